"""A table of text, for a page, a terminal or a file."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Heading, column names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables_to_dict(every: Sequence[Table]) -> dict[str, list[dict[str, str]]]:
    """Rows by column, by title."""
    return {t.title: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in every}


def with_error(value: tuple[float, float], form: str) -> str:
    """A mean and its error, the latter left out where it is 0."""
    mean, error = value
    shown = format(mean, form)
    return f"{shown} ± {format(error, form.lstrip('+'))}" if error else shown
