"""blasst.attention: the numbers of the C interface, layouts, tracing, errors."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import blasst
import c_api
from blasst import attention
from blasst.ops import arguments, library
from blasst.ops.library import call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERYTHING = {
    "return_lse": True,
    "return_stats": True,
    "return_error_bound": True,
    "return_gaps": True,
}


def inputs(batch=2, queries=150, keys=150, heads=4, kv_heads=2, dim=32, value_dim=None, dtype=None):
    """q, k, v in which some stretches of keys matter more than others, so that tiles can go."""
    generator = torch.Generator().manual_seed(batch + queries + 3 * keys + heads)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k = normal(batch, queries, heads, dim), normal(batch, keys, kv_heads, dim)
    size = torch.tensor([3.0, 0.1, 0.2, 4.0, 0.1, 1.0])[torch.arange(keys) // 64 % 6]
    k = k * size[:, None, None]
    v = normal(batch, keys, kv_heads, value_dim or dim)
    return tuple(t.to(dtype or torch.float32) for t in (q, k, v))


def dense(q, k, v, visible, scale=None, softcap=None, sinks=None):
    """[batch, queries, heads, value_dim] in double precision; `visible` [queries, keys]."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def distances(queries, keys):
    """[queries, keys] how far a key lies before its query."""
    return torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)


def assert_same(a: blasst.Result, b: blasst.Result, where: str = "") -> None:
    """Bit for bit."""
    for name in ("out", "lse", "dropped_mass_bound", "gaps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{name} {where}"
    assert all(map(torch.equal, a.stats, b.stats)), f"stats {where}"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "threshold": [0.3, 0.02, 0.5, 0.0]},
        {"causal": True, "threshold_scale_factor": 150.0, "order": "forward", "softcap": 4.0},
        {"window": (70, 3), "threshold": 0.1, "order": "reverse", "scale": 0.4},
        {"absolute_threshold": torch.tensor([[0.7], [2.0]]), "causal": True, "sinks": True},
    ],
    ids=lambda o: "+".join(o) or "dense",
)
def test_numbers_of_the_c_interface(phase, dtype, options):
    q, k, v = inputs(queries=150 if phase == "prefill" else 3, keys=400, value_dim=48, dtype=dtype)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.tensor([0.5, -1.0, 2.0, -math.inf])
    got = attention(q, k, v, phase=phase, **options, **EVERYTHING)

    batch, rows, heads = q.shape[:3]
    expected = {
        "out": torch.zeros(batch, rows, heads, v.shape[-1], dtype=dtype),
        "lse": torch.zeros(heads, batch, rows),
        "dropped_mass_bound": torch.zeros(heads, batch, rows),
        "tiles_visitable": torch.zeros(batch, heads, dtype=torch.int64),
        "tiles_skipped": torch.zeros(batch, heads, dtype=torch.int64),
        "gap_histogram": torch.zeros(heads, 514, dtype=torch.int64),
    }

    def view(t):
        return c_api.View(t.data_ptr(), DTYPES.index(dtype), t.numel(), *t.stride()[:3])

    params = c_api.new_params()
    p, test = params.problem, params.decision.test
    p.batch, p.query_length, p.heads, p.head_dim = q.shape
    p.kv_heads, p.value_dim = v.shape[2:]
    p.q, p.kv.k, p.kv.v, p.out = view(q), view(k), view(v), view(expected["out"])
    p.kv.key_length = k.shape[1]
    p.scale, p.softcap = options.get("scale", 0), options.get("softcap", 0)
    p.mask.causal = options.get("causal", False)
    p.mask.window_left, p.mask.window_right = options.get("window", (-1, -1))
    order = options.get("order", "sink_first")
    params.decision.order = ["forward", "reverse", "sink_first"].index(order)
    if "sinks" in options:
        p.sinks = options["sinks"].data_ptr()
    for kind, name in enumerate(["threshold", "threshold_scale_factor", "absolute_threshold"], 1):
        if name in options:
            values = torch.as_tensor(options[name]).expand(batch, heads).contiguous()
            test.kind, test.values = kind, values.data_ptr()
            test.stride_request, test.stride_head = values.stride()
    for name, t in expected.items():
        if name != "out":
            setattr(params.report, name, t.data_ptr())
    c_api.run(phase, params)

    assert torch.equal(got.out, expected["out"])
    assert torch.equal(got.lse, expected["lse"].transpose(0, 1))
    assert torch.equal(got.dropped_mass_bound, expected["dropped_mass_bound"].transpose(0, 1))
    assert torch.equal(got.stats.visitable, expected["tiles_visitable"])
    assert torch.equal(got.stats.skipped, expected["tiles_skipped"])
    assert torch.equal(got.gaps, expected["gap_histogram"])
    if len(options) > 0:
        assert 0 < got.stats.sparsity < 1, "the problem must put the test to use"


@pytest.mark.parametrize("queries", [1, 3, 150])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": (20, None)},
        {"window": (30, 5)},
        {"causal": True, "softcap": 2.0, "scale": 0.7},
        {"causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 9.0])},
    ],
    ids="+".join,
)
def test_without_threshold_it_is_attention(queries, options):
    q, k, v = inputs(queries=queries, keys=200)
    d = distances(queries, 200)
    visible = torch.ones_like(d, dtype=torch.bool)
    if options.get("causal"):
        visible &= d >= 0
    left, right = options.get("window", (None, None))
    visible &= (d <= (left if left is not None else 999)) & (
        -d <= (999 if right is None else right)
    )
    rest = {name: options[name] for name in ("scale", "softcap", "sinks") if name in options}
    torch.testing.assert_close(
        attention(q, k, v, **options).double(), dense(q, k, v, visible, **rest), rtol=0, atol=3e-6
    )


def test_threshold_zero_is_dense_bit_for_bit():
    q, k, v = inputs()
    for phase, rows in (("prefill", 150), ("decode", 16)):
        plain = attention(q[:, :rows], k, v, causal=True, phase=phase)
        for name in ("threshold", "threshold_scale_factor"):
            zero = attention(q[:, :rows], k, v, causal=True, phase=phase, **{name: 0.0})
            assert torch.equal(plain, zero)


def test_phase_follows_the_query_length():
    q, k, v = inputs(queries=1)
    decode = attention(q, k, v, threshold=0.3, phase="decode")
    assert torch.equal(attention(q, k, v, threshold=0.3), decode)
    assert not torch.equal(attention(q, k, v, threshold=0.3, phase="prefill"), decode)


def test_scale_factor_is_divided_by_the_keys_of_each_request():
    q, k, v = inputs(batch=3)
    lengths = torch.tensor([150, 90, 40])
    factor = attention(
        q[:, :40], k, v, causal=True, lengths=lengths, threshold_scale_factor=9.0, **EVERYTHING
    )
    threshold = (9.0 / lengths)[:, None]
    relative = attention(
        q[:, :40], k, v, causal=True, lengths=lengths, threshold=threshold, **EVERYTHING
    )
    assert_same(factor, relative)
    assert factor.stats.skipped.sum() > 0


def test_thresholds_per_request_and_head():
    q, k, v = inputs()
    thresholds = torch.tensor([[0.0, 0.1, 0.5, 0.9], [0.9, 0.5, 0.0, 0.1]])
    together = attention(q, k, v, causal=True, threshold=thresholds, **EVERYTHING)
    for b in range(2):
        one = attention(
            q[b : b + 1],
            k[b : b + 1],
            v[b : b + 1],
            causal=True,
            threshold=thresholds[b],
            **EVERYTHING,
        )
        assert torch.equal(together.out[b : b + 1], one.out)
        assert torch.equal(together.stats.skipped[b : b + 1], one.stats.skipped)
    assert (together.stats.skipped[thresholds == 0] == 0).all()
    assert (together.stats.skipped[thresholds == 0.9] > 0).all()


