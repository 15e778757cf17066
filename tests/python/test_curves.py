"""From gap histograms to thresholds: arithmetic on small arrays."""

import math

import numpy as np
import pytest

from blasst.calibration.curves import (
    BIN_EDGES,
    GAP_BINS,
    HeadCurves,
    UnfittableError,
    UnreachableError,
    fit_law,
    ln_threshold_at,
    promised_sparsity,
    share_below,
    share_out,
    sparsity_at,
)
from blasst.config import Law


def histogram(gaps: list[float]) -> np.ndarray:
    return np.histogram(gaps, BIN_EDGES)[0].astype(float)


def test_a_histogram_gives_the_sparsity_of_every_threshold():
    counts = histogram([-4.03, -3.03, -2.03, -1.03, 1.0])
    assert share_below(counts)[-1] == 0.8, "threshold 1 skips every gap below 0, no other"
    assert sparsity_at(counts, -2.5) == pytest.approx(0.4)
    for target in (0.4, 0.55):
        assert sparsity_at(counts, ln_threshold_at(counts, target)) == pytest.approx(target)
    assert ln_threshold_at(counts, 0.9) == 0, "unreachable: threshold 1"


def test_promised_sparsity_weighs_heads_by_their_tiles():
    counts = np.stack([histogram([-5.0] * 3 + [1.0]), histogram([-5.0] * 4 + [1.0] * 4)])[None]
    assert counts.shape == (1, 2, GAP_BINS)
    assert promised_sparsity(counts, np.array([[0.0, -20.0]])) == pytest.approx(3 / 12)


def curves() -> HeadCurves:
    # Two heads of equal size: dropping costs the first little, the second ten times as much.
    sparsity = np.array([[0, 0.5, 0.9], [0, 0.5, 0.9]])
    mass = np.array([[0, 0.01, 0.05], [0, 0.1, 0.5]])
    error = np.array([[0, 0.2, 0.6], [0, 0.01, 0.03]])
    return HeadCurves(np.array([0.5, 0.5]), sparsity, mass, error)


def test_equal_sparsity_gives_every_head_the_same():
    assert share_out("equal_sparsity", curves(), 0.4) == pytest.approx([0.4, 0.4])


def test_equal_mass_lets_every_head_drop_the_same_mass():
    first, second = share_out("equal_mass", curves(), 0.5)
    assert first + second == pytest.approx(1.0)
    assert np.interp(first, *curves_of(0)) == pytest.approx(np.interp(second, *curves_of(1)))


def curves_of(head: int) -> tuple[np.ndarray, np.ndarray]:
    return curves().sparsity[head], curves().mass[head]


def test_water_filling_takes_the_cheapest_tiles_first():
    assert share_out("water_filling", curves(), 0.4) == pytest.approx([0.8, 0.0])
    assert share_out("water_filling", curves(), 0.6) == pytest.approx([0.9, 0.3])


def test_least_error_follows_the_error_not_the_mass():
    assert share_out("least_error", curves(), 0.4) == pytest.approx([0.0, 0.8])


def test_water_filling_takes_a_cheap_piece_behind_a_dear_one_with_it():
    dear_first = HeadCurves(
        np.array([0.5, 0.5]),
        np.array([[0, 0.2, 0.8], [0, 0.4, 0.8]]),
        np.array([[0, 0.1, 0.11], [0, 0.2, 0.6]]),
        np.zeros((2, 3)),
    )
    # The first head's 0.8 cost 0.11 in all, less than the second's first 0.4.
    assert share_out("water_filling", dear_first, 0.4) == pytest.approx([0.8, 0.0])


def test_a_target_beyond_threshold_one_is_an_error():
    with pytest.raises(UnreachableError, match=r"90\.0%"):
        share_out("equal_mass", curves(), 0.95)


TARGETS = np.array([0.3, 0.5, 0.7])
LENGTHS = np.array([1024, 2048, 4096])


def points(law: Law) -> np.ndarray:
    return np.array([[law.ln_threshold(t, n) for t in TARGETS] for n in LENGTHS])


@pytest.mark.parametrize("power", [0.8, 1.0, 2.1])
def test_a_law_is_found_again_from_its_points(power):
    law = Law(3.0 * 1000**power / 1e3, 4.0, power)
    found = fit_law(TARGETS, LENGTHS, points(law), fit_power=True)
    assert (found.a, found.b, found.power) == pytest.approx((law.a, law.b, law.power), rel=1e-6)


def test_the_ecosystems_fit_keeps_power_one():
    found = fit_law(TARGETS, LENGTHS, points(Law(2.0, 5.0)), fit_power=False)
    assert (found.a, found.b, found.power) == pytest.approx((2.0, 5.0, 1.0))


def test_the_ecosystems_fit_leans_to_the_longer_lengths():
    law = Law(1000.0, 5.0, 2.0)
    found = fit_law(TARGETS, LENGTHS, points(law), fit_power=False)
    off = [abs(found.ln_threshold(0.5, n) - law.ln_threshold(0.5, n)) for n in LENGTHS]
    assert off[2] < off[0]


def test_saturated_points_do_not_bend_a_fit():
    law = Law(50.0, 4.0)
    saturated = np.array([[math.log(50 / n) + 4 * t for t in TARGETS] for n in (16, 256, 4096)])
    found = fit_law(TARGETS, np.array([16, 256, 4096]), np.minimum(saturated, 0), fit_power=False)
    assert (found.a, found.b) == pytest.approx((law.a, law.b))


def test_too_few_points_for_a_law_is_an_error():
    with pytest.raises(UnfittableError, match="at least two"):
        fit_law(TARGETS, LENGTHS, np.zeros((3, 3)), fit_power=True)
