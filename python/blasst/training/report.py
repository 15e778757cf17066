"""Table and plots of a fine-tuning run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from blasst.files import write_json
from blasst.pages import Table, environment, tables_to_dict, write_page
from blasst.percent import percent
from blasst.training.plan import TRAINED, Case, TrainingPlan, Way
from blasst.training.trainer import read_log

COLOURS = {Way.DENSE: "tab:gray", Way.SPARSE: "tab:blue"}


def costs(cases: Sequence[Case]) -> dict[str, float]:
    """What sparsity costs, by how the model was trained.

    Perplexity measured sparse over that of the dense-trained model measured dense, - 1.
    """
    found = {(case.trained, case.measured): case.perplexity for case in cases}
    return {way: found[way, Way.SPARSE] / found[Way.DENSE, Way.DENSE] - 1 for way in TRAINED}


def about(plan: TrainingPlan) -> str:
    """The plan in a sentence."""
    if plan.distill:
        towards = ", towards the predictions of the untrained model, the dense one here,"
    else:
        towards = ""
    return (
        f"{plan.steps} steps of {plan.batch} x {plan.length} tokens, learning rate "
        f"{plan.learning_rate:g}; sparse training{towards} goes from {percent(plan.start)} to "
        f"{percent(plan.target)} in {plan.ramp} steps."
    )


def table(cases: Sequence[Case], plan: TrainingPlan) -> Table:
    """The four cases."""
    basis = cases[0].perplexity
    return Table(
        f"Perplexity at {plan.length} tokens, target sparsity {percent(plan.target)}",
        ("trained", "measured", "sparsity", "perplexity", "change", *cases[0].by_text),
        tuple(
            (
                case.trained,
                case.measured,
                f"{case.sparsity:.1%}",
                f"{case.perplexity:.3f}",
                f"{case.perplexity / basis - 1:+.2%}",
                *(f"{value:.3f}" for value in case.by_text.values()),
            )
            for case in cases
        ),
        f"Change: against dense-trained, measured dense. {verdict(cases)}",
    )


def verdict(cases: Sequence[Case]) -> str:
    """What training with sparsity is good for."""
    cost = costs(cases)
    return (
        f"Sparsity costs {cost[Way.DENSE]:+.2%} after dense training and "
        f"{cost[Way.SPARSE]:+.2%} after sparse training."
    )


def write(title: str, about: str, cases: Sequence[Case], plan: TrainingPlan, out: Path) -> Path:
    """Write report.html, its plots as PNG and results.json into the run's folder; the report."""
    found = table(cases, plan)
    logs = {way: read_log(out / way / "log.jsonl") for way in TRAINED}
    write_json(
        out / "results.json",
        {
            "title": title,
            "about": about,
            "environment": environment(),
            "plan": asdict(plan),
            "cost_of_sparsity": costs(cases),
            "cases": [asdict(case) for case in cases],
            "tables": tables_to_dict([found]),
            "training": logs,
        },
    )
    plots = [
        ("perplexity", "Perplexity of the four cases", _draw_cases(cases)),
        ("loss", "Training loss", _draw_loss(logs)),
        ("sparsity", "Sparsity while training", _draw_sparsity(logs[Way.SPARSE])),
    ]
    return write_page(title, verdict(cases), about, [found], plots, out)


def _draw_cases(cases: Sequence[Case]) -> Callable[[Axes], None]:
    basis = cases[0].perplexity

    def draw(axes: Axes) -> None:
        for place, case in enumerate(cases):
            change = 100 * (case.perplexity / basis - 1)
            bar = axes.bar(place, change, color=COLOURS[case.trained])
            axes.bar_label(bar, [f"{change:+.2f} %"])
        axes.set_xticks(
            range(len(cases)),
            [f"{case.trained}-trained,\n{case.sparsity:.1%} skipped" for case in cases],
        )
        axes.set_ylabel("perplexity against dense-trained, dense, %")
        axes.axhline(0, color="tab:gray", lw=0.8)
        axes.margins(y=0.15)

    return draw


def _draw_loss(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for way, lines in logs.items():
            axes.plot(
                [line["step"] for line in lines],
                [line["loss"] for line in lines],
                color=COLOURS[way],
                label=f"trained {way}",
            )
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _draw_sparsity(lines: Sequence[Mapping[str, Any]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        steps = [line["step"] for line in lines]
        reached = [line["sparsity"] for line in lines]
        target = [line["target_sparsity"] for line in lines]
        axes.plot(steps, reached, color=COLOURS[Way.SPARSE], label="reached")
        axes.plot(steps, target, ls="--", color="tab:gray", label="target")
        axes.set(xlabel="step", ylabel="sparsity", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend()
        axes.grid(alpha=0.3)

    return draw
