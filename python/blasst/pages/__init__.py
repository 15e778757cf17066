"""Tables and plots on one HTML page: what every report is made of."""

from blasst.pages.about import about_run, environment
from blasst.pages.page import Panel, Plot, write_page
from blasst.pages.table import Table, tables_to_dict, with_error

__all__ = [
    "Panel",
    "Plot",
    "Table",
    "about_run",
    "environment",
    "tables_to_dict",
    "with_error",
    "write_page",
]
