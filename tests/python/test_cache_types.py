"""Keys and values in 8 bits: numbers, scales, layouts, front doors, tracing, errors."""

import pytest
import torch
from torch import Tensor

from blasst import (
    NotSupportedError,
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    workspace_bytes,
)
from needle import FP8, INT8, PLACES, check_needle
from test_attention import EVERYTHING, assert_same, dense, distances, inputs

PAIRS = [(FP8, FP8), (INT8, INT8), (INT8, None), (None, FP8)]


def quantized(t: Tensor, dtype: torch.dtype | None, scale: Tensor) -> Tensor:
    """In units of `scale`, [1 or batch, 1 or kv_heads]; as it is if dtype is None."""
    if dtype is None:
        return t
    units = t.float() / scale[:, None, :, None]
    return (units.round().clamp(-128, 127) if dtype == INT8 else units.clamp(-448, 448)).to(dtype)


def restored(t: Tensor, scale: Tensor) -> Tensor:
    return t.double() * scale.double()[:, None, :, None]


def scales(dtype: torch.dtype | None, *shape: int) -> Tensor:
    most = 448 if dtype == FP8 else 127
    return (torch.rand(shape, generator=torch.Generator().manual_seed(4)) + 1) * 12 / most


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (2, 1)], ids=str)
def test_is_attention_over_the_numbers_that_are_stored(phase, pair, shape):
    rows = 150 if phase == "prefill" else 3
    q, k, v = inputs(queries=rows, keys=400, value_dim=48)
    k_scale, v_scale = scales(pair[0], *shape), scales(pair[1], *shape)
    small_k, small_v = quantized(k, pair[0], k_scale), quantized(v, pair[1], v_scale)
    given = {}
    if pair[0]:
        given["k_scale"], k = k_scale, restored(small_k, k_scale)
    if pair[1]:
        given["v_scale"], v = v_scale, restored(small_v, v_scale)
    options = {"causal": True, "phase": phase, "return_lse": True}
    result = attention(q, small_k, small_v, **given, **options)
    assert result.out.dtype == q.dtype
    visible = distances(rows, 400) >= 0
    torch.testing.assert_close(result.out.double(), dense(q, k, v, visible), atol=2e-5, rtol=1e-5)
    sparse = attention(*(q, small_k, small_v), **given, **options, threshold=0.3, return_stats=True)
    exact = attention(*(q, k.float(), v.float()), **options, threshold=0.3, return_stats=True)
    assert sparse.stats.sparsity > 0.05
    assert torch.equal(sparse.stats.skipped, exact.stats.skipped)
    torch.testing.assert_close(sparse.out, exact.out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_has_the_bits_of_the_same_numbers_in_the_type_of_q(phase, dtype):
    q, k, v = inputs(queries=5, keys=300, dtype=dtype)
    for small in (FP8, INT8):
        small_k, small_v = (8 * k.float()).to(small), (8 * v.float()).to(small)
        options = {"phase": phase, "threshold": 0.2, **EVERYTHING}
        got = attention(q, small_k, small_v, scale=0.02, **options)
        wanted = attention(q, small_k.to(dtype), small_v.to(dtype), scale=0.02, **options)
        assert_same(got, wanted)
        assert_same(attention(q, small_k, small_v, scale=0.08, k_scale=0.25, **options), wanted)


def test_forms_of_a_scale():
    q, k, v = inputs(queries=1, keys=100)
    k, v = k.to(FP8), v.to(FP8)
    by_head = torch.tensor([0.5, 2.0])
    for forms in (
        (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]).double()),
        (by_head, by_head[None], by_head.expand(2, 2), by_head.to(torch.bfloat16)),
    ):
        first, *others = (attention(q, k, v, k_scale=form, v_scale=form) for form in forms)
        for other in others:
            assert torch.equal(first, other)
    assert torch.equal(attention(q, k, v), attention(q, k, v, k_scale=1, v_scale=1.0))


