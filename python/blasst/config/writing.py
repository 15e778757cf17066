"""Writing a `sparse_attention_config`: the part of the ecosystem's readers, and that of ours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blasst.config.laws import Law, Measured, Policy
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
    return {"version": VERSION} | {
        phase: {
            "tile_shape": list(found.tile_shape),
            "policies": [_policy(policy) for policy in found.policies],
        }
        for phase, found in measured.items()
    }


def _policy(policy: Policy) -> dict[str, Any]:
    law = policy.law
    entry = {
        "order": policy.order,
        "heads": policy.heads,
        "law": {"formula": LENGTH_FORMULA, "a": law.a, "b": law.b, "power": law.power},
        "lengths": list(policy.lengths),
        "target_sparsity": list(policy.targets),
        # Three decimals: 0.1 % of a threshold, far below what sparsity can tell apart.
        "ln_threshold": _rounded(policy.ln_threshold.tolist()),
    }
    if policy.shorter is not None:
        shorter = _policy(policy.shorter)
        entry["shorter"] = {"below": list(policy.below), "policy": shorter}
    return entry


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value if not isinstance(v, float) or not math.isnan(v)]
    return round(value, 3)
