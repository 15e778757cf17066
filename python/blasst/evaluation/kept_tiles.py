"""Which tiles a sparse prefill keeps, small enough to be shown."""

import math
from base64 import b64encode
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.hf import Recording
from blasst.hf.operator import Operator, current
from blasst.hf.tensor_parallel import Share
from blasst.ops.attention import Result

MOST_CELLS = 64
"""Along each side of a head's picture."""
SIZE = 400_000
"""Bytes of the pictures of all heads."""
LEVELS = 15
"""Shades of a cell, besides that of nothing."""
THRESHOLDS = tuple(10 ** (step / 3) for step in range(1 - LEVELS, 1))
"""Relative ones, whose pictures a slider goes through."""


def cells_of(length: int, heads: int) -> int:
    """Cells along each side of a head's picture: at most one for 64 tokens, and within SIZE.

    Args:
        length: tokens of the prompt.
        heads: of all layers.
    """
    # A byte has two cells of the triangle.
    room = math.isqrt(4 * SIZE // heads)
    return max(1, min(MOST_CELLS, -(-length // 64), room))


class KeptTiles(Recording):
    """The kept share of every head's tiles, by place, in one prefill, whole or in chunks."""

    wants_tile_mask = True

    def __init__(self, layers: Collection[int], length: int, heads: int, larger: int = 0) -> None:
        """Record these layers, of so many heads together, of a prompt of `length` tokens.

        larger: elements that a head's query has beyond its value (latent attention).
        """
        super().__init__()
        self._layers, self._length, self._larger = layers, length, larger
        self._cells = cells_of(length, heads)
        self._read: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}
        self._all: dict[int, Tensor] = {}

    def add(self, phase: str, layer: int, result: Result, share: Share | None) -> None:
        """Count one attention call; of a layer's calls, those of earlier tokens come first."""
        if share is not None:
            raise NotSupportedError(
                "pictures of the kept tiles of a tensor-parallel model are not supported: a "
                "process has those of its own heads only"
            )
        super().add(phase, layer, result, share)
        if phase != "prefill" or layer not in self._layers:
            return
        [mask], out = result.tile_mask, result.out
        first = self._read.get(layer, 0)
        last = self._read[layer] = first + out.shape[1]
        sizes = out.shape[-1] + self._larger, out.shape[-1]
        rows, keys = current().tile_of(phase, out.device, out.dtype, *sizes)
        query_tiles = _intervals(first, last, rows, out.device)
        key_tiles = _intervals(0, last, keys, out.device)
        # Of each cell: how much of it each tile covers.
        down, across = self._overlap(query_tiles), self._overlap(key_tiles)
        visitable = (key_tiles[:, 0] < query_tiles[:, 1:]).float()
        self._kept[layer] = self._kept.get(layer, 0) + down @ mask.float() @ across.T
        self._all[layer] = self._all.get(layer, 0) + down @ visitable @ across.T

    def _overlap(self, tiles: Tensor) -> Tensor:
        """[cells, tiles] tokens that a cell and a tile share."""
        edges = torch.linspace(0, self._length, self._cells + 1, device=tiles.device)
        left = torch.maximum(edges[:-1, None], tiles[:, 0])
        right = torch.minimum(edges[1:, None], tiles[:, 1])
        return (right - left).clamp(min=0)

    def shares(self) -> list[Tensor]:
        """By layer, [heads, cells, cells]: kept share of the tiles at each place, 0 to 1."""
        return [(self._kept[n] / self._all[n].clamp(min=1e-6)).cpu() for n in sorted(self._kept)]

    def packed(self) -> dict[str, Any]:
        """For a report: see its template `tiles.html.j2`."""
        known = self.layers("prefill")
        layers = [layer for layer in known if layer in self._kept]
        shares = dict(zip(known, self.by_head("prefill").tolist(), strict=True))
        heads = dict(zip(known, self.heads("prefill"), strict=True))
        return {
            "length": self._length,
            "cells": self._cells,
            "layers": [(layer, heads[layer]) for layer in layers],
            "skipped": [[round(s, 4) for s in shares[n][: heads[n]]] for n in layers],
            "sparsity": self.sparsity("prefill", layers),
            "kept": self._triangles(),
        }

    def _triangles(self) -> str:
        """Base64: of each head the cells that a causal mask leaves, row by row, two a byte."""
        rows, columns = np.tril_indices(self._cells)
        heads = torch.cat(self.shares()).numpy()[:, rows, columns]
        levels = np.rint(LEVELS * heads).astype(np.uint8)
        if levels.shape[1] % 2:
            levels = np.pad(levels, ((0, 0), (0, 1)))
        pairs = levels[:, ::2] | levels[:, 1::2] << 4
        return b64encode(pairs.tobytes()).decode()


class KeptByThreshold(KeptTiles):
    """At how many of THRESHOLDS a tile is kept, by place, where one holds for all heads.

    Of a dense prefill inside `calling(AtThresholds(..))`: a skipped tile raises no maximum, so what
    a threshold drops of it is what it drops of the same queries and keys alone.
    """

    def __init__(self, layers: Collection[int], length: int, heads: int, larger: int = 0) -> None:
        super().__init__(layers, length, heads, larger)
        self._kept_at: dict[int, Tensor] = {}
        self._visitable: dict[int, Tensor] = {}

    def add(self, phase: str, layer: int, result: Result, share: Share | None) -> None:
        """Count one attention call."""
        super().add(phase, layer, result, share)
        if phase != "prefill" or layer not in self._layers:
            return
        levels = torch.arange(LEVELS, device=result.out.device)
        kept = (result.tile_mask[0, ..., None] * LEVELS > levels + 0.5).sum((1, 2))
        self._kept_at[layer] = self._kept_at.get(layer, 0) + kept
        visitable = result.stats.visitable[0]
        self._visitable[layer] = self._visitable.get(layer, 0) + visitable

    def packed(self) -> dict[str, Any]:
        """As of one setting, but for `skipped`: by threshold, layer and head."""
        skipped = [
            1 - self._kept_at[n] / self._visitable[n][:, None] for n in sorted(self._kept_at)
        ]
        by_threshold = [
            [[round(share, 4) for share in layer[:, i].tolist()] for layer in skipped]
            for i in range(LEVELS)
        ]
        return super().packed() | {"skipped": by_threshold, "thresholds": THRESHOLDS}


class AtThresholds:
    """An operator whose tile masks say at what share of THRESHOLDS a prefill keeps each tile."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self.tile_of = operator, operator.tile_of

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """As the operator's, which is asked without thresholds."""
        result = self._operator.attention(q, k, v, **options)
        if options["phase"] != "prefill":
            return result
        kept = torch.zeros_like(result.tile_mask, dtype=torch.float32)
        for threshold in THRESHOLDS:
            asked = options | {"threshold": threshold, "order": "sink_first"}
            kept += self._operator.attention(q, k, v, **asked).tile_mask
        return result._replace(tile_mask=kept / LEVELS)


def _intervals(first: int, last: int, size: int, device: torch.device) -> Tensor:
    """[tiles, 2]: first token and the one after the last, of tiles from `first` on."""
    starts = torch.arange(first, last, size, device=device)
    return torch.stack([starts, (starts + size).clamp(max=last)], 1).float()
