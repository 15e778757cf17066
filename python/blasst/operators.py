"""Loads `torch.ops.blasst` and tells torch.compile, export and autograd what it needs to know."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_ops.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing; run `make build` (source tree) or `pip install .`")
torch.ops.load_library(_LIBRARY)

GAP_BINS = 514


def _prefill_tile() -> tuple[int, int]:
    """Query rows and keys of the tile on which prefill decides."""
    row = torch.empty(1, 1, 1, 16, device="cpu")
    return tuple(torch.ops.blasst.prefill_tile_shape(row, row, row)[:2])


QUERY_ROWS, KEYS = _prefill_tile()
"""On the CPU."""


def prefill_tile(device: torch.device, head_dim: int) -> tuple[int, int]:
    """Query rows and keys of the tile on which prefill decides on this kind of device."""
    if device.type == "cuda":
        return 64, 64 if head_dim > 128 else 128
    return QUERY_ROWS, KEYS


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    bands: Tensor | None,
    blocks: Tensor | None,
    order: str,
    test: str,
    thresholds: Tensor | None,
    lse: bool,
    dropped_mass_bound: bool,
    tiles: bool,
    gaps: bool,
    maxima: bool,
    bits: bool,
    *,
    decode: bool = False,
) -> tuple[Tensor, ...]:
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    rows = q.shape[0] * q.shape[1] if cu_seqlens_q is None else q.shape[0]
    query_rows, tile_keys = prefill_tile(q.device, q.shape[-1])
    # As many tile bits as there may be: index tensors are not read here.
    if cu_seqlens_q is not None:
        query_tiles = rows // query_rows + batch
    else:
        query_tiles = batch * -(-q.shape[1] // query_rows)
    if cu_seqlens_k is not None:
        keys = k.shape[0]
    elif page_table is not None:
        keys = page_table.shape[1] * k.shape[1]
    else:
        keys = k.shape[1]

    maxima_shape = (heads, query_tiles, -(-keys // tile_keys))
    if decode:
        maxima_shape = (k.shape[-2], batch, -(-keys // tile_keys))

    def output(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        output(lse, (heads, rows), torch.float32),
        output(dropped_mass_bound, (heads, rows), torch.float32),
        output(tiles, (2, batch, heads), torch.int64),
        output(gaps, (heads, GAP_BINS), torch.int64),
        output(maxima, maxima_shape, torch.float32),
        output(bits, (heads * query_tiles * -(-keys // (32 * tile_keys)),), torch.int32),
    )


def _fake_decode(q: Tensor, k: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    if arguments[-1]:
        raise NotImplementedError("blasst::decode has no tile bits for a backward pass")
    return _fake(q, k, *arguments, decode=True)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    bands: Tensor | None,
    blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32),
    )


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, scale, softcap, sinks, causal, left, right, bands, blocks = inputs[:17]
    out, lse, bound, _, _, maxima, bits = output
    ctx.save_for_backward(*tensors, sinks, bands, blocks, out, lse, bits)
    ctx.scalars = scale, softcap, causal, left, right
    ctx.reported = inputs[20] and inputs[25]  # lse and bits
    ctx.mark_non_differentiable(bound, maxima)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, starts, lengths, query_lengths, cu_q, cu_k, page_table, *saved = ctx.saved_tensors
    sinks, bands, blocks, out, lse, bits = saved
    if q.device.type != "cpu":
        raise NotImplementedError(
            f"blasst.attention has no backward pass on {q.device}; it has one on: cpu"
        )
    if not ctx.reported:
        raise NotImplementedError(
            "torch.ops.blasst.prefill has a backward pass only with lse=True and bits=True"
        )
    scale, softcap, causal, left, right = ctx.scalars
    dq, dk, dv, dsinks = torch.ops.blasst.prefill_backward(
        torch.zeros_like(out) if dout is None else dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        bits,
        starts,
        lengths,
        query_lengths,
        cu_q,
        cu_k,
        page_table,
        scale,
        softcap,
        sinks,
        causal,
        left,
        right,
        bands,
        blocks,
    )
    gradients = [None] * len(ctx.needs_input_grad)
    gradients[:3] = dq, dk, dv
    gradients[11] = None if sinks is None else dsinks
    return tuple(gradients)


def _no_decode_backward(*_: object) -> None:
    raise NotImplementedError(
        "blasst.attention with phase='decode' has no backward pass: run it under torch.no_grad(), "
        "or pass phase='prefill'"
    )


def _fake_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _fake_check_pages(page_table: Tensor, lengths: Tensor, page_size: int, pages: int) -> Tensor:
    return page_table.new_empty(4)


def _no_merge_backward(*_: object) -> None:
    raise NotImplementedError(
        "blasst.merge has no backward pass: run it under torch.no_grad(), or attend to all keys in "
        "one call"
    )


def _no_second_backward(*_: object) -> None:
    raise NotImplementedError("blasst.attention has no second derivative")


torch.library.register_fake("blasst::prefill", _fake)
torch.library.register_fake("blasst::decode", _fake_decode)
torch.library.register_fake("blasst::prefill_backward", _fake_backward)
torch.library.register_fake("blasst::merge", _fake_merge)
torch.library.register_fake("blasst::check_pages", _fake_check_pages)
torch.library.register_autograd("blasst::merge", _no_merge_backward)
torch.library.register_autograd("blasst::prefill", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("blasst::decode", _no_decode_backward)
torch.library.register_autograd("blasst::prefill_backward", _no_second_backward)
