"""How a call differs from what was measured, in words; "": not at all."""

import math
from collections.abc import Sequence

from blasst.config.laws import ThresholdTable

NEAR = 1.1
"""Requests up to so many times the longest calibrated length pass without a word."""


def other_tiles(phase: str, measured: tuple[int, int], runs: tuple[int, int]) -> str:
    """Of tiles, query rows and keys, that thresholds are for and that the kernel has."""
    # Rows of decode are a KV head's, of every model its own.
    differ = measured[1] != runs[1] if phase == "decode" else measured != runs
    if not differ:
        return ""
    if phase == "decode":
        more, (theirs, ours) = measured[1] > runs[1], (f"{t[1]} keys" for t in (measured, runs))
    else:
        more = math.prod(runs) < math.prod(measured)
        theirs, ours = (f"{rows} x {keys}" for rows, keys in (measured, runs))
    return (
        f"thresholds are for tiles of {theirs}, the kernel's are {ours}; expect "
        f"{'more' if more else 'less'} sparsity than the target"
    )


def longer(longest: int, length: int) -> str:
    """Of a request and the longest calibrated length."""
    if length <= NEAR * longest:
        return ""
    return (
        f"{length} keys are {length / longest:.2f}x the longest calibrated length, {longest}; "
        "thresholds are extrapolated"
    )


def other_target(tables: Sequence[ThresholdTable], target: float) -> str:
    """Of a target and those that the tables cover."""
    low, high = tables[0].targets[0], tables[-1].targets[-1]
    if low <= target <= high:
        return ""
    return (
        f"target sparsity {target} is outside the calibrated {low} to {high}; the nearest is used"
    )
