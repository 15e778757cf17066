"""`attention`: the operator for Python callers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.arguments import (
    check_choice,
    check_count,
    check_flags,
    check_indices,
    check_page_table,
    check_positive,
    check_tensors,
    decision_of,
    mask_of,
    phase_of,
    places_on_cuda,
    scales_of,
    sinks_of,
)
from blasst.ops.layouts import check_layout
from blasst.ops.library import (
    CACHES,
    REPORTS,
    TileShape,
    call,
    computed_in,
    decode_tile_heads,
    key_tiles,
)


class TileCounts(NamedTuple):
    """Key tiles, summed over the query tiles of each request and head."""

    visitable: Tensor
    """[batch, heads] int64: tiles that the mask leaves."""
    skipped: Tensor
    """[batch, heads] int64: tiles of these that the test dropped."""

    @property
    def sparsity(self) -> float:
        """Skipped tiles over visitable tiles, 0 if there is none."""
        return self.skipped.sum().item() / max(1, self.visitable.sum().item())


class Result(NamedTuple):
    """What `attention` returns when more than the output is asked for; None: not asked for."""

    out: Tensor
    """Like q, with v's last dimension."""
    lse: Tensor | None
    """[batch, heads, query_length], ragged [heads, rows]: float32 natural log of the softmax
    denominator, over the kept tiles and the sink. A row without a valid key has its sink, or -inf
    without sinks; rows from its query length on have -inf."""
    stats: TileCounts | None
    dropped_mass_bound: Tensor | None
    """Shaped like lse, float32: at least the probability that dense softmax gives to the skipped
    tiles. A row of `out` is off by at most twice that times the largest |v|."""
    gaps: Tensor | None
    """[heads, 514] int64: visited tiles by gap (the largest, over a tile's rows, of row maximum -
    running maximum). Bin 0 is below -32, bins 1 to 512 cut -32 to 0 into equal widths, bin 513 is 0
    and above."""
    tile_maxima: Tensor | None
    """[batch, heads, query tiles, key tiles], decode [batch, kv_heads, key tiles]: float32 largest
    score of each visited tile; -inf where none is visited."""
    tile_mask: Tensor | None
    """[batch, heads, query tiles, key tiles], decode [batch, kv_heads, key tiles]: bool, the tiles
    that were visited and kept. A padded request's query tiles begin at its first row in use."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    threshold: float | Sequence[float] | Tensor | None = None,
    threshold_scale_factor: float | Sequence[float] | Tensor | None = None,
    absolute_threshold: float | Sequence[float] | Tensor | None = None,
    bands: Sequence[Sequence[int]] | Tensor | None = None,
    blocks: Tensor | None = None,
    order: str = "sink_first",
    scores: str = "exact",
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    phase: str | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    return_error_bound: bool = False,
    return_gaps: bool = False,
    return_tile_maxima: bool = False,
    return_tile_mask: bool = False,
    check_pages: bool = False,
) -> Tensor | Result:
    """Softmax attention that drops the key tiles whose scores lie far below the best so far.

    Differentiable in q, k, v and sinks, through the output and Result.lse: a tile that was dropped
    counts as absent.

    Queries stand at the end of their request's keys (masks are aligned bottom-right). With no
    threshold, or threshold 0, the result is dense attention, the same bits. Index tensors are int32
    or int64. Under autocast q, k and v are cast first.

    Args:
        q: [batch, query_length, heads, head_dim], or ragged [rows, heads, head_dim]. float32,
            float16 or bfloat16, any strides. head_dim: a multiple of 8 from 16 to 576. On a
            processor with AVX512_BF16, bfloat16 numbers below 1.2e-38 (subnormal) count as 0. On a
            GPU: 64, 96, 128 or 256; 96 with values of 64; 192 with values of 128; to decode over
            latents, 576.
        k: [batch, keys, kv_heads, head_dim]; ragged [total keys, kv_heads, head_dim]; paged
            [pages, page_size, kv_heads, head_dim]. heads must be a multiple of kv_heads.
            k and v are of q's type, or each of them int8 or float8_e4m3fn, with scales: a quantised
            cache. Then without a backward pass. On cuda strides are multiples of 16; prefill rounds
            k * k_scale and v * v_scale to q's type, but for int8 k under scores="int8"; decode
            takes both in one type with head_dim 64, 128 or 256, or int8 keys and v of q's type with
            128.
        v: like k; its last dimension may differ (the same range). Over latents on a GPU it is the
            view k[..., :512].
        causal: a query sees no key after its own position.
        scale: score = scale * q.k; default 1 / sqrt(head_dim).
        window: keys that a query sees (before, after) its own position, besides it; None: no limit.
        softcap: c > 0: score = c * tanh(scale * q.k / c).
        sinks: [heads] float32 logits that join the softmax denominator.
        threshold: 0 to 1. A tile is dropped if every row's best score in it is below the row's
            running maximum by more than -ln(threshold). A number, [heads], [1 or batch, 1 or
            heads], or [1 or batch, 1 or heads, places]: a query tile takes the threshold of its
            place, which is its first row's position divided by the rows of a query tile (decode:
            by the keys of a key tile), rounded down; those beyond the last place take its.
        threshold_scale_factor: the same, with threshold = factor / keys of the request.
        absolute_threshold: instead, a tile is dropped if every row's best score is below it.
        bands: [heads, 2] first and last distance, both included, that each head sees: its query
            position less the key's. A row without a key in its band gives 0.
        blocks: [heads, query tiles of all requests, key tiles] bool, decode [kv_heads, batch, key
            tiles]: the tiles to visit, of the shape that `tile_shape` says; not for batches with
            starts or query_lengths.
        order: in which order key tiles are visited: "sink_first" (tile 0, then from the diagonal
            back), "reverse" or "forward".
        scores: "exact", or "int8": q.k from bytes, queries in units of each row, keys in units of
            each key tile, after the keys' mean is taken off and both are rotated. Int8 k is taken
            as it is, and q rounded as it comes: rotate both before (`quantize_keys`). Thresholds
            and results mean the same, to the rounding. Prefill only, without a backward pass.
        k_scale: of k in 8 bits: its elements are multiples of it, so that score = scale * k_scale *
            q.k. A number, or a tensor of them: [], [kv_heads] or [1 or batch, 1 or kv_heads];
            positive and finite. Default: 1.
        v_scale: of v in 8 bits, likewise: the output is v_scale times the sum over v.
        phase: "prefill", or "decode" (1 to 16 queries a request; the query heads of a KV head
            decide together). Default: decode if query_length is 1.
        starts: [batch] first key in use of each request: padding on the left. For k of 4 dimensions
            without pages.
        lengths: [batch] end of the keys in use of each request: a cache not yet full, padding on
            the right, or pages. A request's keys are those from starts to lengths.
        query_lengths: [batch] rows in use of each request, from the first: padding on the right.
            The other rows of the output are 0, of lse -inf. For q of 4 dimensions.
        cu_seqlens_q: [batch + 1] first row of each request, for ragged q.
        cu_seqlens_k: [batch + 1] first key of each request, for ragged k and v.
        page_table: [batch, pages a request] page ids, for paged k and v; needs lengths.
        max_seqlen_q: no request of a ragged q has more rows; default: one may have them all.
            Checked on the cpu; on cuda rows beyond it are not computed, and decode needs it: it
            decides for as many, so that a request gets what it gets alone with the same number.
        max_seqlen_k: no request of ragged or paged keys has more; default: as many as k, or the
            page table, has room for. Checked on the cpu; on cuda keys beyond it are not seen.
        out: where the output is written: its shape and type, the last dimension contiguous, sharing
            no memory with the inputs. Without a gradient.
        workspace: beside out, so that the call allocates no more: [bytes] uint8, at least as many
            as `workspace_bytes` says, which no other call uses meanwhile.
        return_lse: fill Result.lse.
        return_stats: fill Result.stats.
        return_error_bound: fill Result.dropped_mass_bound.
        return_gaps: fill Result.gaps.
        return_tile_maxima: fill Result.tile_maxima; for q of 4 dimensions.
        return_tile_mask: fill Result.tile_mask; for q of 4 dimensions.
        check_pages: on cuda, look for page ids and lengths out of range first, which waits for the
            device. Without it such a page reads as zeros and such a length is cut. On the cpu they
            are always an error.

    Returns:
        The output, [batch, query_length, heads, value_dim] or [rows, heads, value_dim]; a Result if
        any return_* is set.

    Raises:
        TypeError: an argument of a wrong type, a tensor of a wrong dtype included.
        ValueError: shapes, numbers or names out of range, arguments that contradict each other,
            tensors on different devices; the message says what was passed and what is accepted.
        NotSupportedError: what this build or device does not do; thresholds that require a
            gradient; in the backward pass of a decode, of int8 scores, of keys or values in 8 bits,
            of pages (on cuda: all; on the CPU: those that requests share), or of a backward pass.
    """
    places = {
        "starts": starts,
        "lengths": lengths,
        "query_lengths": query_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "page_table": page_table,
    }
    check_tensors(
        {"q": q, "k": k, "v": v},
        {"sinks": sinks, **places, "blocks": blocks, "out": out, "workspace": workspace},
    )
    check_indices(places)
    scales = scales_of({"k_scale": (k, k_scale), "v_scale": (v, v_scale)})
    if workspace is not None and out is None:
        raise ValueError("workspace is given without out; the two go together")
    phase = phase_of(phase, q)
    if page_table is None:
        check_layout(q, k, tokens=1, causal=causal)
    check_choice("order", order, ("forward", "reverse", "sink_first"))
    check_choice("scores", scores, ("exact", "int8"))
    check_flags(causal=causal, check_pages=check_pages)
    check_positive("scale", scale, "1 / sqrt(head_dim)")
    check_positive("softcap", softcap, "none")
    check_count("max_seqlen_q", max_seqlen_q)
    check_count("max_seqlen_k", max_seqlen_k)
    asked = {
        "return_lse": return_lse,
        "return_stats": return_stats,
        "return_error_bound": return_error_bound,
        "return_gaps": return_gaps,
        "return_tile_maxima": return_tile_maxima,
        "return_tile_mask": return_tile_mask,
    }
    check_flags(**asked)
    if return_tile_mask and cu_seqlens_q is not None:
        raise ValueError("return_tile_mask is set; it needs q of 4 dimensions, no cu_seqlens_q")
    idle = None
    if q.device.type == "cuda":
        places, idle = places_on_cuda(places, q, k, phase, max_seqlen_q)
        if check_pages:
            check_page_table(k, places["lengths"], places["page_table"])
    sinks = sinks_of(sinks)
    q, k, v = autocast(q, k, v)
    with_gradient = _with_gradient(out, (q, k, v, sinks))
    decision = decision_of(threshold, threshold_scale_factor, absolute_threshold, q.device)
    # A backward pass needs the forward's lse and, where tiles may be skipped, its decisions.
    cached = k.dtype in CACHES or v.dtype in CACHES
    differentiable = with_gradient and phase == "prefill" and scores == "exact" and not cached
    wanted = {
        "lse": return_lse or differentiable,
        "dropped_mass_bound": return_error_bound,
        "tiles": return_stats,
        "gaps": return_gaps,
        "maxima": return_tile_maxima,
        "bits": (differentiable and decision["test"] != "none") or return_tile_mask,
    }
    results = call(
        phase if out is None else f"{phase}_into",
        **({} if out is None else {"out": out, "workspace": workspace}),
        **{"q": q, "k": k, "v": v, **places, "sinks": sinks, "causal": causal, "order": order},
        **{"scale": scale or 0.0, "softcap": softcap or 0.0},
        **mask_of(window, bands, blocks, q.device),
        **decision,
        **{f"want_{name}": want for name, want in wanted.items()},
        **{"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "scores": scores, **scales},
    )
    out, *reports = results if out is None else (out, *results)
    if not any(asked.values()):
        return out
    reported = dict(zip(REPORTS, reports, strict=True))
    if return_tile_mask:
        ranges = {name: places[name] for name in ("cu_seqlens_k", "page_table")}
        heads = q.shape[-2] if phase == "prefill" else decode_tile_heads(q, k, v, q.shape[1])
        tiles = key_tiles(phase, q, k, v, **ranges, max_seqlen_k=max_seqlen_k)
        reported["mask"] = _kept_tiles(reported["bits"], heads, tiles)
    result = _result(q, phase, out, reported)
    if not return_lse:
        return result._replace(lse=None)
    return result if idle is None else result._replace(lse=result.lse.masked_fill(idle, -math.inf))


def _kept_tiles(bits: Tensor, heads: int, tiles: int) -> Tensor:
    """[heads, query tiles, key tiles] bool, from a bit a tile in words of 32."""
    words = bits.reshape(heads, -1, max(1, -(-tiles // 32)))
    tile = torch.arange(tiles, device=bits.device)
    return (words[..., tile // 32] >> (tile % 32) & 1).bool()


def _result(q: Tensor, phase: str, out: Tensor, reported: dict[str, Tensor | None]) -> Result:
    """What the operator reports, by request and head."""

    def by_row(t: Tensor | None) -> Tensor | None:
        return t if t is None or q.dim() == 3 else t.unflatten(1, q.shape[:2]).transpose(0, 1)

    def by_request(tiles: Tensor | None) -> Tensor | None:
        if tiles is None:
            return None
        # Decode has one query tile a request, and no dimension for it.
        if phase == "prefill":
            tiles = tiles.unflatten(1, (q.shape[0], tiles.shape[1] // max(1, q.shape[0])))
        return tiles.transpose(0, 1)

    tiles = reported["tiles"]
    return Result(
        out,
        by_row(reported["lse"]),
        None if tiles is None else TileCounts(*tiles.unbind()),
        by_row(reported["dropped_mass_bound"]),
        reported["gaps"],
        by_request(reported["maxima"]),
        by_request(reported.get("mask")),
    )


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """One attention over two sets of keys, from an attention over each.

    A prompt in chunks, say, or a cache in two places: each call sees its own keys, without a causal
    mask if they all come before the queries. Each decides on its own tiles; sinks belong in one of
    the two calls only.

    Args:
        out1: [batch, query_length, heads, value_dim], or ragged [rows, heads, value_dim].
        lse1: Result.lse of that call: [batch, heads, query_length], or [heads, rows].
        out2: like out1.
        lse2: like lse1.

    Returns:
        The output and its lse, shaped like the inputs. A part whose lse is -inf adds nothing; one
        with a sink but no key adds its sink to the denominator.

    Raises:
        TypeError: an argument that is no tensor, or tensors of a wrong dtype.
        ValueError: shapes that do not fit each other, or tensors on different devices.
        NotSupportedError: a type that the device does not do; in a backward pass.
    """
    check_tensors({"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2}, {})
    for name, out, lse in (("lse1", out1, lse1), ("lse2", out2, lse2)):
        shape = (*out.shape[:-3], out.shape[-2], out.shape[-3]) if out.dim() in (3, 4) else None
        if lse.shape != shape:
            raise ValueError(
                f"{name} is {list(lse.shape)} with an output of {list(out.shape)}; it must be "
                "[batch, heads, query_length], or [heads, rows] for [rows, heads, value_dim]"
            )

    def by_head(lse: Tensor) -> Tensor:
        return lse.transpose(0, 1).flatten(1) if lse.dim() == 3 else lse

    out, lse = call("merge", out_a=out1, lse_a=by_head(lse1), out_b=out2, lse_b=by_head(lse2))
    return out, lse.unflatten(1, out.shape[:2]).transpose(0, 1) if out.dim() == 4 else lse


def tile_shape(q: Tensor, k: Tensor, v: Tensor, *, phase: str) -> TileShape:
    """The tiles on which `attention` would decide for these dense inputs in this phase."""
    check_tensors({"q": q, "k": k, "v": v}, {})
    q, k, v = autocast(q, k, v)
    phase = phase_of(phase, q)
    return TileShape(*call(f"{phase}_tile_shape", q=q, k=k, v=v))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its type, but for keys and values in 8 bits."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(t if t.dtype in CACHES else t.to(computed_in(t.device, t.dtype)) for t in tensors)


def _with_gradient(out: Tensor | None, inputs: tuple[Tensor | None, ...]) -> bool:
    if torch.is_grad_enabled() and out is not None and out.requires_grad:
        raise NotSupportedError(
            "out requires a gradient, and what is written there has none: pass out.detach(), or "
            "run under torch.no_grad()"
        )
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return False
    if out is not None:
        raise NotSupportedError(
            "out is given, but an input requires a gradient: run under torch.no_grad(), or leave "
            "out to the call"
        )
    return True
