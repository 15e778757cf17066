"""The chosen candidates, and what stands in for them where the keys are few."""

from collections.abc import Sequence
from dataclasses import replace

from blasst.calibration import search
from blasst.calibration.measurement import Measurements
from blasst.calibration.result import Candidate
from blasst.calibration.setup import Setup
from blasst.calibration.tables import Tables
from blasst.config import ThresholdTable


class Winners:
    """The chosen candidate of each phase and target."""

    def __init__(
        self,
        setup: Setup,
        measurements: Measurements,
        tables: Tables,
        candidates: Sequence[Candidate],
    ) -> None:
        self._setup, self._measured, self._tables = setup, measurements, tables
        self._candidates = candidates
        self.chosen = [c for c in candidates if c.chosen]

    def marked(self) -> list[Candidate]:
        """All candidates, the stand-ins with the length below which they serve."""
        below = {self._stand_in(w): self._below(w, w.target) for w in self.chosen}
        return [replace(c, below=below.get(c, 0)) for c in self._candidates]

    def saturated(self) -> list[tuple[str, int, float, float]]:
        """Phase, length, target and highest sparsity, where threshold 1 stays below the target."""
        return [
            (w.phase, length, w.target, highest)
            for w in self.chosen
            for length in self._setup.lengths
            if (highest := self._highest(w.phase, self._used(w, length).order, length)) < w.target
        ]

    def measured_at(self, winner: Candidate, length: int) -> list[Candidate]:
        """The winner or its stand-in; where one gives way to the other, both."""
        first = self._below(winner, winner.target)
        other = self._stand_in(winner)
        found = [winner] if length >= first else []
        return found + ([other] if other is not None and length <= first else [])

    def tables(self, phase: str) -> list[ThresholdTable]:
        """Each target of the grid goes with the winner at the nearest target asked for."""
        winners = [w for w in self.chosen if w.phase == phase]
        asked = self._setup.targets[phase]
        groups: list[tuple[Candidate, list[float]]] = []
        grid = {t for w in winners for t in self._tables.grid(phase, w.order, asked)}
        for target in sorted(grid):
            winner = min(winners, key=lambda w: (abs(w.target - target), w.target))
            if target > self._highest(phase, winner.order, self._setup.longest):
                continue
            last, targets = groups[-1] if groups else (None, [])
            if last and (last.order, last.heads) == (winner.order, winner.heads):
                # The higher winner's stand-in: the higher a target, the more it needs one.
                groups[-1] = winner, [*targets, target]
            else:
                groups.append((winner, [target]))
        return [self._with_stand_in(winner, targets) for winner, targets in groups]

    def _with_stand_in(self, winner: Candidate, targets: Sequence[float]) -> ThresholdTable:
        """The winner's table, and its stand-in's for lengths at which it does not reach a target.

        Thresholds of two orders cannot be interpolated with each other, so the stand-in serves
        all lengths below the first from which the winner reaches the target.
        """
        phase = winner.phase
        table = self._tables.table(phase, winner.order, winner.heads, targets)
        below = tuple(self._below(winner, target) for target in targets)
        other = self._stand_in(winner)
        if other is None or not any(below):
            return table
        shorter = self._tables.table(phase, other.order, other.heads, targets, max(below))
        return replace(table, below=below, shorter=shorter)

    def _stand_in(self, winner: Candidate) -> Candidate | None:
        """The best of the order that reaches furthest at short lengths; None: the winner's."""

        def reach(order: str) -> tuple[float, bool]:
            short = self._setup.lengths[:-1]
            far = sum(self._highest(winner.phase, order, n) for n in short)
            return far, order == winner.order

        furthest = max(self._setup.orders, key=reach)
        same = [
            c
            for c in self._candidates
            if (c.phase, c.target, c.order) == (winner.phase, winner.target, furthest)
        ]
        return None if furthest == winner.order else min(same, key=search.cost, default=None)

    def _below(self, winner: Candidate, target: float) -> int:
        """The first length from which on the winner's order reaches a target; 0: it always does."""
        lengths = self._setup.lengths
        short = [n for n in lengths if self._highest(winner.phase, winner.order, n) < target]
        return next(n for n in lengths if n > short[-1]) if short else 0

    def _used(self, winner: Candidate, length: int) -> Candidate:
        """The winner, or its stand-in if it is too short for the winner."""
        is_short = length < self._below(winner, winner.target)
        return (is_short and self._stand_in(winner)) or winner

    def _highest(self, phase: str, order: str, length: int) -> float:
        return self._measured.highest(phase, order, length)
