"""What torch.compile and torch.export know of the operators: the results without their values."""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from blasst.ops.library import GAP_BINS, arguments_of, decode_tile_heads, key_tiles, tile_of


def _check_devices(arguments: dict[str, object], first: str) -> None:
    """An error unless all tensors are where the first one is; a meta tensor is nowhere else."""
    device = arguments[first].device
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{name} is on {value.device}, {first} on {device}; they must share a device"
            )


def _fake_into(operator: str, *inputs: object) -> tuple[Tensor | None, ...]:
    """The reports of prefill and decode, without their values."""
    arguments = arguments_of(operator, inputs)
    _check_devices(arguments, "q")
    a = SimpleNamespace(**arguments)
    heads, rows = a.q.shape[-2], a.q.shape[0]
    if a.cu_seqlens_q is None:
        rows = rows * a.q.shape[1]
    batch = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1
    tiles = _most_tiles(operator, a, batch, rows)
    shapes = {
        "lse": ((heads, rows), torch.float32),
        "dropped_mass_bound": ((heads, rows), torch.float32),
        "tiles": ((2, batch, heads), torch.int64),
        "gaps": ((heads, GAP_BINS), torch.int64),
        "maxima": (tiles, torch.float32),
        "bits": ((tiles[0] * tiles[1] * -(-tiles[2] // 32),), torch.int32),
    }
    return tuple(
        a.q.new_empty(shape, dtype=dtype) if arguments[f"want_{name}"] else None
        for name, (shape, dtype) in shapes.items()
    )


def _fake(operator: str, *inputs: object) -> tuple[Tensor | None, ...]:
    reports = _fake_into(operator, *inputs)
    q, _, v, *_ = inputs
    return (q.new_empty((*q.shape[:-1], v.shape[-1])), *reports)


def _most_tiles(operator: str, a: SimpleNamespace, batch: int, rows: int) -> tuple[int, int, int]:
    """Heads, query tiles and key tiles of a report, as many as the index tensors allow.

    The plan's numbers (`library.plan`), which cannot take sizes that are symbols.
    """
    ranges = {name: getattr(a, name) for name in ("cu_seqlens_k", "page_table", "max_seqlen_k")}
    keys = key_tiles(operator, a.q, a.k, a.v, **ranges)
    if operator.startswith("decode"):
        positions = a.q.shape[1] if a.cu_seqlens_q is None else a.max_seqlen_q
        return decode_tile_heads(a.q, a.k, a.v, positions), batch, keys
    sizes = [int(t.shape[-1]) for t in (a.q, a.v)]
    query_rows, _ = tile_of("prefill", a.q.device, a.q.dtype, *sizes)
    if a.cu_seqlens_q is not None:
        most = (rows + batch * (query_rows - 1)) // query_rows
        return a.q.shape[-2], torch.sym_min(rows, most), keys
    return a.q.shape[-2], batch * -(-a.q.shape[1] // query_rows), keys


def _fake_backward(*inputs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = arguments_of("prefill_backward", inputs)
    _check_devices(arguments, "q")
    q, k, v, sinks = (arguments[name] for name in ("q", "k", "v", "sinks"))
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32),
    )


def _fake_merge(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    arguments = arguments_of("merge", inputs)
    _check_devices(arguments, "out_a")
    out, lse = arguments["out_a"], arguments["lse_a"]
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _fake_check_pages(page_table: Tensor, lengths: Tensor, page_size: int, pages: int) -> Tensor:
    return page_table.new_empty(4)


torch.library.register_fake("blasst::prefill", partial(_fake, "prefill"))
torch.library.register_fake("blasst::decode", partial(_fake, "decode"))
torch.library.register_fake("blasst::prefill_into", partial(_fake_into, "prefill_into"))
torch.library.register_fake("blasst::decode_into", partial(_fake_into, "decode_into"))
torch.library.register_fake("blasst::prefill_backward", _fake_backward)
torch.library.register_fake("blasst::merge", _fake_merge)
torch.library.register_fake("blasst::check_pages", _fake_check_pages)