def test_error_bound_holds():
    q, k, v = inputs()
    exact = attention(q, k, v, causal=True)
    sparse = attention(q, k, v, causal=True, threshold=0.5, return_error_bound=True)
    bound = sparse.dropped_mass_bound.transpose(1, 2)[..., None]
    error = (sparse.out - exact).abs()
    assert (error <= 2 * bound * v.abs().max() + 1e-5).all()
    assert error.max() > 0.01


def test_gaps_of_a_dense_pass_give_the_sparsity_of_a_threshold():
    q, k, v = inputs(keys=400, queries=400)
    gaps = attention(q, k, v, causal=True, return_gaps=True).gaps
    edge = 480  # bins before it hold the gaps below -32 + 479 / 16
    threshold = math.exp(-32 + (edge - 1) / 16)
    sparse = attention(q, k, v, causal=True, threshold=threshold, return_stats=True)
    assert torch.equal(gaps[:, :edge].sum(-1), sparse.stats.skipped.sum(0))
    assert torch.equal(gaps.sum(-1), sparse.stats.visitable.sum(0))
    assert sparse.stats.skipped.sum() > 0


LAYOUTS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a larger tensor": lambda t: F.pad(t, (8, 16, 1, 2, 3, 4))[:, 3:-4, 1:-2, 8:-16],
    "last dimension strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_the_result(layout):
    q, k, v = inputs()
    strided = [LAYOUTS[layout](t) for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in strided)
    assert_same(
        attention(*strided, causal=True, threshold=0.2, **EVERYTHING),
        attention(q, k, v, causal=True, threshold=0.2, **EVERYTHING),
    )


def test_expanded_inputs():
    q, k, v = inputs(batch=1)
    wide = [t.expand(3, -1, -1, -1) for t in (q, k, v)]
    out = attention(*wide, causal=True, threshold=0.2)
    assert torch.equal(out, attention(q, k, v, causal=True, threshold=0.2).expand(3, -1, -1, -1))


def requests(lengths, **options):
    """One result a request of the first `lengths` tokens of `inputs(batch)`."""
    q, k, v = inputs(batch=len(lengths))
    for b, n in enumerate(lengths):
        yield attention(*(t[b : b + 1, :n] for t in (q, k, v)), **options, **EVERYTHING)


def test_ragged_is_request_by_request():
    lengths = [150, 1, 0, 77]
    q, k, v = inputs(batch=4)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    flat = [torch.cat([t[b, :n] for b, n in enumerate(lengths)]) for t in (q, k, v)]
    options = {"causal": True, "threshold": 0.2, "phase": "prefill"}
    together = attention(*flat, cu_seqlens_q=cu, cu_seqlens_k=cu, **options, **EVERYTHING)
    singles = list(requests(lengths, **options))
    assert torch.equal(together.out, torch.cat([r.out[0] for r in singles]))
    assert torch.equal(together.lse, torch.cat([r.lse[0] for r in singles], -1))
    assert torch.equal(together.stats.skipped, torch.cat([r.stats.skipped for r in singles]))
    assert torch.equal(together.gaps, sum(r.gaps for r in singles))


def pages_of(k, lengths, page_size=16):
    """Pages in scattered order, and the page table."""
    per_request = -(-k.shape[1] // page_size)
    padded = F.pad(k, (0, 0, 0, 0, 0, per_request * page_size - k.shape[1]), value=math.nan)
    pages = padded.reshape(-1, page_size, *k.shape[2:])
    place = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    scattered = torch.empty_like(pages)
    scattered[place] = pages
    return scattered, place.reshape(k.shape[0], per_request)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("queries", [1, 4, 150])
def test_pages_and_lengths_do_not_change_the_result(queries, index_type):
    lengths = torch.tensor([150, 151, 200], dtype=index_type)
    q, k, v = inputs(batch=3, queries=queries, keys=200)
    options = {"causal": True, "threshold": 0.2, "lengths": lengths, **EVERYTHING}
    whole = attention(q, k, v, **options)
    paged_k, table = pages_of(k, lengths)
    paged_v, _ = pages_of(v, lengths)
    paged = attention(q, paged_k, paged_v, page_table=table.to(index_type), **options)
    assert_same(whole, paged)
    for b, n in enumerate(lengths):
        one = attention(
            q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True, threshold=0.2
        )
        assert torch.equal(whole.out[b : b + 1], one)
    assert whole.stats.skipped.sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_bits_of_the_request_alone(side):
    lengths = [150, 1, 0, 77]
    q, k, v = inputs(batch=4)

    def pad(t):
        rows = [
            F.pad(
                t[b, :n],
                (0, 0, 0, 0, *((150 - n, 0) if side == "left" else (0, 150 - n))),
                value=math.nan,
            )
            for b, n in enumerate(lengths)
        ]
        return torch.stack(rows)

    n = torch.tensor(lengths)
    ranges = {"starts": 150 - n} if side == "left" else {"lengths": n, "query_lengths": n}
    factors = torch.tensor([[30.0], [20.0], [10.0], [15.0]])
    padded = attention(
        *map(pad, (q, k, v)), causal=True, threshold_scale_factor=factors, **ranges, **EVERYTHING
    )
    gaps = 0
    for b, n in enumerate(lengths):
        one = attention(
            *(t[b : b + 1, :n] for t in (q, k, v)),
            causal=True,
            threshold_scale_factor=factors[b].item(),
            phase="prefill",
            **EVERYTHING,
        )
        used = slice(150 - n, 150) if side == "left" else slice(0, n)
        unused = torch.ones(150, dtype=torch.bool)
        unused[used] = False
        assert torch.equal(padded.out[b, used], one.out[0])
        assert torch.equal(padded.lse[b][:, used], one.lse[0])
        assert torch.equal(padded.dropped_mass_bound[b][:, used], one.dropped_mass_bound[0])
        assert torch.equal(padded.stats.skipped[b], one.stats.skipped[0])
        assert (padded.out[b, unused] == 0).all()
        assert (padded.lse[b][:, unused] == -math.inf).all()
        assert (padded.dropped_mass_bound[b][:, unused] == 0).all()
        gaps = gaps + one.gaps
    assert torch.equal(padded.gaps, gaps)
    assert padded.stats.skipped.sum() > 0


def test_decode_of_ragged_queries_is_each_request_alone():
    q, k, v = inputs(batch=2, queries=5, keys=150)
    got = attention(
        torch.cat([q[0, :2], q[1]]),
        k,
        v,
        cu_seqlens_q=torch.tensor([0, 2, 7]),
        causal=True,
        threshold=0.1,
        phase="decode",
    )
    for b, n, rows in ((0, 2, slice(0, 2)), (1, 5, slice(2, 7))):
        part = q[b : b + 1, :n], k[b : b + 1], v[b : b + 1]
        alone = attention(*part, causal=True, threshold=0.1, phase="decode")
        assert torch.equal(got[rows], alone[0])


def test_a_decode_without_queries():
    q, k, v = inputs(batch=2, queries=5, keys=150)
    options = {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32), "phase": "decode"}
    for most in (None, 5):
        got = attention(q[0, :0], k, v, max_seqlen_q=most, return_stats=True, **options)
        assert got.out.shape == (0, *q.shape[2:])
        assert got.stats.visitable.sum() == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_padded_row_without_a_key_keeps_its_sink(phase, causal):
    q, k, v = inputs(batch=3, queries=8, keys=30)
    sinks = torch.tensor([0.5, -1.0, 2.0, -math.inf], requires_grad=phase == "prefill")
    got = attention(
        q, k, v,
        causal=causal,
        sinks=sinks,
        starts=torch.tensor([30, 27, 0]),
        query_lengths=torch.tensor([8, 8, 5]),
        phase=phase,
        return_lse=True,
    )  # fmt: skip
    rows = 5 if causal else 0  # of request 1, that lie before every key
    for request, keyless in ((0, slice(8)), (1, slice(rows))):
        assert not got.out[request, keyless].any()
        assert (got.lse[request, :, keyless] == sinks[:, None]).all()
    assert not got.out[2, 5:].any()
    assert (got.lse[2, :, 5:] == -math.inf).all()
    assert (got.lse[1, :3, rows:] > sinks[:3, None]).all()
    if phase == "prefill":
        [gradient] = torch.autograd.grad(got.lse[0, :, 2] @ torch.arange(4.0), sinks)
        assert gradient.tolist() == [0, 1, 2, 0]  # a sink of -inf is none


