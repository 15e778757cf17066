"""Scores in int8: an implementation by tensors, thresholds, front doors, models, commands."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import blasst
from blasst import NotSupportedError, Threshold, attention, flash_attn_func
from blasst.calibration import calibrate
from blasst.cli.app import main
from blasst.evaluation import Options, evaluate, report
from blasst.evaluation.settings import Scheme
from blasst.evaluation.summary import rows
from blasst.prompts import reference_text
from recency_model import make_loaded, make_recency_model, make_tokenizer
from test_attention import dense, distances, inputs
from tiny_models import VOCABULARY, make_model

KEYS = 64
"""Of a tile of the CPU's."""


def rotated(x: Tensor) -> Tensor:
    """By Hadamard matrices of the largest power of two that divides the dimension."""
    block = x.shape[-1] & -x.shape[-1]
    for bit in (2**i for i in range(block.bit_length() - 1)):
        a, b = x.unflatten(-1, (-1, 2, bit)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
    return x


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would round twice
    return (x * inverse).round().double() * largest.double() / 127


def with_int8_scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 queries and keys whose products are the scores: rounded, and the mean beside them."""
    block = q.shape[-1] & -q.shape[-1]
    q, k = q.float(), k.float()
    mean = k.double().mean(1, keepdim=True).float()
    turned_q, turned_k = rotated(q), rotated(k - mean)
    tiles = [
        tile.abs().amax((1, 3), keepdim=True).expand_as(tile) for tile in turned_k.split(KEYS, 1)
    ]
    rounded_k = rounded(turned_k, torch.cat(tiles, 1))
    rounded_q = rounded(turned_q, turned_q.abs().amax(-1, keepdim=True))
    group = q.shape[2] // k.shape[2]
    shift = (q.double() * mean.double().repeat_interleave(group, 2)).sum(-1, keepdim=True)
    ones = torch.ones(*rounded_k.shape[:3], 1, dtype=torch.float64)
    return torch.cat([rounded_q / block, shift], -1), torch.cat([rounded_k, ones], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_is_attention_over_rounded_queries_and_keys(dtype, dim):
    q, k, v = inputs(queries=150, keys=400, dim=dim, dtype=dtype)
    visible = distances(150, 400) >= 0
    for softcap, sinks in ((None, None), (4.0, torch.tensor([0.5, -1.0, 2.0, -math.inf]))):
        result = attention(
            *(q, k, v), causal=True, softcap=softcap, sinks=sinks, scores="int8", return_lse=True
        )
        int8_q, int8_k = with_int8_scores(q, k)
        wanted = dense(int8_q, int8_k, v, visible, dim**-0.5, softcap, sinks)
        exact = dense(q, k, v, visible, dim**-0.5, softcap, sinks)
        close = 5e-6 if dtype == torch.float32 else 2e-2
        assert (result.out - wanted).abs().max() < close
        if dtype == torch.float32:
            assert 10 * close < (result.out - exact).abs().max() < 0.3
        scores = (
            int8_q.transpose(1, 2) @ int8_k.transpose(1, 2).repeat_interleave(2, 1).mT
        ) * dim**-0.5
        if softcap is None:
            lse = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
            assert (result.lse - lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_takes_keys_in_int8_as_they_are(dtype, dim):
    """Neither mean nor rotation, of keys of any mean and of a query with one large channel."""
    q, _, v = inputs(queries=150, keys=400, dim=dim, dtype=dtype)
    q[..., 3] *= 10
    k = torch.randint(-128, 128, (2, 400, 2, dim), generator=torch.Generator().manual_seed(2)) // 2
    k[..., 5], k[0, 7, 1, 9] = k[..., 5].abs(), -128
    k_scale = torch.tensor([[0.02, 0.005], [0.01, 0.03]])
    options = {"causal": True, "scores": "int8", "k_scale": k_scale, "return_lse": True}
    rounded_q = rounded(q.float(), q.float().abs().amax(-1, keepdim=True))
    numbers = k.double() * k_scale.double()[:, None, :, None]
    visible = distances(150, 400) >= 0
    for softcap, sinks in ((None, None), (4.0, torch.tensor([0.5, -1.0, 2.0, -math.inf]))):
        result = attention(q, k.char(), v, softcap=softcap, sinks=sinks, **options)
        wanted = dense(rounded_q, numbers, v, visible, dim**-0.5, softcap, sinks)
        close = 5e-6 if dtype == torch.float32 else 2e-2
        assert (result.out - wanted).abs().max() < close
        if softcap is None:
            products = (
                rounded_q.transpose(1, 2) @ numbers.transpose(1, 2).repeat_interleave(2, 1).mT
            )
            lse = (products * dim**-0.5).masked_fill(~visible, -math.inf).logsumexp(-1)
            assert (result.lse - lse).abs().max() < 1e-5 * (1 + lse.abs().max())


def test_thresholds_mean_what_they_mean_with_exact_scores():
    q, k, v = inputs(queries=600, keys=600, dim=64)
    k = k + torch.randn(64, generator=torch.Generator().manual_seed(1))  # a mean that matters
    reports = {"causal": True, "return_stats": True, "return_tile_maxima": True}
    for test in (
        {"threshold": 0.3},
        {"threshold_scale_factor": 200.0},
        {"absolute_threshold": 4.0},
    ):
        exact = attention(q, k, v, **test, **reports)
        int8 = attention(q, k, v, **test, **reports, scores="int8")
        assert 0.1 < exact.stats.sparsity < 0.9
        assert int8.stats.sparsity == pytest.approx(exact.stats.sparsity, abs=0.01)
        assert torch.equal(int8.tile_maxima.isinf(), exact.tile_maxima.isinf())
        seen = exact.tile_maxima.isfinite()
        assert (int8.tile_maxima - exact.tile_maxima)[seen].abs().max() < 0.2


def test_chunks_pages_and_ragged_requests():
    q, k, v = inputs(queries=130, keys=130)
    whole = attention(q, k, v, causal=True, scores="int8")
    last = attention(q[:, 100:], k, v, causal=True, scores="int8")
    torch.testing.assert_close(last, whole[:, 100:], atol=2e-6, rtol=0)
    ends = torch.tensor([0, 130, 260])
    ragged = attention(
        *(t.flatten(0, 1) for t in (q, k, v)),
        causal=True,
        scores="int8",
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
    )
    assert torch.equal(ragged, whole.flatten(0, 1))
    pages = [t.unflatten(1, (13, 10)).flatten(0, 1) for t in (k, v)]
    table = torch.arange(26).reshape(2, 13)
    paged = attention(
        *(q, *pages), causal=True, scores="int8", page_table=table, lengths=torch.tensor([130, 130])
    )
    assert torch.equal(paged, whole)


def test_the_fronts_pass_it_on():
    q, k, v = inputs(queries=130, keys=130)
    wanted = attention(q, k, v, causal=True, threshold=0.2, scores="int8")
    options = {"skip_softmax_threshold": 0.2, "scores": "int8"}
    assert torch.equal(flash_attn_func(q, k, v, causal=True, **options), wanted)
    assert torch.equal(blasst.flash_attn_with_kvcache(q, k, v, causal=True, **options), wanted)
    ends = torch.tensor([0, 130, 260], dtype=torch.int32)
    ragged = blasst.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), ends, ends, 130, 130, causal=True, **options
    )
    assert torch.equal(ragged, wanted.flatten(0, 1))
    torchs = blasst.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True, **options
    )
    assert torch.equal(torchs.transpose(1, 2), wanted)


def test_what_it_does_not_do():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"scores is 'int4'; it must be one of exact, int8"):
        attention(q, k, v, scores="int4")
    with pytest.raises(NotSupportedError, match=r"int8 .*decode has exact scores"):
        attention(q[:, :1], k, v, scores="int8")
    out = attention(q.requires_grad_(), k, v, scores="int8")
    with pytest.raises(NotSupportedError, match=r"scores='int8' has no backward pass"):
        out.sum().backward()


def test_nan_and_infinity():
    q, k, v = inputs(queries=130, keys=130)
    clean = attention(q, k, v, causal=True, scores="int8")
    q[0, 7, 1, 3] = math.inf
    out = attention(q, k, v, causal=True, scores="int8")
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)
    k[1, 100, 1, 0] = math.nan
    out = attention(q, k, v, causal=True, scores="int8")
    reached = out[1].isnan().all(-1)
    assert torch.equal(
        reached, (torch.arange(130) >= 100)[:, None] & torch.tensor([0, 0, 1, 1]).bool()
    )


@pytest.mark.usefixtures("one_thread")
def test_a_model_runs_so_compiled_or_not():
    model = make_model("llama")
    tokens = torch.arange(300)[None] % (VOCABULARY - 1) + 1
    with torch.no_grad():
        exact = model(tokens).logits
        blasst.configure(model, prefill=Threshold(0.05, scores="int8"))
        int8 = model(tokens).logits
        compiled = torch.compile(model, backend="aot_eager")(tokens).logits
        with blasst.configure(model, prefill=Threshold(0.05)):
            sparse = model(tokens).logits
        generated = model.generate(tokens, max_new_tokens=3, do_sample=False)  # decode is exact
    assert torch.equal(compiled, int8)
    assert not torch.equal(int8, sparse)
    assert (int8 - sparse).abs().max() < 0.1 * (exact - exact.mean()).abs().max()
    assert generated.shape == (1, 303)


@pytest.mark.usefixtures("one_thread")
def test_a_calibration_keeps_it_and_an_evaluation_compares_it(tmp_path):
    loaded = make_loaded()
    found = calibrate(
        loaded.model,
        loaded.tokenizer,
        lengths=(512,),
        target_sparsity={"prefill": 0.1},
        prompts=1,
        held_out=[],
        orders=("reverse",),
        schemes=("one_threshold",),
        scores="int8",
    )
    assert found.config.measured["prefill"].scores == "int8"
    assert loaded.model.config.sparse_attention_config["blasst"]["prefill"]["scores"] == "int8"
    options = Options(
        targets=(0, 0.1),
        length=512,
        texts={"text": reference_text()[:4000]},
        needles=1,
        scores=("exact", "int8"),
    )
    results = evaluate(loaded, options, out=tmp_path)
    by_name = {row.setting.name: row for row in rows(results)}
    assert list(by_name) == ["dense", "int8 scores", "calibrated, 10%", "int8 scores, 10%"]
    assert by_name["dense"].kl[0] == pytest.approx(0, abs=1e-9)
    assert 1e-9 < by_name["int8 scores"].kl[0] < 0.01
    assert by_name["int8 scores"].sparsity[0] == 0
    exact, int8 = (by_name[f"{name}, 10%"].sparsity[0] for name in ("calibrated", Scheme.INT8))
    assert exact > 0.02
    assert int8 == pytest.approx(exact, abs=0.02)
    assert "int8 scores, 10%" in str(report.tables(results, None))
    as_calibrated = replace(options, scores=None, needles=0)
    results = evaluate(loaded, as_calibrated, out=tmp_path / "again")
    again = {row.setting.name: row for row in rows(results)}
    assert list(again) == ["dense", "int8 scores", "int8 scores, 10%"]
    assert again["int8 scores, 10%"].sparsity == by_name["int8 scores, 10%"].sparsity
    for wrong in ((), ("int4",)):
        with pytest.raises(ValueError, match=r"exact, int8"):
            Options(targets=(0,), length=512, scores=wrong)
    with pytest.raises(ValueError, match=r"scores is 'int4'"):
        calibrate(make_recency_model(), make_tokenizer(), scores="int4")


def test_the_commands_take_it(capsys):
    for command in ("calibrate", "evaluate"):
        assert main([command, "smollm2", "--scores", "int4"]) != 0
        assert "'int4' is not one of exact, int8" in capsys.readouterr().err
