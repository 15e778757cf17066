"""The fronts in the shape of FlashAttention and of torch, against torch in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blasst
from blasst import (
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from blasst.ops.kv_cache import Cache, only_placed, places

HEADS, KV_HEADS, DIM = 4, 2, 32


def inputs(batch=2, queries=70, keys=130, heads=HEADS, kv_heads=KV_HEADS, dim=DIM):
    """[batch, tokens, heads, head_dim]; some keys matter more than others, so that tiles can go."""
    generator = torch.Generator().manual_seed(queries + 3 * keys)
    q = torch.randn(batch, queries, heads, dim, generator=generator)
    k = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    k = k * torch.tensor([3.0, 0.1, 0.2])[torch.arange(keys) // 64 % 3][:, None, None]
    return q, k, torch.randn(batch, keys, kv_heads, dim, generator=generator)


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, scale=None) -> Tensor:
    """torch's attention in float64, [batch, tokens, heads, head_dim]; 0 for a row without keys."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
    if visible is not None:
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0)
    return out.transpose(1, 2)


def bottom_right(queries: int, keys: int, before=math.inf, after=0) -> Tensor:
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return (distance <= before) & (-distance <= after)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(70, 130), (1, 130), (130, 130), (130, 70)])
def test_flash_attn_func_masks_bottom_right(queries, keys):
    q, k, v = inputs(queries=queries, keys=keys)
    assert_close(flash_attn_func(q, k, v), exact(q, k, v))
    assert_close(
        flash_attn_func(q, k, v, 0.0, 0.3, True), exact(q, k, v, bottom_right(queries, keys), 0.3)
    )
    assert_close(
        flash_attn_func(q, k, v, window_size=(20, 3)),
        exact(q, k, v, bottom_right(queries, keys, 20, 3)),
    )
    assert_close(
        flash_attn_func(q, k, v, causal=True, window_size=(20, -1)),
        exact(q, k, v, bottom_right(queries, keys, 20)),
    )


