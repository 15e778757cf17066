"""Small random models, one of each attention pattern."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from blasst.hf.thresholds import Pass, options_of

VOCABULARY = 97
QUIET = 50
"""Tokens from this one on are those that `with_quiet_tokens` makes negligible as keys."""
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
    "tie_word_embeddings": False,
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
# Name: configuration, what it has of its own, the implementation of Transformers to compare with:
# sdpa has neither soft cap nor sinks.
MODELS = {
    "llama": (LlamaConfig, {}, "sdpa"),
    "qwen3": (Qwen3Config, {}, "sdpa"),
    "mistral_sliding": (MistralConfig, {"sliding_window": WINDOW}, "sdpa"),
    "gemma2_softcap": (Gemma2Config, {**_LAYERS, "attn_logit_softcapping": 3.0}, "eager"),
    "gemma3_sliding_and_global": (Gemma3TextConfig, _LAYERS, "sdpa"),
    "gpt_oss_sinks": (GptOssConfig, {**_LAYERS, "num_local_experts": 4}, "eager"),
}


def make_model(name: str, implementation: str = "blasst", **options) -> PreTrainedModel:
    """The same weights for the same name; `options` change the configuration."""
    config_class, own_options, _ = MODELS[name]
    config = config_class(**{**_SIZES, **own_options, **options})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    )
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def asked(module: torch.nn.Module, phase: str, keys: int = 4096) -> dict:
    """Threshold and order of a layer for one request of so many keys."""
    query, lengths = torch.zeros(1, 1, 4, 16), torch.tensor([keys])
    return options_of(
        module, Pass(phase, query, query.shape[-1], 4, keys, lambda: lengths, lengths.tolist, {})
    )


def with_quiet_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """The model (Llama), changed so that keys of tokens from QUIET on score near 0, others not."""
    heard = 16  # the part of the hidden state that keys are made from; layers leave it as it is
    with torch.no_grad():
        model.model.embed_tokens.weight[QUIET:, :heard] *= 0.01
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[:, heard:] = 0
            layer.self_attn.k_proj.weight *= 4
            layer.self_attn.o_proj.weight[:heard] = 0
            layer.mlp.down_proj.weight[:heard] = 0
    return model
