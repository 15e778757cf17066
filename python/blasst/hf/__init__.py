"""Transformers models: `attn_implementation="blasst"`, its thresholds, policies and recordings."""

from blasst.hf import register  # noqa: F401, makes the name known
from blasst.hf.eight_bit import eight_bit_cache
from blasst.hf.forward import attention_forward
from blasst.hf.latents import absorb, latent_cache
from blasst.hf.layers import NAME, PHASES
from blasst.hf.masks import key_ranges
from blasst.hf.recording import Recording, record, recording_with
from blasst.hf.settings import configure, reset, set_target
from blasst.hf.tensor_parallel import is_sharded
from blasst.hf.thresholds import DENSE, Threshold, dense_on_purpose
from blasst.hf.visits import set_policy, visit_of

__all__ = [
    "DENSE",
    "NAME",
    "PHASES",
    "Recording",
    "Threshold",
    "absorb",
    "attention_forward",
    "configure",
    "dense_on_purpose",
    "eight_bit_cache",
    "is_sharded",
    "key_ranges",
    "latent_cache",
    "record",
    "recording_with",
    "reset",
    "set_policy",
    "set_target",
    "visit_of",
]
