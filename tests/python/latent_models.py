"""Small random models with multi-head latent attention, of every class of Transformers that has it
and chooses no keys of its own."""

import torch
import transformers
from transformers import PreTrainedModel

from tiny_models import VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_LAYERS = {"num_hidden_layers": 2, "intermediate_size": 64}
_EXPERTS = {
    **_LAYERS,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_HYBRID = {
    **_EXPERTS,
    "layer_types": ["full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "dense"],
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
CLASSES = {
    "DeepseekV2": {**_EXPERTS, "first_k_dense_replace": 1},
    "DeepseekV3": {**_EXPERTS, "first_k_dense_replace": 1},
    "AXK1": {**_EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "Glm4MoeLite": {**_EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "Mistral4": {**_EXPERTS, "first_k_dense_replace": 1},
    "MiniCPM3": {**_LAYERS, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    "Youtu": _LAYERS,
    "LongcatFlash": {
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 1,
        "moe_topk": 2,
    },
    "KimiLinear": _HYBRID,
    "BailingHybrid": {**_HYBRID, "head_dim": 16},
}
"""Those that this Transformers lacks are left out by `present`."""


HOPPER = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
}
"""Sizes of heads and latents that all Hopper kernels are for: DeepSeek's, Kimi's and LongCat's."""
ON_GPUS = {
    "DeepseekV2": {**HOPPER, "first_k_dense_replace": 2},
    "DeepseekV3": {**HOPPER, "first_k_dense_replace": 2},
    "AXK1": {**HOPPER, "mlp_layer_types": ["dense", "dense"]},
    "Glm4MoeLite": {
        **HOPPER,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "mlp_layer_types": ["dense", "dense"],
    },
    "Mistral4": {
        **HOPPER,
        "qk_nope_head_dim": 64,
        "kv_lora_rank": 256,
        "first_k_dense_replace": 2,
    },
    "MiniCPM3": {"v_head_dim": 64, "kv_lora_rank": 256},
    "Youtu": HOPPER,
    "LongcatFlash": {**HOPPER, "head_dim": 64, "n_routed_experts": 2, "zero_expert_num": 0},
    "KimiLinear": HOPPER,
    "BailingHybrid": HOPPER,
}
"""The heads of each as its models have them; no experts, of which rounding may choose others."""


def present() -> list[str]:
    """The classes that this Transformers has, and whose layers cache latents."""
    return [name for name in CLASSES if _caches_latents(name)]


def _caches_latents(name: str) -> bool:
    model = getattr(transformers, f"{name}ForCausalLM", None)
    attention = model and vars(__import__(model.__module__, fromlist=["x"]))
    return bool(model) and any(hasattr(thing, "expand_kv") for thing in attention.values())


def make_latent_model(name: str, implementation: str = "blasst", **options) -> PreTrainedModel:
    """The same weights for the same name; `options` change the configuration."""
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **CLASSES[name], **options})
    torch.manual_seed(1)
    kind = getattr(transformers, f"{name}ForCausalLM")
    return kind._from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()


def make_recency_latent_model(name: str, **options) -> PreTrainedModel:
    """One like DeepSeek's whose heads prefer near keys, so that far tiles can be skipped."""
    changes = {"vocab_size": 257, "attention_bias": True, "initializer_range": 0.1, **options}
    model = make_latent_model(name, **changes)
    strength = torch.tensor([2.0, 3.0, 4.0, 5.0])
    with torch.no_grad():
        for layer in model.model.layers:
            # The rotary parts of queries and keys are nearly constant: through the rotation a score
            # falls with the distance.
            attention = layer.self_attn
            attention.q_a_proj.bias.fill_(10.0)
            heads = attention.q_b_proj.weight.unflatten(0, (4, -1))
            heads[:, attention.qk_nope_head_dim :] = strength[:, None, None] / attention.q_lora_rank
            attention.kv_a_proj_with_mqa.bias[attention.kv_lora_rank :] = 2.0
    return model
