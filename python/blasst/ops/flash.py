"""FlashAttention's functions: its argument names, meanings and results, and a threshold beside.

Tensors are [batch, tokens, heads, head_dim]; causal masks and windows are aligned bottom-right.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.arguments import check_flags, check_indices, check_tensors, is_number
from blasst.ops.attention import Result, attention
from blasst.ops.kv_cache import appended, cache_of

Threshold = float | Sequence[float] | Tensor | None

_LATER = {
    "attention_chunk": (0,),
    "num_splits": (0, 1),
    "pack_gqa": (None, False, True),  # how it is computed, not what
    "q_descale": (None,),
    "qv": (None,),
    "scheduler_metadata": (None,),
    "seqused_q": (None,),
    "sm_margin": (0,),
}
"""Arguments of FlashAttention-3 that its second version has not, and the values that are taken."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    skip_softmax_threshold: Threshold = None,
    skip_softmax_threshold_scale_factor: Threshold = None,
    scores: str = "exact",
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **others: object,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention with FlashAttention's arguments; `blasst.attention` says more about each.

    One query a request is a decode, but for a gradient: the query heads of a KV head decide
    together. More are a prefill.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        k: [batch, seqlen_k, kv_heads, head_dim].
        v: [batch, seqlen_k, kv_heads, value_dim].
        dropout_p: 0.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: masked bottom-right.
        window_size: keys that a query sees (before, after) its own position; -1: no limit.
        softcap: 0: none.
        alibi_slopes: None.
        deterministic: either; the result always is.
        return_attn_probs: also return the LSE.
        skip_softmax_threshold: blasst.attention's `threshold`; None: dense, 0: the same bits.
        skip_softmax_threshold_scale_factor: blasst.attention's `threshold_scale_factor`.
        scores: blasst.attention's `scores`.
        k_descale: [batch, kv_heads] of keys in 8 bits: blasst.attention's `k_scale`.
        v_descale: of values in 8 bits: blasst.attention's `v_scale`.
        others: what FlashAttention-3 takes beside these, at its defaults.

    Returns:
        The output, [batch, seqlen_q, heads, value_dim]; with return_attn_probs (output, LSE [batch,
        heads, seqlen_q], None), the None standing for FlashAttention's dropout pattern.

    Raises:
        NotSupportedError: an argument of FlashAttention that has no kernel here, by its name; and
            what blasst.attention raises.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, **others)
    check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    options = _options(
        *(softmax_scale, causal, window_size, softcap, scores, k_descale, v_descale),
        *(skip_softmax_threshold, skip_softmax_threshold_scale_factor),
    )
    result = attention(q, k, v, **options, phase=_phase(q, k, v), return_lse=return_attn_probs)
    return (*_with_lse(result), None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    skip_softmax_threshold: Threshold = None,
    skip_softmax_threshold_scale_factor: Threshold = None,
    scores: str = "exact",
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **others: object,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention over requests of different lengths; see `flash_attn_func` for what is not here.

    Args:
        q: [total rows, heads, head_dim].
        k: [total keys, kv_heads, head_dim], or with block_table [pages, page_size, kv_heads,
            head_dim].
        v: like k, with value_dim.
        cu_seqlens_q: [batch + 1] first row of each request.
        cu_seqlens_k: [batch + 1] first key of each request; with seqused_k it may be None.
        max_seqlen_q: no request has more rows.
        max_seqlen_k: no request has more keys.
        dropout_p: 0.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: masked bottom-right.
        window_size: keys that a query sees (before, after) its own position; -1: no limit.
        softcap: 0: none.
        alibi_slopes: None.
        deterministic: either; the result always is.
        return_attn_probs: also return the LSE.
        block_table: [batch, pages a request] page ids.
        seqused_k: [batch] keys of each request, with block_table.
        skip_softmax_threshold: blasst.attention's `threshold`; None: dense, 0: the same bits.
        skip_softmax_threshold_scale_factor: blasst.attention's `threshold_scale_factor`.
        scores: blasst.attention's `scores`.
        k_descale: [batch, kv_heads] of keys in 8 bits: blasst.attention's `k_scale`.
        v_descale: of values in 8 bits: blasst.attention's `v_scale`.
        others: what FlashAttention-3 takes beside these, at its defaults.

    Returns:
        The output, [total rows, heads, value_dim]; with return_attn_probs (output, LSE [heads,
        total rows], None).

    Raises:
        NotSupportedError: an argument of FlashAttention that has no kernel here, by its name; and
            what blasst.attention raises.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, **others)
    check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    check_tensors(
        {"q": q, "cu_seqlens_q": cu_seqlens_q},
        {"cu_seqlens_k": cu_seqlens_k, "block_table": block_table, "seqused_k": seqused_k},
    )
    keys = _ranges(cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    options = _options(
        *(softmax_scale, causal, window_size, softcap, scores, k_descale, v_descale),
        *(skip_softmax_threshold, skip_softmax_threshold_scale_factor),
    )
    result = attention(
        *(q, k, v),
        **options,
        phase="prefill",
        cu_seqlens_q=cu_seqlens_q,
        **keys,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_attn_probs,
    )
    return (*_with_lse(result), None) if return_attn_probs else result


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    skip_softmax_threshold: Threshold = None,
    skip_softmax_threshold_scale_factor: Threshold = None,
    scores: str = "exact",
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **others: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache, which takes up new keys and values first if they are given.

    Without a gradient. One query a request is a decode: the query heads of a KV head decide
    together. More are a prefill.

    Args:
        q: [batch, seqlen_q, heads, head_dim], the last positions of each request.
        k_cache: [cache batch, room, kv_heads, head_dim], or with block_table [pages, page_size,
            kv_heads, head_dim]. Written in place if k is given.
        v_cache: like k_cache, with value_dim.
        k: [batch, new keys, kv_heads, head_dim] put into the cache from cache_seqlens on, unless
            the call ends in an error. On cuda the values of index tensors are not looked at: keys
            for which the cache has no room or no page are dropped.
        v: like k, with value_dim.
        rotary_cos: None.
        rotary_sin: None.
        cache_seqlens: keys in the cache before the new ones, of each request or of all; None: all
            that there is room for.
        cache_batch_idx: [batch] where in a cache without pages each request is; default: in order.
            The room must be a multiple of 16.
        cache_leftpad: [batch] first key in use, of a cache without pages and cache_batch_idx.
        block_table: [batch, pages a request] page ids.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: masked bottom-right.
        window_size: keys that a query sees (before, after) its own position; -1: no limit.
        softcap: 0: none.
        rotary_interleaved: either, without rotary_cos.
        alibi_slopes: None.
        num_splits: 0 or 1; how a decode is split follows from its shape.
        return_softmax_lse: also return the LSE.
        skip_softmax_threshold: blasst.attention's `threshold`; None: dense, 0: the same bits.
        skip_softmax_threshold_scale_factor: blasst.attention's `threshold_scale_factor`.
        scores: blasst.attention's `scores`.
        k_descale: [batch, kv_heads] of keys in 8 bits: blasst.attention's `k_scale`.
        v_descale: of values in 8 bits: blasst.attention's `v_scale`.
        others: what FlashAttention-3 takes beside these, at its defaults.

    Returns:
        The output, [batch, seqlen_q, heads, value_dim]; with return_softmax_lse (output, LSE
        [batch, heads, seqlen_q]).

    Raises:
        NotSupportedError: an argument of FlashAttention that has no kernel here, by its name; a
            gradient; and what blasst.attention raises.
    """
    _refuse(alibi_slopes=alibi_slopes, num_splits=num_splits, rotary_cos=rotary_cos, **others)
    _refuse(rotary_sin=rotary_sin)
    check_flags(rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse)
    optional = {"k": k, "v": v, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    optional["block_table"] = block_table
    check_tensors({"q": q, "k_cache": k_cache, "v_cache": v_cache}, optional)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k_cache, v_cache, k, v)
    ):
        raise NotSupportedError(
            "an input requires a gradient, and flash_attn_with_kvcache has no backward pass: run "
            "it under torch.no_grad()"
        )
    options = _options(
        *(softmax_scale, causal, window_size, softcap, scores, k_descale, v_descale),
        *(skip_softmax_threshold, skip_softmax_threshold_scale_factor),
    )
    cache = cache_of(
        *(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    )
    with appended(cache, k, v):
        result = attention(
            *(q, cache.k, cache.v),
            **options,
            starts=cache_leftpad,
            lengths=cache.lengths,
            page_table=cache.page_table,
            return_lse=return_softmax_lse,
        )
    return _with_lse(result) if return_softmax_lse else result


def _refuse(**arguments: object) -> None:
    """An error for what FlashAttention takes and blasst does not, and for what neither takes."""
    neutral = {
        **_LATER,
        **{"dropout_p": (0,), "alibi_slopes": (None,), "rotary_cos": (None,)},
        "rotary_sin": (None,),
    }
    for name, value in arguments.items():
        if name not in neutral:
            raise TypeError(f"there is no argument {name!r}")
        taken = neutral[name]
        # What is no number may have an equality of its own, as arrays have.
        if not (value is None or isinstance(value, numbers.Number)) or value not in taken:
            what = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotSupportedError(
                f"{name} is {what}; of FlashAttention's argument blasst takes only "
                f"{' or '.join(map(repr, taken))}"
            )


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    scores: str,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    threshold: Threshold,
    threshold_scale_factor: Threshold,
) -> dict[str, Any]:
    """blasst.attention's arguments for those that all functions here take."""
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": _window(window_size),
        "softcap": _softcap(softcap),
        "scores": scores,
        "k_scale": k_descale,
        "v_scale": v_descale,
        "threshold": threshold,
        "threshold_scale_factor": threshold_scale_factor,
    }


