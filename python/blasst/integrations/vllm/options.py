"""`--additional-config '{"blasst": {...}}'`, and the thresholds of one request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from blasst.config import PHASES, check_target
from blasst.hf import Threshold

REQUESTS = "blasst.integrations.vllm:Requests"
"""What `--logits-processors` is given, so that requests can have thresholds."""
REQUEST_KEYS = {phase: f"blasst_{phase}_threshold" for phase in PHASES}
"""Of `SamplingParams.extra_args`, over HTTP `vllm_xargs`."""


def passes_requests_on(processors: Sequence[str | type] | None) -> bool:
    """Whether an engine with these logits processors hears of its requests' thresholds."""
    return any(
        one == REQUESTS or getattr(one, "__module__", "").startswith("blasst.")
        for one in processors or ()
    )


def is_asked_for(attention_config: Any) -> bool:
    """Whether `--attention-backend` is CUSTOM, for all layers or for those of a kind."""
    by_kind = getattr(attention_config, "backend_per_kind", {})
    asked = (attention_config.backend, *by_kind.values())
    return any(getattr(one, "name", None) == "CUSTOM" for one in asked)


@dataclass(frozen=True)
class Options:
    """What the engine was started with.

    {"prefill": {..}, "decode": {..}, "statistics": true}, each phase with the arguments of
    `blasst.Threshold`, or with a `target_sparsity` for the model's own calibration.
    """

    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    """By phase; they go before the model's calibration."""
    target_sparsity: Mapping[str, float] = field(default_factory=dict)
    """By phase, instead of the calibration's own."""
    statistics: bool = False
    """Count tiles, for the log and Prometheus."""


def options_of(additional_config: Any) -> Options:
    """What `--additional-config` holds for blasst.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: an unknown key or a value out of range; the message says what is accepted.
    """
    given = additional_config.get("blasst", {}) if isinstance(additional_config, Mapping) else {}
    known = (*PHASES, "statistics")
    _check_keys("blasst", given, known)
    statistics = given.get("statistics", False)
    if not isinstance(statistics, bool):
        raise TypeError(f"blasst.statistics is {statistics!r}; it must be true or false")
    thresholds, targets = {}, {}
    for phase in PHASES:
        if phase not in given:
            continue
        values = given[phase]
        _check_keys(f"blasst.{phase}", values, (*_ARGUMENTS, "target_sparsity"))
        if "target_sparsity" not in values:
            thresholds[phase] = _threshold(phase, values)
        elif len(values) > 1:
            others = ", ".join(sorted(set(values) - {"target_sparsity"}))
            raise ValueError(
                f"blasst.{phase} has target_sparsity and {others}; a target takes the model's own "
                "thresholds and nothing beside it"
            )
        else:
            check_target(phase, values["target_sparsity"])
            targets[phase] = float(values["target_sparsity"])
    return Options(thresholds, targets, statistics)


_ARGUMENTS = tuple(f.name for f in fields(Threshold))


def _threshold(phase: str, values: Mapping[str, Any]) -> Threshold:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in given.items():
        if isinstance(value, tuple) and any(isinstance(one, Sequence) for one in value):
            raise TypeError(
                f"blasst.{phase}: {name} is {values[name]!r}; it must be a number or a list of them"
            )
    try:
        return Threshold(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"blasst.{phase}: {error}") from None


def _check_keys(name: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} is {given!r}; it must be an object")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{name} has {', '.join(map(repr, unknown))}; known keys: {', '.join(known)}"
        )


def thresholds_of_request(extra_args: Mapping[str, Any] | None) -> dict[str, float]:
    """The thresholds that a request asks for, by phase; those of others are not there.

    Raises:
        ValueError: one that is no number from 0 to 1, or a key that begins with "blasst" and is
            none of `REQUEST_KEYS`.
    """
    given = {k: v for k, v in (extra_args or {}).items() if str(k).startswith("blasst")}
    if unknown := sorted(set(given) - set(REQUEST_KEYS.values())):
        raise ValueError(
            f"extra_args has {', '.join(map(repr, unknown))}; of blasst it may have "
            f"{' and '.join(REQUEST_KEYS.values())}"
        )
    found = {phase: given[key] for phase, key in REQUEST_KEYS.items() if key in given}
    for phase, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise ValueError(
                f"{REQUEST_KEYS[phase]} is {value!r}; it must be a number from 0 (dense) to 1"
            )
    return found
