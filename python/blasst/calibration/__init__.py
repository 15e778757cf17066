"""Calibration: from a few long prompts to thresholds, by phase, length, layer and head."""

from blasst.calibration.curves import UnreachableError
from blasst.calibration.search import Calibration, calibrate

__all__ = ["Calibration", "UnreachableError", "calibrate"]
