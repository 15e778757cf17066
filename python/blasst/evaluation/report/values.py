"""Numbers that tables and plots are made of."""

import statistics

from blasst.calibration import Calibration
from blasst.evaluation.settings import Scheme, Setting
from blasst.evaluation.summary import mean_and_error
from blasst.measure.results import Results
from blasst.percent import percent


def with_method(name: str, scheme: str) -> str:
    """A name, and the method's where it is not our own."""
    return name if scheme in (Scheme.DENSE, Scheme.CALIBRATED) else f"{name}, {scheme}"


def sparsity_by_length(results: Results) -> dict[tuple[int, str, float], list[float]]:
    """By length, scheme and target."""
    found: dict[tuple[int, str, float], list[float]] = {}
    for (length, _, scheme, target), value in results.all("length"):
        found.setdefault((length, scheme, target), []).append(value)
    return found


def by_length(
    results: Results, calibration: Calibration | None
) -> dict[Setting, list[tuple[int, float]]]:
    """Length and sparsity by setting."""
    found: dict[Setting, list[tuple[int, float]]] = {}
    for (length, scheme, target), values in sparsity_by_length(results).items():
        point = (length, statistics.fmean(values))
        found.setdefault(Setting(scheme, target), []).append(point)
    for held in calibration.held_out if calibration else ():
        if held.phase == "prefill":
            point = (held.length, held.achieved)
            found.setdefault(Setting(Scheme.CALIBRATED, held.target), []).append(point)
    order = sorted(found, key=lambda setting: (setting.target, setting.scheme))
    return {setting: sorted(found[setting]) for setting in order}


def by_head(results: Results) -> tuple[str, list[list[float]]] | None:
    """Of the highest calibrated target: its name and [layers][heads] sparsity of one text."""
    found = [
        (target, name, value["by_head"])
        for (name, scheme, target), value in results.all("text")
        if scheme in (Scheme.CALIBRATED, Scheme.INT8) and target
    ]
    if not found:
        return None
    target, name, table = max(found, key=lambda item: item[0])
    return f"target {percent(target)}, {name}", table


def scores(results: Results) -> dict[str, list[tuple[float, float, float]]]:
    """By what was to be answered: sparsity of prefill, mean score and its error, by setting."""
    groups: dict[tuple[str, Setting], list[tuple[float, float]]] = {}
    for (_, _, scheme, target), value in results.all("needle"):
        of = (with_method("facts found", scheme), Setting(scheme, target))
        groups.setdefault(of, []).append((value["sparsity"], float(value["right"])))
    for (task, _, scheme, target), value in results.all("task"):
        of = (with_method(task, scheme), Setting(scheme, target))
        groups.setdefault(of, []).append((value["sparsity"], value["score"]))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (name, _), values in groups.items():
        sparsity, scores = zip(*values, strict=True)
        found.setdefault(name, []).append((statistics.fmean(sparsity), *mean_and_error(scores)))
    return {name: sorted(points) for name, points in found.items()}


def found_by_place(results: Results) -> dict[Setting, dict[tuple[int, float], bool]]:
    """By setting, whether the fact at each length and depth was found."""
    found: dict[Setting, dict[tuple[int, float], bool]] = {}
    for (length, depth, scheme, target), value in results.all("needle"):
        found.setdefault(Setting(scheme, target), {})[length, depth] = value["right"]
    return found
