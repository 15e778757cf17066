"""Plots, and one HTML page that holds them and the tables: nothing outside it is needed."""

import base64
import html
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from blasst.calibration import Calibration
from blasst.evaluation.runner import (
    CALIBRATED,
    DENSE,
    PAPER,
    Results,
    Row,
    Setting,
    mean_and_error,
    rows,
)
from blasst.hf.models import replace_file, write_json
from blasst.methods.bsfa import AbsoluteThresholds

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; margin: 1rem 0 }
"""
COLOURS = {
    CALIBRATED: "tab:blue",
    PAPER: "tab:orange",
    DENSE: "tab:gray",
    "bsfa": "tab:green",
    "dhsa": "tab:red",
    "dhsa+blasst": "tab:purple",
}
NEEDLES_SHOWN = 3
Plot = tuple[str, str, Callable[[Axes], None]]
"""File name without its suffix, caption, and what draws it."""


@dataclass(frozen=True)
class Table:
    """Heading, column names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(results: Results, calibration: Calibration | None) -> list[Table]:
    """Everything that was measured, in the order of the report."""
    found = [_agreement_table(results), _needle_table(results), _task_table(results)]
    found += [_layer_table(results), _answer_table(results), _length_table(results)]
    found = [table for table in found if table.rows]
    return found + (calibration_tables(calibration) if calibration else [])


def calibration_tables(calibration: Calibration) -> list[Table]:
    """What was tried, and what it reaches at other lengths."""
    found = [_candidate_table(calibration), _held_out_table(calibration)]
    return [table for table in found if table.rows]


def write(
    title: str, subtitle: str, results: Results, calibration: Calibration | None, out: Path
) -> Path:
    """Write report.html, its plots as PNG and results.json into a folder; the report's path."""
    every = tables(results, calibration)
    write_json(
        out / "results.json",
        {
            "title": title,
            "about": subtitle,
            "tables": tables_to_dict(every),
            "results": [
                {"key": [kind, *key], "value": value}
                for kind in ("sdpa", "text", "needle", "length", "task")
                for key, value in results.all(kind)
            ],
        },
    )
    return write_page(title, subtitle, every, _plots(results, calibration), out)


def tables_to_dict(every: Sequence[Table]) -> dict[str, list[dict[str, str]]]:
    """Rows by column, by title."""
    return {t.title: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in every}


def write_page(
    title: str, subtitle: str, every: Sequence[Table], plots: Sequence[Plot], out: Path
) -> Path:
    """Write report.html with tables and plots, and the plots as PNG beside it; its path."""
    images = []
    for name, caption, draw in plots:
        picture = _png(draw)
        replace_file(out / f"{name}.png", picture)
        encoded = base64.b64encode(picture).decode()
        images.append(
            f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
            f'src="data:image/png;base64,{encoded}">'
        )
    page = "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
            f"</title><style>{STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>",
            *(_html(table) for table in every),
            *images,
            "</html>\n",
        ]
    )
    replace_file(out / "report.html", page)
    return out / "report.html"


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(c)}>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    title = html.escape(table.title)
    return f"<h2>{title}</h2>\n{note}<table><tr>{head}</tr>\n{body}</table>"


def _class(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] in "+-" else ""


def _with_error(value: tuple[float, float], form: str) -> str:
    mean, error = value
    shown = format(mean, form)
    return f"{shown} ± {format(error, form.lstrip('+'))}" if error else shown


def _agreement_table(results: Results) -> Table:
    found = rows(results)
    sdpa = next((value for _, value in results.all("sdpa")), None)
    return Table(
        "Perplexity and agreement with dense",
        (
            "setting",
            "sparsity",
            "perplexity",
            "same next token",
            "KL divergence",
            "prefill",
            "against sdpa",
        ),
        tuple(
            (
                row.setting.name,
                _with_error(row.sparsity, ".1%"),
                _with_error(row.perplexity_change, "+.2%") if row.setting.target else "dense",
                _with_error(row.top1, ".2%"),
                _with_error(row.kl, ".4f"),
                f"{row.prefill_seconds:.2f} s",
                f"{sdpa['prefill_seconds'] / row.prefill_seconds:.2f}x" if sdpa else "",
            )
            for row in found
        ),
        _mean_over(found[0].texts) if found else "",
    )


def _mean_over(texts: int) -> str:
    return (
        f"Mean over {texts} texts, ± the standard error of the mean." if texts > 1 else "One text."
    )


