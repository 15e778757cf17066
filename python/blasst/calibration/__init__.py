"""Calibration: from a few long prompts to thresholds, by phase, length, layer and head."""

from blasst.calibration.curves import UnreachableError
from blasst.calibration.result import Calibration
from blasst.calibration.run import calibrate

__all__ = ["Calibration", "UnreachableError", "calibrate"]
