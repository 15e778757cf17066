"""Absolute thresholds: against float64, decision by decision; prompts, fits, files, errors."""

import dataclasses
import math

import pytest
import torch

import blasst
from blasst import Bands, Threshold, attention
from blasst.cli.app import main
from blasst.hf import models
from blasst.methods import bsfa
from blasst.methods.bsfa import AbsoluteThresholds, thresholds_of
from blasst.ops.library import KEYS, QUERY_ROWS
from recency_model import make_loaded

KEEPS = (1, 2, 4)


def inputs(length=64 * 9):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(1, length, heads, 32, generator=generator) for heads in (4, 2, 2))


def scores_of(q, k):
    """[heads, queries, keys] float64, -inf where causality forbids."""
    q, k = (t[0].double().transpose(0, 1) for t in (q, k))
    scores = q @ k.repeat_interleave(2, 0).mT / math.sqrt(32)
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


def tile_maxima(scores):
    tiles = scores.unflatten(-1, (-1, KEYS)).unflatten(1, (-1, KEYS))
    return tiles.amax((2, 4))


def plain_thresholds(maxima, keep):
    """By the definition, tile by tile."""
    result = torch.full(maxima.shape[:2], -math.inf, dtype=torch.float64)
    for head, of_head in enumerate(maxima):
        for place, row in enumerate(of_head):
            others = sorted(row[:place].tolist(), reverse=True)
            if len(others) > keep:
                result[head, place] = (others[keep - 1] + others[keep]) / 2
    return result


