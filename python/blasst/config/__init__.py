"""`sparse_attention_config`: the entry of a model's config.json that holds its thresholds."""

from typing import get_args

from blasst.config.laws import LOWEST_LN_THRESHOLD, Law, Measured, Schedule, ThresholdTable
from blasst.config.messages import NEAR
from blasst.config.reading import Read, parse, parsed, thresholds_for
from blasst.config.schema import (
    ALGORITHM,
    ECOSYSTEM_TARGET,
    FORMULA,
    HIGHEST_LN_THRESHOLD,
    LENGTH_FORMULA,
    VERSION,
    HeadScheme,
    Order,
    Scores,
)
from blasst.config.sparse_attention import (
    ECOSYSTEM_TILE_SHAPE,
    GENERIC_TARGETS,
    PHASES,
    Rule,
    Rules,
    SparseAttention,
    check_target,
    is_listed,
)

ORDERS: tuple[str, ...] = get_args(Order)
SCORES: tuple[str, ...] = get_args(Scores)
HEAD_SCHEMES: tuple[str, ...] = get_args(HeadScheme)

__all__ = [
    "ALGORITHM",
    "ECOSYSTEM_TARGET",
    "ECOSYSTEM_TILE_SHAPE",
    "FORMULA",
    "GENERIC_TARGETS",
    "HEAD_SCHEMES",
    "HIGHEST_LN_THRESHOLD",
    "LENGTH_FORMULA",
    "LOWEST_LN_THRESHOLD",
    "NEAR",
    "ORDERS",
    "PHASES",
    "SCORES",
    "VERSION",
    "Law",
    "Measured",
    "Read",
    "Rule",
    "Rules",
    "Schedule",
    "SparseAttention",
    "ThresholdTable",
    "check_target",
    "is_listed",
    "parse",
    "parsed",
    "thresholds_for",
]
