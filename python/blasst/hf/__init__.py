"""Transformers models: `attn_implementation="blasst"`, its thresholds, policies and recordings."""

from blasst.hf.forward import (
    NAME,
    PHASES,
    Recording,
    Threshold,
    attention_forward,
    configure,
    is_sharded,
    key_ranges,
    record,
    recording_with,
    set_policy,
    visit_of,
)

__all__ = [
    "NAME",
    "PHASES",
    "Recording",
    "Threshold",
    "attention_forward",
    "configure",
    "is_sharded",
    "key_ranges",
    "record",
    "recording_with",
    "set_policy",
    "visit_of",
]
