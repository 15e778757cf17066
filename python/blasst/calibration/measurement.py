"""What dense passes measured: sums by phase, visit order, length, layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blasst.calibration.curves import GAP_BINS, HeadCurves, share_below

SWEEP = (0.3, 0.55, 0.75, 0.9, 1.0)
"""Shares of each head's highest sparsity at which its costs are measured in prefill."""
DECODE_SWEEP = (-7.0, -5.0, -3.5, -2.0, -1.0, 0.0)
"""ln thresholds of the same in decode, where one step has too few tiles for shares."""
LAW = "law"
"""In place of an order: the ecosystem's, forward, on its own tiles."""

_ARRAYS = ("gaps", "swept", "visitable", "mass", "error", "heads", "groups")
"""Of a measurement."""


@dataclass
class Measurement:
    """Sums over the prompts of one length, by layer and head; one phase, one order.

    0 for the heads that a layer has fewer than others.
    """

    gaps: np.ndarray
    """[layers, heads, 514] visited tiles by gap."""
    swept: np.ndarray
    """[points, layers, heads] tiles skipped at each point of the sweep."""
    visitable: np.ndarray
    """[layers, heads] visitable tiles, in the passes that swept."""
    mass: np.ndarray
    """[points, layers, heads] dropped softmax mass, summed over rows."""
    error: np.ndarray
    """[points, layers, heads] squared change of the layer's output over the squared residual."""
    heads: np.ndarray
    """[layers] of each; of those that are not measured, the most that any has."""
    groups: np.ndarray
    """[layers] neighbouring heads that decide together: in decode, those of a KV head."""
    rows: int = 0
    """Query rows in the passes that swept."""

    @classmethod
    def empty(cls, layers: int, heads: int, points: int) -> "Measurement":
        """Nothing measured yet, of layers with at most so many heads."""
        swept = np.zeros((points, layers, heads))
        return cls(
            np.zeros((layers, heads, GAP_BINS)),
            swept,
            np.zeros((layers, heads)),
            swept.copy(),
            swept.copy(),
            np.full(layers, heads),
            np.ones(layers, dtype=np.int64),
        )

    def has_head(self) -> np.ndarray:
        """[layers, heads] bool."""
        return np.arange(self.gaps.shape[1]) < self.heads[:, None]

    def curves(self, layers: Sequence[int]) -> HeadCurves:
        """The heads of these layers, in one row."""
        there = self.has_head()[layers]

        def rows(values: np.ndarray) -> np.ndarray:
            mean = values[:, layers]
            for of_layer, layer in zip(mean.swapaxes(0, 1), layers, strict=True):
                heads, group = self.heads[layer], self.groups[layer]
                together = of_layer[:, :heads].reshape(len(values), -1, group)
                of_layer[:, :heads] = together.mean(-1).repeat(group, -1)
            picked = mean[:, there].T
            return np.concatenate([np.zeros((len(picked), 1)), picked], -1)

        visitable = self.visitable[layers][there]
        sparsity = rows(self.swept) / np.maximum(visitable, 1)[:, None]
        return HeadCurves(
            visitable / visitable.sum(),
            np.maximum.accumulate(sparsity, -1),
            rows(self.mass) / max(self.rows, 1),
            rows(self.error),
        )


class Measurements:
    """Everything that was measured, and what sparse passes say of it."""

    def __init__(self, all_layers: int, most_heads: int, layers: Sequence[int]) -> None:
        """Nothing yet.

        Args:
            all_layers: of the model.
            most_heads: of the layer that has the most.
            layers: those that are calibrated.
        """
        self._size, self._layers = (all_layers, most_heads), layers
        self._found: dict[tuple[str, str, int], Measurement] = {}
        self._first: dict[tuple[str, int], np.ndarray] = {}
        self._drift: dict[tuple[str, int], dict[float, float]] = {}
        self.tile_shapes: dict[str, tuple[int, int]] = {}
        """By phase: query rows and keys of the tiles that were counted."""

    def at(self, phase: str, order: str, length: int) -> Measurement:
        """What was measured of one phase, order and length."""
        return self._found[phase, order, length]

    def place_for(
        self, phase: str, order: str, length: int, layer: int, heads: int, kv_heads: int
    ) -> Measurement:
        """The same, to add what a layer of so many heads does; made when it is first asked for."""
        points = SWEEP if phase == "prefill" else DECODE_SWEEP
        key = phase, order, length
        if key not in self._found:
            self._found[key] = Measurement.empty(*self._size, len(points))
        found = self._found[key]
        found.heads[layer] = heads
        found.groups[layer] = heads // kv_heads if phase == "decode" else 1
        return found

    def has(self, phase: str, order: str, length: int) -> bool:
        """Whether anything was."""
        return (phase, order, length) in self._found

    def pooled(self, phase: str, order: str, length: int) -> np.ndarray:
        """[514] visited tiles by gap, of all calibrated heads."""
        return self._found[phase, order, length].gaps[self._layers].sum((0, 1))

    def highest(self, phase: str, order: str, length: int) -> float:
        """The sparsity that threshold 1 reaches."""
        return float(share_below(self.pooled(phase, order, length))[-1])

    def keep_first(self, order: str, length: int) -> None:
        """What prefill of the first prompt measured is what is there now."""
        self._first[order, length] = self._found["prefill", order, length].gaps.copy()

    def first(self, order: str, length: int) -> np.ndarray:
        """[layers, heads, 514] gaps of prefill of the first prompt alone."""
        return self._first[order, length]

    def kept(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything, as arrays by name and what JSON can hold: `restore` takes it."""
        arrays = {f"first/{order}/{n}": gaps for (order, n), gaps in self._first.items()}
        sums = []
        for i, (place, found) in enumerate(self._found.items()):
            arrays |= {f"{i}/{name}": getattr(found, name) for name in _ARRAYS}
            sums.append([*place, found.rows])
        drift = [[*place, list(points.items())] for place, points in self._drift.items()]
        return arrays, {"sums": sums, "drift": drift, "tile_shapes": self.tile_shapes}

    def restore(self, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """What `kept` gave."""
        for i, (phase, order, length, rows) in enumerate(about["sums"]):
            sums = {name: arrays[f"{i}/{name}"] for name in _ARRAYS}
            self._found[phase, order, length] = Measurement(**sums, rows=rows)
        for name, gaps in arrays.items():
            if name.startswith("first/"):
                _, order, length = name.split("/")
                self._first[order, int(length)] = gaps
        for order, length, points in about["drift"]:
            self._drift[order, length] = dict(map(tuple, points))
        self.tile_shapes = {p: tuple(shape) for p, shape in about["tile_shapes"].items()}

    def note_drift(self, order: str, length: int, target: float, drift: float) -> None:
        """A sparse prefill at this target reached so much more than the dense gaps promise."""
        self._drift.setdefault((order, length), {})[target] = drift

    def nominal(self, phase: str, order: str, length: int, target: float) -> float:
        """The target to read from dense gaps so that a sparse pass reaches `target`."""
        drift = self._drift.get((order, length)) if phase == "prefill" else None
        if not drift:
            return target
        points = sorted({0.0: 0.0, **drift}.items())
        return max(0.0, target - float(np.interp(target, *zip(*points, strict=True))))