def test_padding_in_decode():
    q, k, v = inputs(batch=3, queries=1, keys=200)
    starts, lengths = torch.tensor([0, 60, 199]), torch.tensor([200, 150, 200])
    out = attention(q, k, v, starts=starts, lengths=lengths, threshold=0.2, causal=True)
    for b in range(3):
        keys = slice(starts[b], lengths[b])
        one = attention(q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys], threshold=0.2)
        assert torch.equal(out[b : b + 1], one)


def test_unused_keys_are_never_read():
    q, k, v = inputs(queries=1)
    k[:, 100:], v[:, 100:] = math.nan, math.inf
    k[:, :10], v[:, :10] = math.inf, math.nan
    out = attention(q, k, v, starts=torch.tensor([10, 10]), lengths=torch.tensor([100, 100]))
    assert out.isfinite().all()


def test_empty_inputs():
    q, k, v = inputs()
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 150, 4, 32)
    assert attention(q[:, :0], k, v).shape == (2, 0, 4, 32)
    assert (attention(q, k[:, :0], v[:, :0]) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out = attention(q, k, v.to(torch.bfloat16), causal=True, threshold=0.2)
    assert out.dtype == dtype
    expected = attention(
        q.to(dtype), k.to(dtype), v.to(torch.bfloat16).to(dtype), causal=True, threshold=0.2
    )
    assert torch.equal(out, expected)


def test_inference_mode():
    q, k, v = inputs()
    expected = attention(q, k, v, causal=True, threshold=0.2)
    with torch.inference_mode():
        out = attention(*(t.clone() for t in (q, k, v)), causal=True, threshold=0.2)
    assert out.is_inference()
    assert torch.equal(out, expected)


def test_tile_shape_is_what_statistics_count():
    q, k, v = inputs(queries=200, keys=200)
    rows, keys, *_ = blasst.tile_shape(q, k, v, phase="prefill")
    stats = attention(q, k, v, return_stats=True).stats
    assert (stats.visitable == math.ceil(200 / rows) * math.ceil(200 / keys)).all()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_plan_has_the_sizes_of_what_is_reported(phase):
    queries = 130 if phase == "prefill" else 5
    q, k, v = inputs(queries=queries, keys=200)
    found = library.plan(
        *(phase, q.device, q.dtype),
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        query_length=queries,
        keys=200,
    )
    got = attention(q, k, v, phase=phase, return_tile_maxima=True, return_tile_mask=True)
    tiles = found.heads * found.query_tiles * found.key_tiles
    assert got.tile_maxima.numel() == got.tile_mask.numel() == tiles
    assert found.shape == blasst.tile_shape(q, k, v, phase=phase)
    with pytest.raises(ValueError, match="head_dim is 12; it must be a multiple of 8"):
        library.plan(phase, q.device, q.dtype, head_dim=12)


# Tracing


def sparse_attention(q: Tensor, k: Tensor, v: Tensor) -> blasst.Result:
    return attention(q, k, v, causal=True, threshold=[0.3, 0.1, 0.0, 0.5], **EVERYTHING)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("queries", [1, 150])
def test_compiles_without_a_graph_break(backend, queries):
    q, k, v = inputs(queries=queries)
    compiled = torch.compile(sparse_attention, fullgraph=True, backend=backend)
    assert_same(compiled(q, k, v), sparse_attention(q, k, v))


def test_compiles_with_inductor():
    q, k, v = inputs()

    def block(q, k, v, starts):
        return attention(q * 2, k, v, causal=True, threshold=0.2, starts=starts) + 1

    starts = torch.tensor([0, 30])
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v, starts), block(q, k, v, starts))


def test_compiles_under_autocast_and_inference_mode():
    q, k, v = inputs()
    compiled = torch.compile(sparse_attention, fullgraph=True, backend="aot_eager")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(compiled(q, k, v), sparse_attention(q, k, v))


def test_exports_with_dynamic_lengths():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_attention(q, k, v)

    q, k, v = inputs()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        Module(), (q, k, v), dynamic_shapes={name: {1: length} for name in "qkv"}
    )
    assert "blasst.prefill" in program.graph_module.code
    shorter = [t[:, :70] for t in (q, k, v)]
    assert_same(program.module()(*shorter), sparse_attention(*shorter))


