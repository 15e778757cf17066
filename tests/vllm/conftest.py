"""Small random models, saved once."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from engines import WORDS

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": WORDS,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FOR_GPU = {"hidden_size": 512, "head_dim": 128, "initializer_range": 0.05}
LAW = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "ignore": ["model.layers.0.self_attn"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 1.0, "b": 10.0},
                "decode": {"a": 1.0, "b": 9.0},
            },
            "target_sparsity": {"prefill": 0.5, "decode": 0.5},
        }
    }
}
"""Of the ecosystem: thresholds that fall with the length; layer 0 stays dense."""


def _save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return str(folder)


def _llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | changes, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return _save(_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory) -> str:
    """The same model with a calibration."""
    model = _llama()
    model.config.sparse_attention_config = LAW
    return _save(model, tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="session")
def llama_for_gpu(tmp_path_factory) -> str:
    return _save(_llama(**FOR_GPU).bfloat16(), tmp_path_factory.mktemp("llama_for_gpu"))


@pytest.fixture(scope="session")
def heads_of_96_for_gpu(tmp_path_factory) -> str:
    sizes = FOR_GPU | {"hidden_size": 384, "head_dim": 96}
    return _save(_llama(**sizes).bfloat16(), tmp_path_factory.mktemp("heads_of_96_for_gpu"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> str:
    return _save(_gemma(), tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def gemma_for_gpu(tmp_path_factory) -> str:
    return _save(_gemma(**FOR_GPU).bfloat16(), tmp_path_factory.mktemp("gemma_for_gpu"))


def _gemma(**changes):
    """Every other layer with a window, all with a soft cap."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES | changes,
        sliding_window=100,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=None,
        query_pre_attn_scalar=32,
        pad_token_id=0,
    )
    model = Gemma2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "post_" in name:
            weight.data.fill_(5.0)
    return model
