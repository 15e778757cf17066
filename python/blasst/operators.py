"""Loads and calls `torch.ops.blasst`; says what torch.compile, export and autograd must know."""

from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_ops.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing; run `make build` (source tree) or `pip install .`")
torch.ops.load_library(_LIBRARY)

GAP_BINS = 514
REPORTS = ("lse", "dropped_mass_bound", "tiles", "gaps", "maxima", "bits")
"""What prefill and decode report, in this order: each a tensor if want_... is true, else None."""

_ERRORS = {
    error.__name__: error for error in (TypeError, ValueError, NotImplementedError, MemoryError)
}


def call(operator: str, **arguments: object) -> Any:
    """An operator's result.

    torch makes a RuntimeError of every error of an operator; here it gets the type that its message
    begins with.
    """
    try:
        return getattr(torch.ops.blasst, operator)(**arguments)
    except RuntimeError as error:
        kind, _, message = str(error).partition(": ")
        if kind not in _ERRORS:
            raise
        raise _ERRORS[kind](message) from None


@cache
def _names(operator: str) -> tuple[str, ...]:
    schema = getattr(torch.ops.blasst, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


def _arguments(operator: str, inputs: tuple[object, ...]) -> dict[str, object]:
    """The inputs by name. torch leaves out the last ones if they are the default, None."""
    return dict(zip_longest(_names(operator), inputs))


def _prefill_tile() -> tuple[int, int]:
    """Query rows and keys of the tile on which prefill decides."""
    row = torch.empty(1, 1, 1, 16, device="cpu", dtype=torch.float32)
    return tuple(torch.ops.blasst.prefill_tile_shape(row, row, row)[:2])


QUERY_ROWS, KEYS = _prefill_tile()
"""On the CPU."""


def prefill_tile(device: torch.device, head_dim: int) -> tuple[int, int]:
    """Query rows and keys of the tile on which prefill decides on this kind of device."""
    if device.type == "cuda":
        return 64, 64 if head_dim > 128 else 128
    return QUERY_ROWS, KEYS


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
    arguments = _arguments(operator, inputs)
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
    """Heads, query tiles and key tiles of a report, as many as the index tensors allow."""
    query_rows, tile_keys = prefill_tile(a.q.device, a.q.shape[-1])
    if a.cu_seqlens_k is not None:
        keys = a.k.shape[0]
    elif a.page_table is not None:
        keys = a.page_table.shape[1] * a.k.shape[1]
    else:
        keys = a.k.shape[1]
    if a.max_seqlen_k is not None:
        keys = torch.sym_min(keys, a.max_seqlen_k)
    key_tiles = -(-keys // tile_keys)
    if operator.startswith("decode"):
        return a.k.shape[-2], batch, key_tiles
    if a.cu_seqlens_q is not None:
        return a.q.shape[-2], rows // query_rows + batch, key_tiles
    return a.q.shape[-2], batch * -(-a.q.shape[1] // query_rows), key_tiles


def _fake_backward(*inputs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = _arguments("prefill_backward", inputs)
    _check_devices(arguments, "q")
    q, k, v, sinks = (arguments[name] for name in ("q", "k", "v", "sinks"))
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32),
    )


def _fake_merge(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    arguments = _arguments("merge", inputs)
    _check_devices(arguments, "out_a")
    out, lse = arguments["out_a"], arguments["lse_a"]
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _fake_check_pages(page_table: Tensor, lengths: Tensor, page_size: int, pages: int) -> Tensor:
    return page_table.new_empty(4)


def _save_for_backward(
    ctx: Any, inputs: tuple[object, ...], output: tuple[Tensor | None, ...]
) -> None:
    arguments = _arguments("prefill", inputs)
    out, *reports = output
    reported = dict(zip(REPORTS, reports, strict=True))
    saved = {name: arguments[name] for name in _names("prefill_backward") if name in arguments}
    saved |= {"out": out, "lse": reported.pop("lse"), "bits": reported["bits"]}
    ctx.others = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
    ctx.names = [name for name in saved if name not in ctx.others]
    ctx.save_for_backward(*(saved[name] for name in ctx.names))
    ctx.mark_non_differentiable(*(t for t in reported.values() if t is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
    device = saved["q"].device
    if device.type != "cpu":
        raise NotImplementedError(
            f"blasst.attention has no backward pass on {device}; it has one on: cpu"
        )
    if saved["lse"] is None or saved["bits"] is None:
        raise NotImplementedError(
            "torch.ops.blasst.prefill has a backward pass only with want_lse=True and "
            "want_bits=True"
        )
    dout = torch.zeros_like(saved["out"]) if dout is None else dout
    dq, dk, dv, dsinks = call("prefill_backward", dout=dout, dlse=dlse, **saved)
    gradients = {"q": dq, "k": dk, "v": dv, "sinks": None if saved["sinks"] is None else dsinks}
    return tuple(gradients.get(name) for name in _names("prefill"))


def _no_decode_backward(*_: object) -> None:
    raise NotImplementedError(
        "blasst.attention with phase='decode' has no backward pass: run it under torch.no_grad(), "
        "or pass phase='prefill'"
    )


def _no_merge_backward(*_: object) -> None:
    raise NotImplementedError(
        "blasst.merge has no backward pass: run it under torch.no_grad(), or attend to all keys in "
        "one call"
    )


def _no_second_backward(*_: object) -> None:
    raise NotImplementedError("blasst.attention has no second derivative")


torch.library.register_fake("blasst::prefill", partial(_fake, "prefill"))
torch.library.register_fake("blasst::decode", partial(_fake, "decode"))
torch.library.register_fake("blasst::prefill_into", partial(_fake_into, "prefill_into"))
torch.library.register_fake("blasst::decode_into", partial(_fake_into, "decode_into"))
torch.library.register_fake("blasst::prefill_backward", _fake_backward)
torch.library.register_fake("blasst::merge", _fake_merge)
torch.library.register_fake("blasst::check_pages", _fake_check_pages)
torch.library.register_autograd("blasst::merge", _no_merge_backward)
torch.library.register_autograd("blasst::prefill", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("blasst::decode", _no_decode_backward)
torch.library.register_autograd("blasst::prefill_backward", _no_second_backward)
