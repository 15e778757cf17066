"""Loads and calls `torch.ops.blasst`."""

import re
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.import_hook import when_imported

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
        raise _ERRORS[kind](_in_python(message)) from None


_NAMES = {
    **{"mask.bands": "bands", "kv.cu_seqlens": "cu_seqlens_k"},
    **{f"kv.{name}": name for name in ("lengths", "page_table", "starts")},
    **{"out_a": "out1", "lse_a": "lse1", "out_b": "out2", "lse_b": "lse2"},
}
"""Python's names for what messages call otherwise."""

_TYPES = {"Byte": torch.uint8, "Char": torch.int8, "ComplexFloat": torch.complex64}
"""Types that torch's Python has by another name than its C++."""


def _in_python(message: str) -> str:
    """A message with the names of Python's arguments and types."""
    words = "|".join(map(re.escape, _NAMES))
    message = re.sub(rf"\b({words})\b", lambda name: _NAMES[name[0]], message)

    def named(match: re.Match[str]) -> str:
        verb, name = match.groups()
        dtype = _TYPES.get(name, getattr(torch, name.lower(), None))
        return f"{verb} {dtype}" if isinstance(dtype, torch.dtype) else match[0]

    return re.sub(r"\b(is|be) ([A-Z]\w+)", named, message)


@cache
def names(operator: str) -> tuple[str, ...]:
    """Of its arguments, as its schema has them."""
    schema = getattr(torch.ops.blasst, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


def arguments_of(operator: str, inputs: tuple[object, ...]) -> dict[str, object]:
    """The inputs by name. torch leaves out the last ones if they are the default, None."""
    return dict(zip_longest(names(operator), inputs))


DEVICES = ("cpu", "cuda")
"""Where blasst runs."""

CACHES = (torch.int8, torch.float8_e4m3fn)
"""Types that keys and values may have beside that of the queries."""


class TileShape(NamedTuple):
    """The tiles on which decisions are taken."""

    query_rows: int
    """Rows of one head in a query tile; in decode, all the rows of a KV head's query heads."""
    keys: int
    """Keys in a key tile."""
    split_tiles: int = 0
    """Decode: visited tiles in one split of a long KV; 0: never split. What is left joins the split
    before it if it is half of one at most and no more than 4 tiles."""
    most_splits: int = 0
    """Decode: the most splits, which then are longer; 0: no limit."""


class Plan(NamedTuple):
    """What a call decides on and needs, whatever its tensors hold."""

    query_rows: int
    keys: int
    split_tiles: int
    heads: int
    """Of a report of tiles, as the query tiles and key tiles, each as many as there may be."""
    query_tiles: int
    key_tiles: int
    words: int
    workspace_bytes: int
    most_splits: int = 0

    @property
    def shape(self) -> TileShape:
        """Of its tiles."""
        return TileShape(self.query_rows, self.keys, self.split_tiles, self.most_splits)


def plan(
    phase: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    query_length: int = 1,
    keys: int = 1,
    rows: int | None = None,
    scores: str = "exact",
    k_dtype: torch.dtype | None = None,
    v_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a call of these numbers, on this kind of device.

    keys: that a request has room for. rows: of all requests, of ragged queries. scores: "exact" or
    "int8". k_dtype, v_dtype: of k and v, if they are in 8 bits.
    """
    if device.type not in DEVICES:
        raise NotSupportedError(f"device is {device}; blasst runs on: {', '.join(DEVICES)}")
    numbers = call(
        "plan",
        phase=phase,
        device=device.type,
        dtype=_name(dtype),
        k_dtype=None if k_dtype is None else _name(k_dtype),
        v_dtype=None if v_dtype is None else _name(v_dtype),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        query_length=query_length,
        keys=keys,
        rows=rows,
        scores=scores,
    )
    return Plan(*numbers)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_size(name: str, value: int, least: int) -> None:
    accepted = f"it must be an integer from {least} to {2**31 - 1}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; {accepted}")
    if not least <= value < 2**31:
        raise ValueError(f"{name} is {value}; {accepted}")


def workspace_bytes(
    phase: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    batch: int,
    query_length: int = 1,
    keys: int,
    scores: str = "exact",
    k_dtype: torch.dtype | None = None,
    v_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of `attention`'s workspace for calls of up to so many requests and positions.

    Args:
        phase: "prefill" or "decode".
        device: where the calls run; on the cpu, with as many threads as torch has now.
        dtype: of q.
        heads: of q.
        kv_heads: of k.
        head_dim: of q and k.
        value_dim: of v; default: head_dim.
        batch: the most requests.
        query_length: the most rows of a request.
        keys: what a request has room for: of a call, max_seqlen_k, or what its page table has.
        scores: "exact" or "int8".
        k_dtype: of k; default: dtype.
        v_dtype: of v; default: dtype.

    Raises:
        NotSupportedError: calls that the device does not do, or another device.
        TypeError: numbers that are not whole.
        ValueError: numbers out of range.
    """
    value_dim = head_dim if value_dim is None else value_dim
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    for name, value in {**numbers, "batch": batch, "query_length": query_length}.items():
        _check_size(name, value, 1)
    _check_size("keys", keys, 0)
    # A decode of fewer requests is spread over more splits, each with a result of its own.
    fewer = range(1, batch + 1) if phase == "decode" else (batch,)
    shorter = range(1, query_length + 1) if phase == "decode" else (query_length,)
    return max(
        plan(
            phase,
            torch.device(device),
            dtype,
            **numbers,
            batch=requests,
            query_length=rows,
            keys=keys,
            scores=scores,
            k_dtype=k_dtype,
            v_dtype=v_dtype,
        ).workspace_bytes
        for requests in fewer
        for rows in shorter
    )


QUERY_ROWS, KEYS = plan("prefill", torch.device("cpu"), torch.float32, head_dim=16)[:2]
"""On the CPU."""


_cached_plan = cache(plan)


def tile_of(
    phase: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
) -> tuple[int, int]:
    """Query rows and keys of the tile that a phase decides on; decode: of one row a KV head.

    dtype: of q, before autocast. value_dim: default: head_dim.
    """
    dtype = computed_in(device, dtype)
    return _cached_plan(phase, device, dtype, head_dim=head_dim, value_dim=value_dim)[:2]


def computed_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type of a call's queries, keys and values: under autocast its own."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def decode_tile_heads(q: Tensor, k: Tensor, v: Tensor, positions: int) -> int:
    """KV heads, or the parts of them in which query heads decide, of a decode's report of tiles.

    positions: the most of a request.
    """
    if q.device.type != "cuda":
        return k.shape[-2]
    sizes = {"head_dim": int(q.shape[-1]), "value_dim": int(v.shape[-1])}
    heads = {"heads": int(q.shape[-2]), "kv_heads": int(k.shape[-2])}
    numbers = {**heads, **sizes, "query_length": int(positions)}
    return _cached_plan("decode", q.device, q.dtype, **numbers).heads


# To say so earlier would import all of torch's compiler, which takes seconds.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(tile_of))


def prefill_tile(
    device: torch.device, head_dim: int, value_dim: int | None = None
) -> tuple[int, int]:
    """Query rows and keys of the tile on which prefill decides on this kind of device.

    value_dim: default: head_dim.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tile_of("prefill", device, dtype, head_dim, value_dim)


def key_tiles(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        keys = torch.sym_min(keys, torch.sym_max(1, max_seqlen_k))
    phase = operator.removesuffix("_into")
    sizes = int(q.shape[-1]), int(v.shape[-1])
    return -(-keys // tile_of(phase, q.device, q.dtype, *sizes)[1])