def _window(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """blasst.attention's window."""
    accepted = "it must be (before, after), each an integer of 0 or more, or -1 for no limit"
    if not isinstance(window_size, Sequence) or any(
        isinstance(side, bool) or not isinstance(side, int) for side in window_size
    ):
        raise TypeError(f"window_size is {window_size!r}; {accepted}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size is {window_size!r}; {accepted}")
    before, after = (None if side == -1 else side for side in window_size)
    return before, after


def _softcap(softcap: float) -> float | None:
    return None if is_number(softcap) and softcap == 0 else softcap


def _phase(*inputs: Tensor) -> str | None:
    """A gradient needs a prefill, also of one query."""
    return "prefill" if torch.is_grad_enabled() and any(t.requires_grad for t in inputs) else None


def _ranges(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
) -> dict[str, Tensor]:
    """blasst.attention's arguments that say which keys each ragged request has."""
    if block_table is None:
        if seqused_k is not None:
            raise NotSupportedError("seqused_k is given without block_table")
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k is None; it may be so with block_table and seqused_k")
        return {"cu_seqlens_k": cu_seqlens_k}
    if seqused_k is not None:
        return {"page_table": block_table, "lengths": seqused_k}
    if cu_seqlens_k is None:
        raise ValueError("block_table is given without cu_seqlens_k or seqused_k")
    check_indices({"cu_seqlens_k": cu_seqlens_k})
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k is {list(cu_seqlens_k.shape)}; it must be [batch + 1] = "
            f"{list(cu_seqlens_q.shape)}"
        )
    return {"page_table": block_table, "lengths": cu_seqlens_k.diff()}


def _with_lse(result: Result) -> tuple[Tensor, Tensor]:
    return result.out, result.lse
