"""`scaled_dot_product_attention`, with the arguments and meanings of torch's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.arguments import check_flags, check_tensors, is_number
from blasst.ops.attention import attention
from blasst.ops.layouts import check_layout


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    skip_softmax_threshold: float | Sequence[float] | Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | Sequence[float] | Tensor | None = None,
    scores: str = "exact",
) -> Tensor:
    """Attention with the arguments of torch.nn.functional's function of this name.

    A query without a key gives 0. One query a request is a decode, but for a gradient: the query
    heads of a KV head decide together.

    Args:
        query: [batch, heads, queries, head_dim], or [batch, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim], or [batch, keys, head_dim].
        value: like key, with value_dim.
        attn_mask: boolean, True: this key takes part, broadcastable to [batch, heads, queries,
            keys], the same for all heads and queries, and the keys of a request side by side: a
            batch that is padded on the left or the right. Its values are looked at.
        dropout_p: 0.
        is_causal: as torch has it, aligned top-left: query i sees keys 0 to i, also where there are
            more keys than queries. (blasst.attention and FlashAttention align bottom-right.)
        scale: default 1 / sqrt(head_dim).
        enable_gqa: heads may be a multiple of kv_heads.
        skip_softmax_threshold: blasst.attention's `threshold`; None: dense, 0: the same bits.
        skip_softmax_threshold_scale_factor: blasst.attention's `threshold_scale_factor`.
        scores: blasst.attention's `scores`.

    Returns:
        The output, [batch, heads, queries, value_dim] or [batch, queries, value_dim].

    Raises:
        NotSupportedError: dropout, or another mask; and what blasst.attention raises.
    """
    check_tensors({"query": query, "key": key, "value": value}, {"attn_mask": attn_mask})
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    if not is_number(dropout_p) or dropout_p != 0:
        raise NotSupportedError(f"dropout_p is {dropout_p!r}; blasst takes only 0")
    dims = query.dim()
    if dims not in (3, 4) or key.dim() != dims or value.dim() != dims:
        raise ValueError(
            f"query is {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}; they "
            "must be [batch, heads, tokens, head_dim] or [batch, tokens, head_dim]"
        )
    if dims == 3:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
    check_layout(query, key, tokens=2, causal=False)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; without enable_gqa they "
            "must be as many"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal exclude each other, as in torch")

    queries, keys = query.shape[2], key.shape[2]
    window = None
    if is_causal and queries > keys:  # bottom-right, the last query would see the last key
        window = (None, queries - keys)
    elif is_causal:  # keys beyond the last query are seen by none
        key, value = key[:, :, :queries], value[:, :, :queries]
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out = attention(
        *(t.transpose(1, 2) for t in (query, key, value)),
        causal=is_causal and window is None,
        window=window,
        scale=scale,
        threshold=skip_softmax_threshold,
        threshold_scale_factor=skip_softmax_threshold_scale_factor,
        scores=scores,
        phase="prefill" if with_gradient else None,
        **({} if attn_mask is None else _key_range(attn_mask, query, keys)),
    ).transpose(1, 2)
    return out.squeeze(1) if dims == 3 else out


def _key_range(mask: Tensor, query: Tensor, keys: int) -> dict[str, Tensor]:
    """blasst.attention's starts and lengths of the requests."""
    if mask.dtype != torch.bool:
        raise NotSupportedError(
            f"attn_mask is {mask.dtype}; blasst takes a boolean mask of keys, or is_causal"
        )
    batch, heads, queries, _ = query.shape
    try:
        mask = mask.expand(batch, heads, queries, keys)
    except RuntimeError as error:
        raise ValueError(
            f"attn_mask is {list(mask.shape)}; it must be broadcastable to "
            f"{[batch, heads, queries, keys]}"
        ) from error
    # A dimension that was not broadcast may hold the same everywhere: one look says so.
    by_request = mask[:, 0, 0] if heads > 0 and queries > 0 else mask.new_zeros(batch, keys)
    if not torch.equal(mask, by_request[:, None, None].expand_as(mask)):
        raise NotSupportedError(
            "attn_mask differs between heads or queries; blasst takes a mask of keys, is_causal, "
            "or blasst.attention's window, bands and blocks"
        )
    counts = by_request.sum(-1)
    starts = by_request.int().argmax(-1) if keys > 0 else counts
    ends = starts + counts
    place = torch.arange(keys, device=mask.device)
    side_by_side = (place >= starts[:, None]) & (place < ends[:, None])
    if not torch.equal(by_request, side_by_side):
        raise NotSupportedError(
            "attn_mask leaves out keys between others of the same request; blasst takes the keys "
            "of a request side by side"
        )
    return {"starts": starts.to(torch.int32), "lengths": ends.to(torch.int32)}
