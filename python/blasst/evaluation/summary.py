"""Means over texts with their errors, and medians of repeated times with their spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        )
        for setting, values in by_setting.items()
    ]


@dataclass(frozen=True)
class Timing:
    """Prefill of one length in one setting, in seconds."""

    length: int
    setting: Setting
    sparsity: float
    seconds: tuple[float, ...]
    """Of the whole model, ascending."""
    attention: float | None = None
    """Of its attention calls, one by one on a device that does nothing else."""
    dense: "Timing | None" = None
    """The same length, dense; None: this one is, or it was not timed."""

    @property
    def median(self) -> float:
        """Of the whole model."""
        return statistics.median(self.seconds)

    @property
    def predicted(self) -> float | None:
        """What dense takes, with this attention in the place of its own."""
        if self.dense is None or self.attention is None or self.dense.attention is None:
            return None
        return self.dense.median - self.dense.attention + self.attention


def timings(results: Results) -> list[Timing]:
    """By length, in the order in which the settings were run."""
    found = [
        Timing(
            length,
            Setting(scheme, target),
            value["sparsity"],
            tuple(sorted(value["seconds"])),
            value.get("attention"),
        )
        for (length, scheme, target), value in results.all("time")
    ]
    dense = {timing.length: timing for timing in found if timing.setting.is_dense}
    compared = [
        timing if timing.setting.is_dense else replace(timing, dense=dense.get(timing.length))
        for timing in found
    ]
    return sorted(compared, key=lambda timing: timing.length)


def longest_timings(results: Results) -> dict[Setting, Timing]:
    """Of the longest timed length."""
    found = timings(results)
    return {t.setting: t for t in found if t.length == found[-1].length}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error
