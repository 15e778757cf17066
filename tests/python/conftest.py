"""Small random models, one of each attention pattern."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

VOCABULARY = 97
WINDOW = 40
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
# The other implementation: what Transformers itself has for the model. sdpa has no soft cap, sinks.
MODELS = {
    "llama": (LlamaConfig, {}, "sdpa"),
    "qwen3": (Qwen3Config, {}, "sdpa"),
    "mistral_sliding": (MistralConfig, {"sliding_window": WINDOW}, "sdpa"),
    "gemma2_softcap": (Gemma2Config, {**_LAYERS, "attn_logit_softcapping": 3.0}, "eager"),
    "gemma3_sliding_and_global": (Gemma3TextConfig, _LAYERS, "sdpa"),
    "gpt_oss_sinks": (GptOssConfig, {**_LAYERS, "num_local_experts": 4}, "eager"),
}


@pytest.fixture(scope="session")
def make_model():
    """make_model(name, implementation, **options): the same weights for the same name."""

    def make(name, implementation="blasst", dtype=torch.float32, **options):
        config_class, own_options, _ = MODELS[name]
        config = config_class(**{**_SIZES, **own_options, **options})
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=dtype
        )
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        return model.eval()

    return make
