"""What was measured, as plots."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

from matplotlib.axes import Axes

from blasst.calibration import Calibration
from blasst.evaluation.report.values import by_head, by_length, scores, with_method
from blasst.evaluation.settings import Scheme, Setting
from blasst.evaluation.summary import Row, rows
from blasst.measure.results import Results
from blasst.pages import Plot

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
            ("time", "Prefill time against sparsity", _draw_time(results, by_scheme)),
            ("trade", "Perplexity against prefill time", _draw_trade(by_scheme)),
        ]
    answered = scores(results)
    if any(len(points) > 1 for points in answered.values()):
        plots.append(("accuracy", "Accuracy against sparsity", _draw_accuracy(answered)))
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
        marker="o",
        capsize=3,
        label=label,
        color=COLOURS.get(label),
    )


def _draw(by_scheme: dict[str, list[Row]], value: Callable, ylabel: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for scheme, some in by_scheme.items():
            if scheme != Scheme.DENSE:
                _curve(axes, some, by_scheme.get(Scheme.DENSE, []), value, scheme)
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


def _draw_lengths(points: dict[Setting, list[tuple[int, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for setting, some in points.items():
            target = setting.target
            label = with_method(f"target {target:.0%}", setting.scheme)
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
        axes.figure.colorbar(image, ax=axes, format="{x:.0%}", label="tiles skipped")

    return draw
