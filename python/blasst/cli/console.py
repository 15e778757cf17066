"""What the command line shows: progress and tables."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from blasst.pages import Table as ReportTable
from blasst.progress import Progress

WIDTH_OF_A_FILE = 120
"""Columns of what is printed where no terminal says how many it has."""
LINE_EVERY = 10.0
"""Seconds between two lines of progress there."""

console = Console()
if not console.is_terminal:
    console = Console(width=WIDTH_OF_A_FILE)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar for each step on a terminal, now and then a line anywhere else."""
    if console.is_terminal:
        with _bars() as progress:
            yield progress
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Bars(*columns, console=console) as bars:
        known = {}

        def show(step: str, share: float, what: str) -> None:
            if step not in known:
                known[step] = bars.add_task(step, total=1.0, what=what)
            bars.update(known[step], completed=share, what=what)

        yield show


class _Lines:
    """Each step's beginning and end, and a line every LINE_EVERY seconds between them."""

    def __init__(self) -> None:
        self._begun: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, step: str, share: float, what: str) -> None:
        now = time.monotonic()
        is_new = step not in self._begun
        begun = self._begun.setdefault(step, now)
        if is_new or share >= 1 or now - self._last >= LINE_EVERY:
            self._last = now
            console.print(f"{step}: {share:.0%} after {now - begun:.0f} s {what}".rstrip())


def show(table: ReportTable) -> None:
    """Print a table of the report."""
    printed = Table(title=table.title, caption=table.note or None)
    for column in table.columns:
        printed.add_column(column)
    for row in table.rows:
        printed.add_row(*map(escape, row))  # a model's words are no markup
    console.print(printed)


@contextmanager
def log_to_console() -> Iterator[None]:
    """The package's warnings, as lines between the bars; each once."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    handler.addFilter(_Once())
    log = logging.getLogger("blasst")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Once(logging.Filter):
    """Evaluation sets a configuration many times over; what it says is news only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return is_new