def test_pages_and_ragged_requests():
    q, k, v = inputs(queries=2, keys=128)
    k, v = k.to(FP8), (10 * v).to(INT8)
    given = {"k_scale": torch.tensor([[0.5, 1.5], [2.0, 1.0]]), "v_scale": torch.tensor([0.1, 0.2])}
    whole = attention(q, k, v, phase="decode", causal=True, threshold=0.1, **given)
    lengths = torch.tensor([128, 128])
    table = torch.tensor([[3, 1, 0, 5], [2, 7, 6, 4]])
    pages = [torch.empty(8, 32, *t.shape[2:], dtype=t.dtype) for t in (k, v)]
    for paged, t in zip(pages, (k, v), strict=True):
        paged.view(torch.uint8)[table.flatten()] = (
            t.unflatten(1, (4, 32)).flatten(0, 1).view(torch.uint8)
        )
    paged = attention(
        q,
        *pages,
        phase="decode",
        causal=True,
        threshold=0.1,
        page_table=table,
        lengths=lengths,
        **given,
    )
    assert torch.equal(paged, whole)
    prefill = attention(q, k, v, phase="prefill", causal=True, threshold=0.1, **given)
    ragged = attention(
        *(t.flatten(0, 1) for t in (q, k, v)),
        phase="prefill",
        causal=True,
        threshold=0.1,
        cu_seqlens_q=torch.tensor([0, 2, 4]),
        cu_seqlens_k=torch.tensor([0, 128, 256]),
        **given,
    )
    assert torch.equal(ragged.view_as(prefill), prefill)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("at", PLACES)
def test_a_needle_among_128k_keys_is_found(pair, at):
    check_needle(pair, 64, at, close=1e-5)


def test_front_doors_take_descales():
    q, k, v = inputs(queries=1, keys=96)
    k, v = k.to(FP8), v.to(FP8)
    k_descale, v_descale = torch.tensor([[0.5, 2], [1, 3]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    wanted = attention(q, k, v, k_scale=k_descale, v_scale=v_descale)
    descales = {"k_descale": k_descale, "v_descale": v_descale}
    assert torch.equal(flash_attn_func(q, k, v, **descales), wanted)
    assert torch.equal(flash_attn_with_kvcache(q, k, v, **descales), wanted)
    room = [torch.zeros(2, 128, *t.shape[2:], dtype=t.dtype) for t in (k, v)]
    for cache, t in zip(room, (k, v), strict=True):
        cache[:, :95] = t[:, :95]
    appended = flash_attn_with_kvcache(
        *(q, *room), k=k[:, 95:], v=v[:, 95:], cache_seqlens=95, **descales
    )
    assert torch.equal(appended, wanted)
    cu_q, cu_k = torch.tensor([0, 1, 2]), torch.tensor([0, 96, 192])
    ragged = flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), cu_q, cu_k, 1, 96, **descales
    )
    prefill = attention(q, k, v, phase="prefill", k_scale=k_descale, v_scale=v_descale)
    assert torch.equal(ragged.view_as(prefill), prefill)


def test_autocast_leaves_caches_as_they_are():
    q, k, v = inputs(queries=3, keys=70)
    k, v = k.to(FP8), (10 * v).to(INT8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, v_scale=0.1)
    assert torch.equal(out, attention(q.bfloat16(), k, v, v_scale=0.1))


def test_fake_tensors_and_compilation():
    q, k, v = inputs(queries=1, keys=100)
    k, v, scale = (10 * k).to(INT8), (10 * v).to(INT8), torch.tensor([[0.1]])
    nothing = [None] * 6
    tail = (0.0, 0.0, None, False, -1, -1, None, None, "sink_first", "none", None)
    report = (True, False, True, False, False, True)
    for phase in ("prefill", "decode"):
        torch.library.opcheck(
            getattr(torch.ops.blasst, phase),
            (q, k, v, *nothing, *tail, *report, None, None, "exact", scale, scale),
        )
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    given = {"k_scale": scale, "v_scale": 0.5}
    assert torch.equal(compiled(q, k, v, **given), attention(q, k, v, **given))


