"""From what a dense pass measured to thresholds: gap histograms, curves per head, fits.

Everything here is arithmetic on small arrays; `calibration` runs the model.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from blasst.config import LOWEST_LN_THRESHOLD, Law

GAP_BINS = 514
GAP_RANGE = -LOWEST_LN_THRESHOLD
BIN_WIDTH = GAP_RANGE / (GAP_BINS - 2)
BIN_EDGES = np.concatenate([[-np.inf], np.linspace(-GAP_RANGE, 0, GAP_BINS - 1), [np.inf]])
"""Natural log; bin i of a gap histogram is from edge i to edge i + 1."""


class UnreachableError(ValueError):
    """A target sparsity that no threshold up to 1 reaches."""


class UnfittableError(ValueError):
    """Too few points for a law."""


def share_below(histogram: np.ndarray) -> np.ndarray:
    """[..., 514] counts -> [..., 513]: the share of tiles skipped at each ln threshold of edges.

    Entry i belongs to ln threshold BIN_EDGES[i + 1]; the last is threshold 1.
    """
    total = np.maximum(histogram.sum(-1, keepdims=True), 1)
    return np.cumsum(histogram, -1)[..., :-1] / total


def ln_threshold_at(histogram: np.ndarray, sparsity: float) -> float:
    """[514] counts -> the ln threshold, at most 0, that skips this share of the tiles."""
    return float(np.interp(sparsity, share_below(histogram), BIN_EDGES[1:-1]))


def sparsity_at(histogram: np.ndarray, ln_threshold: float) -> float:
    """[514] counts -> the share of the tiles that a threshold skips."""
    return float(np.interp(ln_threshold, BIN_EDGES[1:-1], share_below(histogram)))


def promised_sparsity(histograms: np.ndarray, ln_threshold: np.ndarray) -> float:
    """[layers, heads, 514] counts, [layers, heads] ln thresholds -> the share skipped in all.

    A head that a layer has not counts nothing, and its threshold is NaN.
    """
    counts = histograms.reshape(-1, GAP_BINS)
    skipped = sum(
        h.sum() * sparsity_at(h, ln)
        for h, ln in zip(counts, ln_threshold.reshape(-1), strict=True)
        if not math.isnan(ln)
    )
    return float(skipped / max(counts.sum(), 1))


@dataclass(frozen=True)
class HeadCurves:
    """What dropping more and more tiles costs each head, all heads of a model in one row."""

    weight: np.ndarray
    """[heads] each head's share of all visitable tiles; sums to 1."""
    sparsity: np.ndarray
    """[heads, points] ascending from 0 to the most that threshold 1 skips."""
    mass: np.ndarray
    """[heads, points] dropped softmax mass, mean over rows."""
    error: np.ndarray
    """[heads, points] what the dropped tiles change in the layer's output: see `calibration`."""

    @property
    def highest(self) -> float:
        """The sparsity of threshold 1 everywhere."""
        return float(self.weight @ self.sparsity[:, -1])


def share_out(scheme: str, curves: HeadCurves, target: float) -> np.ndarray:
    """[heads] sparsity of each head, so that all together reach `target`.

    Args:
        scheme: "equal_sparsity", "equal_mass" (every head drops the same mass), "water_filling"
            (the next tile is dropped where it costs the least mass), "least_error" (where it
            changes the output least).
        curves: of the heads.
        target: 0 to 1.

    Raises:
        UnreachableError: the heads cannot reach it.
    """
    if target > curves.highest:
        raise UnreachableError(f"{curves.highest:.1%}")
    if scheme == "equal_sparsity":
        return _solve(lambda s: np.minimum(s, curves.sparsity[:, -1]), curves.weight, target, 1.0)
    if scheme == "equal_mass":
        mass = np.maximum.accumulate(curves.mass, -1)
        return _solve(
            lambda m: np.array(
                [np.interp(m, x, y) for x, y in zip(mass, curves.sparsity, strict=True)]
            ),
            curves.weight,
            target,
            float(mass.max()),
        )
    cost = {"water_filling": curves.mass, "least_error": curves.error}[scheme]
    return _water_filling(curves, np.maximum.accumulate(cost, -1), target)


def _solve(shares, weight: np.ndarray, target: float, high: float) -> np.ndarray:
    """shares(x), x from 0 to `high`, where their weighted mean is `target`; it grows with x."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weight @ shares(middle) < target else (low, middle)
    return shares(high)


def _water_filling(curves: HeadCurves, cost: np.ndarray, target: float) -> np.ndarray:
    """Take pieces of the heads' curves, cheapest slope first, until the target is reached."""
    pieces = []
    for head, (x, y) in enumerate(zip(curves.sparsity, cost, strict=True)):
        hull = [0]
        for point in range(1, len(x)):
            # The lower convex hull: a cheap piece behind a dear one is taken together with it.
            while len(hull) > 1 and _slope(x, y, hull[-2], hull[-1]) >= _slope(
                x, y, hull[-1], point
            ):
                hull.pop()
            hull.append(point)
        pieces += [
            (_slope(x, y, left, right), head, x[right] - x[left]) for left, right in pairwise(hull)
        ]
    # A slope is error per share of the head's own tiles; a head with more tiles gains more.
    pieces = [(slope / curves.weight[head], head, width) for slope, head, width in pieces]
    taken = np.zeros(len(curves.weight))
    missing = target
    for _, head, width in sorted(pieces):
        gain = min(width, missing / curves.weight[head])
        taken[head] += gain
        missing -= gain * curves.weight[head]
        if missing <= 1e-12:
            break
    return taken


def _slope(x: np.ndarray, y: np.ndarray, left: int, right: int) -> float:
    return (y[right] - y[left]) / max(x[right] - x[left], 1e-9)


def fit_law(
    targets: np.ndarray, lengths: np.ndarray, ln_threshold: np.ndarray, *, fit_power: bool
) -> Law:
    """Least squares for ln threshold = ln a + b * target - power * ln length.

    Args:
        targets: [T].
        lengths: [N].
        ln_threshold: [N, T]; saturated ones (0: threshold 1) are left out.
        fit_power: else it is 1, the ecosystem's law.

    The longer lengths weigh more: what a fit is for lies beyond them.
    """
    length, target = np.meshgrid(lengths.astype(float), targets, indexing="ij")
    usable = (ln_threshold < 0) & (ln_threshold > LOWEST_LN_THRESHOLD)
    columns = [np.ones_like(target), target]
    right = ln_threshold.copy()
    if fit_power and len(set(length[usable])) > 1:
        columns.append(-np.log(length))
    else:
        right += np.log(length)
    weight = (length / length.max())[usable]
    matrix = np.stack([column[usable] for column in columns], -1)
    if len(set(target[usable])) < 2:
        raise UnfittableError(
            "a fit needs at least two target sparsities below the highest reachable"
        )
    solution, *_ = np.linalg.lstsq(matrix * weight[:, None], right[usable] * weight, rcond=None)
    ln_a, b, *power = solution.tolist()
    return Law(math.exp(ln_a), b, power[0] if power else 1.0)
