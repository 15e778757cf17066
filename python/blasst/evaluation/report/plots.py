"""What was measured, as plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from blasst.calibration import Calibration
from blasst.evaluation.report.values import (
    by_head,
    by_length,
    found_by_place,
    scores,
    with_method,
)
from blasst.evaluation.settings import DENSELY, SDPA, Scheme, Setting
from blasst.evaluation.summary import Row, Timing, longest_timings, rows, timings
from blasst.measure.results import Results
from blasst.pages import Plot
from blasst.percent import percent

COLOURS = {
    Scheme.CALIBRATED: "tab:blue",
    Scheme.PAPER: "tab:orange",
    Scheme.DENSE: "tab:gray",
    "bsfa": "tab:green",
    "dhsa": "tab:red",
    "dhsa+blasst": "tab:purple",
}


def plots_of(results: Results, calibration: Calibration | None) -> list[Plot]:
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
        ]
    times = timings(results)
    longest = longest_timings(results)
    if len(longest) > 1:
        plots.append(("time", f"Prefill of {times[-1].length} tokens", _draw_time(longest)))
    if any(row.setting in longest for row in found if row.setting.target):
        plots.append(("trade", "Perplexity against prefill time", _draw_trade(found, longest)))
    if len({time.length for time in times}) > 1:
        plots.append(("times", "Prefill against length", _draw_times(times)))
    answered = scores(results)
    if any(len(points) > 1 for points in answered.values()):
        plots.append(("accuracy", "Accuracy against sparsity", _draw_accuracy(answered)))
    places = found_by_place(results)
    if len({place for some in places.values() for place in some}) > 1:
        plots.append(("needles", "Facts found by depth and length", _draw_needles(places)))
    lengths = by_length(results, calibration)
    if lengths:
        plots.append(("lengths", "Sparsity against length", _draw_lengths(lengths)))
    heat = by_head(results)
    if heat:
        plots.append(("heads", f"Sparsity by layer and head, {heat[0]}", _draw_heads(heat[1])))
    return plots


def _curve(
    axes: Axes, rows_: Sequence[Row], dense: Sequence[Row], value: Callable, label: str
) -> None:
    points = sorted([*dense, *rows_], key=lambda r: r.sparsity[0])
    axes.errorbar(
        [r.sparsity[0] for r in points],
        [value(r)[0] for r in points],
        yerr=[value(r)[1] for r in points],
        **_style(label),
    )


def _draw(by_scheme: dict[str, list[Row]], value: Callable, ylabel: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for scheme, some in by_scheme.items():
            if scheme != Scheme.DENSE:
                _curve(axes, some, by_scheme.get(Scheme.DENSE, []), value, scheme)
        axes.set(xlabel="sparsity of prefill", ylabel=ylabel)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
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


def _draw_time(times: Mapping[Setting, Timing]) -> Callable[[Axes], None]:
    """The median, from the lowest to the highest, and what attention alone predicts."""
    sdpa, dense = times.get(SDPA), times.get(DENSELY)
    by_scheme: dict[str, list[Timing]] = {}
    for setting, time in times.items():
        if setting not in (SDPA, DENSELY):
            by_scheme.setdefault(setting.scheme, [dense] if dense else []).append(time)
    if dense and not by_scheme:
        by_scheme[Scheme.DENSE] = [dense]

    def draw(axes: Axes) -> None:
        for scheme, unsorted in by_scheme.items():
            some = sorted(unsorted, key=lambda time: time.sparsity)
            x = [time.sparsity for time in some]
            line = axes.errorbar(x, *_spread(some), **_style(scheme))
            # From dense, which every prediction starts from.
            told = [time for time in some if time.predicted or time.setting == DENSELY]
            predicted = [(time.sparsity, time.predicted or time.median) for time in told]
            if any(time.predicted for time in told):
                color = line.lines[0].get_color()
                axes.plot(*zip(*predicted, strict=True), ls=":", color=color, label="predicted")
        if sdpa:
            axes.axhline(sdpa.median, ls="--", color="tab:gray", label=SDPA.name)
        axes.set(xlabel="sparsity of prefill", ylabel="prefill, s")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_times(times: Sequence[Timing]) -> Callable[[Axes], None]:
    by_setting: dict[Setting, list[Timing]] = {}
    for time in times:
        by_setting.setdefault(time.setting, []).append(time)

    def draw(axes: Axes) -> None:
        for setting, some in by_setting.items():
            grey = {"color": "tab:gray"} if setting == SDPA else {}
            line = {"marker": "o", "capsize": 3, "label": setting.name}
            axes.errorbar([time.length for time in some], *_spread(some), **line, **grey)
        axes.set(xlabel="tokens", ylabel="prefill, s", xscale="log", yscale="log")
        lengths = _with_room(sorted({time.length for time in times}))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _with_room(lengths: Sequence[int]) -> list[int]:
    """Those of ascending lengths whose labels have room on a logarithmic axis, the last always."""
    room, kept = (lengths[-1] / lengths[0]) ** 0.13, [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if kept[-1] / length >= room:
            kept.append(length)
    return kept


def _spread(times: Sequence[Timing]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the lowest and the highest are from them."""
    below = [time.median - time.seconds[0] for time in times]
    above = [time.seconds[-1] - time.median for time in times]
    return [time.median for time in times], [below, above]


