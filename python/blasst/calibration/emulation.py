"""Decisions on tiles of any shape, in torch's own operations: what a kernel with them would do.

Slow, but on any device: calibration measures for tiles that the kernel of this device has not. A
skipped tile never raises a running maximum, so gaps do not depend on the threshold.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from blasst.calibration.curves import BIN_EDGES, GAP_BINS
from blasst.errors import NotSupportedError
from blasst.hf.operator import KERNELS
from blasst.ops.attention import Result, TileCounts, attention
from blasst.ops.library import TileShape

SCORES_AT_ONCE = 1 << 25
"""Numbers: 128 MiB of scores in float32."""
SEED_TILES = 4
"""As BLASST_SEED_TILES in blasst.h."""


_NOT_DONE = ("bands", "blocks", "window", "starts", "lengths", "query_lengths", "cu_seqlens_q")
_NOT_REPORTED = ("return_error_bound", "return_gaps", "return_tile_maxima")
"""Under a threshold."""


class _Block(NamedTuple):
    """Some heads' scores of one query tile."""

    heads: slice
    """KV heads."""
    rows: slice
    scores: Tensor
    """[batch, deciding heads, rows of a decision, tiles * keys] float32, -inf where masked."""
    maxima: Tensor
    """[batch, deciding heads, rows of a decision, tiles]: of each tile."""


@dataclass(frozen=True)
class Emulation:
    """`blasst.attention` with tiles of other shapes, for dense causal batches."""

    tile_shapes: Mapping[str, tuple[int, ...]]
    """By phase, as `TileShape`: of decode the query rows have no effect. A phase that is not here
    has the kernel's."""

    def tile_of(self, phase: str, *of_call: Any) -> tuple[int, int]:
        """Query rows and keys of the tile that a phase decides on: see `ops.library.tile_of`."""
        shape = self.tile_shapes.get(phase)
        return KERNELS.tile_of(phase, *of_call) if shape is None else tuple(shape[:2])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result | Tensor:
        """As `blasst.attention`; without a threshold it is that, but for the gaps."""
        is_sparse = options.get("threshold") is not None
        is_kernels = options["phase"] not in self.tile_shapes
        if is_kernels or not (is_sparse or options.get("return_gaps")):
            return attention(q, k, v, **options)
        _refuse(options)
        if is_sparse:
            return self._sparse(q, k, v, options)
        dense = attention(q, k, v, **{**options, "return_gaps": False, "return_lse": True})
        shape = self.tile_shapes[options["phase"]]
        return dense._replace(gaps=gaps(q, k, shape, options))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Result:
        batch, rows, heads, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1])
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
        counts = torch.zeros(2, batch, heads, dtype=torch.int64, device=q.device)
        phase = options["phase"]
        shape = TileShape(*self.tile_shapes[phase])
        ln_threshold = _by_head(options["threshold"], q).log()
        group = heads // k.shape[2]
        mask = _no_tiles(q, k, shape, phase) if options.get("return_tile_mask") else None
        for block in _blocks(q, k, shape, options):
            mine = slice(block.heads.start * group, block.heads.stop * group)
            limit = _rows_of(ln_threshold[:, mine, None], phase, group, block)
            order, gap = _gaps(block, options["order"], shape)
            kept = torch.empty_like(gap[:, :, 0], dtype=torch.bool)
            kept[..., order] = ((gap - limit[..., None]) >= 0).any(2)
            if mask is not None:
                deciding = block.heads if phase == "decode" else mine
                tile = block.rows.start // shape.query_rows if phase != "decode" else 0
                mask[:, deciding, tile, : kept.shape[-1]] = kept
            counts[0, :, mine] += kept.shape[-1]
            skipped = (~kept).sum(-1)
            counts[1, :, mine] += _to_heads(skipped, phase, group)
            keys = kept.repeat_interleave(shape.keys, -1)[:, :, None]
            scores = block.scores.masked_fill_(~keys, -math.inf)
            found, found_lse = _softmax(scores, v[:, :, block.heads], phase, group, options, mine)
            out[:, block.rows, mine] = found.to(out.dtype)
            lse[:, mine, block.rows] = found_lse
        stats = TileCounts(*counts) if options.get("return_stats") else None
        if mask is not None and phase == "decode":
            mask = mask[:, :, 0]
        return Result(out, lse, stats, None, None, None, mask)