def test_flash_attn_func_is_attention():
    q, k, v = inputs()
    for threshold in (None, 0, 0.2, [0.1, 0.2, 0.3, 0.0]):
        got = flash_attn_func(
            *(q, k, v), causal=True, softcap=3.0, skip_softmax_threshold=threshold
        )
        assert torch.equal(got, attention(q, k, v, causal=True, softcap=3.0, threshold=threshold))
    dense = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(dense, flash_attn_func(q, k, v, causal=True, skip_softmax_threshold=0.0))
    assert not torch.equal(dense, flash_attn_func(q, k, v, causal=True, skip_softmax_threshold=0.3))
    factor = flash_attn_func(q, k, v, causal=True, skip_softmax_threshold_scale_factor=20.0)
    assert torch.equal(factor, attention(q, k, v, causal=True, threshold_scale_factor=20.0))

    out, lse, pattern = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, dense)
    assert lse.shape == (2, HEADS, 70)
    assert pattern is None
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).repeat_interleave(2, 1).mT
    scores = (scores * DIM**-0.5).masked_fill(~bottom_right(70, 130), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_flash_attn_func_has_gradients():
    for queries in (70, 1):
        q, k, v = (t.requires_grad_() for t in inputs(queries=queries))
        doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
        got = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
        out = exact(*doubles, bottom_right(queries, 130))
        for a, b in zip(got, torch.autograd.grad(out.sum(), doubles), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=0)


def pages_of(t: Tensor, size: int, table: Tensor) -> Tensor:
    """The tokens of each request in the pages that the table says."""
    pages = torch.full((int(table.max()) + 1, size, *t.shape[2:]), math.nan)
    padded = F.pad(t, (0, 0, 0, 0, 0, table.shape[1] * size - t.shape[1]), value=math.nan)
    pages[table.long()] = padded.unflatten(1, (table.shape[1], size))
    return pages


def test_flash_attn_varlen_func_is_request_by_request():
    lengths_q, lengths_k = [70, 1, 0, 33], [130, 40, 10, 33]
    q, k, v = inputs(batch=4)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    rows = torch.cat([t[:n] for t, n in zip(q, lengths_q, strict=True)])
    keys = [torch.cat([t[:n] for t, n in zip(x, lengths_k, strict=True)]) for x in (k, v)]
    options = {"causal": True, "skip_softmax_threshold": 0.1, "return_attn_probs": True}
    out, lse, _ = flash_attn_varlen_func(rows, *keys, cu_q, cu_k, 70, 130, **options)
    assert lse.shape == (HEADS, 104)
    for b, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        alone = attention(
            *(q[b : b + 1, :m], k[b : b + 1, :n], v[b : b + 1, :n]),
            causal=True, threshold=0.1, phase="prefill", return_lse=True,
        )  # fmt: skip
        assert torch.equal(out[cu_q[b] : cu_q[b + 1]], alone.out[0])
        assert torch.equal(lse[:, cu_q[b] : cu_q[b + 1]], alone.lse[0])

    table = torch.randperm(4 * 9, generator=torch.Generator().manual_seed(0)).view(4, 9).int()
    paged = [pages_of(t, 16, table) for t in (k, v)]
    got = flash_attn_varlen_func(rows, *paged, cu_q, cu_k, 70, 130, block_table=table, **options)
    assert torch.equal(got[0], out)
    used = torch.tensor(lengths_k, dtype=torch.int32)
    got = flash_attn_varlen_func(
        rows, *paged, cu_q, None, 70, 130, block_table=table, seqused_k=used, **options
    )
    assert torch.equal(got[0], out)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("layout", ["dense", "batch_idx", "pages"])
def test_flash_attn_with_kvcache(layout, queries):
    q, k, v = inputs(batch=3, queries=queries, keys=144)
    before = torch.tensor([100, 7, 139], dtype=torch.int32)
    ends = before + queries
    new = [t[:, :queries] + 1 for t in inputs(batch=3, queries=1, keys=150)[1:]]
    wanted_caches = [k.clone(), v.clone()]
    for cache, t in zip(wanted_caches, new, strict=True):
        for b in range(3):
            cache[b, before[b] : ends[b]] = t[b]
    wanted = [
        attention(
            q[b : b + 1],
            *(t[b : b + 1, : ends[b]] for t in wanted_caches),
            causal=True,
            threshold=0.1,
        )
        for b in range(3)
    ]
    options = {"causal": True, "skip_softmax_threshold": 0.1, "cache_seqlens": before}
    caches = [k.clone(), v.clone()]
    if layout == "batch_idx":
        places = torch.tensor([4, 0, 2])
        caches = [torch.zeros(5, *t.shape[1:]).index_copy(0, places, t) for t in caches]
        options["cache_batch_idx"] = places
    if layout == "pages":
        table = torch.randperm(27, generator=torch.Generator().manual_seed(0)).view(3, 9).int()
        caches = [pages_of(t, 16, table) for t in caches]
        options["block_table"] = table
    out, lse = flash_attn_with_kvcache(q, *caches, *new, return_softmax_lse=True, **options)
    assert torch.equal(out, torch.cat(wanted))
    assert lse.shape == (3, HEADS, queries)
    for cache, t in zip(caches, wanted_caches, strict=True):
        if layout == "batch_idx":
            cache = cache[places]
        if layout == "pages":
            cache = cache[table.long()].flatten(1, 2)
        assert torch.equal(cache, t)


def test_a_cache_without_new_keys():
    q, k, v = inputs(batch=3, queries=1, keys=144)
    assert_close(flash_attn_with_kvcache(q, k, v), exact(q, k, v))
    assert_close(flash_attn_with_kvcache(q, k, v, cache_seqlens=50), exact(q, k[:, :50], v[:, :50]))
    padded = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=100, cache_leftpad=torch.tensor([0, 10, 99])
    )
    place = torch.arange(144)
    visible = (place < 100) & (place >= torch.tensor([0, 10, 99])[:, None])
    assert_close(padded, exact(q, k, v, visible[:, None, None]))


def test_pages_that_are_not_in_use_may_be_anything():
    table = i32([0, -1], [2, 99])
    got = paged_kvcache(table, cache_seqlens=i32(15, 9))
    assert torch.equal(got, kvcache(cache_seqlens=i32(15, 9)))