def _style(scheme: str) -> dict[str, Any]:
    return {"marker": "o", "capsize": 3, "label": str(scheme), "color": COLOURS.get(scheme)}


def _draw_needles(
    places: Mapping[Setting, Mapping[tuple[int, float], bool]],
) -> Callable[[Axes], None]:
    """How many settings found the fact, by depth down and length across."""
    asked = {place for some in places.values() for place in some}
    lengths = sorted({length for length, _ in asked})
    depths = sorted({depth for _, depth in asked})

    def draw(axes: Axes) -> None:
        table = [[math.nan] * len(lengths) for _ in depths]
        for length, depth in asked:
            found = [some[length, depth] for some in places.values() if (length, depth) in some]
            row, column = depths.index(depth), lengths.index(length)
            table[row][column] = sum(found) / len(found)
            axes.text(column, row, f"{sum(found)} of {len(found)}", ha="center", va="center")
        axes.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn", alpha=0.5)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="tokens", ylabel="depth", title="settings in which it was found")

    return draw


def _draw_accuracy(
    scores: dict[str, list[tuple[float, float, float]]],
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, points in scores.items():
            sparsity, score, error = zip(*points, strict=True)
            axes.errorbar(sparsity, score, yerr=error, marker="o", capsize=3, label=name)
        axes.set(xlabel="sparsity of prefill", ylabel="right answers", ylim=(0, 1.05))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_trade(rows_: Sequence[Row], times: Mapping[Setting, Timing]) -> Callable[[Axes], None]:
    """What each method's quality costs: below and to the left is better."""
    by_scheme: dict[str, list[Row]] = {}
    for row in rows_:
        if row.setting in times:
            by_scheme.setdefault(row.setting.scheme, []).append(row)

    def draw(axes: Axes) -> None:
        for scheme, some in by_scheme.items():
            points = sorted(some, key=lambda row: times[row.setting].median)
            axes.errorbar(
                [times[row.setting].median for row in points],
                [100 * row.perplexity_change[0] for row in points],
                yerr=[100 * row.perplexity_change[1] for row in points],
                **_style(scheme),
            )
        axes.set(xlabel="prefill, s", ylabel="perplexity above dense, %")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_lengths(points: dict[Setting, list[tuple[int, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for setting, some in points.items():
            target = setting.target
            label = with_method(f"target {percent(target)}", setting.scheme)
            [line] = axes.plot(*zip(*some, strict=True), marker="o", label=label)
            axes.axhline(target, ls="--", color=line.get_color(), alpha=0.6)
        axes.set(xlabel="tokens", ylabel="sparsity of prefill", ylim=(0, 1))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_heads(table: list[list[float]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        # Layers may differ in their number of heads.
        heads = list(zip_longest(*table, fillvalue=math.nan))
        image = axes.imshow(heads, vmin=0, vmax=1, aspect="auto")
        axes.set(xlabel="layer", ylabel="head")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.colorbar(image, ax=axes, format="{x:.0%}", label="tiles skipped")

    return draw
