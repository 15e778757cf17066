"""Long-context attention made sparse by softmax thresholding (BLASST).

`attention` is the operator, `merge` puts two calls over different keys together; `flash_attn_func`
and its like, and `scaled_dot_product_attention`, are `attention` with the arguments of others.
Importing this package also makes `attn_implementation="blasst"` available to Transformers, which it
does not import itself: `configure` sets a model's thresholds and `record` collects the sparsity
that it reaches; `calibrate` finds thresholds and writes them into its config.
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:  # python -m blasst, which imports this before its own first line
    from blasst.cli import interrupt

    interrupt.quit_at_once()

from blasst._version import __version__
from blasst.errors import NotSupportedError
from blasst.import_hook import when_imported
from blasst.ops import (
    QuantizedKeys,
    Result,
    TileCounts,
    TileShape,
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge,
    quantize_keys,
    rotate,
    scaled_dot_product_attention,
    tile_shape,
    workspace_bytes,
)
from blasst.versions import check_version

if TYPE_CHECKING:
    from blasst.calibration import Calibration, calibrate
    from blasst.hf import (
        Recording,
        Threshold,
        absorb,
        configure,
        eight_bit_cache,
        latent_cache,
        record,
        reset,
        set_policy,
        set_target,
    )
    from blasst.methods.dhsa import Dhsa
    from blasst.policies import Bands

__all__ = [
    "Bands",
    "Calibration",
    "Dhsa",
    "NotSupportedError",
    "QuantizedKeys",
    "Recording",
    "Result",
    "Threshold",
    "TileCounts",
    "TileShape",
    "__version__",
    "absorb",
    "attention",
    "calibrate",
    "configure",
    "eight_bit_cache",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "latent_cache",
    "merge",
    "quantize_keys",
    "record",
    "reset",
    "rotate",
    "scaled_dot_product_attention",
    "set_policy",
    "set_target",
    "tile_shape",
    "workspace_bytes",
]

_LAZY = {
    "Bands": "blasst.policies",
    "Calibration": "blasst.calibration",
    "Dhsa": "blasst.methods.dhsa",
    "Recording": "blasst.hf",
    "Threshold": "blasst.hf",
    "absorb": "blasst.hf",
    "calibrate": "blasst.calibration",
    "configure": "blasst.hf",
    "eight_bit_cache": "blasst.hf",
    "latent_cache": "blasst.hf",
    "record": "blasst.hf",
    "reset": "blasst.hf",
    "set_policy": "blasst.hf",
    "set_target": "blasst.hf",
}
"""What needs Transformers, and where it is."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'blasst' has no attribute {name!r}")
    check_version()
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make the implementation known to Transformers, which is being imported."""
    try:
        check_version()
        import_module("blasst.hf")
    except ImportError as error:  # whoever does not use blasst shall not notice
        logging.getLogger("blasst").warning(
            "attn_implementation='blasst' is not available with this Transformers: %s", error
        )


when_imported("transformers.modeling_utils", _register)