def _no_tiles(q: Tensor, k: Tensor, shape: TileShape, phase: str) -> Tensor:
    """[batch, deciding heads, query tiles, key tiles] bool: none is kept yet."""
    of_rows = 1 if phase == "decode" else -(-q.shape[1] // shape.query_rows)
    heads = k.shape[2] if phase == "decode" else q.shape[2]
    return q.new_zeros(q.shape[0], heads, of_rows, -(-k.shape[1] // shape.keys), dtype=torch.bool)


def _refuse(options: dict[str, Any]) -> None:
    refused = [name for name in _NOT_DONE if options.get(name) is not None]
    if options.get("threshold") is not None:
        refused += [name for name in _NOT_REPORTED if options.get(name)]
    for name in refused:
        raise NotSupportedError(
            f"{name} with tiles of another shape than the kernel's is not supported"
        )
    if options.get("scores", "exact") != "exact":
        raise NotSupportedError(
            f"scores={options['scores']!r} with tiles of another shape than the kernel's is not "
            "supported"
        )
    if not options["causal"]:
        raise NotSupportedError("tiles of another shape than the kernel's need a causal mask")


def gaps(q: Tensor, k: Tensor, tile_shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """[heads, 514] int64: visited tiles by gap, as `Result.gaps`, on tiles of this shape.

    Args:
        q: [batch, query_length, heads, head_dim].
        k: [batch, keys, kv_heads, head_dim].
        tile_shape: as `TileShape`.
        options: of `blasst.attention`: phase, order, scale, softcap.
    """
    heads, phase, shape = q.shape[2], options["phase"], TileShape(*tile_shape)
    group = heads // k.shape[2]
    counts = torch.zeros(heads, GAP_BINS, dtype=torch.int64, device=q.device)
    edges = torch.tensor(BIN_EDGES[1:-1], dtype=torch.float32, device=q.device)
    for block in _blocks(q, k, shape, options):
        _, gap = _gaps(block, options["order"], shape)
        bins = torch.bucketize(gap.amax(2), edges, right=True)  # [batch, deciding heads, tiles]
        bins = _to_heads(bins, phase, group).transpose(0, 1).flatten(1)
        mine = counts[block.heads.start * group : block.heads.stop * group]
        mine.scatter_add_(1, bins, torch.ones_like(bins))
    return counts


def _blocks(q: Tensor, k: Tensor, shape: TileShape, options: dict[str, Any]) -> Iterator[_Block]:
    """The scores, query tile by query tile, of as many heads at once as there is room for."""
    batch, rows, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    group, offset, phase = heads // kv_heads, keys - rows, options["phase"]
    height, width = (rows if phase == "decode" else shape.query_rows), shape.keys
    scale = options.get("scale") or size**-0.5
    at_once = max(1, SCORES_AT_ONCE // max(1, batch * group * height * keys))
    for first in range(0, kv_heads, at_once):
        mine = slice(first, min(first + at_once, kv_heads))
        known = k[:, :, mine].permute(0, 2, 3, 1).float()  # [batch, kv_heads, size, keys]
        asked = q[:, :, first * group : mine.stop * group].float() * scale
        asked = asked.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)
        for start in range(0, rows, height):
            part = slice(start, min(start + height, rows))
            seen = offset + part.stop
            tiles = -(-seen // width)
            scores = asked[:, :, :, part].flatten(2, 3) @ known[..., :seen]
            if cap := options.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            scores = scores.unflatten(2, (group, -1))
            # Every row sees the keys before the tile's own.
            position = torch.arange(part.stop - part.start, device=q.device)
            hidden = position > position[:, None]
            scores[..., offset + part.start :].masked_fill_(hidden, -math.inf)
            scores = scores.flatten(2, 3) if phase == "decode" else scores.flatten(1, 2)
            if missing := tiles * width - seen:
                scores = pad(scores, (0, missing), value=-math.inf)
            yield _Block(mine, part, scores, scores.unflatten(-1, (tiles, width)).amax(-1))


def _gaps(block: _Block, order: str, shape: TileShape) -> tuple[list[int], Tensor]:
    """Tiles in the order of the visit, and [batch, deciding heads, rows, tiles] row gaps so.

    A row without a valid key in a tile has -inf there: it neither vetoes nor allows. In the first
    tile where it has one, +inf.
    """
    tiles = block.maxima.shape[-1]
    visit = {
        "forward": [*range(tiles)],
        "reverse": [*range(tiles - 1, -1, -1)],
        "sink_first": [0, *range(tiles - 1, 0, -1)],
    }[order]
    maxima = block.maxima[..., visit]
    gap = torch.where(maxima == -math.inf, -math.inf, maxima - _running(maxima, shape))
    return visit, gap


def _running(maxima: Tensor, shape: TileShape) -> Tensor:
    """The running maximum that each tile is tested against.

    Every split but the first starts from the maxima of the visit's first tiles, of those before it.

    Args:
        maxima: [..., tiles] in the order of the visit.
        shape: that of the tiles, and their splits.
    """
    tiles = maxima.shape[-1]
    least = -(-tiles // shape.most_splits) if shape.most_splits else 0
    split = max(shape.split_tiles, least) or tiles
    splits = pad(maxima, (0, -tiles % split), value=-math.inf).unflatten(-1, (-1, split))
    running = pad(splits.cummax(-1).values[..., :-1], (1, 0), value=-math.inf)
    seeds = maxima[..., :SEED_TILES].cummax(-1).values
    last = [min(SEED_TILES, begin) - 1 for begin in range(split, tiles, split)]
    later = running[..., 1:, :]
    torch.maximum(later, seeds[..., last, None], out=later)
    # What is left may join the split before it.
    if split < tiles and 0 < tiles % split <= min(split // 2, SEED_TILES):
        before = torch.maximum(running[..., -2, -1:], splits[..., -2, -1:])
        torch.maximum(running[..., -1, :], before, out=running[..., -1, :])
    return running.flatten(-2)[..., :tiles]


def _softmax(
    scores: Tensor, v: Tensor, phase: str, group: int, options: dict[str, Any], mine: slice
) -> tuple[Tensor, Tensor]:
    """[batch, rows, heads, value_dim] and [batch, heads, rows] natural log of the denominator.

    The scores are overwritten.
    """
    # [batch, kv_heads, group, rows, keys]
    scores = (
        scores.unflatten(2, (group, -1)) if phase == "decode" else scores.unflatten(1, (-1, group))
    )
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    lse = (weights.sum(-1, keepdim=True).log() + largest)[..., 0]
    if options.get("sinks") is not None:
        sinks = options["sinks"][mine].float().unflatten(0, (-1, group))[..., None]
        lse = torch.logaddexp(lse, sinks)
    keys = min(weights.shape[-1], v.shape[1])
    out = weights[..., :keys] @ v[:, :keys].permute(0, 2, 1, 3).float()[:, :, None]
    out *= (largest - lse[..., None]).exp()
    return out.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2)


def _by_head(threshold: Any, q: Tensor) -> Tensor:
    """[batch, heads] float32; a calibration's come as the operator takes them, with a place."""
    values = torch.as_tensor(threshold, dtype=torch.float32, device=q.device)
    values = values.squeeze(-1) if values.dim() == 3 else values
    return values.reshape((1,) * (2 - values.dim()) + values.shape).expand(q.shape[0], q.shape[2])


def _rows_of(by_head: Tensor, phase: str, group: int, block: _Block) -> Tensor:
    """[batch, heads, 1] -> [batch, deciding heads, rows of a decision]."""
    if phase != "decode":
        return by_head
    rows = block.rows.stop - block.rows.start
    return by_head.unflatten(1, (-1, group)).expand(-1, -1, -1, rows).flatten(2, 3)


def _to_heads(values: Tensor, phase: str, group: int) -> Tensor:
    """[batch, deciding heads, ...] -> [batch, heads, ...]."""
    return values.repeat_interleave(group, 1) if phase == "decode" else values
