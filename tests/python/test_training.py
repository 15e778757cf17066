"""Gradients of blasst.attention against float64 autograd of softmax over the kept tiles."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blasst import attention
from blasst.ops.library import KEYS, QUERY_ROWS, REPORTS, call

THRESHOLD = 0.3
ABSENT = (
    *("starts", "lengths", "query_lengths", "cu_seqlens_q", "cu_seqlens_k", "page_table"),
    *("max_seqlen_q", "max_seqlen_k", "bands", "blocks"),
)


def inputs(batch=2, queries=150, keys=330, heads=4, kv_heads=2, dim=32, dtype=torch.float32):
    """q, k, v in which some stretches of keys matter more than others, so that tiles can go."""
    generator = torch.Generator().manual_seed(batch + queries + 3 * keys + heads)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k = normal(batch, queries, heads, dim), normal(batch, keys, kv_heads, dim)
    size = torch.tensor([3.0, 0.1, 0.2, 4.0, 0.1, 1.0])[torch.arange(keys) // 64 % 6]
    k, v = k * size[:, None, None], normal(batch, keys, kv_heads, dim)
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, v))


def kept_keys(q: Tensor, k: Tensor, v: Tensor, causal=True, threshold=THRESHOLD, **options):
    """[batch, heads, queries, keys]: whether attention keeps the tile."""
    mask = attention(
        *(q, k, v),
        causal=causal,
        threshold=threshold,
        phase="prefill",
        return_tile_mask=True,
        **options,
    ).tile_mask
    mask = mask.repeat_interleave(QUERY_ROWS, 2).repeat_interleave(KEYS, 3)
    return mask[:, :, : q.shape[1], : k.shape[1]]


def softmax_over(q, k, v, kept, causal=True, scale=None, softcap=None, sinks=None, window=None):
    """Attention as one writes it down, in the type of the inputs, and its lse."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
    visible = kept & (distance >= (0 if causal else -keys))
    if window is not None:
        visible &= (distance <= window[0]) & (-distance <= window[1])
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    out = (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)
    return out, scores.logsumexp(-1)


def gradients(result: Tensor, wanted: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, wanted, weights.to(result.dtype))


def noise_like(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": None},
        {},
        {"causal": False},
        {"softcap": 4.0, "scale": 0.4, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"window": (100, 20), "causal": False},
    ],
    ids="+".join,
)
def test_float32_is_as_good_as_plain_float32(options):
    q, k, v = inputs()
    wanted = [q, k, v]
    if "sinks" in options:
        options = {**options, "sinks": options["sinks"].clone().requires_grad_()}
        wanted.append(options["sinks"])
    plain = {name: o for name, o in options.items() if name != "threshold"}
    got = attention(q, k, v, **{"causal": True, "threshold": THRESHOLD, **options})
    dout = noise_like(got)
    with torch.no_grad():
        kept = kept_keys(q, k, v, **options)
    skipped = ~kept[..., ::QUERY_ROWS, ::KEYS]
    assert options.get("threshold", THRESHOLD) is None or skipped.float().mean() > 0.1

    doubles = [t.detach().double().requires_grad_() for t in wanted]
    exact_options = {**plain, "sinks": doubles[3]} if "sinks" in options else plain
    exact = gradients(softmax_over(*doubles[:3], kept, **exact_options)[0], doubles, dout)
    floats = gradients(softmax_over(q, k, v, kept, **plain)[0], wanted, dout)
    ours = gradients(got, wanted, dout)
    for name, e, f, o in zip(["q", "k", "v", "sinks"], exact, floats, ours, strict=False):
        error, plain_error = (o - e).norm() / e.norm(), (f - e).norm() / e.norm()
        assert error <= 2 * plain_error + 1e-7, f"d{name}: {error}, plain {plain_error}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype):
    q, k, v = inputs(dtype=dtype)
    got = attention(q, k, v, causal=True, threshold=THRESHOLD)
    dout = noise_like(got).to(dtype)
    with torch.no_grad():
        kept = kept_keys(q, k, v)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = gradients(softmax_over(*doubles, kept)[0], doubles, dout)
    for e, o in zip(exact, gradients(got, [q, k, v], dout), strict=True):
        assert o.dtype == dtype
        assert (o - e).norm() <= 2 * torch.finfo(dtype).eps * e.norm()


def test_the_lse_has_a_gradient():
    q, k, v = inputs()
    result = attention(q, k, v, causal=True, threshold=THRESHOLD, return_lse=True)
    dlse = noise_like(result.lse)
    with torch.no_grad():
        kept = kept_keys(q, k, v)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = gradients(softmax_over(*doubles, kept)[1], doubles[:2], dlse)
    for e, o in zip(exact, gradients(result.lse, [q, k], dlse), strict=True):
        assert (o - e).norm() <= 1e-5 * e.norm()