def test_every_decision_is_that_of_a_direct_implementation():
    q, k, v = inputs()
    dense = attention(q, k, v, causal=True, return_tile_maxima=True)
    thresholds = thresholds_of(dense.tile_maxima[0], KEEPS)
    scores = scores_of(q, k)
    maxima = tile_maxima(scores)
    diagonal = torch.eye(maxima.shape[-1], dtype=torch.bool)
    for keep, found in zip(KEEPS, thresholds, strict=True):
        wanted = plain_thresholds(maxima, keep)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        kept = (maxima >= wanted[..., None]) | diagonal
        kept &= maxima > -math.inf
        rule = {"absolute_threshold": found.float()[None], "order": "reverse"}
        got = attention(q, k, v, causal=True, return_stats=True, return_tile_maxima=True, **rule)
        assert torch.equal(got.stats.skipped[0], ((maxima > -math.inf) & ~kept).sum((1, 2)))
        assert (kept.sum(-1) == torch.arange(9).clamp(max=keep) + 1).all()
        mask = kept.repeat_interleave(KEYS, 1).repeat_interleave(KEYS, 2)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out = weights @ v[0].double().transpose(0, 1).repeat_interleave(2, 0)
        torch.testing.assert_close(got.out[0].double(), out.transpose(0, 1), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def found(loaded):
    return bsfa.calibrate(loaded.model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=3)


def test_prompts_that_are_read_in_chunks_ask_for_the_same(loaded, found):
    model, tokenizer = loaded.model, loaded.tokenizer
    options = {"length": 512, "keeps": KEEPS, "prompts": 3}
    parts = bsfa.calibrate(model, tokenizer, **options, chunk=128)
    torch.testing.assert_close(parts.table, found.table, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.spread, found.spread, rtol=1e-3, atol=1e-3, equal_nan=True)
    with pytest.raises(ValueError, match="chunk is 100; it must be a multiple of 128"):
        bsfa.calibrate(model, tokenizer, **options, chunk=100)


def of_one_prompt(loaded, seed):
    return bsfa.calibrate(
        loaded.model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=seed + 1
    ).table.double() * (seed + 1)


def test_prompts_are_averaged_and_their_spread_is_reported(loaded, found):
    sums = [of_one_prompt(loaded, seed) for seed in range(3)]
    single = torch.stack([sums[0], sums[1] - sums[0], sums[2] - sums[1]])
    finite = found.table.isfinite()
    torch.testing.assert_close(found.table[finite].double(), single.mean(0)[finite])
    torch.testing.assert_close(
        found.spread[finite].double(), single.std(0)[finite], atol=1e-4, rtol=1e-3
    )
    assert found.spread[~finite].isnan().all()
    for keep, table in zip(KEEPS, found.table, strict=True):
        assert torch.equal(table.isfinite().all((0, 1)), torch.arange(8) > keep)
    assert (
        bsfa.calibrate(loaded.model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=1)
        .spread.isnan()
        .all()
    )


def test_a_model_keeps_about_k_tiles(loaded, found):
    model = loaded.model
    tokens = torch.randint(5, 50, (1, 512), generator=torch.Generator().manual_seed(0))
    for keep in KEEPS:
        found.apply(model, keep)
        with torch.no_grad(), blasst.record() as recording:
            model(tokens)
        assert recording.sparsity("prefill") == pytest.approx(found.sparsity(keep, 512), abs=0.2)
    blasst.configure(model, prefill=Threshold(), decode=Threshold())


def test_calibration_runs_dense_and_leaves_the_model_as_it_was(loaded, found):
    model = loaded.model
    found.apply(model, 1)
    before = [m.blasst_thresholds for m in models.attention_layers(model).values()]
    again = bsfa.calibrate(model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=3)
    assert torch.equal(again.table, found.table)
    assert [m.blasst_thresholds for m in models.attention_layers(model).values()] == before
    blasst.configure(model, prefill=Threshold(), decode=Threshold())


def test_calibration_under_a_policy(loaded, found):
    model = loaded.model
    blasst.set_policy(model, Bands(512))
    banded = bsfa.calibrate(model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=1)
    blasst.set_policy(model, None)
    # A band of half the distances leaves no query tile more than 4 tiles besides the last.
    assert banded.table.isfinite().sum() < found.table.isfinite().sum()


def test_the_fit():
    places = torch.arange(40)
    coefficients = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    table = torch.einsum("klhc,pc->klhp", coefficients.double(), bsfa.basis(places)).float()
    table[..., :5] = -math.inf
    table[1, :, :, :36] = -math.inf  # too few places to fit
    noise = 0.1 * (-1.0) ** places
    table[0, 0, 2] += noise
    thresholds = AbsoluteThresholds({}, (0,), (1, 2), table, torch.full_like(table, 0.5), 2)
    error = thresholds.fit_error()
    assert error[0, 0, :2].max() < 1e-5
    assert error[0, 0, 2] == pytest.approx(0.1, rel=0.05)
    assert error[1].isnan().all()
    fitted = thresholds.fitted()
    torch.testing.assert_close(fitted[0, 0, :2], table[0, 0, :2], atol=1e-4, rtol=1e-4)
    assert torch.equal(fitted[1], table[1])
    assert thresholds.mean_spread() == pytest.approx(0.5)


@pytest.mark.parametrize("tile_shape", [(64, 64), (64, 128)])
@pytest.mark.parametrize("length", [512, 500])
def test_sparsity_counts_the_tiles_of_a_shape(found, tile_shape, length):
    rows, keys = tile_shape
    query, key = torch.arange(length)[:, None] // rows, torch.arange(length) // keys
    causal = torch.ones(length, length).tril().bool()
    tiles = {
        (int(q), int(k))
        for q, k in zip(
            query.expand(length, length)[causal], key.expand(length, length)[causal], strict=True
        )
    }
    last = {q: max(k for r, k in tiles if r == q) for q, _ in tiles}
    dropped = sum(last[q] - k > 2 for q, k in tiles)  # which of them does not matter
    thresholds = dataclasses.replace(found, tile_shape=tile_shape)
    assert thresholds.sparsity(2, length) == pytest.approx(dropped / len(tiles))


def test_a_file_holds_everything(loaded, found, tmp_path):
    path = tmp_path / "bsfa.safetensors"
    found.save(path)
    again = AbsoluteThresholds.load(path)
    assert torch.equal(again.table, found.table)
    assert torch.equal(again.spread.nan_to_num(), found.spread.nan_to_num())
    assert (again.model, again.layers, again.keeps) == (found.model, found.layers, found.keeps)
    assert again.tile_shape == (QUERY_ROWS, KEYS)
    again.apply(loaded.model, 2, fitted=True)
    blasst.reset(loaded.model)


def test_bad_input(loaded, found, tmp_path):
    with pytest.raises(ValueError, match="calibrate absolute thresholds in one process"):
        bsfa._Prompts([0], (1,), 64).add("prefill", 0, None, share="half of the heads")
    with pytest.raises(ValueError, match="keep is 3; it must be one of 1, 2, 4"):
        found.apply(loaded.model, 3)
    other = make_loaded().model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="these thresholds are of a model with"):
        found.apply(other, 2)
    found.apply(make_loaded().model.bfloat16(), 2)  # the same model in another type
    elsewhere = dataclasses.replace(found, tile_shape=(64, 128))
    with pytest.raises(ValueError, match="for tiles of 64 x 128; on cpu this model decides on"):
        elsewhere.apply(loaded.model, 2)
    for keeps in ((), (0,), (7,)):
        with pytest.raises(ValueError, match="each must be 1 to 6"):
            bsfa.calibrate(loaded.model, loaded.tokenizer, length=512, keeps=keeps)
    for options in ({"length": "512"}, {"keeps": ("1",)}, {"prompts": 1.5}):
        with pytest.raises(TypeError, match=r"it must be (a )?whole number"):
            bsfa.calibrate(loaded.model, loaded.tokenizer, **options)
    with pytest.raises(ValueError, match="prompts is 0"):
        bsfa.calibrate(loaded.model, loaded.tokenizer, length=512, keeps=KEEPS, prompts=0)
    model_file = tmp_path / "model"
    loaded.model.save_pretrained(model_file)
    with pytest.raises(ValueError, match="holds no absolute thresholds"):
        AbsoluteThresholds.load(model_file / "model.safetensors")


def test_unequal_prompts_are_averaged_where_they_reach():
    sums = bsfa._Prompts([0], (1,), 64)
    for tiles, value in ((3, 1.0), (5, 3.0)):
        maxima = torch.full((1, 1, tiles, tiles), value).tril()
        maxima = maxima.masked_fill(torch.ones(tiles, tiles).triu(1).bool(), -math.inf)
        out = torch.zeros(1, 64 * tiles, 1, 16)
        sums.begin()
        sums.add("prefill", 0, blasst.Result(out, *[None] * 4, maxima, None), None)
    table, spread = sums.table()
    assert table[0, 0, 0].tolist() == [-math.inf, -math.inf, 2.0, 3.0, 3.0]
    assert spread[0, 0, 0, 2] == pytest.approx(math.sqrt(2))
    assert spread[0, 0, 0, 3:].isnan().all()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, loading: make_loaded())
    path = tmp_path / "thresholds.safetensors"
    arguments = ["--length", "512", "--prompts", "2", "--out", str(path)]
    assert main(["bsfa", "tiny", *arguments, "--keep", "1", "4"]) == 0
    assert AbsoluteThresholds.load(path).keeps == (1, 4)
    assert "between prompts" in capsys.readouterr().out
    assert main(["bsfa", "tiny", *arguments, "--keep", "9"]) == 1
    assert "blasst: tiles to keep are [9]; each must be 1 to 6" in capsys.readouterr().err
