"""What was measured, as tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from blasst.calibration import Calibration
from blasst.evaluation.report.bounds import bound_table, worst_table
from blasst.evaluation.report.calibration import calibration_tables
from blasst.evaluation.report.values import by_head, sparsity_by_length, with_method
from blasst.evaluation.settings import Setting
from blasst.evaluation.summary import mean_and_error, rows, timings
from blasst.measure.results import Results
from blasst.pages import Table, with_error
from blasst.percent import percent

NEEDLES_SHOWN = 3


def tables(results: Results, calibration: Calibration | None) -> list[Table]:
    """Everything that was measured, in the order of the report."""
    found = [_agreement_table(results), bound_table(results), worst_table(results)]
    found += [_time_table(results), _needle_table(results), _depth_table(results)]
    found += [_task_table(results), _layer_table(results), _answer_table(results)]
    found += [_length_table(results)]
    found = [table for table in found if table.rows]
    return found + (calibration_tables(calibration) if calibration else [])


def _agreement_table(results: Results) -> Table:
    found = rows(results)
    return Table(
        "Perplexity and agreement with dense",
        (
            "setting",
            "sparsity",
            "perplexity",
            "same next token",
            "KL divergence",
        ),
        tuple(
            (
                row.setting.name,
                with_error(row.sparsity, ".1%"),
                with_error(row.perplexity_change, "+.2%") if not row.setting.is_dense else "dense",
                with_error(row.top1, ".2%"),
                with_error(row.kl, ".4f"),
            )
            for row in found
        ),
        _mean_over(found[0].texts) if found else "",
    )


def _mean_over(texts: int) -> str:
    return (
        f"Mean over {texts} texts, ± the standard error of the mean." if texts > 1 else "One text."
    )


def _time_table(results: Results) -> Table:
    found = timings(results)
    return Table(
        "Prefill by length",
        (
            "tokens",
            "setting",
            "sparsity",
            "prefill",
            "lowest to highest",
            "attention",
            "of prefill",
            "gain over dense",
            "predicted",
        ),
        tuple(
            (
                str(time.length),
                time.setting.name,
                f"{time.sparsity:.1%}",
                f"{time.median:.3f} s",
                f"{time.seconds[0]:.3f} to {time.seconds[-1]:.3f} s",
                f"{time.attention:.3f} s" if time.attention else "",
                f"{time.attention / time.median:.0%}" if time.attention else "",
                f"{time.dense.median / time.median:.2f}x" if time.dense else "",
                f"{time.dense.median / time.predicted:.2f}x" if time.predicted else "",
            )
            for time in found
        ),
        f"Median of {len(found[0].seconds)}, warm, the settings in turn. Attention: its calls "
        "alone, one by one on a device that does nothing else. Predicted: from dense prefill, with "
        "this attention in the place of its own."
        if found
        else "",
    )


def _depth_table(results: Results) -> Table:
    """Depths down, lengths across."""
    groups: dict[tuple[str, float], dict[int, str]] = {}
    for (length, depth, scheme, target), value in results.all("needle"):
        row = groups.setdefault((Setting(scheme, target).name, depth), {})
        row[length] = "found" if value["right"] else "not found"
    lengths = sorted({length for row in groups.values() for length in row})
    return Table(
        "Facts by depth and length",
        ("setting", "depth", *(f"{length} tokens" for length in lengths)),
        tuple(
            (name, f"{depth:.0%}", *(row.get(length, "") for length in lengths))
            for (name, depth), row in groups.items()
        ),
        "Depth: where in the text the fact stands.",
    )


def _needle_table(results: Results) -> Table:
    groups: dict[Setting, list[dict]] = {}
    for (_, _, scheme, target), value in results.all("needle"):
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
                *_times(values),
            )
            for setting, values in groups.items()
        ),
    )


def _times(values: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Of prefill and decode; none of answers that were not generated."""
    if "prefill_seconds" not in values[0]:
        return "", ""
    return (
        f"{statistics.fmean(v['prefill_seconds'] for v in values):.2f} s",
        f"{1e3 * statistics.fmean(v['decode_seconds'] for v in values):.1f} ms a token",
    )


def _answer_table(results: Results) -> Table:
    shown: dict[tuple[int, float], dict[str, str]] = {}
    settings: list[str] = []
    for (length, depth, scheme, target), value in results.all("needle"):
        if (length, depth) in shown or len(shown) < NEEDLES_SHOWN:
            name = Setting(scheme, target).name
            settings += [name] if name not in settings else []
            asked = f"{value['question']} ({', '.join(value['expected'])})"
            shown.setdefault((length, depth), {"": asked})[name] = value["answer"]
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
        "Tasks (lm-eval)",
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
                with_error(mean_and_error([v["score"] for v in values]), ".2f"),
                f"{statistics.fmean(v['sparsity'] for v in values):.1%}",
                f"{statistics.fmean(v['decode_sparsity'] for v in values):.1%}",
                *_times(values),
            )
            for (task, setting), values in groups.items()
        ),
    )


def _layer_table(results: Results) -> Table:
    """Ten layers a row, each the mean over its heads."""
    found = by_head(results)
    layers = [f"{statistics.fmean(heads):.0%}" for heads in found[1]] if found else []
    rows = (layers[i : i + 10] for i in range(0, len(layers), 10))
    return Table(
        f"Sparsity by layer, {found[0]}" if found else "Sparsity by layer",
        ("layers from", *(f"+{i}" for i in range(10))),
        tuple((str(10 * i), *row, *[""] * (10 - len(row))) for i, row in enumerate(rows)),
    )


def _length_table(results: Results) -> Table:
    found = sorted(sparsity_by_length(results).items())
    return Table(
        "Sparsity at other lengths",
        ("tokens", "target", "prompts", "sparsity of prefill", "off by"),
        tuple(
            (
                str(length),
                with_method(percent(target), scheme),
                str(len(values)),
                with_error(mean_and_error(values), ".1%"),
                f"{100 * (statistics.fmean(values) - target):+.1f} points",
            )
            for (length, scheme, target), values in found
        ),
    )