def _needle_table(results: Results) -> Table:
    groups: dict[Setting, list[dict]] = {}
    for (_, scheme, target), value in results.all("needle"):
        groups.setdefault(Setting(scheme, target), []).append(value)
    return Table(
        "Finding a fact in a long text",
        ("setting", "found", "sparsity of prefill", "of decode", "prefill", "decode"),
        tuple(
            (
                setting.name,
                f"{sum(v['right'] for v in values)} of {len(values)}",
                f"{statistics.fmean(v['sparsity'] for v in values):.1%}",
                f"{statistics.fmean(v['decode_sparsity'] for v in values):.1%}",
                f"{statistics.fmean(v['prefill_seconds'] for v in values):.2f} s",
                f"{1e3 * statistics.fmean(v['decode_seconds'] for v in values):.1f} ms a token",
            )
            for setting, values in groups.items()
        ),
    )


def _answer_table(results: Results) -> Table:
    shown: dict[int, dict[str, str]] = {}
    settings: list[str] = []
    for (index, scheme, target), value in results.all("needle"):
        if index < NEEDLES_SHOWN:
            name = Setting(scheme, target).name
            settings += [name] if name not in settings else []
            shown.setdefault(index, {"": f"{value['question']} ({', '.join(value['expected'])})"})[
                name
            ] = value["answer"]
    return Table(
        "Answers side by side",
        ("question (expected)", *settings),
        tuple((row[""], *(row.get(s, "") for s in settings)) for row in shown.values()),
    )


def _task_table(results: Results) -> Table:
    groups: dict[tuple[str, Setting], list[dict]] = {}
    for (task, _, scheme, target), value in results.all("task"):
        groups.setdefault((task, Setting(scheme, target)), []).append(value)
    return Table(
        "RULER tasks (lm-eval)",
        (
            "task",
            "setting",
            "documents",
            "score",
            "sparsity of prefill",
            "of decode",
            "prefill",
            "decode",
        ),
        tuple(
            (
                task,
                setting.name,
                str(len(values)),
                _with_error(mean_and_error([v["score"] for v in values]), ".2f"),
                f"{statistics.fmean(v['sparsity'] for v in values):.1%}",
                f"{statistics.fmean(v['decode_sparsity'] for v in values):.1%}",
                f"{statistics.fmean(v['prefill_seconds'] for v in values):.2f} s",
                f"{1e3 * statistics.fmean(v['decode_seconds'] for v in values):.1f} ms a token",
            )
            for (task, setting), values in groups.items()
        ),
    )


def _layer_table(results: Results) -> Table:
    """Ten layers a row, each the mean over its heads."""
    found = _by_head(results)
    layers = [f"{statistics.fmean(heads):.0%}" for heads in found[1]] if found else []
    rows = (layers[i : i + 10] for i in range(0, len(layers), 10))
    return Table(
        f"Sparsity by layer, {found[0]}" if found else "Sparsity by layer",
        ("layers from", *(f"+{i}" for i in range(10))),
        tuple((str(10 * i), *row, *[""] * (10 - len(row))) for i, row in enumerate(rows)),
    )


def _length_table(results: Results) -> Table:
    found = sorted(_sparsity_by_length(results).items())
    return Table(
        "Sparsity at other lengths",
        ("tokens", "target", "prompts", "sparsity of prefill", "off by"),
        tuple(
            (
                str(length),
                _with_method(f"{target:.0%}", scheme),
                str(len(values)),
                _with_error(mean_and_error(values), ".1%"),
                f"{100 * (statistics.fmean(values) - target):+.1f} points",
            )
            for (length, scheme, target), values in found
        ),
    )


def _sparsity_by_length(results: Results) -> dict[tuple[int, str, float], list[float]]:
    """By length, scheme and target."""
    found: dict[tuple[int, str, float], list[float]] = {}
    for (length, _, scheme, target), value in results.all("length"):
        found.setdefault((length, scheme, target), []).append(value)
    return found


def _candidate_table(calibration: Calibration) -> Table:
    return Table(
        "What calibration chose from",
        (
            "phase",
            "target",
            "order",
            "thresholds",
            "sparsity",
            "KL divergence",
            "same next token",
            "perplexity",
            "",
        ),
        tuple(
            (
                c.phase,
                f"{c.target:.0%}",
                c.order.replace("_", " "),
                c.heads.replace("_", " "),
                f"{c.sparsity:.1%}",
                f"{c.kl:.4f}",
                f"{c.top1:.2%}",
                f"{c.perplexity_ratio - 1:+.2%}",
                "chosen" if c.chosen else f"below {c.below} tokens" if c.below else "",
            )
            for c in calibration.candidates
        ),
        "One validation prompt at the longest calibrated length, compared with dense. Below so "
        "many tokens the chosen order does not reach the target, and another stands in.",
    )


