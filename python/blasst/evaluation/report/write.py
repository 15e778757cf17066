"""The report of an evaluation."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from blasst.calibration import Calibration
from blasst.evaluation.options import Options
from blasst.evaluation.report.panels import panels_of
from blasst.evaluation.report.plots import plots_of
from blasst.evaluation.report.tables import tables
from blasst.evaluation.report.verdict import verdict
from blasst.files import write_json
from blasst.hf.models import Loaded
from blasst.measure.results import Results
from blasst.pages import Table, about_run, environment, tables_to_dict, write_page

RESULT_KINDS = ("text", "time", "needle", "length", "task")


class Written(NamedTuple):
    """A report."""

    path: Path
    tables: list[Table]


def publish(
    loaded: Loaded,
    options: Options,
    results: Results,
    out: Path,
    calibration: Calibration | None = None,
) -> Written:
    """Write the report of a model's evaluation, and of its calibration if there is one to show."""
    every, texts = options.every, ", ".join(options.texts)
    compared = f", compared at every {every} positions" if every > 1 else ""
    about = about_run(f"Texts: {texts}{compared}." if texts else "", loaded.model)
    title = f"{loaded.title} at {options.length} tokens"
    path = write(title, about, results, calibration, out, loaded.model)
    return Written(path, tables(results, calibration))


def write(
    title: str,
    subtitle: str,
    results: Results,
    calibration: Calibration | None,
    out: Path,
    model: nn.Module | None = None,
) -> Path:
    """Write report.html, its plots as PNG and results.json into a folder; the report's path."""
    every = tables(results, calibration)
    write_json(
        out / "results.json",
        {
            "title": title,
            "verdict": verdict(results),
            "about": subtitle,
            "environment": environment(model),
            "tables": tables_to_dict(every),
            "results": [
                {"key": [kind, *key], "value": value}
                for kind in RESULT_KINDS
                for key, value in results.all(kind)
            ],
        },
    )
    plots, panels = plots_of(results, calibration), panels_of(results)
    return write_page(title, verdict(results), subtitle, every, plots, out, panels)