def test_a_workspace_is_large_enough_for_them():
    q, k, v = inputs(queries=1, keys=300)
    k, v = k.to(FP8), (10 * v).to(INT8)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "batch": 2, "keys": 300}
    small = workspace_bytes("decode", "cpu", torch.float32, **shape)
    room = workspace_bytes("decode", "cpu", torch.float32, **shape, k_dtype=FP8, v_dtype=INT8)
    assert room > small
    out = torch.empty_like(q)
    attention(q, k, v, out=out, workspace=torch.empty(room, dtype=torch.uint8))
    assert torch.equal(out, attention(q, k, v))
    with pytest.raises(ValueError, match="of at least"):
        attention(q, k, v, out=out, workspace=torch.empty(small, dtype=torch.uint8))


Q, K, V = inputs(queries=3, keys=70)
K8, V8 = K.to(FP8), V.to(FP8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention(Q, K, V, k_scale=0.5), ValueError, "k_scale is given, but k is"),
        (lambda: attention(Q, K8, V, v_scale=0.5), ValueError, "v_scale is given, but v is"),
        (lambda: attention(Q, K8, V8, k_scale=0.0), ValueError, "k_scale is 0.0; it must be posi"),
        (lambda: attention(Q, K8, V8, v_scale=-1), ValueError, "v_scale is -1; it must be posit"),
        (lambda: attention(Q, K8, V8, k_scale=1e-50), ValueError, "k_scale is 1e-50; it must be 1"),
        (lambda: attention(Q, K8, V8, v_scale=1e39), ValueError, "v_scale is 1e.39; it must be 1"),
        (lambda: attention(Q, K8, V8, k_scale=float("nan")), ValueError, "k_scale is nan"),
        (lambda: attention(Q, K8, V8, k_scale="1"), TypeError, "k_scale is '1'; it must be a nu"),
        (lambda: attention(Q, K8, V8, k_scale=True), TypeError, "k_scale is True"),
        (
            lambda: attention(Q, K8, V8, v_scale=torch.tensor([1.0, 0.0])),
            ValueError,
            "v_scales of request 0, KV head 1 is 0; it must be positive and finite",
        ),
        (
            lambda: attention(Q, K8, V8, k_scale=torch.tensor([[1.0], [float("nan")]])),
            ValueError,
            "k_scales of request 1, KV head 0 is nan",
        ),
        (
            lambda: attention(Q, K8, V8, k_scale=torch.tensor([1, 2])),
            TypeError,
            "k_scale is torch.int64",
        ),
        (
            lambda: attention(Q, K8, V8, k_scale=torch.ones(3)),
            ValueError,
            r"k_scale is \[1, 3\]; it must be \[1 or batch, 1 or kv_heads\] with batch 2 and kv_h",
        ),
        (
            lambda: attention(Q, K8, V8, k_scale=torch.ones(1, 1, 1)),
            ValueError,
            r"k_scale is \[1, 1, 1\]; it must be a number, or a tensor",
        ),
        (
            lambda: attention(Q, K8, V8, k_scale=torch.ones(2, requires_grad=True)),
            NotSupportedError,
            "k_scale requires a gradient",
        ),
        (
            lambda: attention(Q, K.to(torch.float8_e5m2), V),
            TypeError,
            "k is torch.float8_e5m2, but q is torch.float32; they must be of one type, or k",
        ),
        (
            lambda: attention(K8[:, :3].repeat(1, 1, 2, 1), K8, V8),
            TypeError,
            "q is torch.float8_e4m3fn",
        ),
        (
            lambda: attention(Q.clone().requires_grad_(), K8, V8).sum().backward(),
            NotSupportedError,
            "k is torch.float8_e4m3fn; .* no backward pass",
        ),
        (
            lambda: (
                attention(Q, K, V8, phase="prefill", sinks=torch.zeros(4, requires_grad=True))
                .sum()
                .backward()
            ),
            NotSupportedError,
            "v is torch.float8_e4m3fn; .* no backward pass",
        ),
        (
            lambda: flash_attn_func(Q, K, V, k_descale=torch.ones(2, 2)),
            ValueError,
            "k_scale is given, but k is",
        ),
    ],
)
def test_bad_input_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