def _held_out_table(calibration: Calibration) -> Table:
    return Table(
        "Sparsity at lengths that no fit has seen",
        ("phase", "tokens", "target", "achieved", "the law alone"),
        tuple(
            (
                h.phase,
                str(h.length),
                f"{h.target:.0%}",
                f"{h.achieved:.1%}",
                "" if h.law is None else f"{h.law:.1%}",
            )
            for h in calibration.held_out
        ),
        "The law alone: threshold = a exp(b target) / length, forward order, one threshold.",
    )


def threshold_table(found: AbsoluteThresholds) -> Table:
    """Absolute thresholds: root mean squares over layers, heads and places, in scores."""

    def rms(values: Tensor) -> str:
        known = values[values.isfinite()].double()
        return f"{known.square().mean().sqrt():.3f}" if len(known) else "-"

    spread, error = found.mean_spread(), found.fit_error()
    places = found.table.shape[-1]
    rows = [
        (
            str(keep),
            f"{found.sparsity(keep, places * found.tile_shape[0]):.1%}",
            rms(spread[i]),
            rms(error[i]),
        )
        for i, keep in enumerate(found.keeps)
    ]
    return Table(
        f"Absolute thresholds from {found.prompts} prompts of {places} tiles",
        ("tiles kept", "sparsity", "between prompts", "error of the fit"),
        tuple(rows),
        "Standard deviation between prompts and error of the fit: root mean square, in scores.",
    )


def _plots(results: Results, calibration: Calibration | None) -> list[Plot]:
    """The plots that there are numbers for."""
    found = rows(results)
    by_scheme: dict[str, list[Row]] = {}
    for row in found:
        by_scheme.setdefault(row.setting.scheme, []).append(row)
    plots: list[Plot] = []
    if len(found) > 1:
        plots += [
            ("agreement", "Agreement with dense against sparsity", _draw_agreement(by_scheme)),
            ("perplexity", "Perplexity against sparsity", _draw_perplexity(by_scheme)),
            ("time", "Prefill time against sparsity", _draw_time(results, by_scheme)),
            ("trade", "Perplexity against prefill time", _draw_trade(by_scheme)),
        ]
    scores = _scores(results)
    if any(len(points) > 1 for points in scores.values()):
        plots.append(("accuracy", "Accuracy against sparsity", _draw_accuracy(scores)))
    lengths = _by_length(results, calibration)
    if lengths:
        plots.append(("lengths", "Sparsity against length", _draw_lengths(lengths)))
    heat = _by_head(results)
    if heat:
        plots.append(("heads", f"Sparsity by layer and head, {heat[0]}", _draw_heads(heat[1])))
    return plots


def _png(draw: Callable[[Axes], None]) -> bytes:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    finally:
        plt.close(figure)
    return buffer.getvalue()


def _curve(
    axes: Axes, rows_: Sequence[Row], dense: Sequence[Row], value: Callable, label: str
) -> None:
    points = sorted([*dense, *rows_], key=lambda r: r.sparsity[0])
    axes.errorbar(
        [r.sparsity[0] for r in points],
        [value(r)[0] for r in points],
        yerr=[value(r)[1] for r in points],
        marker="o",
        capsize=3,
        label=label,
        color=COLOURS.get(label),
    )


