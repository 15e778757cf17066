"""One HTML page that holds tables and plots: nothing outside it is needed."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from blasst.files import replace_file
from blasst.pages.table import Table

Plot = tuple[str, str, Callable[[Axes], None]]
"""File name without its suffix, caption, and what draws it."""


def write_page(
    title: str,
    verdict: str,
    subtitle: str,
    every: Sequence[Table],
    plots: Sequence[Plot],
    out: Path,
) -> Path:
    """Write report.html, and its plots as PNG beside it.

    Args:
        title: of the page.
        verdict: what it comes to, in a sentence: first.
        subtitle: on what was measured, and how.
        every: tables, folded.
        plots: shown before them.
        out: folder.

    Returns:
        The page's path.
    """
    pictures = []
    for name, caption, draw in plots:
        picture = png(draw)
        replace_file(out / f"{name}.png", picture)
        pictures.append((caption, base64.b64encode(picture).decode()))
    page = _template().render(
        title=title, verdict=verdict, subtitle=subtitle, tables=every, pictures=pictures
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
    """A picture."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    finally:
        plt.close(figure)
    return buffer.getvalue()
