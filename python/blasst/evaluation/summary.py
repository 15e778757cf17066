"""Means over texts, with their errors."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blasst.evaluation.settings import Setting
from blasst.measure.results import Results


@dataclass(frozen=True)
class Row:
    """One setting's means over the texts, with the standard error of each mean."""

    setting: Setting
    texts: int
    sparsity: tuple[float, float]
    perplexity_change: tuple[float, float]
    """Perplexity over dense perplexity - 1."""
    top1: tuple[float, float]
    kl: tuple[float, float]
    prefill_seconds: float


def rows(results: Results) -> list[Row]:
    """The table of perplexity and agreement, in the order in which the settings were run."""
    by_setting: dict[Setting, list[dict[str, Any]]] = {}
    for (_, scheme, target), value in results.all("text"):
        by_setting.setdefault(Setting(scheme, target), []).append(value)
    return [
        Row(
            setting,
            len(values),
            mean_and_error([v["sparsity"] for v in values]),
            mean_and_error([v["perplexity"] / v["dense_perplexity"] - 1 for v in values]),
            mean_and_error([v["top1"] for v in values]),
            mean_and_error([v["kl"] for v in values]),
            statistics.fmean(v["prefill_seconds"] for v in values),
        )
        for setting, values in by_setting.items()
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error