def test_threshold_zero_gives_the_bits_of_dense():
    q, k, v = inputs()
    dense = attention(q, k, v, causal=True)
    dout = noise_like(dense)
    zero = attention(q, k, v, causal=True, threshold=0.0)
    for a, b in zip(
        gradients(dense, [q, k, v], dout), gradients(zero, [q, k, v], dout), strict=True
    ):
        assert torch.equal(a, b)


def test_ragged_requests_have_the_gradients_they_have_alone():
    lengths = [150, 1, 0, 260]
    q, k, v = (t.detach()[0].requires_grad_() for t in inputs(batch=1, queries=411, keys=411))
    cu = torch.tensor([0, 150, 151, 151, 411], dtype=torch.int32)
    out = attention(
        q, k, v, causal=True, threshold=THRESHOLD, cu_seqlens_q=cu, cu_seqlens_k=cu, phase="prefill"
    )
    dout = noise_like(out)
    together = gradients(out, [q, k, v], dout)
    first = 0
    for length in filter(None, lengths):
        rows = slice(first, first + length)
        first += length
        part = [t.detach()[None, rows].requires_grad_() for t in (q, k, v)]
        alone = attention(*part, causal=True, threshold=THRESHOLD, phase="prefill")
        for a, b in zip(gradients(alone, part, dout[None, rows]), together, strict=True):
            assert torch.equal(a[0], b[rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_gradient_and_changes_none(side):
    q, k, v = inputs(batch=2, queries=200, keys=200)
    used = [200, 130]
    if side == "left":
        padding = {"starts": torch.tensor([0, 70], dtype=torch.int32)}
        rows = slice(70, 200)
    else:
        ends = torch.tensor(used, dtype=torch.int32)
        padding = {"lengths": ends, "query_lengths": ends}
        rows = slice(0, 130)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_()
    options = {"causal": True, "threshold": THRESHOLD, "sinks": sinks}
    out = attention(q, k, v, **options, **padding)
    dout = noise_like(out)
    together = gradients(out, [q, k, v, sinks], dout)
    dsinks = torch.zeros(4)
    for request, part_rows in enumerate([slice(0, 200), rows]):
        part = [t.detach()[request, None, part_rows].requires_grad_() for t in (q, k, v)]
        alone = gradients(
            attention(*part, **options), [*part, sinks], dout[request, None, part_rows]
        )
        for a, b in zip(alone[:3], together, strict=False):
            assert torch.equal(a[0], b[request, part_rows])
            assert b[request].count_nonzero() == a.count_nonzero()
        dsinks += alone[3]
    torch.testing.assert_close(dsinks, together[3], rtol=1e-6, atol=0)  # rounded once


def test_compiled_gradients_are_the_eager_ones():
    q, k, v = inputs()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_()

    def loss(q, k, v, sinks):
        result = attention(
            2 * q, k, v, causal=True, threshold=THRESHOLD, sinks=sinks, return_lse=True
        )
        return (result.out**2).sum() + result.lse.sum()

    wanted = [q, k, v, sinks]
    eager = torch.autograd.grad(loss(*wanted), wanted)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for a, b in zip(eager, torch.autograd.grad(compiled(*wanted), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant):
    q, k, v = inputs()

    def layer(q, k, v):
        return attention(q, k, v, causal=True, threshold=THRESHOLD)

    plain = layer(q, k, v)
    dout = noise_like(plain)
    plain.backward(dout)
    wanted = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    checkpoint(layer, q, k, v, use_reentrant=reentrant).backward(dout)
    for t, w in zip((q, k, v), wanted, strict=True):
        assert torch.equal(t.grad, w)


def test_the_saved_tensors_serve_twice():
    q, k, v = inputs()
    out = attention(q, k, v, causal=True, threshold=THRESHOLD)
    dout = noise_like(out)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert all(map(torch.equal, first, second))
    third = torch.autograd.grad(out, (q, k, v), 2 * dout)
    for a, b in zip(first, third, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_any_strides_and_any_subset_of_gradients():
    q, k, v = inputs()
    wanted = attention(q, k, v, causal=True, threshold=THRESHOLD)
    dout = noise_like(wanted)
    expected = gradients(wanted, [q, k, v], dout)
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for chosen in ([0], [1], [2], [0, 2]):
        leaves = [t.clone().requires_grad_(i in chosen) for i, t in enumerate(turned)]
        out = attention(*leaves, causal=True, threshold=THRESHOLD)
        got = gradients(out, [leaves[i] for i in chosen], dout)
        assert all(torch.equal(g, expected[i]) for g, i in zip(got, chosen, strict=True))
    # The gradient of a sum is one number seen many times.
    summed = torch.autograd.grad(attention(q, k, v, causal=True).sum(), v)[0]
    ones = torch.autograd.grad(attention(q, k, v, causal=True), v, torch.ones_like(wanted))[0]
    assert torch.equal(summed, ones)


@pytest.mark.parametrize("what", ["bands", "blocks"])
def test_the_backward_follows_the_policy(what):
    q, k, v = inputs(batch=1)
    distance = torch.arange(150)[:, None] + 330 - 150 - torch.arange(330)
    if what == "bands":
        policy = [(0, 79), (80, 159), (160, 239), (240, 400)]
        visible = [(distance >= first) & (distance <= last) for first, last in policy]
        visible = torch.stack(visible) & (distance >= 0)
        assert not visible.any(-1).all(), "some rows must have no valid key"
    else:
        policy = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(1)) < 0.6
        policy[..., 0] = True
        visible = policy.repeat_interleave(QUERY_ROWS, 1).repeat_interleave(KEYS, 2)
        visible = visible[:, :150, :330]
    got = attention(q, k, v, causal=True, **{what: policy})
    dout = noise_like(got)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    some = (visible & (distance >= 0)).any(-1)  # rows without a key give 0, whatever the keys
    out = softmax_over(*doubles, visible | ~some[..., None])[0]
    exact = gradients(torch.where(some.T[None, ..., None], out, 0.0), doubles, dout)
    ours = gradients(got, [q, k, v], dout)
    for name, e, o in zip("qkv", exact, ours, strict=True):
        assert (o - e).norm() <= 1e-5 * e.norm(), name
    assert not ours[0][:, ~some.T].any()


def test_autocast_gives_gradients_of_the_leaves_type():
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, causal=True, threshold=THRESHOLD)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def backward_arguments(lengths=None, sinks=None) -> dict:
    """What prefill_backward takes by name, after a prefill."""
    q, k, v = (t.detach() for t in inputs())
    problem = {
        **dict.fromkeys(ABSENT),
        **{"q": q, "k": k, "v": v, "lengths": lengths, "sinks": sinks},
        **{"scale": 0.0, "softcap": 0.0, "causal": True, "window_left": -1, "window_right": -1},
        "bands": torch.tensor([[0, 40], [41, 90], [0, 200], [3, 3]]),
        "blocks": torch.ones(4, 6, 6, dtype=torch.uint8),
    }
    out, lse, *_, bits = call(
        "prefill",
        **problem,
        **{"order": "sink_first", "test": "none", "thresholds": None},
        **{f"want_{name}": name in ("lse", "bits") for name in REPORTS},
    )
    return {"dout": noise_like(out), "dlse": None, **problem, "out": out, "lse": lse, "bits": bits}


def test_fake_gradients_have_the_real_shapes():
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    ends = torch.tensor([330, 130], dtype=torch.int32)
    for lengths, sink in ((None, None), (ends, sinks)):
        given = backward_arguments(lengths, sink)
        torch.library.opcheck(torch.ops.blasst.prefill_backward, (), given)


def test_the_backward_reads_strided_tensors():
    given = backward_arguments()
    given["dlse"] = noise_like(given["lse"])
    wanted = call("prefill_backward", **given)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]

    for name in ("dout", "dlse", "q", "k", "v", "out", "lse", "bits", "bands", "blocks"):
        for a, b in zip(
            call("prefill_backward", **{**given, name: strided(given[name])}), wanted, strict=True
        ):
            assert torch.equal(a, b), name
    ones = torch.full((1,), -1, dtype=torch.int32).expand(given["bits"].shape)
    everything = torch.full_like(given["bits"], -1)
    for a, b in zip(
        call("prefill_backward", **{**given, "bits": ones}),
        call("prefill_backward", **{**given, "bits": everything}),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "bits",
            lambda t: t.to(torch.int8),
            TypeError,
            "bits is torch.int8; it must be torch.int32",
        ),
        ("bits", lambda t: t.double(), TypeError, "bits is torch.float64; it must be torch.int32"),
        ("bits", lambda t: t[1:], ValueError, "bits is [23]; it must be [24], as prefill"),
        ("lse", lambda t: t.double(), TypeError, "lse is torch.float64; it must be torch.float32"),
        ("lse", lambda t: t.half(), TypeError, "lse is torch.float16; it must be torch.float32"),
        ("lse", lambda t: t[:, 1:], ValueError, "lse is [4, 299]; it must be [heads, rows]"),
        (
            "dlse",
            lambda _: torch.zeros(4, 300, dtype=int),
            TypeError,
            "dlse is torch.int64; it must be",
        ),
        ("dlse", lambda _: torch.zeros(4), ValueError, "dlse is [4]; it must be [heads, rows]"),
        (
            "out",
            lambda t: t[..., :16],
            ValueError,
            "out is [2, 150, 4, 16]; it must be [..., heads",
        ),
        ("out", lambda t: t.half(), TypeError, "out is torch.float16; it must be torch.float32"),
        ("dout", lambda t: t[0], ValueError, "dout is [150, 4, 32]; it must be [..., heads"),
        (
            "dout",
            lambda t: t.double(),
            TypeError,
            "dout is torch.float64; it must be torch.float32",
        ),
        ("v", lambda t: t.half(), TypeError, "v is torch.float16, but q is torch.float32"),
        ("k", lambda t: t[:, 1:], ValueError, "v is [2, 330, 2, 32], but k is [2, 329, 2, 32]"),
        ("bands", lambda t: t.int(), TypeError, "bands is torch.int32; it must be torch.int64"),
        ("blocks", lambda t: t.bool(), TypeError, "blocks is torch.bool; it must be torch.uint8"),
        ("blocks", lambda t: t[:, 1:], ValueError, "blocks is [4, 5, 6]; for tiles of 64 rows"),
        (
            "starts",
            lambda _: torch.zeros(2),
            TypeError,
            "starts is torch.float32; it must be int32",
        ),
        (
            "sinks",
            lambda _: torch.zeros(4).half(),
            TypeError,
            "sinks is torch.float16; it must be torch.float32",
        ),
    ],
)
def test_the_backward_checks_every_tensor(name, change, error, message):
    given = backward_arguments()
    with pytest.raises(error) as raised:
        call("prefill_backward", **{**given, name: change(given[name])})
    assert message in str(raised.value)


