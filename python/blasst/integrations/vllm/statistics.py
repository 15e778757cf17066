"""Tiles that were visitable and skipped, by layer and phase: in the log and for Prometheus."""

import logging
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blasst.config import PHASES

_log = logging.getLogger("vllm.blasst")  # where vLLM's own lines go


class Statistics:
    """Counts on the device, which a captured graph adds to; read now and then by the host."""

    def __init__(self, layers: Sequence[str], device: torch.device, interval: float) -> None:
        """Args: interval: seconds between two lines in the log."""
        self._rows = {name: row for row, name in enumerate(layers)}
        self._counts = torch.zeros(len(PHASES), len(layers), 2, dtype=torch.int64, device=device)
        self._interval, self._told_at = interval, time.monotonic()
        self._told = self._counts.to("cpu", copy=True)

    def add(self, phase: str, layer: str, tiles: Tensor) -> None:
        """Args: tiles: [2, requests, heads] visitable and skipped, of one call."""
        self._counts[PHASES.index(phase), self._rows[layer]] += tiles.sum((1, 2))

    def tell(self) -> None:
        """If it is time to: what came since, to the log and to Prometheus."""
        now = time.monotonic()
        if now - self._told_at < self._interval:
            return
        self._told_at = now
        counts = self._counts.to("cpu", copy=True)
        since, self._told = counts - self._told, counts
        for phase, by_layer in zip(PHASES, since, strict=True):
            if by_layer.any():
                _log.info("blasst: %s: %s", phase, summary(by_layer, list(self._rows)))
        for phase, by_layer in zip(PHASES, since.tolist(), strict=True):
            for layer, numbers in zip(self._rows, by_layer, strict=True):
                for counter, number in zip(_counters(), numbers, strict=True):
                    counter.labels(phase=phase, layer=layer).inc(number)


def summary(by_layer: Tensor, layers: Sequence[str]) -> str:
    """Sparsity in words.

    Args:
        by_layer: [layers, 2] int64 visitable and skipped tiles, not all 0.
        layers: their names.
    """
    visitable, skipped = by_layer.sum(0).tolist()
    shares = by_layer[:, 1] / by_layer[:, 0].clamp(min=1)
    least, most = int(shares.argmin()), int(shares.argmax())
    return (
        f"{skipped / visitable:.1%} of {visitable} tiles skipped, from {shares[least]:.1%} "
        f"({layers[least]}) to {shares[most]:.1%} ({layers[most]})"
    )


@cache
def _counters() -> tuple[Any, Any]:
    """Prometheus's, one of each a process."""
    from prometheus_client import Counter

    return tuple(
        Counter(f"blasst:tiles_{name}", f"Key tiles that were {name}", ("phase", "layer"))
        for name in ("visitable", "skipped")
    )
