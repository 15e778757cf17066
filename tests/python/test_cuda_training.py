"""Gradients on a GPU of compute capability 9.0, against float64 autograd over the kept tiles."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blasst import attention
from blasst.ops.library import prefill_tile
from gpu import hopper

pytestmark = hopper
THRESHOLD = 0.3


SIZES = pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)]
)


def inputs(
    batch=2,
    queries=400,
    keys=700,
    heads=4,
    kv_heads=2,
    dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
):
    """q, k, v in which some stretches of keys matter more than others, so that tiles can go."""
    generator = torch.Generator().manual_seed(batch + queries + 3 * keys + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = normal(batch, queries, heads, dim), normal(batch, keys, kv_heads, dim)
    size = torch.tensor([3.0, 0.1, 0.2, 4.0, 0.1, 1.0])[torch.arange(keys) // 128 % 6]
    k, v = k * size[:, None, None], normal(batch, keys, kv_heads, value_dim)
    return tuple(t.to("cuda", dtype).requires_grad_() for t in (q, k, v))


def noise_like(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(t.shape, generator=generator).to(t.device, t.dtype)


def kept_keys(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """[batch, heads, queries, keys]: whether attention keeps the tile."""
    mask = attention(q, k, v, phase="prefill", return_tile_mask=True, **options).tile_mask
    rows, keys = prefill_tile(q.device, q.shape[-1], v.shape[-1])
    mask = mask.repeat_interleave(rows, 2).repeat_interleave(keys, 3)
    return mask[:, :, : q.shape[1], : k.shape[1]]


def softmax_over(q, k, v, kept, causal=True, softcap=None, sinks=None, window=None, **_):
    """Attention as one writes it down, in the type of the inputs, and its lse."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    distance = (torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)).to(q.device)
    visible = kept & (distance >= (0 if causal else -keys))
    if window is not None:
        visible &= (distance <= window[0]) & (-distance <= window[1])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    out = (scores.softmax(-1)[..., :keys] @ v).transpose(1, 2)
    return out, scores.logsumexp(-1)


