"""`attention`: the operator for Python callers."""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blasst.operators import REPORTS, call

_INTEGERS = (numbers.Integral, torch.SymInt)
_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)


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


class TileShape(NamedTuple):
    """The tiles on which decisions are taken."""

    query_rows: int
    """Rows of one head in a query tile; in decode, all the rows of a KV head's query heads."""
    keys: int
    """Keys in a key tile."""
    split_tiles: int
    """Decode: visited tiles in one split of a long KV; 0: never split."""


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
    return_lse: bool = False,
    return_stats: bool = False,
    return_error_bound: bool = False,
    return_gaps: bool = False,
    return_tile_maxima: bool = False,
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
            float16 or bfloat16, any strides. head_dim: a multiple of 8 from 16 to 256.
        k: [batch, keys, kv_heads, head_dim]; ragged [total keys, kv_heads, head_dim]; paged
            [pages, page_size, kv_heads, head_dim]. heads must be a multiple of kv_heads.
        v: like k; its last dimension may differ (the same range).
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
        phase: "prefill", or "decode" (1 to 16 queries a request, dense; the query heads of a KV
            head decide together). Default: decode if query_length is 1.
        starts: [batch] first key in use of each request: padding on the left. For k of 4 dimensions
            without pages.
        lengths: [batch] end of the keys in use of each request: a cache not yet full, padding on
            the right, or pages. A request's keys are those from starts to lengths.
        query_lengths: [batch] rows in use of each request, from the first: padding on the right.
            The other rows of the output are 0, of lse -inf. For q of 4 dimensions.
        cu_seqlens_q: [batch + 1] first row of each request, for ragged q.
        cu_seqlens_k: [batch + 1] first key of each request, for ragged k and v.
        page_table: [batch, pages a request] page ids, for paged k and v; needs lengths.
        max_seqlen_q: no request of a ragged q has more rows. Without it, on cuda, room is made for
            one that has all of them, which costs time. Checked on the cpu; on cuda rows beyond it
            are not computed.
        max_seqlen_k: no request of ragged or paged keys has more. Without it, on cuda, room is made
            for all that k, or the page table, holds. Checked on the cpu; on cuda keys beyond it are
            not seen.
        out: where the output is written: its shape and type, the last dimension contiguous, sharing
            no memory with the inputs. Without a gradient.
        return_lse: fill Result.lse.
        return_stats: fill Result.stats.
        return_error_bound: fill Result.dropped_mass_bound.
        return_gaps: fill Result.gaps.
        return_tile_maxima: fill Result.tile_maxima; for q of 4 dimensions.
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
        NotImplementedError: what this build or device does not do; thresholds that require a
            gradient; in the backward pass of a decode, of pages that requests share, on cuda, or of
            a backward pass.
    """
    _check_tensors(
        {"q": q, "k": k, "v": v},
        {
            "sinks": sinks,
            "starts": starts,
            "lengths": lengths,
            "query_lengths": query_lengths,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "page_table": page_table,
            "blocks": blocks,
            "out": out,
        },
    )
    if phase is None:
        phase = "decode" if q.dim() == 4 and q.shape[1] == 1 else "prefill"
    _check_choice("phase", phase, ("prefill", "decode"))
    _check_choice("order", order, ("forward", "reverse", "sink_first"))
    _check_flags(
        causal=causal,
        return_lse=return_lse,
        return_stats=return_stats,
        return_error_bound=return_error_bound,
        return_gaps=return_gaps,
        return_tile_maxima=return_tile_maxima,
        check_pages=check_pages,
    )
    _check_positive("scale", scale, "1 / sqrt(head_dim)")
    _check_positive("softcap", softcap, "none")
    _check_count("max_seqlen_q", max_seqlen_q)
    _check_count("max_seqlen_k", max_seqlen_k)
    idle = None  # [batch, 1, 1] requests without a query
    if q.device.type == "cuda":
        starts, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, page_table = (
            _narrow(name, t)
            for name, t in (
                ("starts", starts),
                ("lengths", lengths),
                ("query_lengths", query_lengths),
                ("cu_seqlens_q", cu_seqlens_q),
                ("cu_seqlens_k", cu_seqlens_k),
                ("page_table", page_table),
            )
        )
        if phase == "decode" and query_lengths is not None:
            starts, lengths = _without_idle(q, k, starts, lengths, query_lengths)
            idle, query_lengths = (query_lengths <= 0)[:, None, None], None
        if check_pages:
            _check_pages(k, lengths, page_table)
    left, right = _window(window)
    bands = _bands(bands, q.device)
    if blocks is not None:
        if blocks.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"blocks is {blocks.dtype}; it must be torch.bool")
        blocks = blocks.to(torch.uint8)
    test, thresholds = _tile_test(threshold, threshold_scale_factor, absolute_threshold, q.device)
    if sinks is not None and not sinks.is_floating_point():
        raise TypeError(f"sinks is {sinks.dtype}; it must be of a floating-point type")
    sinks = None if sinks is None else sinks.to(torch.float32)
    if thresholds is not None and thresholds.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "the threshold requires a gradient; dropping a tile or not has none: pass "
            "threshold.detach()"
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    with_gradient = _with_gradient(out, (q, k, v, sinks))
    # A backward pass needs the forward's lse and its decisions.
    differentiable = with_gradient and phase == "prefill" and q.device.type == "cpu"
    wanted = {
        "lse": return_lse or differentiable,
        "dropped_mass_bound": return_error_bound,
        "tiles": return_stats,
        "gaps": return_gaps,
        "maxima": return_tile_maxima,
        "bits": differentiable,
    }
    into = {} if out is None else {"out": out}
    results = call(
        f"{phase}_into" if into else phase,
        **into,
        q=q,
        k=k,
        v=v,
        starts=starts,
        lengths=lengths,
        query_lengths=query_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        page_table=page_table,
        scale=scale or 0.0,
        softcap=softcap or 0.0,
        sinks=sinks,
        causal=causal,
        window_left=left,
        window_right=right,
        bands=bands,
        blocks=blocks,
        order=order,
        test=test,
        thresholds=thresholds,
        **{f"want_{name}": want for name, want in wanted.items()},
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    out, *reports = results if out is None else (out, *results)
    if not any((return_lse, return_stats, return_error_bound, return_gaps, return_tile_maxima)):
        return out
    reported = dict(zip(REPORTS, reports, strict=True))

    def by_row(name: str) -> Tensor:
        t = reported[name]
        return t if q.dim() == 3 else t.unflatten(1, q.shape[:2]).transpose(0, 1)

    def by_request(tiles: Tensor) -> Tensor:
        # Decode has one query tile a request, and no dimension for it.
        if phase == "prefill":
            tiles = tiles.unflatten(1, (q.shape[0], -1))
        return tiles.transpose(0, 1)

    lse = by_row("lse") if return_lse else None
    if lse is not None and sinks is not None and idle is not None:
        lse = lse.masked_fill(idle, -math.inf)
    return Result(
        out,
        lse,
        TileCounts(*reported["tiles"].unbind()) if return_stats else None,
        by_row("dropped_mass_bound") if return_error_bound else None,
        reported["gaps"] if return_gaps else None,
        by_request(reported["maxima"]) if return_tile_maxima else None,
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
        NotImplementedError: a type that the device does not do; in a backward pass.
    """
    _check_tensors({"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2}, {})
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


def _with_gradient(out: Tensor | None, inputs: tuple[Tensor | None, ...]) -> bool:
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return False
    if out is not None:
        raise NotImplementedError(
            "out is given, but an input requires a gradient: run under torch.no_grad(), or leave "
            "out to the call"
        )
    return True


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    accepted = f"it must be one of {', '.join(choices)}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {accepted}")


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be True or False")


def _check_positive(name: str, value: float | None, default: str) -> None:
    if value is None:
        return
    accepted = f"it must be positive and finite, or None for {default}"
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; {accepted}")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, _INTEGERS)):
        raise TypeError(f"{name} is {value!r}; it must be an integer of 0 or more, or None")


def _narrow(name: str, index: Tensor | None) -> Tensor | None:
    """As int32, which is what is read on cuda."""
    if index is None:
        return None
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {index.dtype}; it must be torch.int32 or torch.int64")
    return index.to(torch.int32)


def _without_idle(
    q: Tensor, k: Tensor, starts: Tensor | None, lengths: Tensor | None, query_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The starts and lengths that leave requests without a query no keys either."""
    if q.shape[1] != 1:
        raise ValueError(
            f"query_lengths is given for a decode of {q.shape[1]} positions on {q.device}; there "
            "it works with one"
        )
    if starts is None:
        starts = torch.zeros_like(query_lengths)
    if lengths is None:
        lengths = torch.full_like(query_lengths, k.shape[1])
    return starts, torch.where(query_lengths > 0, lengths, starts)


def _check_pages(k: Tensor, lengths: Tensor | None, page_table: Tensor | None) -> None:
    """An error if a page id or a length on the device is out of range."""
    if page_table is None or lengths is None:
        raise ValueError("check_pages is set; it needs page_table and lengths")
    found = call(
        "check_pages",
        page_table=page_table,
        lengths=lengths,
        page_size=k.shape[1],
        pages=k.shape[0],
    )
    kind, request, *numbers = found.tolist()
    if kind == 1:
        index, page = numbers
        raise ValueError(
            f"page_table[{request}, {index}] is {page}; it must be 0 to {k.shape[0] - 1}, a page "
            "of k"
        )
    if kind == 2:
        length, room = numbers
        raise ValueError(
            f"lengths[{request}] is {length}; it must be 0 to {room}, what the page table has room "
            "for"
        )


def tile_shape(q: Tensor, k: Tensor, v: Tensor, *, phase: str) -> TileShape:
    """The tiles on which `attention` would decide for these dense inputs in this phase."""
    _check_tensors({"q": q, "k": k, "v": v}, {})
    _check_choice("phase", phase, ("prefill", "decode"))
    return TileShape(*call(f"{phase}_tile_shape", q=q, k=k, v=v))


def _window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """The operator's window_left and window_right; -1: no limit."""
    if window is None:
        return -1, -1
    accepted = "it must be (before, after), each an integer of 0 or more, or None for no limit"
    if (
        not isinstance(window, Sequence)
        or isinstance(window, str)
        or any(isinstance(w, bool) or not isinstance(w, int | None) for w in window)
    ):
        raise TypeError(f"window is {window!r}; {accepted}")
    if len(window) != 2 or any(w is not None and w < 0 for w in window):
        raise ValueError(f"window is {window!r}; {accepted}")
    left, right = (-1 if w is None else w for w in window)
    return left, right


def _bands(bands: Sequence[Sequence[int]] | Tensor | None, device: torch.device) -> Tensor | None:
    """The operator's bands, [heads, 2] int64."""
    if bands is None:
        return None
    try:
        values = torch.as_tensor(bands, device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"bands is {bands!r}; it must be [heads, 2] whole numbers") from error
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TypeError(f"bands is {values.dtype}; it must be [heads, 2] whole numbers")
    return values.to(torch.int64)


def _tile_test(
    threshold: float | Sequence[float] | Tensor | None,
    threshold_scale_factor: float | Sequence[float] | Tensor | None,
    absolute_threshold: float | Sequence[float] | Tensor | None,
    device: torch.device,
) -> tuple[str, Tensor | None]:
    """The operator's name for the test that was chosen, and its values, [1 or B, 1 or H, P]."""
    given = [
        (name, test, value)
        for name, test, value in (
            ("threshold", "relative", threshold),
            ("threshold_scale_factor", "scale_factor", threshold_scale_factor),
            ("absolute_threshold", "absolute", absolute_threshold),
        )
        if value is not None
    ]
    if not given:
        return "none", None
    if len(given) > 1:
        raise ValueError(f"{' and '.join(name for name, *_ in given)} exclude each other; give one")
    [(name, test, value)] = given
    accepted = "it must be a number, a list of numbers, or a tensor of them"
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if device.type == "cuda":
        _check_host_values(name, test, value)
    if isinstance(value, _NUMBERS):  # no copy from the host, so that a graph can capture it
        return test, torch.full((1, 1, 1), value, dtype=torch.float32, device=device)
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name} is {value.dtype}; {accepted}")
    try:
        values = torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}; {accepted}") from error
    if values.dim() > 3 or not values.numel():
        raise ValueError(
            f"{name} is {list(values.shape)}; it must be a number, [heads], [1 or batch, 1 or "
            "heads], or [1 or batch, 1 or heads, places]"
        )
    if values.dim() < 3:
        values = values.reshape((1,) * (2 - values.dim()) + values.shape + (1,))
    return test, values


def _check_host_values(name: str, test: str, value: object) -> None:
    """An error if a number that the host has is no threshold: on cuda nobody looks at it later."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = [] if torch.compiler.is_compiling() else value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        for element in value:
            _check_host_values(name, test, element)
    elif isinstance(value, _NUMBERS):
        if test == "relative" and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be a number from 0 to 1")
        if test == "scale_factor" and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and at least 0")
        if test == "absolute" and math.isnan(value):
            raise ValueError(f"{name} is {value}; it must be a number")


def _check_tensors(needed: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """An error unless all are strided tensors on one device that has a backend."""
    [first, *_] = needed
    q = needed[first]
    if isinstance(q, Tensor) and q.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{first} is on {q.device}; blasst runs on: cpu, cuda")
    for name, t in {**needed, **optional}.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Tensor):
            none = ", or None" if name in optional else ""
            raise TypeError(f"{name} is a {type(t).__name__}; it must be a torch.Tensor{none}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} is {t.layout}; it must be torch.strided")
        if t.device != q.device:
            raise ValueError(
                f"{name} is on {t.device}, {first} on {q.device}; they must share a device"
            )