def test_most_tokens_of_a_request_change_nothing():
    q, k, v = inputs(batch=3, queries=100)
    cu_q, cu_k = torch.tensor([0, 100, 140, 300]), torch.tensor([0, 100, 150, 450])
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    options = {"causal": True, "threshold": 0.2, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    wanted = attention(*flat, **options, **EVERYTHING)
    for most_q, most_k in ((160, 300), (10_000, 10_000)):
        got = attention(*flat, max_seqlen_q=most_q, max_seqlen_k=most_k, **options, **EVERYTHING)
        assert_same(got, wanted)
    paged_k, table = pages_of(k, None)
    paged_v, _ = pages_of(v, None)
    options = {"page_table": table, "lengths": torch.tensor([120, 150, 3]), **EVERYTHING}
    for rows in (1, 100):
        wanted = attention(q[:, :rows], paged_k, paged_v, **options)
        assert_same(attention(q[:, :rows], paged_k, paged_v, max_seqlen_k=150, **options), wanted)


def test_the_default_type_does_not_change_thresholds():
    q, k, v = inputs()
    options = ({"threshold": 0.3}, {"threshold": [0.3, 0.1, 0.7, 0.2]}, {"absolute_threshold": 0.1})
    wanted = [attention(q, k, v, causal=True, **o, **EVERYTHING) for o in options]
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            got = [attention(q, k, v, causal=True, **o, **EVERYTHING) for o in options]
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_package_can_be_imported_with_any_default_type(dtype):
    code = f"import torch; torch.set_default_dtype(torch.{dtype}); from blasst import attention"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_for_a_gpu_are_checked_on_the_host():
    check = arguments._check_host_values
    for test, good, bad in (
        ("relative", [0, 1.0, [0.5]], [-1e-9, 1.1, math.nan, [0.1, 2], torch.tensor([0.1, -1.0])]),
        ("scale_factor", [0, 1e9], [-1, math.inf, math.nan, ((3.0, -3.0),)]),
        ("absolute", [-math.inf, 3], [math.nan, torch.tensor(math.nan)]),
    ):
        for value in good:
            check("threshold", test, value)
        for value in bad:
            with pytest.raises(ValueError, match=r"threshold is .*; it must be"):
                check("threshold", test, value)


def test_fake_tensors_have_the_real_shapes():
    cu = torch.tensor([0, 100, 150])
    thresholds = torch.tensor([[[0.2], [0.1], [0.0], [0.5]]])
    bands = torch.tensor([[0, 40], [41, 90], [0, 200], [3, 3]])
    blocks = torch.ones(4, 6, 3, dtype=torch.uint8)
    q, k, v = inputs()

    def tail(blocks):
        mask = (True, -1, -1, bands, blocks)
        return (0.0, 0.0, None, *mask, "sink_first", "relative", thresholds)

    for report in ((True,) * 4, (False,) * 4):
        for bits in (True, False):
            for maxima in (True, False):
                torch.library.opcheck(
                    torch.ops.blasst.prefill,
                    (q, k, v, *[None] * 6, *tail(blocks), *report, maxima, bits),
                )
            ragged = (q[0], k[0], v[0], None, None, None, cu, cu, None, *tail(blocks[:, :3]))
            for most in ((), (100, 120)):
                torch.library.opcheck(
                    torch.ops.blasst.prefill, (*ragged, *report, False, bits, *most)
                )
        one_row = q[:, :1].mT.contiguous().mT
        torch.library.opcheck(
            torch.ops.blasst.decode,
            (one_row, k, v, *[None] * 6, *tail(blocks[:2, :2]), *report, True, True),
        )
        decoded = (q[0, :7], k, v, None, None, None, torch.tensor([0, 2, 7]), None, None)
        torch.library.opcheck(
            torch.ops.blasst.decode,
            (*decoded, *tail(blocks[:2, :2]), *report, False, True, 5),
        )
        torch.library.opcheck(
            torch.ops.blasst.prefill_into,
            (torch.empty_like(q), q, k, v, *[None] * 6, *tail(blocks), *report, True, True),
        )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_output_is_written_in_place(phase, padded):
    q, k, v = inputs(queries=16, value_dim=48)
    options = {"causal": True, "threshold": 0.2, "phase": phase, **EVERYTHING}
    if padded:
        options["starts"], options["query_lengths"] = torch.tensor([0, 140]), torch.tensor([16, 3])
    wanted = attention(q, k, v, **options)
    whole = torch.full((2, 18, 5, 64), 7.0)
    out = whole[:, 1:17, :4, 8:56]
    got = attention(q, k, v, out=out, **options)
    assert got.out is out
    assert_same(got, wanted)
    out.fill_(7.0)
    assert (whole == 7.0).all(), "what lies between the rows is left alone"
    plain = torch.empty(2, 16, 4, 48)
    del options["return_lse"], options["return_stats"]
    del options["return_error_bound"], options["return_gaps"]
    assert attention(q, k, v, out=plain, **options) is plain
    assert torch.equal(plain, wanted.out)


def test_an_output_that_does_not_fit_is_refused():
    q, k, v = inputs()
    good = torch.empty_like(q)
    for out, error, message in [
        (good[:, 1:], ValueError, r"out is \[2, 149, 4, 32\]; it must be \[\.\.\., heads"),
        (good.half(), TypeError, "out is torch.float16; it must be torch.float32"),
        (good.mT.contiguous().mT, ValueError, "out has a last dimension that is not contiguous"),
        (good[:1].expand(2, -1, -1, -1), ValueError, "overlaps elements of out"),
        (q, ValueError, "out and q share memory; out needs a buffer of its own"),
        (good.to("meta"), ValueError, "out is on meta, q on cpu"),
        ([], TypeError, r"out is a list; it must be a torch\.Tensor, or None"),
    ]:
        with pytest.raises(error, match=message):
            attention(q, k, v, out=out)
    with pytest.raises(NotImplementedError, match="out requires a gradient, and what is written"):
        attention(q, k, v, out=torch.zeros_like(q, requires_grad=True))
    with pytest.raises(NotImplementedError, match="out is given, but an input requires a gradient"):
        attention(q.requires_grad_(), k, v, out=good)
    with torch.no_grad():
        attention(q, k, v, out=good)
        leaf = torch.zeros_like(q, requires_grad=True)
        assert torch.equal(attention(q, k, v, out=leaf), good)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch is 0; it must be an integer from 1 to 2147483647"),
        ({"query_length": 0}, ValueError, "query_length is 0; it must be an integer from 1"),
        ({"batch": 2.0}, TypeError, "batch is 2.0; it must be an integer from 1 to 2147483647"),
        ({"heads": True}, TypeError, "heads is True; it must be an integer from 1 to 2147483647"),
        (
            {"keys": 2**70},
            ValueError,
            "keys is 1180591620717411303424; it must be an integer from 0",
        ),
        ({"heads": 2**70}, ValueError, "heads is 1180591620717411303424; it must be an integer fr"),
        ({"device": "meta"}, blasst.NotSupportedError, "device is meta; blasst runs on: cpu, cuda"),
        ({"device": "mps"}, blasst.NotSupportedError, "device is mps; blasst runs on: cpu, cuda"),
        ({"phase": "decod"}, ValueError, "phase is 'decod'; it must be one of prefill, decode"),
        ({"dtype": torch.float64}, ValueError, "dtype is 'float64'; it must be one of float32"),
    ],
    ids=str,
)
def test_what_no_workspace_can_be_named_for(changes, error, message):
    given = {"phase": "decode", "device": "cpu", "dtype": torch.float32, "batch": 2, "keys": 99}
    given |= {"heads": 4, "kv_heads": 2, "head_dim": 32}
    assert blasst.workspace_bytes(**given) > 0
    for phase in {given["phase"], "prefill"}:
        with pytest.raises(error, match=message):
            blasst.workspace_bytes(**({**given, "phase": phase} | changes))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_workspace_goes_with_an_output(phase):
    q, k, v = inputs(queries=16)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "keys": k.shape[1], "query_length": 16}
    needed, more = (
        blasst.workspace_bytes(phase, "cpu", q.dtype, batch=batch, **shape) for batch in (2, 3)
    )
    assert 0 < needed <= more
    out, enough = torch.empty_like(q), torch.empty(more, dtype=torch.uint8)
    for workspace in (enough, enough[:needed]):
        got = attention(q, k, v, causal=True, out=out, workspace=workspace, phase=phase)
        assert torch.equal(got, attention(q, k, v, causal=True, phase=phase))
    for workspace, error, message in [
        (enough.float(), TypeError, "workspace is torch.float32; it must be torch.uint8"),
        (enough[None], ValueError, rf"workspace is \[1, {more}\]; it must be \[bytes\], contig"),
        (enough[:8], ValueError, r"workspace is \[8\]; .* of at least \d+ for this call"),
        (enough.to("meta"), ValueError, "workspace is on meta, q on cpu"),
        (100, TypeError, r"workspace is a int; it must be a torch\.Tensor, or None"),
    ]:
        with pytest.raises(error, match=message):
            attention(q, k, v, out=out, workspace=workspace, phase=phase)
    with pytest.raises(ValueError, match="workspace is given without out"):
        attention(q, k, v, workspace=enough)