def norm_of_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SIZES
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": None},
        {},
        {"causal": False},
        {"softcap": 4.0, "sinks": [0.5, -1.0, 2.0, 0.0]},
        {"window": (300, 20), "causal": False},
    ],
    ids="+".join,
)
def test_gradients_are_as_good_as_plain_ones(
    options: dict, dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = inputs(dim=dim, value_dim=value_dim, dtype=dtype)
    options = {"causal": True, "threshold": THRESHOLD, **options}
    wanted = [q, k, v]
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device="cuda", requires_grad=True)
        wanted.append(options["sinks"])
    result = attention(q, k, v, return_lse=True, **options)
    dout, dlse = noise_like(result.out), noise_like(result.lse)
    with torch.no_grad():
        kept = kept_keys(q, k, v, **options)
    assert options["threshold"] is None or not kept[:, :, :, :128].all() or not kept.all()

    def gradients(leaves: list[Tensor], out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))

    def plain(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        sinks = leaves[3] if len(leaves) > 3 else None
        return gradients(leaves, *softmax_over(*leaves[:3], kept, **{**options, "sinks": sinks}))

    exact = plain([t.detach().double().requires_grad_() for t in wanted])
    rounded = plain([t.detach().clone().requires_grad_() for t in wanted])
    ours = gradients(wanted, result.out, result.lse)
    for name, e, p, o in zip(("q", "k", "v", "sinks"), exact, rounded, ours, strict=False):
        error, plain_error = norm_of_difference(o, e), norm_of_difference(p, e)
        assert error <= 2 * plain_error + 1e-6 * e.norm(), f"d{name}: {error}, plain {plain_error}"


@SIZES
def test_the_same_bits_whatever_asks_for_them(dim: int, value_dim: int) -> None:
    q, k, v = inputs(dim=dim, value_dim=value_dim)

    def layer(q: Tensor, k: Tensor, v: Tensor, threshold: float | None = THRESHOLD) -> Tensor:
        return attention(q, k, v, causal=True, threshold=threshold)

    out = layer(q, k, v)
    dout = noise_like(out)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for other in (out, checkpoint(layer, q, k, v, use_reentrant=False)):
        assert all(map(torch.equal, first, torch.autograd.grad(other, (q, k, v), dout)))
    dense, zero = (
        torch.autograd.grad(layer(q, k, v, threshold), (q, k, v), dout) for threshold in (None, 0)
    )
    assert all(map(torch.equal, dense, zero))
    assert not all(map(torch.equal, dense, first))


@SIZES
def test_packed_sequences_have_the_gradients_that_each_has_alone(dim: int, value_dim: int) -> None:
    lengths = [300, 0, 77, 513]
    sizes = {"dim": dim, "value_dim": value_dim}
    q, k, v = (t.detach()[0, : sum(lengths)] for t in inputs(1, 900, 900, **sizes))
    ends = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    packed = attention(
        *leaves, causal=True, threshold=THRESHOLD, cu_seqlens_q=ends, cu_seqlens_k=ends
    )
    dout = noise_like(packed)
    got = torch.autograd.grad(packed, leaves, dout)
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if begin == end:
            continue
        alone = [t[None, begin:end].clone().requires_grad_() for t in (q, k, v)]
        out = attention(*alone, causal=True, threshold=THRESHOLD)
        for g, w in zip(got, torch.autograd.grad(out, alone, dout[None, begin:end]), strict=True):
            assert torch.equal(g[begin:end], w[0])


def test_padded_batches() -> None:
    q, k, v = inputs(2, 400, 400)
    starts = torch.tensor([0, 130], device="cuda")
    out = attention(q, k, v, causal=True, threshold=THRESHOLD, starts=starts)
    dout = noise_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for request, start in enumerate(starts.tolist()):
        alone = [t.detach()[request : request + 1, start:].clone() for t in (q, k, v)]
        alone = [t.requires_grad_() for t in alone]
        out = attention(*alone, causal=True, threshold=THRESHOLD)
        wanted = torch.autograd.grad(out, alone, dout[request : request + 1, start:])
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g[request, start:], w[0])
            assert not g[request, :start].any()


def test_any_strides() -> None:
    q, k, v = inputs()
    out = attention(q, k, v, causal=True, threshold=THRESHOLD)
    dout = noise_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    wide = torch.zeros(*dout.shape[:-1], 131, dtype=dout.dtype, device="cuda")[..., 1:129]
    wide.copy_(dout)
    got = torch.autograd.grad(out, (q, k, v), wide, retain_graph=True)
    assert all(map(torch.equal, got, wanted))
    # The gradient of a sum is one number seen many times.
    summed = torch.autograd.grad(out.sum(), v, retain_graph=True)[0]
    assert torch.equal(summed, torch.autograd.grad(out, v, torch.ones_like(out))[0])


def test_compiled_and_under_autocast() -> None:
    q, k, v = (t.detach().float().requires_grad_() for t in inputs())

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return attention(q, k, v, causal=True, threshold=THRESHOLD).float().square().sum()

    eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(q, k, v), (q, k, v)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_what_has_no_backward_is_named() -> None:
    q, k, v = inputs(2, 100, 128)
    with pytest.raises(NotImplementedError, match="scores='int8' has no backward pass"):
        attention(q, k, v, scores="int8").sum().backward()
    pages = torch.arange(4, dtype=torch.int32, device="cuda").view(2, 2)
    k, v = (t.detach().view(4, 64, *t.shape[2:]).requires_grad_() for t in (k, v))
    lengths = torch.tensor([128, 128], device="cuda")
    with pytest.raises(NotImplementedError, match=r"kv\.layout is paged"):
        attention(q, k, v, page_table=pages, lengths=lengths, phase="prefill").sum().backward()