@pytest.mark.parametrize("pages", [False, True])
def test_new_keys_without_a_place_are_dropped(pages):
    """As on cuda, where nobody looks at the lengths and page ids."""
    k, v = (torch.randn(6, 16, 2, 8) for _ in range(2))
    table = torch.tensor([[3, 0], [-1, 6], [4, 5], [2, 1], [-(2**40), 2**40], [1, 1]])
    before = torch.tensor([15, 15, 31, -1, 0, 2**40])
    if not pages:
        before = torch.tensor([15, 16, -2, 2**40, -(2**40), 0])
    new = [torch.randn(6, 2, 2, 8) for _ in (k, v)]
    wanted = [k.clone(), v.clone()]
    for cache, t in zip(wanted, new, strict=True):
        if pages:  # each of what has one: the last of page 3, the first of 0, the last of 5, ...
            cache[3, 15], cache[0, 0], cache[5, 15], cache[2, 0] = (
                t[0, 0],
                t[0, 1],
                t[2, 0],
                t[3, 1],
            )
        else:
            cache[0, 15], cache[5, 0], cache[5, 1] = t[0, 0], t[5, 0], t[5, 1]
    for first in (before, torch.full((6,), 99)):
        cache = Cache(k, v, table if pages else None, first + 2)
        place, values = only_placed([k, v], places(cache, 2), new)
        k[place], v[place] = values
        assert torch.equal(k, wanted[0])
        assert torch.equal(v, wanted[1])


SDPA_SHAPES = [(70, 130), (130, 70), (1, 130), (64, 64), (130, 1)]


@pytest.mark.parametrize(("queries", "keys"), SDPA_SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention_is_torchs(queries, keys, causal):
    for kv_heads in (HEADS, KV_HEADS):
        q, k, v = (t.transpose(1, 2) for t in inputs(queries=queries, keys=keys, kv_heads=kv_heads))
        options = {"is_causal": causal, "scale": 0.4, "enable_gqa": kv_heads != HEADS}
        wanted = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), **options)
        assert_close(scaled_dot_product_attention(q, k, v, **options), wanted)
        zero = scaled_dot_product_attention(q, k, v, **options, skip_softmax_threshold=0.0)
        assert torch.equal(zero, scaled_dot_product_attention(q, k, v, **options))
    one_head = [t[:, 0] for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*(t.double() for t in one_head), is_causal=causal)
    assert_close(scaled_dot_product_attention(*one_head, is_causal=causal), wanted)


def test_scaled_dot_product_attention_skips_and_has_gradients():
    q, k, v = (t.transpose(1, 2) for t in inputs(queries=130))
    sparse = scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, skip_softmax_threshold=0.3
    )
    wanted = attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, threshold=0.3)
    assert torch.equal(sparse, wanted.transpose(1, 2))
    for causal, queries in ((True, 130), (False, 1)):
        leaves = [t.detach().clone().requires_grad_() for t in (q[:, :, :queries], k, v)]
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        options = {"is_causal": causal, "enable_gqa": True}
        got = torch.autograd.grad(scaled_dot_product_attention(*leaves, **options).sum(), leaves)
        out = F.scaled_dot_product_attention(*doubles, **options)
        for a, b in zip(got, torch.autograd.grad(out.sum(), doubles), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_mask_of_padded_keys(queries, side):
    q, k, v = (t.transpose(1, 2) for t in inputs(batch=3, queries=queries))
    place = torch.arange(130)
    first = torch.tensor([0, 40, 129])[:, None] * (side != "right")
    last = torch.tensor([130, 70, 130])[:, None] if side != "left" else torch.tensor(130)
    keys = (place >= first) & (place < last)
    wanted = F.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), keys[:, None, None], enable_gqa=True
    )
    masks = [keys[:, None, None], keys[:, None, None].expand(3, HEADS, queries, 130)]
    for mask in (*masks, masks[1].contiguous()):
        assert_close(scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), wanted)
    everything = torch.ones(130, dtype=torch.bool)
    got = scaled_dot_product_attention(q, k, v, everything, enable_gqa=True)
    assert torch.equal(got, scaled_dot_product_attention(q, k, v, enable_gqa=True))
    nothing = scaled_dot_product_attention(q, k, v, ~everything, enable_gqa=True)
    assert not nothing.any()


def test_the_fronts_compile():
    q, k, v = inputs()

    def flash(q, k, v):
        return flash_attn_func(q, k, v, causal=True, skip_softmax_threshold=0.2) + 1

    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + 1

    for front in (flash, sdpa):
        compiled = torch.compile(front, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), front(q, k, v))


