"""Writing a `sparse_attention_config`: the part of the ecosystem's readers, and that of ours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blasst.config.laws import Law, Measured, ThresholdTable
from blasst.config.schema import ALGORITHM, FORMULA, LENGTH_FORMULA, VERSION


def ecosystem_entry(
    targets: Sequence[str],
    ignore: Sequence[str],
    laws: Mapping[str, Law],
    target_sparsity: Mapping[str, float],
) -> dict[str, Any]:
    """`config_groups`, which Model-Optimizer and serving engines read."""
    group: dict[str, Any] = {"algorithm": ALGORITHM, "targets": list(targets)}
    if ignore:
        group["ignore"] = list(ignore)
    group["threshold_scale_factor"] = {"formula": FORMULA} | {
        phase: {"a": law.a, "b": law.b} for phase, law in laws.items()
    }
    group["target_sparsity"] = dict(target_sparsity)
    return {"group_0": group}


def own_entry(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """What is under our key."""
    return {"version": VERSION} | {phase: _measured(found) for phase, found in measured.items()}


def _measured(found: Measured) -> dict[str, Any]:
    entry = {
        "tile_shape": list(found.tile_shape),
        "policies": [_table(table) for table in found.tables],
    }
    if found.scores != "exact":
        entry["scores"] = found.scores
    if found.law is not None:
        entry["law"] = {"a": found.law.a, "b": found.law.b}
    if found.others:
        entry["others"] = [_measured(other) for other in found.others]
    return entry


def _table(table: ThresholdTable) -> dict[str, Any]:
    law = table.law
    entry = {
        "order": table.order,
        "heads": table.heads,
        "law": {"formula": LENGTH_FORMULA, "a": law.a, "b": law.b, "power": law.power},
        "lengths": list(table.lengths),
        "target_sparsity": list(table.targets),
        # Three decimals: 0.1 % of a threshold, far below what sparsity can tell apart.
        "ln_threshold": _rounded(table.ln_threshold.tolist()),
    }
    if table.shorter is not None:
        shorter = _table(table.shorter)
        entry["shorter"] = {"below": list(table.below), "policy": shorter}
    return entry


def _rounded(value: Any) -> Any:
    """Tuples, so that whoever reads them at each call need not look for edits."""
    if isinstance(value, list):
        return tuple(_rounded(v) for v in value if not isinstance(v, float) or not math.isnan(v))
    return round(value, 3)
