"""What users set on a model: thresholds, target sparsity; and undoing it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from blasst.config import check_target
from blasst.hf.layers import entry_of, modules_of_layers
from blasst.hf.saving import CONFIG_KEY
from blasst.hf.thresholds import Threshold, calibration_read

SETTINGS = ("blasst_thresholds", "blasst_targets", "blasst_policy", "blasst_absorbs", "expand_kv")
"""What modules carry of `configure`, `set_target`, `set_policy` and `absorb`."""


class Setting:
    """What layers were set to before; at the end of a `with` statement they are it again."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [
            (module, {name: vars(module)[name] for name in SETTINGS if name in vars(module)})
            for module in modules
        ]

    def __enter__(self) -> None:
        """The layers are set already."""

    def __exit__(self, *_: object) -> None:
        for module, before in self._before:
            for name in SETTINGS:
                vars(module).pop(name, None)
            vars(module).update(before)


def configure(
    model: nn.Module,
    *,
    prefill: Threshold | None = None,
    decode: Threshold | None = None,
    layers: Iterable[int] | None = None,
) -> Setting:
    """Set the thresholds of a model that runs with `attn_implementation="blasst"`.

    They go before what the model's configuration says, until `reset` or, in a `with` statement, its
    end.

    Args:
        model: the model, also wrapped (compiled, or for data parallelism), or a part of one; its
            attention layers keep the setting.
        prefill: for passes with more than one query a request. None: stays as it is; `Threshold()`
            is dense.
        decode: for passes with one query a request; None likewise.
        layers: the layers of the language model to set; default: everything that calls attention,
            image encoders too if they run blasst.

    Returns:
        For a `with` statement, after which the model is as it was before.

    Raises:
        TypeError: something else than a `Threshold`, or nothing at all.
        ValueError: the model runs another attention, or has no such layer.
    """
    given = {"prefill": prefill, "decode": decode}
    for phase, threshold in given.items():
        if not isinstance(threshold, Threshold | None):
            raise TypeError(
                f"{phase} is {threshold!r}; it must be a blasst.Threshold, for example "
                f"Threshold(0.01) (Threshold() is dense)"
            )
    changed = _given("configure", given)
    modules = modules_of_layers(model, layers)
    setting = Setting(modules)
    for module in modules:
        module.blasst_thresholds = getattr(module, "blasst_thresholds", {}) | changed
    return setting


def _given(name: str, by_phase: dict[str, Any]) -> dict[str, Any]:
    """What is not None; an error if nothing is."""
    found = {phase: value for phase, value in by_phase.items() if value is not None}
    if not found:
        raise TypeError(f"{name} sets prefill, decode or both; neither is given")
    return found


def set_target(
    model: nn.Module,
    *,
    prefill: float | None = None,
    decode: float | None = None,
    layers: Iterable[int] | None = None,
) -> Setting:
    """Set the target sparsity of a calibrated model, by phase; its configuration keeps its own.

    It goes before what `configure` set for the phase, until `configure`, `reset` or, in a `with`
    statement, its end.

    Args:
        model: as for `configure`, with a `sparse_attention_config`.
        prefill: 0 to 1, 0: dense. None: stays as it is.
        decode: likewise.
        layers: default: all that are calibrated.

    Returns:
        For a `with` statement, after which the model is as it was before.

    Raises:
        TypeError: a target that is no number, or none at all.
        ValueError: a target out of range, or a model without a calibration of the phase.
    """
    targets = _given("set_target", {"prefill": prefill, "decode": decode})
    for phase, target in targets.items():
        check_target(phase, target)
    modules = [m for m in modules_of_layers(model, layers) if entry_of(m, CONFIG_KEY) is not None]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no sparse_attention_config: calibrate it "
            "(blasst.calibrate) or set thresholds (blasst.configure)"
        )
    for module in modules:
        read = calibration_read(module)
        for phase in targets:
            if phase not in read.laws and phase not in read.measured:
                raise ValueError(f"the model's sparse_attention_config has no {phase}")
    setting = Setting(modules)
    for module in modules:
        module.blasst_targets = getattr(module, "blasst_targets", {}) | targets
        configured = vars(module).pop("blasst_thresholds", {})
        if kept := {phase: t for phase, t in configured.items() if phase not in targets}:
            module.blasst_thresholds = kept
    return setting


def reset(model: nn.Module) -> None:
    """Undo `configure`, `set_target`, `set_policy` and `absorb`: the configuration holds again."""
    for module in modules_of_layers(model, None):
        for name in SETTINGS:
            module.__dict__.pop(name, None)
