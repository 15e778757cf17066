"""The operators: `attention` and `merge`, and their fronts in the shape of other libraries."""

from blasst.ops import autograd, fakes  # noqa: F401, they register what torch must know
from blasst.ops.attention import Result, TileCounts, attention, merge, tile_shape
from blasst.ops.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from blasst.ops.library import TileShape, workspace_bytes
from blasst.ops.quantize import QuantizedKeys, quantize_keys, rotate
from blasst.ops.sdpa import scaled_dot_product_attention

__all__ = [
    "QuantizedKeys",
    "Result",
    "TileCounts",
    "TileShape",
    "attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge",
    "quantize_keys",
    "rotate",
    "scaled_dot_product_attention",
    "tile_shape",
    "workspace_bytes",
]