def kvcache(q=None, caches=None, k=None, **arguments):
    """A call over caches that are looked at behind it: an error must leave them as they were."""
    q = Q[:, :1] if q is None else q
    caches = [K.clone(), V.clone()] if caches is None else caches
    new = [t[:, -1:] + 1 for t in (K, V)]
    before = [t.clone() for t in caches]
    try:
        arguments = {"cache_seqlens": i32(3, 5), "v": new[1]} | arguments
        return flash_attn_with_kvcache(q, *caches, new[0] if k is None else k, **arguments)
    except Exception:
        assert all(torch.equal(t, kept) for t, kept in zip(caches, before, strict=True))
        raise


def paged_kvcache(table, **arguments):
    caches = [t.unflatten(1, (2, 16)).flatten(0, 1).clone() for t in (K, V)]
    return kvcache(caches=caches, block_table=table, **arguments)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


Q, K, V = inputs(batch=2, queries=20, keys=32)
CU = torch.tensor([0, 20, 40], dtype=torch.int32)
TURNED = [t.transpose(1, 2) for t in (Q, K, V)]
REFUSED = [
    (lambda: flash_attn_func(Q, K, V, 0.1), "dropout_p is 0.1; of FlashAttention's argument"),
    (lambda: flash_attn_func(Q, K, V, alibi_slopes=Q[0, 0, :, 0]), "alibi_slopes is a tensor"),
    (lambda: flash_attn_func(Q, K, V, np.zeros(2)), r"dropout_p is array\(\[0\., 0\.\]\)"),
    (lambda: flash_attn_func(Q, K, V, pack_gqa=[]), r"pack_gqa is \[\]; .* None or False or True"),
    (
        lambda: scaled_dot_product_attention(*TURNED, dropout_p=torch.zeros(2)),
        r"dropout_p is tensor\(\[0\., 0\.\]\); blasst takes only 0",
    ),
    (lambda: flash_attn_func(Q, K, V, attention_chunk=64), "attention_chunk is 64"),
    (lambda: flash_attn_func(Q, K, V, q_descale=V), "q_descale is a tensor"),
    (lambda: flash_attn_func(Q, K, V, num_splits=4), "num_splits is 4; .* takes only 0 or 1"),
    (
        lambda: flash_attn_varlen_func(Q[0], K[0], V[0], CU, CU, 20, 20, seqused_k=CU[1:]),
        "seqused_k is given without block_table",
    ),
    (lambda: flash_attn_with_kvcache(Q, K, V, rotary_cos=Q), "rotary_cos is a tensor"),
    (
        lambda: flash_attn_with_kvcache(Q, K[:, :30], V[:, :30], cache_batch_idx=CU[:2]),
        "cache_batch_idx is given with k_cache",
    ),
    (
        lambda: flash_attn_with_kvcache(Q, K, V, cache_batch_idx=CU[:2], cache_leftpad=CU[:2]),
        "cache_leftpad is given together with",
    ),
    (
        lambda: flash_attn_with_kvcache(Q.clone().requires_grad_(), K, V),
        "flash_attn_with_kvcache has no backward pass",
    ),
    (lambda: scaled_dot_product_attention(*TURNED, dropout_p=0.5), "dropout_p is 0.5"),
    (
        lambda: scaled_dot_product_attention(*TURNED, torch.zeros(20, 32), enable_gqa=True),
        "attn_mask is torch.float32; blasst takes a boolean mask",
    ),
    (
        lambda: scaled_dot_product_attention(
            *TURNED, torch.ones(20, 32, dtype=torch.bool).tril(), enable_gqa=True
        ),
        "attn_mask differs between heads or queries",
    ),
    (
        lambda: scaled_dot_product_attention(*TURNED, torch.arange(32) % 2 == 0, enable_gqa=True),
        "attn_mask leaves out keys between others",
    ),
]
WRONG = [
    (TypeError, lambda: flash_attn_func(Q, K, V, is_causal=True), "no argument 'is_causal'"),
    (TypeError, lambda: flash_attn_func(Q, K, V, window_size=5), "window_size is 5; it must be"),
    (TypeError, lambda: flash_attn_func(Q, K, V, window_size=(None, 3)), "window_size is"),
    (TypeError, lambda: flash_attn_func(Q, K, V, causal=1), "causal is 1; it must be True or"),
    (TypeError, lambda: flash_attn_func(Q, K, V, deterministic=None), "deterministic is None"),
    (ValueError, lambda: flash_attn_func(Q, K, V, window_size=(-2, 0)), "window_size is"),
    (ValueError, lambda: flash_attn_func(Q, K, V, window_size=(1, 2, 3)), "window_size is"),
    (TypeError, lambda: flash_attn_func(Q, K, V, softcap=torch.ones(2)), r"softcap is tensor"),
    (TypeError, lambda: flash_attn_func(Q, K, V, softcap=False), "softcap is False; it must be"),
    (ValueError, lambda: flash_attn_func(Q, K, V, softcap=1e-50), "softcap is 1e-50; it must be 1"),
    (ValueError, lambda: flash_attn_func(Q, K, V, softmax_scale=1e-50), "scale is 1e-50; it must"),
    (ValueError, lambda: flash_attn_func(Q, K, V, softcap=-1.0), "softcap is -1.0; it must be"),
    (
        ValueError,
        lambda: flash_attn_func(Q, K, V, skip_softmax_threshold=1.5),
        "head 0 is 1.5; it must be a number from 0 to 1",
    ),
    (
        ValueError,
        lambda: flash_attn_varlen_func(*(t.flatten(0, 1) for t in (Q, K, V)), CU, None, 20, 20),
        "cu_seqlens_k is None",
    ),
    (
        ValueError,
        lambda: flash_attn_varlen_func(Q.flatten(0, 1), K, V, CU, None, 20, 20, block_table=CU),
        "block_table is given without cu_seqlens_k or seqused_k",
    ),
    (
        ValueError,
        lambda: flash_attn_varlen_func(
            *(Q.flatten(0, 1), K[:, :20].flatten(0, 1), V[:, :20].flatten(0, 1), CU, CU, 19, 20)
        ),
        "max_seqlen_q is 19, but request 0 has 20 tokens",
    ),
    (
        ValueError,
        lambda: flash_attn_varlen_func(
            Q.flatten(0, 1), K, V, CU, CU[:2], 20, 20, block_table=CU[:2, None]
        ),
        r"cu_seqlens_k is \[2\]; it must be \[batch \+ 1\] = \[3\]",
    ),
    (
        TypeError,
        lambda: flash_attn_varlen_func(
            Q.flatten(0, 1), K, V, CU, CU.float(), 20, 20, block_table=CU[:2, None]
        ),
        "cu_seqlens_k is torch.float32; it must be torch.int32 or torch.int64",
    ),
    (TypeError, lambda: flash_attn_with_kvcache(Q, K, V, cache_seqlens="a"), "cache_seqlens is"),
    (
        ValueError,
        lambda: flash_attn_with_kvcache(Q, K, V, K[:, :1]),
        "k, v and cache_seqlens go together",
    ),
    (
        ValueError,
        lambda: flash_attn_with_kvcache(Q, K, V, K[:, :3], V[:, :3], cache_seqlens=30),
        r"cache_seqlens is 30, with 3 new keys; the cache has room for 32, so .* 0 to 29",
    ),
    (
        ValueError,
        lambda: flash_attn_with_kvcache(Q, K, V, K[:, :1], V[:1, :1], cache_seqlens=3),
        r"v is \[1, 1, 2, 32\]; it must be",
    ),
    (
        TypeError,
        lambda: flash_attn_with_kvcache(Q, K, V, K[:, :1].half(), V[:, :1], cache_seqlens=3),
        "k is torch.float16; it must be torch.float32, as its cache is",
    ),
    (
        ValueError,
        lambda: flash_attn_with_kvcache(Q, K, V, cache_batch_idx=CU[:2], block_table=CU[None, :2]),
        "cache_batch_idx and block_table exclude each other",
    ),
    (ValueError, lambda: kvcache(skip_softmax_threshold=3.0), "is 3; it must be a number from 0"),
    (ValueError, lambda: kvcache(scores="int9"), "scores is 'int9'; it must be one of exact, int8"),
    (ValueError, lambda: kvcache(window_size=(1,)), r"window_size is \(1,\); it must be"),
    (ValueError, lambda: kvcache(softmax_scale=-1.0), "scale is -1.0; it must be positive"),
    (ValueError, lambda: kvcache(k_descale=torch.ones(2, 2)), "k_scale is given, but k is torch"),
    (ValueError, lambda: kvcache(Q[0, 0]), r"q is \[4, 32\]; it must be \[batch, seqlen_q, heads"),
    (ValueError, lambda: kvcache(Q[:, :1, :3]), "heads is 3 and kv_heads is 2; heads must be"),
    (
        ValueError,
        lambda: kvcache(Q[..., :16]),
        r"k_cache is \[2, 32, 2, 32\], but q has head_dim 16",
    ),
    (ValueError, lambda: kvcache(Q[:1]), r"cache_seqlens is \[2\]; .* with batch 1"),
    (
        ValueError,
        lambda: kvcache(caches=[K[0, 0], V]),
        r"k_cache is \[2, 32\]; it must be \[batch, ",
    ),
    (
        ValueError,
        lambda: kvcache(caches=[K[0, 0, 0], V]),
        r"k_cache is \[32\]; it must be \[batch, r",
    ),
    (
        ValueError,
        lambda: kvcache(caches=[K, V[:, :9]]),
        r"v_cache is \[2, 9, 2, 32\], but k_cache is",
    ),
    (
        ValueError,
        lambda: kvcache(caches=[K[:1], V[:1]]),
        r"k_cache is \[1, .*\], but q has batch 2",
    ),
    (
        ValueError,
        lambda: kvcache(caches=[K[:, :, :1].expand(K.shape), V.clone()]),
        r"k_cache is .* of strides .*, which overlap; new keys need a place of their own",
    ),
    (
        ValueError,
        lambda: kvcache(caches=[K[:, :0], V[:, :0]]),
        r"k_cache .* has no room for new keys",
    ),
    (
        ValueError,
        lambda: kvcache(k=K[0, 0, 0]),
        r"k is \[32\]; it must be .* = \[2, new keys, 2, 32\]",
    ),
    (
        ValueError,
        lambda: kvcache(v=V[:, :2]),
        r"v is \[2, 2, 2, 32\]; it must be .* = \[2, 1, 2, 32\]",
    ),
    (ValueError, lambda: kvcache(v=None), "k, v and cache_seqlens go together"),
    (
        TypeError,
        lambda: kvcache(cache_seqlens=torch.tensor([3.7, 5])),
        "cache_seqlens is torch.float3",
    ),
    (
        TypeError,
        lambda: kvcache(cache_seqlens=True),
        "cache_seqlens is True; it must be an integer",
    ),
    (ValueError, lambda: kvcache(cache_seqlens=i32(3)), r"cache_seqlens is \[1\]; .* with batch 2"),
    (
        ValueError,
        lambda: kvcache(cache_seqlens=i32(32, 0)),
        r"cache_seqlens is \[32, 0\], with 1 new",
    ),
    (ValueError, lambda: kvcache(cache_seqlens=i32(-1, 0)), r"is \[-1, 0\], .* must be 0 to 31"),
    (
        ValueError,
        lambda: kvcache(cache_seqlens=2**70),
        "cache_seqlens is 1180591620717411303424, wi",
    ),
    (
        ValueError,
        lambda: kvcache(cache_seqlens=torch.tensor([2**40, 0])),
        r"cache_seqlens is \[1099511627776, 0\], with 1 new keys; the cache has room for 32",
    ),
    (ValueError, lambda: kvcache(cache_leftpad=i32(0, 7)), r"cache_leftpad\[1\] is 7; .* 0 to 6, "),
    (
        ValueError,
        lambda: kvcache(cache_leftpad=i32(-1, 0)),
        r"cache_leftpad\[0\] is -1; .* 0 to 4, ",
    ),
    (
        TypeError,
        lambda: kvcache(cache_leftpad=torch.ones(2)),
        "cache_leftpad is torch.float32; it m",
    ),
    (
        ValueError,
        lambda: kvcache(cache_batch_idx=i32(-1, 0)),
        r"cache_batch_idx\[0\] is -1; .* 0 to 1,",
    ),
    (
        ValueError,
        lambda: kvcache(cache_batch_idx=i32(0, 2)),
        r"cache_batch_idx\[1\] is 2; .* 0 to 1, ",
    ),
    (TypeError, lambda: kvcache(cache_batch_idx=torch.ones(2)), "cache_batch_idx is torch.float32"),
    (
        ValueError,
        lambda: paged_kvcache(i32([-1, 1], [2, 3])),
        r"block_table\[0, 0\] is -1; .* 0 to 3, ",
    ),
    (
        ValueError,
        lambda: paged_kvcache(i32([0, 1], [4, 3])),
        r"block_table\[1, 0\] is 4; .* 0 to 3, a",
    ),
    (
        TypeError,
        lambda: paged_kvcache(torch.ones(2, 2)),
        "block_table is torch.float32; it must be",
    ),
    (
        ValueError,
        lambda: paged_kvcache(i32(0, 1)),
        r"block_table is \[2\]; it must be \[batch, pages",
    ),
    (ValueError, lambda: paged_kvcache(i32([0, 1])), r"block_table is \[1, 2\]; .* with batch 2"),
    (ValueError, lambda: scaled_dot_product_attention(*TURNED), "query has 4 heads and key 2"),
    (
        ValueError,
        lambda: scaled_dot_product_attention(
            *TURNED, torch.ones(32, dtype=torch.bool), is_causal=True, enable_gqa=True
        ),
        "attn_mask and is_causal exclude each other",
    ),
    (
        ValueError,
        lambda: scaled_dot_product_attention(
            *TURNED, torch.ones(33, dtype=torch.bool), enable_gqa=True
        ),
        r"attn_mask is \[33\]; it must be broadcastable to \[2, 4, 20, 32\]",
    ),
    (ValueError, lambda: scaled_dot_product_attention(*(t[0, 0] for t in TURNED)), "they must be"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_named(call, message):
    with pytest.raises(blasst.NotSupportedError, match=message):
        call()


@pytest.mark.parametrize(("error", "call", "message"), WRONG, ids=[case[2] for case in WRONG])
def test_wrong_arguments(error, call, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error


HEADS_SECOND = r"look like \[batch, heads, tokens, head_dim\]: transpose dimensions 1 and 2"
TOKENS_SECOND = r"look like \[batch, tokens, heads, head_dim\]: transpose dimensions 1 and 2"


@pytest.mark.parametrize("front", [attention, flash_attn_func])
def test_heads_before_tokens_are_caught(front):
    for q, k in [
        ((1, 32, 1, 16), (1, 8, 500, 16)),  # a decode
        ((1, 32, 2000, 16), (1, 32, 2000, 16)),  # a prompt
        ((2, 32, 300, 16), (2, 8, 300, 16)),  # a short one, causal
        ((1, 9, 70, 16), (1, 3, 300, 16)),  # a chunk of one
    ]:
        with pytest.raises(ValueError, match=HEADS_SECOND):
            front(torch.zeros(q), torch.zeros(k), torch.zeros(k), causal=True)


def test_tokens_before_heads_are_caught():
    for q, k in [
        ((1, 1, 32, 16), (1, 500, 8, 16)),
        ((1, 2000, 32, 16), (1, 2000, 32, 16)),
        ((1, 70, 9, 16), (1, 300, 3, 16)),
    ]:
        with pytest.raises(ValueError, match=TOKENS_SECOND):
            scaled_dot_product_attention(
                torch.zeros(q), torch.zeros(k), torch.zeros(k), enable_gqa=True
            )


def test_unusual_shapes_raise_no_alarm():
    for q, k in [
        ((2, 1, 128, 16), (2, 5, 128, 16)),  # one token, many heads
        ((1, 4, 64, 16), (1, 4, 8, 16)),  # a prompt shorter than its heads
        ((1, 3, 64, 16), (1, 1, 64, 16)),  # more queries than keys
        ((1, 0, 64, 16), (1, 0, 64, 16)),
        ((0, 7, 2, 16), (0, 7, 2, 16)),
        ((1, 3, 1024, 16), (1, 3, 1024, 16)),
        ((1, 3, 1, 16), (1, 3, 1, 16)),
    ]:
        tensors = torch.randn(q), torch.randn(k), torch.randn(k)
        for causal in (False, True):
            assert flash_attn_func(*tensors, causal=causal).shape == q
            turned = [t.transpose(1, 2) for t in tensors]
            got = scaled_dot_product_attention(*turned, is_causal=causal, enable_gqa=True)
            assert got.shape == turned[0].shape
