"""The operator that attention layers call, which a calibration may put another in the place of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from blasst.ops.attention import attention
from blasst.ops.library import tile_of


class Operator(Protocol):
    """Attention, and the tiles on which it decides."""

    attention: Callable[..., Any]
    """As `blasst.attention`."""
    tile_of: Callable[..., tuple[int, int]]
    """As `ops.library.tile_of`."""


class Kernels:
    """What the device of the tensors has."""

    attention = staticmethod(attention)
    tile_of = staticmethod(tile_of)


KERNELS = Kernels()
_calling: list[Operator] = [KERNELS]


def current() -> Operator:
    """The one that layers call now."""
    return KERNELS if torch.compiler.is_compiling() else _calling[-1]


@contextmanager
def calling(operator: Operator) -> Iterator[None]:
    """Layers call this one inside."""
    _calling.append(operator)
    try:
        yield
    finally:
        _calling.pop()
