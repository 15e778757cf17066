"""From measurements to tables of thresholds by length, target, layer and head."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from blasst.calibration.curves import UnfittableError, fit_law, ln_threshold_at, share_out
from blasst.calibration.measurement import LAW, Measurements
from blasst.config import HIGHEST_LN_THRESHOLD, LOWEST_LN_THRESHOLD, Law, ThresholdTable

TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""The grid that a table is made for, as far as its order reaches."""
FEW = (0.3, 0.6, 0.9)
"""Of what an order reaches, where that is less than two targets."""


class Tables:
    """Makes tables of any order, scheme and targets from the same measurements."""

    def __init__(
        self, measurements: Measurements, layers: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self._measured, self._layers, self._lengths = measurements, layers, lengths

    def grid(self, phase: str, order: str, asked: Sequence[float]) -> list[float]:
        """Targets of the grid and those asked for, up to what this order reaches at the longest.

        The last is that, in whole percents.
        """
        highest = self._measured.highest(phase, order, self._lengths[-1])
        grid = (*TARGETS, *asked, math.floor(100 * highest) / 100)
        return sorted({t for t in grid if t <= highest})

    def table(
        self,
        phase: str,
        order: str,
        scheme: str,
        targets: Sequence[float],
        longest: int | None = None,
    ) -> ThresholdTable:
        """The measured table of one order and scheme, at the lengths up to `longest`."""
        lengths = [n for n in self._lengths if longest is None or n <= longest]
        # The power of the length is the one threshold's: a head's own is too noisy to extrapolate.
        law = self.law(phase, order, fit_power=True)
        make = self._for_all if scheme == "one_threshold" else self._by_head
        ln = np.array([[make(phase, order, scheme, n, t) for t in targets] for n in lengths])
        self._continue_beyond_one(phase, order, targets, law.power, ln)
        values = torch.tensor(ln, dtype=torch.float32)
        values = values.clamp(LOWEST_LN_THRESHOLD, HIGHEST_LN_THRESHOLD)
        return ThresholdTable(order, scheme, law, tuple(lengths), tuple(targets), values)

    def _for_all(
        self, phase: str, order: str, scheme: str, length: int, target: float
    ) -> np.ndarray:
        """[1, 1] ln threshold, the same for all heads."""
        nominal = self._measured.nominal(phase, order, length, target)
        return np.array([[ln_threshold_at(self._measured.pooled(phase, order, length), nominal)]])

    def _by_head(
        self, phase: str, order: str, scheme: str, length: int, target: float
    ) -> np.ndarray:
        """[layers, heads] ln thresholds; layers that stay dense: the lowest; NaN: no such head."""
        measurement = self._measured.at(phase, order, length)
        there = measurement.has_head()
        ln = np.where(there, LOWEST_LN_THRESHOLD, np.nan)
        curves = measurement.curves(self._layers)
        target = self._measured.nominal(phase, order, length, target)
        places = [(n, head) for n in self._layers for head in np.flatnonzero(there[n])]
        if target > curves.highest:
            ln[tuple(zip(*places, strict=True))] = 0.0
            return ln
        for place, share in zip(places, share_out(scheme, curves, target), strict=True):
            ln[place] = ln_threshold_at(measurement.gaps[place], share)
        return ln

    def _continue_beyond_one(
        self, phase: str, order: str, targets: Sequence[float], power: float, ln: np.ndarray
    ) -> None:
        """Where threshold 1 stays below a target, write what the law says, above 1.

        It is used as 1 there, but between this length and the next the interpolation is right.
        """
        for i in reversed(range(len(ln) - 1)):
            length, longer = self._lengths[i : i + 2]
            for j, target in enumerate(targets):
                if self._measured.highest(phase, order, length) < target:
                    step = power * math.log(longer / length)
                    ln[i, j] = np.maximum(ln[i + 1, j] + step, 0)

    def law(self, phase: str, order: str, *, fit_power: bool) -> Law:
        """A law for one threshold; without its power fitted, 1 as in the ecosystem's.

        order: or `LAW`, of the ecosystem's own tiles.

        Raises:
            UnfittableError: the order skips too little.
        """
        reach = self._measured.highest(phase, order, self._lengths[-1])
        grid = [t for t in TARGETS if t < reach]
        # An order that reaches little still has a law, of what it does reach.
        targets = np.array(TARGETS if len(grid) > 1 else [s * reach for s in FEW])
        ln = np.zeros((len(self._lengths), len(targets)))
        for row, length in enumerate(self._lengths):
            pooled = self._measured.pooled(phase, order, length)
            highest = self._measured.highest(phase, order, length)
            for column, target in enumerate(targets):
                # 0 marks what threshold 1 does not reach; the fit leaves it out.
                ln[row, column] = ln_threshold_at(pooled, target) if target < highest else 0.0
        return fit_law(targets, np.array(self._lengths), ln, fit_power=fit_power)

    def ecosystem_law(self, phase: str, order: str = LAW) -> Law | None:
        """For one threshold, power 1; None where the order skips too little to fit one.

        Args:
            phase: a calibrated one.
            order: "forward" fits it on the tiles that were measured instead of 128 x 128.
        """
        if not self._measured.has(phase, order, self._lengths[-1]):
            return None
        try:
            return self.law(phase, order, fit_power=False)
        except UnfittableError:
            return None
