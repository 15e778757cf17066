"""Loads and calls `torch.ops.blasst`."""

from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blasst.errors import NotSupportedError

_LIBRARY = Path(__file__).parents[1] / "_ops.so"
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing; run `make build` (source tree) or `pip install .`")
torch.ops.load_library(_LIBRARY)

GAP_BINS = 514
REPORTS = ("lse", "dropped_mass_bound", "tiles", "gaps", "maxima", "bits")
"""What prefill and decode report, in this order: each a tensor if want_... is true, else None."""

_ERRORS = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    "NotImplementedError": NotSupportedError,
    "MemoryError": MemoryError,
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
def names(operator: str) -> tuple[str, ...]:
    """Of its arguments, as its schema has them."""
    schema = getattr(torch.ops.blasst, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


def arguments_of(operator: str, inputs: tuple[object, ...]) -> dict[str, object]:
    """The inputs by name. torch leaves out the last ones if they are the default, None."""
    return dict(zip_longest(names(operator), inputs))


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


def decode_keys(device: torch.device) -> int:
    """Keys of the tile on which decode decides on this kind of device."""
    return 64 if device.type == "cuda" else KEYS


def key_tiles(
    phase: str,
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    max_seqlen_k: int | None,
) -> int:
    """Of a request of the most keys, as far as sizes say; index tensors are not read."""
    if cu_seqlens_k is not None:
        keys = k.shape[0]
    elif page_table is not None:
        keys = page_table.shape[1] * k.shape[1]
    else:
        keys = k.shape[1]
    if max_seqlen_k is not None:
        keys = torch.sym_min(keys, max_seqlen_k)
    decode = phase.startswith("decode")
    return -(-keys // (decode_keys(q.device) if decode else prefill_tile(q.device, q.shape[-1])[1]))
