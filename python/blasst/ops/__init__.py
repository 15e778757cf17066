"""The operators: `attention` and `merge`, and their fronts in the shape of other libraries."""

from blasst.ops import autograd, fakes  # noqa: F401, they register what torch must know
from blasst.ops.attention import Result, TileCounts, TileShape, attention, merge, tile_shape

__all__ = ["Result", "TileCounts", "TileShape", "attention", "merge", "tile_shape"]