def test_every_tensor_must_share_the_device():
    given = backward_arguments(torch.tensor([330, 130]), torch.zeros(4))
    given["dlse"] = noise_like(given["lse"])
    for name in filter(lambda name: isinstance(given[name], Tensor), given):
        first = "dout is on cpu, q on meta" if name == "q" else f"{name} is on meta, q on cpu"
        with pytest.raises(ValueError, match=first):
            call("prefill_backward", **{**given, name: given[name].to("meta")})


def test_gradients_of_pages_are_those_of_the_keys_in_them():
    q, k, v = inputs(queries=70)
    size = 32
    lengths = torch.tensor([k.shape[1], 100], dtype=torch.int32)
    count = -(-k.shape[1] // size)
    table = torch.randperm(2 * count + 1, generator=torch.Generator().manual_seed(3)).int()
    table = table[: 2 * count].view(2, count)

    def paged(t):
        padded = torch.nn.functional.pad(t.detach(), (0, 0, 0, 0, 0, count * size - t.shape[1]))
        pages = torch.full((2 * count + 1, size, *t.shape[2:]), math.nan)
        pages[table.long()] = padded.unflatten(1, (count, size))
        return pages.requires_grad_()

    options = {"causal": True, "threshold": THRESHOLD, "lengths": lengths, "phase": "prefill"}
    dense = torch.autograd.grad((attention(q, k, v, **options) ** 2).sum(), (q, k, v))
    kp, vp = paged(k), paged(v)
    out = attention(q, kp, vp, page_table=table, **options)
    dq, *pages = torch.autograd.grad((out**2).sum(), (q, kp, vp))
    assert torch.equal(dq, dense[0])
    for gradient, wanted in zip(pages, dense[1:], strict=True):
        unused = torch.ones(len(gradient), dtype=torch.bool)
        unused[table.long()] = False
        assert not gradient[unused].any()
        assert torch.equal(gradient[table.long()].flatten(1, 2)[:, : k.shape[1]], wanted)


def test_what_has_no_backward_is_named():
    q, k, v = inputs(queries=2)
    with pytest.raises(NotImplementedError, match="phase='decode'"):
        attention(q, k, v, phase="decode").sum().backward()
    pages = torch.zeros(2, 1, dtype=torch.int32)
    lengths = torch.full((2,), 200, dtype=torch.int32)
    kp, vp = (t.detach()[:, :200].clone().requires_grad_() for t in (k, v))
    with pytest.raises(NotImplementedError, match="page 0 is used by requests 0 and 1"):
        attention(q, kp, vp, page_table=pages, lengths=lengths, phase="prefill").sum().backward()
    out = attention(q, k, v, causal=True, phase="prefill")
    first = torch.autograd.grad((out**2).sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()
    threshold = torch.tensor(0.3, requires_grad=True)
    for keep in (0, 3):  # alone, and beside q, k and v
        leaves = [t if i < keep else t.detach() for i, t in enumerate((q, k, v))]
        with pytest.raises(NotImplementedError, match="the threshold requires a gradient"):
            attention(*leaves, causal=True, threshold=threshold, phase="prefill")
    with torch.no_grad():
        attention(q, k, v, causal=True, threshold=threshold, phase="prefill")
    result = attention(q, k, v, causal=True, return_error_bound=True, phase="prefill")
    assert not result.dropped_mass_bound.requires_grad
