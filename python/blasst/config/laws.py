"""Thresholds as functions of target sparsity and length: the fitted law, the measured tables."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOWEST_LN_THRESHOLD = -32.0
"""Where the gap histograms end; a head at this threshold drops nothing that matters."""


class Schedule(NamedTuple):
    """Thresholds at every length, for one target."""

    order: str
    lengths: tuple[float, ...]
    """Ascending; beyond them thresholds fall with `power` of the length."""
    ln_lengths: Tensor
    """[lengths] float64."""
    ln_threshold: Tensor
    """[lengths, layers, heads] or [lengths, 1, 1] float32; NaN: a head that a layer lacks."""
    power: float
    below: int = 0
    shorter: "Schedule | None" = None
    """Stands in for this one in a call with fewer keys than `below`."""

    def of_call(self, keys: int) -> "Schedule":
        """The one for a call with room for so many keys a request: a call has one order."""
        return self.shorter if keys < self.below else self

    def of_layer(self, layer: int) -> "Schedule":
        """That of one layer, [lengths, 1, heads]."""
        table = self.ln_threshold
        return self._replace(
            ln_threshold=_of_layer(table, layer, heads_of(table))[:, None],
            shorter=self.shorter and self.shorter.of_layer(layer),
        )

    def to(self, device: torch.device) -> "Schedule":
        """The same on this device, where `at` then works."""
        return self._replace(
            ln_lengths=self.ln_lengths.to(device),
            ln_threshold=self.ln_threshold.to(device),
            shorter=self.shorter and self.shorter.to(device),
        )

    def at(self, lengths: Tensor | int) -> Tensor:
        """Thresholds, 0 to 1, [requests, layers, heads] float32.

        Args:
            lengths: [requests] keys; a number that the host knows: of one request, of which most is
                worked out there. On a GPU each step of the rest costs a short pass its launch.
        """
        if isinstance(lengths, int):
            return self._at_number(lengths)
        ln_length, points = lengths.double().log(), self.ln_lengths
        nearest = ln_length.clamp(math.log(self.lengths[0]), math.log(self.lengths[-1]))
        if len(self.lengths) == 1:
            ln = self.ln_threshold
        else:
            right = torch.searchsorted(points, nearest).clamp(min=1)
            left = right - 1
            share = (nearest - points[left]) / (points[right] - points[left])
            ln = self.ln_threshold[left].lerp(
                self.ln_threshold[right], share.float()[:, None, None]
            )
        beyond = self.power * (ln_length - nearest)
        ln = ln - beyond.float()[:, None, None]
        return ln.clamp(LOWEST_LN_THRESHOLD, 0).exp()

    def _at_number(self, keys: int) -> Tensor:
        ln_length = math.log(keys) if keys else -math.inf
        points = [math.log(length) for length in self.lengths]
        nearest = min(max(ln_length, points[0]), points[-1])
        ln = self.ln_threshold[0]
        if len(points) > 1:
            right = max(1, bisect_left(points, nearest))
            left = right - 1
            share = (nearest - points[left]) / (points[right] - points[left])
            ln = self.ln_threshold[left].lerp(self.ln_threshold[right], share)
        if nearest != ln_length:
            ln = ln - self.power * (ln_length - nearest)
        return ln.clamp(LOWEST_LN_THRESHOLD, 0).exp()[None]


@dataclass(frozen=True)
class Law:
    """threshold = min(1, a * exp(b * target) / length ** power), for all heads."""

    a: float
    b: float
    power: float = 1.0

    def ln_threshold(self, target: float, length: float) -> float:
        """Natural log of the threshold, at most 0."""
        return min(0.0, self._at_one(target) - self.power * math.log(length))

    def schedule(self, target: float) -> Schedule:
        """The thresholds for this target sparsity, tiles visited forward."""
        ln = on_host([[[self._at_one(target)]]], torch.float32)
        return Schedule("forward", (1.0,), on_host([0.0], torch.float64), ln, self.power)

    def _at_one(self, target: float) -> float:
        """Of the ln threshold, for a length of 1: may be above threshold 1."""
        return math.log(self.a) + self.b * target if self.a else LOWEST_LN_THRESHOLD


@dataclass(frozen=True)
class ThresholdTable:
    """Measured thresholds for a range of targets: one order, one way to share among heads."""

    order: str
    heads: str
    law: Law
    lengths: tuple[int, ...]
    """Ascending, in keys."""
    targets: tuple[float, ...]
    """Ascending, 0 to 1."""
    ln_threshold: Tensor = field(compare=False)
    """[lengths, targets, layers, heads] float32, or [lengths, targets, 1, 1]: one for all. NaN
    stands for the heads that a layer has fewer than others."""
    below: tuple[int, ...] = ()
    """By target: with fewer keys its order does not reach it, and `shorter` stands in."""
    shorter: "ThresholdTable | None" = None
    """Of another order, for the same targets."""

    def schedule(self, target: float) -> Schedule:
        """The thresholds for this target sparsity."""
        by_length = _interpolate(self.ln_threshold.movedim(1, 0), self.targets, target)
        ln_lengths = on_host(self.lengths, torch.float64).log()
        # Thresholds fall more slowly where lengths are long: the fitted power alone skips too
        # little there, the ecosystem's 1 too much.
        power = (1 + self.law.power) / 2
        found = Schedule(self.order, self.lengths, ln_lengths, by_length, power)
        if self.shorter is None:
            return found
        # Between two targets: what the higher one needs.
        nearest = min(bisect_left(self.targets, target), len(self.targets) - 1)
        return found._replace(below=self.below[nearest], shorter=self.shorter.schedule(target))

    def at(self, target: float, length: int) -> Tensor:
        """[layers, heads] or [1, 1]: thresholds, 0 to 1, for this target sparsity and key count."""
        return self.schedule(target).of_call(length).at(on_host([length], torch.float64))[0]


def on_host(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, whatever torch's default type and device are."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _interpolate(table: Tensor, points: Sequence[float], x: float) -> Tensor:
    """Linear between the rows of `table`, which stand at `points`; constant outside."""
    x = min(max(x, points[0]), points[-1])
    right = next(i for i, point in enumerate(points) if point >= x)
    if points[right] == x:
        return table[right]
    share = (x - points[right - 1]) / (points[right] - points[right - 1])
    return table[right - 1] * (1 - share) + table[right] * share


@dataclass(frozen=True)
class Measured:
    """What a calibration of ours found for one phase."""

    tile_shape: tuple[int, int]
    """Query rows and keys of the tiles that it was measured on."""
    tables: tuple[ThresholdTable, ...]
    """By ascending target; each covers the targets from its first to its last. None: the law."""
    scores: str = "exact"
    """How the phase computes scores, at every target, on any tiles."""
    law: Law | None = None
    """The ecosystem's law (forward, one threshold) as fitted on these tiles; None: it was not."""
    others: tuple["Measured", ...] = ()
    """The same phase on other tiles."""

    def under_the_law(self, general: Law | None) -> "Measured | None":
        """Without tables: on each tile shape its own law, else `general`; None: there is none."""
        laws = [
            replace(m, tables=(), others=())
            for m in (self, *self.others)
            if m.law is not None or general is not None
        ]
        return replace(laws[0], others=tuple(laws[1:])) if laws else None

    def beside(self, older: "Measured") -> "Measured":
        """With what was measured before on other tiles, of the same layers and heads."""
        tables = [table for m in (self, older) for table in m.tables]
        shapes = {tuple(table.ln_threshold.shape[2:]) for table in tables}
        if self.scores != older.scores or len(shapes - {(1, 1)}) > 1:
            return self
        known = {m.tile_shape: replace(m, others=()) for m in (older, *older.others)}
        known.pop(self.tile_shape, None)
        return replace(self, others=tuple(known.values()))

    def on(self, tile: tuple[int, int] | None, *, keys_only: bool) -> "Measured":
        """What was measured on tiles of this shape, else on those nearest in size; None: this.

        Args:
            tile: query rows and keys.
            keys_only: the rows do not tell shapes apart: in decode they are a KV head's.
        """
        if tile is None or not self.others:
            return self

        def distance(one: Measured) -> tuple[float, float]:
            rows, keys = (math.log(a / b) for a, b in zip(one.tile_shape, tile, strict=True))
            return abs(keys) if keys_only else abs(rows + keys), abs(keys)

        return min((self, *self.others), key=distance)

    def table(self, target: float) -> ThresholdTable:
        """The one that covers this target, else the nearest."""
        return min(
            self.tables, key=lambda p: max(p.targets[0] - target, target - p.targets[-1], 0.0)
        )


def heads_of(ln_threshold: Tensor) -> list[int] | None:
    """How many heads each layer of a table [n, layers, heads] has; None: as many as it is wide."""
    missing = ln_threshold[0].isnan()
    return (~missing).sum(-1).tolist() if missing.any() else None


def _of_layer(table: Tensor, layer: int, heads: list[int] | None) -> Tensor:
    """[n, heads of the layer] of a table [n, layers, heads], or of one for all, [n, 1, 1]."""
    row = row_of(layer, table.shape[1])
    return table[:, row] if heads is None else table[:, row, : heads[row]]


def row_of(layer: int, layers: int) -> int:
    """Where a layer's thresholds stand among those of so many layers, or of one for all."""
    if layers > 1 and layer >= layers:
        raise ValueError(
            f"sparse_attention_config holds thresholds for {layers} layers; the model asks for "
            f"layer {layer}"
        )
    return layer if layers > 1 else 0
