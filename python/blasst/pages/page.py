"""One HTML page that holds tables and pictures: nothing outside it is needed."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blasst.files import replace_file
from blasst.pages.table import Table

Plot = tuple[str, str, Callable[[Axes], None]]
"""File name without its suffix, caption, and what draws it."""

SIZE = (5.6, 3.9)
"""Inches: letters can still be read where a phone shows 400 pixels."""
_INK = "#010203"
"""Stands for the colour of the page's text."""
_DRAWN_FOR_PAGES = {
    "svg.fonttype": "none",
    "svg.hashsalt": "blasst",
    "font.family": "sans-serif",
    "legend.framealpha": 0.0,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}
_NOT_IN_A_PAGE = (
    r"<metadata>.*?</metadata>",
    r"<style.*?</style>",  # for every element of the page
    r' (?:width|height)="[\d.]+pt"',
    r' id="[\w.]*_\d+"',  # alike in all pictures; what one refers to is named by its content
)


class Panel(NamedTuple):
    """A part of the page that its reader can change."""

    kind: str
    """Template `KIND.html.j2`, beside the page's."""
    caption: str
    data: Any
    """What its script shows, as JSON has it."""


def write_page(
    title: str,
    verdict: str,
    subtitle: str,
    every: Sequence[Table],
    plots: Sequence[Plot],
    out: Path,
    panels: Sequence[Panel] = (),
) -> Path:
    """Write report.html, and its plots as PNG beside it.

    Args:
        title: of the page.
        verdict: what it comes to, in a sentence: first.
        subtitle: on what was measured, and how.
        every: tables, folded.
        plots: shown before them.
        out: folder.
        panels: shown before the plots.

    Returns:
        The page's path.
    """
    for name, _, draw in plots:
        replace_file(out / f"{name}.png", png(draw))
    page = _template().render(
        title=title,
        verdict=verdict,
        subtitle=subtitle,
        tables=every,
        panels=panels,
        pictures=[(caption, svg(draw)) for _, caption, draw in plots],
    )
    replace_file(out / "report.html", page)
    return out / "report.html"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("blasst.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["numeric"] = lambda cell: cell[:1].isdigit() or cell[:1] in ("+", "-")
    return environment.get_template("page.html.j2")


def png(draw: Callable[[Axes], None]) -> bytes:
    """A picture for white paper."""
    buffer = io.BytesIO()
    with drawn(draw) as figure:
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def svg(draw: Callable[[Axes], None]) -> Markup:
    """A picture for a page: its lines and letters have the colour of the page's text."""
    buffer = io.StringIO()
    with mpl.rc_context(_DRAWN_FOR_PAGES), drawn(draw) as figure:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    whole = buffer.getvalue()
    whole = whole[whole.index("<svg") :].replace(_INK, "currentColor")
    for what in _NOT_IN_A_PAGE:
        whole = re.sub(what, "", whole, flags=re.DOTALL)
    return Markup(whole)


@contextmanager
def drawn(draw: Callable[[Axes], None]) -> Iterator[Figure]:
    """The figure of a plot."""
    # Labels as they are, not what is to be added to a number in the corner.
    with mpl.rc_context({"axes.formatter.useoffset": False}):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        try:
            draw(axes)
            yield figure
        finally:
            plt.close(figure)
