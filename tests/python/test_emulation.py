"""Decisions on other tiles than the kernel's: the kernel's where shapes are equal, else as said."""

import math
from pathlib import Path

import pytest
import torch

import blasst
from blasst import NotSupportedError
from blasst.calibration import emulation
from blasst.calibration.emulation import SEED_TILES, Emulation
from blasst.ops.library import plan

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 32}
OWN = {
    phase: plan(phase, torch.device("cpu"), torch.float32, **SIZES).shape
    for phase in ("prefill", "decode")
}
HEADER = Path(__file__).parents[2] / "include/blasst/blasst.h"
ORDERS = ("forward", "reverse", "sink_first")


def inputs(rows: int, keys: int, heads: int = 4, kv_heads: int = 2, size: int = 32):
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, rows, heads, size, generator=generator)
    k = torch.randn(2, keys, kv_heads, size, generator=generator)
    loud = torch.arange(keys) // 64 % 2 == 0  # every other tile scores high
    k *= torch.where(loud, 1.0, 0.05)[:, None, None]
    return q, k, torch.randn(2, keys, kv_heads, size, generator=generator)


CASES = {
    "prefill": (200, 200, "prefill", {}),
    "a later chunk": (128, 333, "prefill", {}),
    "soft cap and sinks": (130, 130, "prefill", {"softcap": 4.0, "sinks": torch.randn(4)}),
    "decode": (1, 333, "decode", {"scale": 0.3}),
    "decode in splits": (1, 9000, "decode", {"scale": 0.1}),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_on_the_kernels_own_tiles_it_does_what_the_kernel_does(case, order):
    rows, keys, phase, more = CASES[case]
    q, k, v = inputs(rows, keys)
    options = {"causal": True, "phase": phase, "order": order, **more}
    asked = options | {"return_lse": True, "return_gaps": True}
    dense = blasst.attention(q, k, v, **asked)
    found = Emulation(OWN).attention(q, k, v, **asked)
    assert torch.equal(found.gaps, dense.gaps)
    assert torch.equal(found.out, dense.out)
    threshold = torch.tensor([0.6, 0.7, 0.5, 0.0])
    asked = options | {"return_lse": True, "return_stats": True, "threshold": threshold}
    asked["return_tile_mask"] = True
    sparse = blasst.attention(q, k, v, **asked)
    found = Emulation(OWN).attention(q, k, v, **asked)
    assert sparse.stats.skipped.sum() > 0
    assert torch.equal(found.tile_mask, sparse.tile_mask)
    assert torch.equal(found.stats.visitable, sparse.stats.visitable)
    assert torch.equal(found.stats.skipped, sparse.stats.skipped)
    torch.testing.assert_close(found.lse, sparse.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.out, sparse.out, rtol=1e-4, atol=1e-5)


def gaps_one_by_one(q, k, tile: tuple[int, int], order: str) -> torch.Tensor:
    """[heads, query tiles, key tiles], NaN where there is none."""
    _, rows, heads, size = q.shape
    offset, group = k.shape[1] - rows, heads // k.shape[2]
    tiles = [-(-n // t) for n, t in zip((rows, k.shape[1]), tile, strict=True)]
    found = torch.full((heads, *tiles), math.nan)
    for head in range(heads):
        scores = q[0, :, head] @ k[0, :, head // group].T / size**0.5
        hidden = torch.arange(k.shape[1]) > offset + torch.arange(rows)[:, None]
        scores.masked_fill_(hidden, -math.inf)
        for i in range(tiles[0]):
            mine = scores[i * tile[0] : (i + 1) * tile[0]]
            n = -(-min(k.shape[1], offset + (i + 1) * tile[0]) // tile[1])
            visit = {
                "forward": range(n),
                "reverse": range(n - 1, -1, -1),
                "sink_first": [0, *range(n - 1, 0, -1)],
            }[order]
            running = torch.full((len(mine),), -math.inf)
            for j in visit:
                best = mine[:, j * tile[1] : (j + 1) * tile[1]].amax(1)
                seen = best > -math.inf
                found[head, i, j] = (best - running)[seen].max()
                running = torch.maximum(running, best)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [(64, 128), (128, 128), (32, 48)])
def test_on_other_tiles_gaps_are_those_of_these_tiles(tile, order):
    q, k, _ = (t[:1] for t in inputs(200, 260))
    options = {"causal": True, "phase": "prefill", "order": order}
    counts = emulation.gaps(q, k, tile, options)
    wanted = gaps_one_by_one(q, k, tile, order).flatten(1)
    for head, row in enumerate(wanted):
        known = row[~row.isnan()].clamp(-33, 1)
        bins = ((known + 32) * 16).floor().clamp(-1, 512).long() + 1
        assert torch.equal(counts[head], torch.bincount(bins, minlength=514))


def kept_one_by_one(q, k, order: str, threshold: torch.Tensor, split: int) -> torch.Tensor:
    """[kv_heads, key tiles of 64] bool, of one request's decode in splits of so many tiles."""
    heads, kv_heads = q.shape[2], k.shape[2]
    tiles = -(-k.shape[1] // 64)
    visit = {
        "forward": [*range(tiles)],
        "reverse": [*range(tiles - 1, -1, -1)],
        "sink_first": [0, *range(tiles - 1, 0, -1)],
    }[order]
    kept = torch.zeros(kv_heads, tiles, dtype=torch.bool)
    for head in range(heads):
        scores = q[0, 0, head] @ k[0, :, head * kv_heads // heads].T / q.shape[-1] ** 0.5
        best = [scores[64 * j : 64 * (j + 1)].max() for j in visit]
        for i, j in enumerate(visit):
            begin = i // split * split
            if begin > 0 and tiles - begin <= min(split / 2, SEED_TILES):  # joins the one before
                begin -= split
            before = best[begin:i] + best[: min(SEED_TILES, begin)]
            skips = bool(before) and best[i] - max(before) < threshold[head].log()
            kept[head * kv_heads // heads, j] |= not skips
    return kept


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "split"), [((8, 132), 8), ((8, 5), 15), ((2, 0), 2)])
def test_splits_start_from_the_maxima_of_the_visits_first_tiles(shape, split, order):
    keys = 75 * 64 - 7
    q, k, v = (t[:1] for t in inputs(1, keys))
    # The best keys lie in the middle: a split that starts behind them does not know of them.
    k *= torch.linspace(0, math.pi, keys).sin()[:, None, None]
    threshold = torch.tensor([0.6, 0.4, 0.7, 0.5])
    options = {"causal": True, "phase": "decode", "order": order, "threshold": threshold}
    found = Emulation({"decode": (2, 64, *shape)}).attention(q, k, v, **options, return_tile_mask=1)
    wanted = kept_one_by_one(q, k, order, threshold, split)
    assert torch.equal(found.tile_mask[0], wanted)
    unsplit = kept_one_by_one(q, k, order, threshold, 75)
    assert not torch.equal(wanted, unsplit), "splits must matter"


def test_a_phase_without_a_shape_is_the_kernels():
    q, k, v = inputs(1, 333)
    options = {"causal": True, "phase": "decode", "order": "reverse", "threshold": 0.6}
    found = Emulation({"prefill": (64, 128)})
    out = found.attention(q, k, v, **options)
    assert torch.equal(out, blasst.attention(q, k, v, **options))
    assert found.tile_of("decode", q.device, q.dtype, 32) == (1, 64)


def test_seeds_are_as_many_as_the_headers():
    assert f"#define BLASST_SEED_TILES {SEED_TILES}\n" in HEADER.read_text()


def test_on_coarser_tiles_the_values_of_kept_tiles_alone_come_through():
    q, k, v = inputs(256, 256)
    shapes = {"prefill": (128, 128), "decode": (1, 128)}
    options = {"causal": True, "phase": "prefill", "order": "reverse"}
    sparse = Emulation(shapes).attention(
        q, k, v, **options, threshold=0.9, return_stats=True, return_lse=True
    )
    # The second query tile may drop its first key tile.
    for request in range(2):
        for head in range(4):
            scores = q[request, 128:, head] @ k[request, :, head // 2].T / 32**0.5
            hidden = torch.arange(256) > torch.arange(128, 256)[:, None]
            scores.masked_fill_(hidden, -math.inf)
            drops = (scores[:, :128].amax(1) - scores[:, 128:].amax(1) < math.log(0.9)).all()
            assert sparse.stats.skipped[request, head] == drops
            scores = scores[:, 128:] if drops else scores
            values = v[request, -scores.shape[1] :, head // 2]
            torch.testing.assert_close(
                sparse.out[request, 128:, head], scores.softmax(1) @ values, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bands": [[0, 9]] * 4}, "bands with tiles of another shape than the kernel's"),
        ({"causal": False}, "need a causal mask"),
        ({"scores": "int8"}, "scores='int8' with tiles of another shape"),
        ({"starts": torch.zeros(2)}, "starts with tiles of another shape"),
        ({"return_error_bound": True}, "return_error_bound with tiles of another shape"),
    ],
)
def test_what_it_does_not_do_is_an_error(option, message):
    asked = {"causal": True, "phase": "prefill", "order": "forward", "threshold": 0.5} | option
    with pytest.raises(NotSupportedError, match=message):
        Emulation(OWN).attention(*inputs(64, 64), **asked)
