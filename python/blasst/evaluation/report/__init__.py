"""Tables and plots of what was measured, on one HTML page."""

from blasst.evaluation.report.calibration import calibration_tables
from blasst.evaluation.report.methods import predictor_table, threshold_table
from blasst.evaluation.report.tables import tables
from blasst.evaluation.report.write import Written, publish, write

__all__ = [
    "Written",
    "calibration_tables",
    "predictor_table",
    "publish",
    "tables",
    "threshold_table",
    "write",
]
