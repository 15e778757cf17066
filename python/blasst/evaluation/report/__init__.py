"""Tables and plots of what was measured, on one HTML page."""

from blasst.evaluation.report.html import (
    Table,
    calibration_tables,
    tables,
    tables_to_dict,
    threshold_table,
    write,
    write_page,
)

__all__ = [
    "Table",
    "calibration_tables",
    "tables",
    "tables_to_dict",
    "threshold_table",
    "write",
    "write_page",
]
