"""How wrong the rows of sparse passes may be, as tables."""

from typing import Any

from blasst.evaluation.bounds import LIMITS
from blasst.evaluation.settings import Setting
from blasst.evaluation.summary import mean_and_error
from blasst.measure.results import Results
from blasst.pages import Table, with_error


def bound_table(results: Results) -> Table:
    """How many rows are safe for certain."""
    by_setting: dict[Setting, list[dict[str, float]]] = {}
    for (_, setting), bound in _bounds(results).items():
        by_setting.setdefault(setting, []).append(bound["below"])
    return Table(
        "Bound on the mass that rows dropped",
        ("setting", *(f"rows below {limit:.0%}" for limit in LIMITS)),
        tuple(
            (
                setting.name,
                *(
                    with_error(mean_and_error([shares[str(limit)] for shares in of_texts]), ".1%")
                    for limit in LIMITS
                ),
            )
            for setting, of_texts in by_setting.items()
        ),
        "Of all rows (a token, a layer that skips, a head): where dense softmax gives the keys of "
        "skipped tiles a share below this, for certain. The true share is often a tenth of the "
        "bound. An output is off by at most twice the share times the largest |v|.",
    )


def worst_table(results: Results) -> Table:
    """The tokens with the largest bounds, at the largest target of each scheme."""
    found = _bounds(results)
    most: dict[str, float] = {}
    for _, setting in found:
        most[setting.scheme] = max(setting.target, most.get(setting.scheme, 0.0))
    return Table(
        "Tokens with the largest bound",
        ("setting", "text", "token", "text up to it", "mean bound"),
        tuple(
            (setting.name, name, str(one["token"]), one["text"], f"{one['bound']:.1%}")
            for (name, setting), bound in found.items()
            if setting.target == most[setting.scheme]
            for one in bound["worst"]
        ),
        "Mean over the layers that skip and their heads.",
    )


def _bounds(results: Results) -> dict[tuple[str, Setting], dict[str, Any]]:
    """By text and setting."""
    return {
        (name, Setting(scheme, target)): value["bound"]
        for (name, scheme, target), value in results.all("text")
        if "bound" in value
    }