def _draw(by_scheme: dict[str, list[Row]], value: Callable, ylabel: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for scheme, some in by_scheme.items():
            if scheme != DENSE:
                _curve(axes, some, by_scheme.get(DENSE, []), value, scheme)
        axes.set(xlabel="sparsity of prefill", ylabel=ylabel)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_agreement(by_scheme: dict[str, list[Row]]) -> Callable[[Axes], None]:
    return _draw(
        by_scheme, lambda r: (100 * r.top1[0], 100 * r.top1[1]), "same next token as dense, %"
    )


def _draw_perplexity(by_scheme: dict[str, list[Row]]) -> Callable[[Axes], None]:
    return _draw(
        by_scheme,
        lambda r: (100 * r.perplexity_change[0], 100 * r.perplexity_change[1]),
        "perplexity above dense, %",
    )


def _draw_time(results: Results, by_scheme: dict[str, list[Row]]) -> Callable[[Axes], None]:
    draw = _draw(by_scheme, lambda r: (r.prefill_seconds, 0.0), "prefill, s")
    sdpa = next((value for _, value in results.all("sdpa")), None)

    def with_sdpa(axes: Axes) -> None:
        draw(axes)
        if sdpa:
            axes.axhline(sdpa["prefill_seconds"], ls="--", color="tab:gray", label="torch sdpa")
            axes.legend()
        axes.set_ylim(bottom=0)

    return with_sdpa


def _with_method(name: str, scheme: str) -> str:
    return name if scheme in (DENSE, CALIBRATED) else f"{name}, {scheme}"


def _scores(results: Results) -> dict[str, list[tuple[float, float, float]]]:
    """By what was to be answered: sparsity of prefill, mean score and its error, by setting."""
    groups: dict[tuple[str, Setting], list[tuple[float, float]]] = {}
    for (_, scheme, target), value in results.all("needle"):
        of = (_with_method("facts found", scheme), Setting(scheme, target))
        groups.setdefault(of, []).append((value["sparsity"], float(value["right"])))
    for (task, _, scheme, target), value in results.all("task"):
        of = (_with_method(task, scheme), Setting(scheme, target))
        groups.setdefault(of, []).append((value["sparsity"], value["score"]))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (name, _), values in groups.items():
        sparsity, scores = zip(*values, strict=True)
        found.setdefault(name, []).append((statistics.fmean(sparsity), *mean_and_error(scores)))
    return {name: sorted(points) for name, points in found.items()}


def _draw_accuracy(
    scores: dict[str, list[tuple[float, float, float]]],
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, points in scores.items():
            sparsity, score, error = zip(*points, strict=True)
            axes.errorbar(sparsity, score, yerr=error, marker="o", capsize=3, label=name)
        axes.set(xlabel="sparsity of prefill", ylabel="right answers", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_trade(by_scheme: dict[str, list[Row]]) -> Callable[[Axes], None]:
    """What each method's quality costs: below and to the left is better."""

    def draw(axes: Axes) -> None:
        for scheme, some in by_scheme.items():
            points = sorted(some, key=lambda r: r.prefill_seconds)
            axes.errorbar(
                [r.prefill_seconds for r in points],
                [100 * r.perplexity_change[0] for r in points],
                yerr=[100 * r.perplexity_change[1] for r in points],
                marker="o",
                capsize=3,
                label=scheme,
                color=COLOURS.get(scheme),
            )
        axes.set(xlabel="prefill, s", ylabel="perplexity above dense, %")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _by_length(
    results: Results, calibration: Calibration | None
) -> dict[Setting, list[tuple[int, float]]]:
    """Length and sparsity by setting."""
    found: dict[Setting, list[tuple[int, float]]] = {}
    for (length, scheme, target), values in _sparsity_by_length(results).items():
        point = (length, statistics.fmean(values))
        found.setdefault(Setting(scheme, target), []).append(point)
    for held in calibration.held_out if calibration else ():
        if held.phase == "prefill":
            point = (held.length, held.achieved)
            found.setdefault(Setting(CALIBRATED, held.target), []).append(point)
    order = sorted(found, key=lambda setting: (setting.target, setting.scheme))
    return {setting: sorted(found[setting]) for setting in order}


def _draw_lengths(points: dict[Setting, list[tuple[int, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for setting, some in points.items():
            target = setting.target
            label = _with_method(f"target {target:.0%}", setting.scheme)
            [line] = axes.plot(*zip(*some, strict=True), marker="o", label=label)
            axes.axhline(target, ls="--", color=line.get_color(), alpha=0.6)
        axes.set(xlabel="tokens", ylabel="sparsity of prefill", ylim=(0, 1))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _by_head(results: Results) -> tuple[str, list[list[float]]] | None:
    """Of the highest calibrated target: its name and [layers][heads] sparsity of one text."""
    found = [
        (target, name, value["by_head"])
        for (name, scheme, target), value in results.all("text")
        if scheme == CALIBRATED
    ]
    if not found:
        return None
    target, name, table = max(found, key=lambda item: item[0])
    return f"target {target:.0%}, {name}", table


def _draw_heads(table: list[list[float]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        # Layers may differ in their number of heads.
        heads = list(zip_longest(*table, fillvalue=math.nan))
        image = axes.imshow(heads, vmin=0, vmax=1, aspect="auto")
        axes.set(xlabel="layer", ylabel="head")
        axes.figure.colorbar(image, ax=axes, format="{x:.0%}", label="tiles skipped")

    return draw