def test_compiles_with_an_output_of_the_callers():
    q, k, v = inputs()

    def run(q, k, v, out):
        attention(2 * q, k, v, causal=True, threshold=0.2, out=out)
        return out + 1

    compiled = torch.compile(run, fullgraph=True)
    outs = torch.empty_like(q), torch.empty_like(q)
    assert torch.equal(compiled(q, k, v, outs[0]), run(q, k, v, outs[1]))
    assert torch.equal(*outs)


def test_a_dimension_of_one_element_may_have_any_stride():
    q, k, v = inputs(batch=1, queries=1, heads=1, kv_heads=1)
    wanted = attention(q, k, v, return_lse=True)

    def odd(t):
        strides = [3 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)]
        return t.as_strided(t.shape, strides)

    got = attention(*map(odd, (q, k, v)), return_lse=True, out=odd(torch.empty_like(q)))
    assert torch.equal(got.out, wanted.out)
    merged = blasst.merge(odd(got.out), got.lse, odd(got.out), got.lse)
    assert torch.equal(merged[0], blasst.merge(wanted.out, got.lse, wanted.out, got.lse)[0])


# Policies: bands, block masks, thresholds by place


def visible_of(bands, queries, keys):
    """[heads, queries, keys]"""
    distance = distances(queries, keys)
    return torch.stack([(distance >= first) & (distance <= last) for first, last in bands])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_bands(phase):
    q, k, v = inputs(queries=150 if phase == "prefill" else 3, keys=300)
    bands = [(0, 39), (40, 79), (-5, 500), (250, 400)]
    got = attention(q, k, v, causal=True, bands=bands, phase=phase, return_lse=True)
    visible = visible_of(bands, q.shape[1], 300) & (distances(q.shape[1], 300) >= 0)
    some = visible.any(-1).T  # [queries, heads]
    assert not some.all() or phase == "decode", "some rows must have no valid key"
    expected = dense(q, k, v, visible)
    torch.testing.assert_close(got.out[:, some], expected[:, some].float(), atol=1e-5, rtol=1e-4)
    assert not got.out[:, ~some].any()
    assert (got.lse.transpose(1, 2)[:, ~some] == -math.inf).all()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_block_mask_is_attention_over_its_tiles(phase):
    q, k, v = inputs(queries=150 if phase == "prefill" else 3, keys=300)
    rows, keys, *_ = blasst.tile_shape(q, k, v, phase=phase)
    heads, query_tiles = (4, 2 * 3) if phase == "prefill" else (2, 2)
    blocks = torch.rand(heads, query_tiles, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    blocks[..., 0] = True
    got = attention(
        q, k, v, causal=True, blocks=blocks, phase=phase, return_stats=True, threshold=0.0
    )
    if phase == "prefill":
        by_request = blocks.unflatten(1, (2, 3)).transpose(0, 1)
        visible = by_request.repeat_interleave(rows, 2)
    else:
        visible = blocks.transpose(0, 1).repeat_interleave(2, 1)[:, :, None]
    visible = visible.repeat_interleave(keys, 3)[..., : q.shape[1], :300]
    visible = visible & (distances(q.shape[1], 300) >= 0)
    torch.testing.assert_close(got.out, dense(q, k, v, visible).float(), atol=1e-5, rtol=1e-4)
    full = attention(q, k, v, causal=True, phase=phase, return_stats=True, threshold=0.0)
    assert got.stats.visitable.sum() < full.stats.visitable.sum()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tile_maxima(phase):
    q, k, v = inputs(queries=150 if phase == "prefill" else 3, keys=300)
    got = attention(q, k, v, causal=True, phase=phase, return_tile_maxima=True, softcap=4.0)
    scores = q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT * 32**-0.5
    scores = (4 * torch.tanh(scores / 4)).masked_fill(distances(q.shape[1], 300) < 0, -math.inf)
    scores = F.pad(scores, (0, 20), value=-math.inf).unflatten(-1, (5, 64)).amax(-1)
    if phase == "decode":
        scores = scores.amax(2).unflatten(1, (2, 2)).amax(2)
    else:
        scores = F.pad(scores, (0, 0, 0, 42), value=-math.inf).unflatten(2, (3, 64)).amax(3)
    torch.testing.assert_close(got.tile_maxima, scores)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("keys", [300, 2200])
def test_the_output_is_attention_over_the_tiles_of_the_mask(phase, keys):
    q, k, v = inputs(queries=150 if phase == "prefill" else 3, keys=keys)
    got = attention(
        q, k, v, causal=True, phase=phase, threshold=0.3, return_tile_mask=True, return_stats=True
    )
    rows, size, *_ = blasst.tile_shape(q, k, v, phase=phase)
    mask = got.tile_mask
    assert mask.dtype == torch.bool
    if phase == "decode":  # the query heads of a KV head share it
        mask = mask.repeat_interleave(2, 1)[:, :, None]
    kept = (got.stats.visitable - got.stats.skipped).sum((0, 1))
    assert mask.sum() == kept
    assert 0 < got.stats.sparsity < 1
    visible = mask.repeat_interleave(rows, 2).repeat_interleave(size, 3)
    visible = visible[:, :, : q.shape[1], :keys] & (distances(q.shape[1], keys) >= 0)
    assert (got.out - dense(q, k, v, visible)).abs().max() < 1e-5
    compiled = torch.compile(
        lambda q, k, v: (
            attention(
                q, k, v, causal=True, phase=phase, threshold=0.3, return_tile_mask=True
            ).tile_mask
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(q, k, v), got.tile_mask)


@pytest.mark.parametrize("queries", [1, 150])
def test_a_tile_mask_of_a_padded_batch(queries):
    q, k, v = inputs(batch=3, queries=queries, keys=200)
    starts, lengths = torch.tensor([0, 30, 190]), torch.tensor([200, 140, 200])
    options = {"causal": True, "threshold": 0.2, "return_tile_mask": True}
    mask = attention(q, k, v, starts=starts, lengths=lengths, **options).tile_mask
    for b in range(3):
        used = slice(starts[b], lengths[b])
        n = int(lengths[b] - starts[b])
        alone = q[b : b + 1, -min(n, queries) :], k[b : b + 1, used], v[b : b + 1, used]
        phase = "prefill" if queries > 1 else "decode"
        one = attention(*alone, phase=phase, **options).tile_mask[0]
        part = mask[b][..., : one.shape[-1]]
        if queries > 1:
            part, rest = part[:, : one.shape[1]], part[:, one.shape[1] :]
            assert not rest.any()
        assert torch.equal(part, one)
        assert not mask[b][..., one.shape[-1] :].any()
    lengths = torch.tensor([64, 64, 10])
    whole = attention(q, k, v, lengths=lengths, **options).tile_mask
    paged_k, table = pages_of(k, None)
    paged_v, _ = pages_of(v, None)
    paged = attention(q, paged_k, paged_v, lengths=lengths, page_table=table, **options)
    assert torch.equal(paged.tile_mask, whole)
    assert whole.shape[-1] == 4
    assert not whole[..., 1:].any()


@pytest.mark.parametrize(("phase", "rows"), [("prefill", [150, 70, 1]), ("decode", [3, 1, 2])])
def test_a_tile_mask_of_queries_of_different_lengths(phase, rows):
    q, k, v = inputs(batch=3, queries=max(rows), keys=400)
    options = {"causal": True, "threshold": 0.3, "return_tile_mask": True, "phase": phase}
    mask = attention(q, k, v, query_lengths=i32(*rows), **options).tile_mask
    for b, n in enumerate(rows):
        one = attention(q[b : b + 1, :n], k[b : b + 1], v[b : b + 1], **options).tile_mask[0]
        assert not one.all()
        if phase == "prefill":
            assert not mask[b, :, one.shape[1] :].any()
        assert torch.equal(mask[b, :, : one.shape[1]], one)


def test_thresholds_by_place():
    q, k, v = inputs(queries=200, keys=330)
    # Query tiles start at positions 130, 194, 258, 322: places 2, 3, 4, 5.
    thresholds = torch.tensor([9.0, 9.0, -math.inf, 0.9, 1.2])[None, None]
    got = attention(q, k, v, causal=True, absolute_threshold=thresholds)
    for first, place in ((0, 2), (64, 3), (128, 4), (192, 4)):
        value = float(thresholds[0, 0, place])
        alone = attention(q, k, v, causal=True, absolute_threshold=value)
        rows = slice(first, first + 64)
        assert torch.equal(got[:, rows], alone[:, rows]), place
    assert not torch.equal(got, attention(q, k, v, causal=True))


def test_a_padded_request_has_its_own_bands_and_places():
    q, k, v = inputs(batch=2, queries=150, keys=150)
    starts = torch.tensor([0, 40])
    options = {
        "causal": True,
        "bands": [(0, 29), (30, 90), (0, 200), (91, 140)],
        "absolute_threshold": torch.tensor([[[-math.inf, 0.5, 0.1]]]),
    }
    got = attention(q, k, v, starts=starts, **options)
    alone = attention(q[1:, 40:], k[1:, 40:], v[1:, 40:], **options)
    assert torch.equal(got[1:, 40:], alone)


# Bad input

Q, K, V = inputs(queries=20, keys=30)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


RAGGED = {"q": Q[0], "cu_seqlens_q": i32(0, 10, 20)}
RAGGED_KEYS = {"k": K[0], "v": V[0], "cu_seqlens_k": i32(0, 10, 30)}
PAGED = {
    "k": torch.zeros(5, 16, 2, 32),
    "v": torch.zeros(5, 16, 2, 32),
    "page_table": torch.zeros(2, 3, dtype=torch.int32),
    "lengths": i32(40, 40),
}
BAD = {
    TypeError: [
        (
            {"q": Q.double(), "k": K.double(), "v": V.double()},
            "q is torch.float64; blasst takes float32, fl",
        ),
        ({"k": K.half()}, "k is torch.float16, but q is torch.float32; they must be of one type"),
        ({"q": [1, 2]}, "q is a list; it must be a torch.Tensor"),
        ({"k": None}, "k is a NoneType; it must be a torch.Tensor"),
        ({"q": Q.to_sparse()}, "q is torch.sparse_coo; it must be torch.strided"),
        (
            {"threshold": torch.ones(1, 1, 1).to_sparse()},
            "threshold is torch.sparse_coo; it must be torch.strided",
        ),
        (
            {"threshold": "a"},
            "threshold is 'a'; it must be a number, a list of numbers, or a tensor of",
        ),
        ({"bands": [(0.5, 3)] * 4}, "bands is torch.float32; it must be [heads, 2] whole numbers"),
        ({"bands": "a"}, "bands is 'a'; it must be [heads, 2] whole numbers"),
        ({"blocks": torch.ones(4, 2, 1)}, "blocks is torch.float32; it must be torch.bool"),
        ({"window": 5}, "window is 5; it must be (before, after), each an integer of 0 or more"),
        ({"window": (1.5, None)}, "window is (1.5, None); it must be (before, after)"),
        (
            {"sinks": torch.zeros(4, dtype=int)},
            "sinks is torch.int64; it must be of a floating-point",
        ),
        ({"order": None}, "order is None; it must be one of forward, reverse, sink_first"),
        ({"lengths": [3, 3]}, "lengths is a list; it must be a torch.Tensor, or None"),
        (
            {"lengths": torch.zeros(2)},
            "lengths is torch.float32; it must be torch.int32 or torch.int64",
        ),
        ({"order": 3}, "order is 3; it must be one of forward, reverse, sink_first"),
        ({"phase": True}, "phase is True; it must be one of prefill, decode"),
        (
            {"scale": "1"},
            "scale is '1'; it must be positive and finite, or None for 1 / sqrt(head_dim)",
        ),
        ({"softcap": True}, "softcap is True; it must be positive and finite, or None for none"),
        ({"softcap": torch.ones(2)}, "softcap is tensor([1., 1.]); it must be positive and finite"),
        ({"bands": [[0, 2**70]] * 4}, "it must be [heads, 2] whole numbers that fit in int64"),
        ({"causal": None}, "causal is None; it must be True or False"),
        ({"return_lse": 1}, "return_lse is 1; it must be True or False"),
        (
            {"threshold": True},
            "threshold is True; it must be a number, a list of numbers, or a tensor",
        ),
        (
            {"threshold": torch.ones(4, dtype=torch.bool)},
            "threshold is torch.bool; it must be a number",
        ),
        ({"threshold": torch.ones(4) * 1j}, "threshold is torch.complex64; it must be a number"),
        ({"max_seqlen_q": 2.5}, "max_seqlen_q is 2.5; it must be an integer of 0 or more, or None"),
        (
            {"starts": torch.zeros(2)},
            "starts is torch.float32; it must be torch.int32 or torch.int64",
        ),
        ({"q": Q.to_mkldnn()}, "q is torch._mkldnn; it must be torch.strided"),
    ],
    ValueError: [
        ({"q": Q[0]}, "q is [20, 4, 32]; it must be [batch, query_length, heads, head_dim]"),
        ({"k": K[0]}, "k is [30, 2, 32]; it must be [batch, keys, kv_heads, head_dim]"),
        ({"v": V[:, 1:]}, "v is [2, 29, 2, 32], but k is [2, 30, 2, 32]"),
        ({"k": K[:1], "v": V[:1]}, "k is [1, 30, 2, 32], but q has batch 2"),
        ({"k": K[..., :16]}, "k is [2, 30, 2, 16], but q has head_dim 32"),
        ({"q": Q[:, :, :3]}, "heads is 3 and kv_heads is 2; heads must be a multiple of kv_heads"),
        (
            {"q": Q[..., :20], "k": K[..., :20]},
            "head_dim is 20; it must be a multiple of 8 from 16 to",
        ),
        ({"v": V[..., :12]}, "value_dim is 12; it must be a multiple of 8 from 16 to 576"),
        ({"k": K.to("meta")}, "k is on meta, q on cpu; they must share a device"),
        ({"lengths": i32(3, 3).to("meta")}, "lengths is on meta, q on cpu"),
        (
            {"threshold": -0.1},
            "threshold of request 0, head 0 is -0.1; it must be a number from 0 to 1",
        ),
        ({"threshold": [0.1, 0.1, 1.5, 0.1]}, "head 2 is 1.5; it must be a number from 0 to 1"),
        ({"threshold": math.nan}, "head 0 is nan; it must be a number from 0 to 1"),
        (
            {"threshold": [0.1] * 3},
            "thresholds is [1, 3, 1]; it must be [1 or batch, 1 or heads, pla",
        ),
        (
            {"threshold": torch.zeros(1, 1, 4, 2)},
            "threshold is [1, 1, 4, 2]; it must be a number, [heads]",
        ),
        (
            {"threshold": torch.zeros(1, 1, 0)},
            "threshold is [1, 1, 0]; it must be a number, [heads]",
        ),
        ({"bands": [(0, 3)] * 3}, "bands is [3, 2]; it must be [heads, 2] = [4, 2]"),
        ({"bands": [(5, 3)] * 4}, "bands[0] is 5 to 3; the first distance must not exceed"),
        (
            {"blocks": torch.ones(4, 1, 1, dtype=torch.bool)},
            "blocks is [4, 1, 1]; for tiles of 64 rows and 64 keys it must be [4, 2, at least 1]",
        ),
        (
            {"blocks": torch.ones(4, 2, 1, dtype=torch.bool), "starts": i32(0, 1)},
            "blocks is given together with starts or query_lengths",
        ),
        (RAGGED | {"return_tile_mask": True}, "return_tile_mask is set; it needs q of 4 dime"),
        (
            RAGGED | {"return_tile_maxima": True},
            "maxima is true; it needs q as [batch, query_length",
        ),
        (
            {"threshold_scale_factor": -1},
            "factor of request 0, head 0 is -1; it must be finite and at",
        ),
        ({"threshold_scale_factor": math.inf}, "is inf; it must be finite and at least 0"),
        (
            {"absolute_threshold": math.nan},
            "absolute threshold of request 0, head 0 is nan; it must b",
        ),
        (
            {"threshold": 0.1, "threshold_scale_factor": 3.0},
            "threshold and threshold_scale_factor exclude each other",
        ),
        ({"scale": 0.0}, "scale is 0.0; it must be positive and finite, or None"),
        ({"scale": 1e-50}, "scale is 1e-50; it must be 1.1754944e-38 to 3.4028235e+38, a normal"),
        ({"scale": 1e39}, "scale is 1e+39; it must be 1.1754944e-38 to 3.4028235e+38, a normal"),
        ({"softcap": 1e-40}, "softcap is 1e-40; it must be 1.1754944e-38 to 3.4028235e+38"),
        (
            {"threshold_scale_factor": 1e39},
            "threshold_scale_factor is 1e+39; it must fit in float32, up to 3.4028235e+38",
        ),
        ({"absolute_threshold": -1e39}, "absolute_threshold is -1e+39; it must fit in float32"),
        ({"scale": math.nan}, "scale is nan; it must be positive and finite, or None"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be positive and finite, or None"),
        ({"window": (-2, 0)}, "window is (-2, 0); it must be (before, after)"),
        ({"sinks": torch.zeros(3)}, "sinks is [3]; it must be [heads] = [4]"),
        ({"sinks": torch.full((4,), math.nan)}, "sinks[0] is nan; it must be finite or -inf"),
        (
            {"order": "backward"},
            "order is 'backward'; it must be one of forward, reverse, sink_first",
        ),
        ({"phase": "train"}, "phase is 'train'; it must be one of prefill, decode"),
        ({"phase": "decode"}, "query_length is 20; it must be 1 to 16"),
        ({"lengths": i32(31, 3)}, "lengths[0] is 31; it must be 0 to 30"),
        ({"lengths": i32(3)}, "lengths is [1]; it must be [batch] = [2]"),
        ({"lengths": torch.tensor([2**33, 3])}, "lengths holds 8589934592; it must fit in int32"),
        ({"starts": i32(-1, 0)}, "starts[0] is -1; it must be 0 to 30"),
        ({"starts": i32(0, 5), "lengths": i32(4, 4)}, "starts[1] is 5; it must be 0 to 4"),
        ({"query_lengths": i32(21, 0)}, "query_lengths[0] is 21; it must be 0 to 20"),
        (
            {**PAGED, "starts": i32(0, 0)},
            "starts is given; it needs k as [batch, keys, kv_heads, head",
        ),
        (
            {**RAGGED, "query_lengths": i32(3, 3)},
            "query_lengths is given; it needs q as [batch, que",
        ),
        ({**RAGGED, "cu_seqlens_q": i32(1, 10, 20)}, "cu_seqlens_q[0] is 1; it must be 0"),
        (
            {**RAGGED, "cu_seqlens_q": i32(0, 30, 20)},
            "cu_seqlens_q[2] is 20, less than 30 before it",
        ),
        (
            {**RAGGED, "cu_seqlens_q": i32(0, 10, 19)},
            "cu_seqlens_q ends at 19, but q is [20, 4, 32]",
        ),
        (
            {"cu_seqlens_q": i32(0, 10, 20)},
            "q is [2, 20, 4, 32]; it must be [rows, heads, head_dim]",
        ),
        (
            {"cu_seqlens_k": i32(0, 15, 30)},
            "k is [2, 30, 2, 32]; it must be [total keys, kv_heads, h",
        ),
        (
            {"k": K[0], "v": V[0], "cu_seqlens_k": i32(0, 10, 29)},
            "cu_seqlens_k ends at 29, but k is",
        ),
        (
            {"k": K[0], "v": V[0], "cu_seqlens_k": i32(0, 30)},
            "cu_seqlens_k is [2]; it must be [batch",
        ),
        (
            {**PAGED, "cu_seqlens_k": i32(0, 40, 80)},
            "cu_seqlens_k is given together with page_table",
        ),
        ({**PAGED, "lengths": None}, "page_table is given without lengths"),
        ({**PAGED, "lengths": i32(49, 40)}, "lengths[0] is 49; it must be 0 to 48"),
        ({**PAGED, "page_table": torch.full((2, 3), 5)}, "page_table[0, 0] is 5; kv.pages is 5"),
        ({**PAGED, "page_table": torch.full((2, 3), -1)}, "page_table[0, 0] is -1; kv.pages is 5"),
        (
            {**PAGED, "page_table": i32(0, 1)},
            "page_table is [2]; it must be [batch, pages a request]",
        ),
        (
            {**RAGGED, "cu_seqlens_q": i32(0, 0, 20), "phase": "decode"},
            "query_length is 20; it must be 1 to 16",
        ),
        ({"window": (1, 2, 3)}, "window is (1, 2, 3); it must be (before, after)"),
        ({"window": (2**31, 0)}, "window is (2147483648, 0); each side must fit in int32"),
        ({"max_seqlen_q": 20}, "max_seqlen_q is given without cu_seqlens_q"),
        ({**RAGGED, "max_seqlen_q": 2**63}, "max_seqlen_q is 9223372036854775808; it must be 0 or"),
        ({"max_seqlen_k": 30}, "max_seqlen_k is given without cu_seqlens_k or page_table"),
        ({**RAGGED, **RAGGED_KEYS, "max_seqlen_q": -1}, "max_seqlen_q is -1; it must be 0 or more"),
        (
            {**RAGGED, **RAGGED_KEYS, "max_seqlen_q": 9},
            "max_seqlen_q is 9, but request 0 has 10 tokens by cu_seqlens_q",
        ),
        (
            {**PAGED, "max_seqlen_k": 39},
            "max_seqlen_k is 39, but request 0 has 40 tokens by lengths",
        ),
        (
            {**RAGGED, **RAGGED_KEYS, "max_seqlen_k": 19},
            "max_seqlen_k is 19, but request 1 has 20 tokens by cu_seqlens_k",
        ),
    ],
    blasst.NotSupportedError: [
        ({"q": Q.to("meta")}, "q is on meta; blasst runs on: cpu, cuda"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [(kind, *case) for kind, cases in BAD.items() for case in cases],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_bad_input(kind, change, message):
    arguments = {"q": Q, "k": K, "v": V, **change}
    with pytest.raises(kind) as error:
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert type(error.value) is kind
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_result_fields_that_were_not_asked_for():
    result = attention(Q, K, V, return_lse=True)
    assert result.lse.shape == (2, 4, 20)
    assert (result.stats, result.dropped_mass_bound, result.gaps) == (None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [0, 1, 100, 150])
def test_merge_of_two_calls_is_one_call(dtype, cut):
    q, k, v = inputs(queries=50, dtype=dtype)
    parts = [
        attention(q, *kv, return_lse=True)
        for kv in ((k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:]))
    ]
    out, lse = blasst.merge(parts[0].out, parts[0].lse, parts[1].out, parts[1].lse)
    exact = dense(q, k, v, torch.ones(50, 150, dtype=torch.bool))
    one = attention(q, k, v, return_lse=True)
    allowed = 2 * max((one.out - exact).norm().item(), 1e-6 * exact.norm().item())
    assert (out - exact).norm() < allowed
    torch.testing.assert_close(lse, one.lse, atol=1e-5, rtol=0)
    rows = [
        t.flatten(0, 1) if t.dim() == 4 else t.transpose(0, 1).flatten(1)
        for p in parts
        for t in p[:2]
    ]
    ragged = blasst.merge(*rows)
    assert torch.equal(ragged[0], out.flatten(0, 1))
    assert torch.equal(ragged[1], lse.transpose(0, 1).flatten(1))


def test_a_row_without_a_key_keeps_its_sink():
    q, k, v = inputs(batch=3)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    starts, lengths, rows = (torch.tensor(x) for x in ([0, 0, 90], [0, 150, 150], [100, 150, 150]))
    ranges = {"starts": starts, "lengths": lengths, "query_lengths": rows}
    for causal in (False, True):
        leaf = sinks.clone().requires_grad_()
        result = attention(
            q, k, v, sinks=leaf, causal=causal, phase="prefill", return_lse=True, **ranges
        )
        expected = sinks[:, None].expand(4, 100)
        assert torch.equal(result.lse[0, :, :100], expected)
        assert (result.lse[0, :, 100:] == -math.inf).all()  # not in use
        assert (result.out[0] == 0).all()
        if causal:
            assert torch.equal(result.lse[2, :, :90], expected[:, :90])
        (gradient,) = torch.autograd.grad(result.lse[0, :, :100].sum(), leaf)
        torch.testing.assert_close(gradient, torch.full((4,), 100.0))


def test_merge_keeps_the_sink_of_an_empty_part():
    q, k, v = inputs(queries=50)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    one = attention(q, k, v, sinks=sinks, return_lse=True)
    for cut in (0, 100):
        first = attention(q, k[:, :cut], v[:, :cut], sinks=sinks, return_lse=True)
        rest = attention(q, k[:, cut:], v[:, cut:], return_lse=True)
        out, lse = blasst.merge(first.out, first.lse, rest.out, rest.lse)
        torch.testing.assert_close(out, one.out, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse, one.lse, atol=1e-5, rtol=0)


def test_merge_traces_and_refuses():
    out, lse = torch.randn(2, 3, 4, 16), torch.randn(2, 4, 3)
    compiled = torch.compile(blasst.merge, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        compiled(out, lse, -out, 2 * lse), blasst.merge(out, lse, -out, 2 * lse), strict=True
    ):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"lse2 is \[2, 3, 4\] with an output of \[2, 3, 4, 16\]"):
        blasst.merge(out, lse, out, lse.transpose(1, 2))
    with pytest.raises(ValueError, match=r"out2 is \[2, 3, 4, 24\], but out1 is"):
        blasst.merge(out, lse, torch.randn(2, 3, 4, 24), lse)
    with pytest.raises(TypeError, match=r"lse2 is torch.float64; it must be torch.float32"):
        blasst.merge(out, lse, out, lse.double())
    with pytest.raises(TypeError, match=r"lse1 is a NoneType; it must be a torch\.Tensor$"):
        blasst.merge(out, None, out, lse)
    with pytest.raises(NotImplementedError, match=r"blasst\.merge has no backward pass"):
        blasst.merge(out.requires_grad_(), lse, out, lse)[0].sum().backward()


def test_the_tensors_of_a_merge_share_a_device():
    tensors = torch.randn(2, 3, 4, 16), torch.randn(2, 4, 3)
    tensors = [*tensors, *tensors]
    for i in range(1, 4):
        with pytest.raises(ValueError, match="is on meta, out1 on cpu"):
            blasst.merge(*(t.to("meta") if i == j else t for j, t in enumerate(tensors)))
    by_head = [t if t.dim() == 4 else t.transpose(0, 1).flatten(1) for t in tensors]
    names = ("out_a", "lse_a", "out_b", "lse_b")
    for name in names:
        given = dict(zip(names, by_head, strict=True))
        with pytest.raises(ValueError, match=r"is on (meta|cpu), out_a on (cpu|meta)"):
            call("merge", **{**given, name: given[name].to("meta")})


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tile_shape_refuses_what_attention_would(phase):
    q, k, v = inputs(queries=3)
    for tensors, error, message in [
        ((q[0], k, v), ValueError, r"q is \[3, 4, 32\]; it must be \[batch, query_length"),
        ((q, k.half(), v), TypeError, "k is torch.float16, but q is torch.float32"),
        ((q, k, v[:, 1:]), ValueError, r"v is \[2, 149, 2, 32\], but k is"),
        ((q, k, v.to("meta")), ValueError, "v is on meta, q on cpu"),
        ((q, k, None), TypeError, r"v is a NoneType; it must be a torch\.Tensor"),
    ]:
        with pytest.raises(error, match=message):
            blasst.tile_shape(*tensors, phase=phase)
    with pytest.raises(ValueError, match="phase is 'train'; it must be one of prefill, decode"):
        blasst.tile_shape(q, k, v, phase="train")


def test_pages_are_always_checked_on_the_cpu():
    q, k, v = inputs(queries=1, keys=64)
    paged = {"page_table": torch.tensor([[0], [2]]), "lengths": torch.tensor([64, 64])}
    with pytest.raises(ValueError, match=r"page_table\[1, 0\] is 2; kv.pages is 2"):
        attention(q, k, v, check_pages=True, **paged)


def test_indices_of_64_bits_stay_out_of_range_on_cuda():
    lengths = torch.tensor([2**40, -(2**40), 2**32 + 3, 5])
    given = {"starts": None, "lengths": lengths, "query_lengths": None}
    places, _ = arguments.places_on_cuda(given, Q, K, "prefill", None)
    assert places["lengths"].dtype == torch.int32
    assert places["lengths"].tolist() == [2**31 - 1, -(2**31), 2**31 - 1, 5]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "rows"), [(4, 4, 192, 128, 4), (128, 1, 576, 512, 2)]
)
def test_a_compiled_decode_knows_the_tiles_of_other_values(heads, kv_heads, dim, value_dim, rows):
    """Of a GPU, which none need have: values smaller than keys have kernels of their own."""
    try:
        library.plan("decode", torch.device("cuda"), torch.bfloat16, head_dim=128)
    except blasst.NotSupportedError:
        pytest.skip("built without CUDA")
    with FakeTensorMode():
        q = torch.empty(2, 1, heads, dim, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 256, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
        v = k[..., :value_dim] if kv_heads == 1 else torch.empty_like(k)[..., :value_dim]
        lengths = torch.empty(2, dtype=torch.int64, device="cuda")
        options = {"causal": True, "lengths": lengths, "phase": "decode"}
        assert attention(q, k, v, **options).shape == (2, 1, heads, value_dim)
        mask = attention(q, k, v, **options, return_tile_mask=True).tile_mask
        assert mask.shape == (2, rows, 4)
