"""What the command line shows: progress bars and tables."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from blasst import report

console = Console()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar that is told what is being done and the share, 0 to 1, that is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=1.0, what="")

        def show(what: str, share: float) -> None:
            progress.update(bar, completed=share, what=what)

        yield show
        progress.update(bar, completed=1.0, what="")


def show(table: report.Table) -> None:
    """Print a table of the report."""
    printed = Table(title=table.title, caption=table.note or None)
    for column in table.columns:
        printed.add_column(column)
    for row in table.rows:
        printed.add_row(*row)
    console.print(printed)


def log_to_console() -> None:
    """The package's warnings, as lines between the bars."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logging.getLogger("blasst").addHandler(handler)
