"""Long-context attention made sparse by softmax thresholding (BLASST).

`attention` is the operator, `merge` puts two calls over different keys together. With Transformers
installed, importing this package also makes `attn_implementation="blasst"` available; `configure`
sets a model's thresholds and `record` collects the sparsity that it reaches; `calibrate` finds
thresholds and writes them into its config.
"""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"]:  # python -m blasst, which imports this before its own first line
    from blasst.cli import interrupt

    interrupt.quit_at_once()

from blasst.attention import Result, TileCounts, TileShape, attention, merge, tile_shape

__all__ = ["Result", "TileCounts", "TileShape", "attention", "merge", "tile_shape"]

if find_spec("transformers"):
    from blasst import versions

    versions.check_version()
    from blasst.calibration import Calibration, calibrate
    from blasst.hf import Recording, Threshold, configure, record, set_policy
    from blasst.methods.dhsa import Dhsa
    from blasst.policies import Bands

    __all__ += ["Calibration", "calibrate"]
    __all__ += ["Bands", "Dhsa", "Recording", "Threshold", "configure", "record", "set_policy"]
