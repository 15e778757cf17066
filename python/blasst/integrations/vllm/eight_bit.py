"""Caches in float8_e4m3, which vLLM keeps as bytes.

Kernels read them in decode, those of the CPU in prefill, too. A GPU's prefill reads 16 bits: the
operator would widen each of a call's requests into room for the longest that there may be. So the
pages in use are widened before it, into one buffer that all layers share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blasst.ops.quantize import in_units

NAMES = ("fp8", "fp8_e4m3")
"""Of `--kv-cache-dtype`."""
TYPE = torch.float8_e4m3fn
AT_ONCE = 256
"""Pages that are widened by one operation, which makes a copy of them first."""


class Pages(NamedTuple):
    """Those of some requests, taken out of the cache."""

    own: Tensor
    """[pages] int64: which of the cache, one request after the other."""
    table: Tensor
    """[requests, most pages of one] int32: which of these. A request with fewer has any there."""


def pages_of(table: Tensor, numbers: Tensor) -> Pages:
    """What to take out for requests of so many pages.

    Args:
        table: [requests, columns] int32 pages of the cache.
        numbers: [requests] int64 pages of each, on the host.
    """
    first = numbers.cumsum(0) - numbers
    request = torch.arange(len(numbers)).repeat_interleave(numbers)
    column = torch.arange(len(request)) - first[request]
    own = torch.arange(int(numbers.max())).expand(len(numbers), -1)
    own = (first[:, None] + own).clamp(max=len(request) - 1).int()
    request, column, own = (t.to(table.device, non_blocking=True) for t in (request, column, own))
    return Pages(table[request, column].long(), own)


def groups_of(pages: Sequence[int], room: int) -> list[slice]:
    """Requests that follow each other, together of at most `room` pages; none alone has more."""
    groups, start, taken = [], 0, 0
    for i, number in enumerate(pages):
        if taken + number > room:
            groups.append(slice(start, i))
            start, taken = i, 0
        taken += number
    return [*groups, slice(start, len(pages))]


def widen(cache: Tensor, pages: Tensor, into: Tensor) -> Tensor:
    """Some pages of a cache, exactly, in the type of a buffer.

    Args:
        cache: [blocks, kv_heads, block_size, 2 * head_size] bytes.
        pages: [n] int64.
        into: [n or more, ..], the rest as `cache`.

    Returns:
        The first n of `into`.
    """
    for place, some in zip(into.split(AT_ONCE), pages.split(AT_ONCE), strict=False):
        place[: len(some)].copy_(cache[some].view(TYPE))
    return into[: len(pages)]


def narrow(values: Tensor, scale: Tensor) -> Tensor:
    """Bytes of keys or values, the nearest that there are, the largest for what is beyond."""
    return in_units(values, scale, TYPE).view(torch.uint8)
