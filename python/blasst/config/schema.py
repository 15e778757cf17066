"""`sparse_attention_config`: the entry of a model's config.json that holds its thresholds.

The keys are the ecosystem's (Model-Optimizer writes them, serving engines read them), so that
configurations travel both ways. What they cannot express goes under one key of our own, "blasst",
which other readers ignore:

    {"config_groups": {"group_0": {
        "algorithm": "skip_softmax",
        "targets": ["LlamaAttention"],                     # classes of the attention layers
        "ignore": ["model.layers.0.self_attn"],            # modules that stay dense
        "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)",
                                   "prefill": {"a": .., "b": ..}, "decode": {"a": .., "b": ..}},
        "target_sparsity": {"prefill": 0.5, "decode": 0.5}}},
     "producer": {"name": .., "version": ..},
     "blasst": {"version": 1,
        "prefill": {"tile_shape": [64, 64], "policies": [{
            "order": "sink_first",
            "heads": "equal_mass",                         # how thresholds were shared out
            "law": {"formula": "a * exp(b * target_sparsity) / length ** power",
                    "a": .., "b": .., "power": ..},
            "lengths": [1024, 2048], "target_sparsity": [0.3, 0.5],
            "ln_threshold": [lengths][targets][layers][heads],  # or [1][1]: one for all; layers
                                                           # may differ in their number of heads
            "shorter": {"below": [2048, 4096], "policy": {..}}}]},    # optional
        "decode": ..}}

Without our key a phase follows the ecosystem's law: threshold = a * exp(b * target) / length, one
for all heads, tiles visited forward, fitted on tiles of 128 x 128 (or of `tile_shape`, where
`policies` is empty). With policies: the measured table, interpolated in target and in ln length,
and beyond its lengths continued with a power half-way between the law's and 1. Where the keys are
few, an order may not reach a target that another one does: `shorter` holds that one, and by target
the number of keys below which it stands in. `targets` and `ignore` name classes or modules: see
`SparseAttention`.
"""

import fnmatch
import logging
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

PHASES = ("prefill", "decode")
ORDERS = ("sink_first", "reverse", "forward")
HEAD_SCHEMES = ("one_threshold", "equal_sparsity", "equal_mass", "water_filling", "least_error")
FORMULA = "a * exp(b * target_sparsity)"
LENGTH_FORMULA = f"{FORMULA} / length ** power"
ALGORITHM = "skip_softmax"
VERSION = 1
LOWEST_LN_THRESHOLD = -32.0
"""Where the gap histograms end; a head at this threshold drops nothing that matters."""
HIGHEST_LN_THRESHOLD = 8.0
"""A table may go above threshold 1 at a length where 1 is too little, for interpolation; what is
used never does."""
ECOSYSTEM_TILE_SHAPE = (128, 128)
GENERIC_TARGETS = ("Attention",)
"""What Model-Optimizer writes where it does not know the class: any."""
ECOSYSTEM_TARGET = 0.5
"""What readers of the ecosystem take where a file says no target."""

NEAR = 1.1
"""Requests up to so many times the longest calibrated length pass without a word."""

_log = logging.getLogger("blasst")


class Rule(NamedTuple):
    """What one attention call needs to know."""

    threshold: Tensor | None
    """[requests, heads] or [requests, 1] float32, 0 to 1; None: dense."""
    order: str


DENSE = Rule(None, "sink_first")


class Schedule(NamedTuple):
    """Thresholds at every length, for one target."""

    order: str
    lengths: Tensor
    """[lengths] float64, ascending; beyond them thresholds fall with `power` of the length."""
    ln_threshold: Tensor
    """[lengths, layers, heads] or [lengths, 1, 1] float32; NaN: a head that a layer lacks."""
    power: float
    below: int = 0
    shorter: "Schedule | None" = None
    """Stands in for this one in a call with fewer keys than `below`."""

    def of_call(self, keys: int) -> "Schedule":
        """The one for a call with room for so many keys a request: a call has one order."""
        return self.shorter if keys < self.below else self

    def at(self, lengths: Tensor) -> Tensor:
        """[requests] keys -> [requests, layers, heads] float32: thresholds, 0 to 1."""
        ln_length, points = lengths.double().log(), self.lengths.log()
        nearest = ln_length.clamp(points[0], points[-1])
        if len(points) == 1:
            ln = self.ln_threshold
        else:
            right = torch.searchsorted(points, nearest).clamp(min=1)
            left = right - 1
            share = (nearest - points[left]) / (points[right] - points[left])
            ln = self.ln_threshold[left].lerp(
                self.ln_threshold[right], share.float()[:, None, None]
            )
        beyond = self.power * (ln_length - nearest)
        ln = ln - beyond.float()[:, None, None]
        return ln.clamp(LOWEST_LN_THRESHOLD, 0).exp()


@dataclass(frozen=True)
class Law:
    """threshold = min(1, a * exp(b * target) / length ** power), for all heads."""

    a: float
    b: float
    power: float = 1.0

    def ln_threshold(self, target: float, length: float) -> float:
        """Natural log of the threshold, at most 0."""
        return min(0.0, self._at_one(target) - self.power * math.log(length))

    def schedule(self, target: float) -> Schedule:
        """The thresholds for this target sparsity, tiles visited forward."""
        ln = _on_host([[[self._at_one(target)]]], torch.float32)
        return Schedule("forward", _on_host([1.0], torch.float64), ln, self.power)

    def _at_one(self, target: float) -> float:
        """Of the ln threshold, for a length of 1: may be above threshold 1."""
        return math.log(self.a) + self.b * target if self.a else LOWEST_LN_THRESHOLD


@dataclass(frozen=True)
class Policy:
    """Measured thresholds for a range of targets: one order, one way to share among heads."""

    order: str
    heads: str
    law: Law
    lengths: tuple[int, ...]
    """Ascending, in keys."""
    targets: tuple[float, ...]
    """Ascending, 0 to 1."""
    ln_threshold: Tensor = field(compare=False)
    """[lengths, targets, layers, heads] float32, or [lengths, targets, 1, 1]: one for all. NaN
    stands for the heads that a layer has fewer than others."""
    below: tuple[int, ...] = ()
    """By target: with fewer keys its order does not reach it, and `shorter` stands in."""
    shorter: "Policy | None" = None
    """Of another order, for the same targets."""

    def schedule(self, target: float) -> Schedule:
        """The thresholds for this target sparsity."""
        by_length = _interpolate(self.ln_threshold.movedim(1, 0), self.targets, target)
        lengths = _on_host(self.lengths, torch.float64)
        # Thresholds fall more slowly where lengths are long: the fitted power alone skips too
        # little there, the ecosystem's 1 too much.
        power = (1 + self.law.power) / 2
        found = Schedule(self.order, lengths, by_length, power)
        if self.shorter is None:
            return found
        # Between two targets: what the higher one needs.
        nearest = min(bisect_left(self.targets, target), len(self.targets) - 1)
        return found._replace(below=self.below[nearest], shorter=self.shorter.schedule(target))

    def at(self, target: float, length: int) -> Tensor:
        """[layers, heads] or [1, 1]: thresholds, 0 to 1, for this target sparsity and key count."""
        return self.schedule(target).of_call(length).at(_on_host([length], torch.float64))[0]


def _on_host(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, whatever torch's default type and device are."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _interpolate(table: Tensor, points: Sequence[float], x: float) -> Tensor:
    """Linear between the rows of `table`, which stand at `points`; constant outside."""
    x = min(max(x, points[0]), points[-1])
    right = next(i for i, point in enumerate(points) if point >= x)
    if points[right] == x:
        return table[right]
    share = (x - points[right - 1]) / (points[right] - points[right - 1])
    return table[right - 1] * (1 - share) + table[right] * share


@dataclass(frozen=True)
class Measured:
    """What a calibration of ours found for one phase."""

    tile_shape: tuple[int, int]
    """Query rows and keys of the tiles that it was measured on."""
    policies: tuple[Policy, ...]
    """By ascending target; each covers the targets from its first to its last. None: the law."""

    def policy(self, target: float) -> Policy:
        """The one that covers this target, else the nearest."""
        return min(
            self.policies, key=lambda p: max(p.targets[0] - target, target - p.targets[-1], 0.0)
        )


@dataclass(frozen=True)
class SparseAttention:
    """A parsed `sparse_attention_config`.

    `targets` and `ignore` hold class names of attention layers or names of modules, as
    `named_modules` gives them, in whole or in part ("layers.0.self_attn", "model.visual"), with the
    wildcards of fnmatch. A module's name covers all that is inside it.
    """

    targets: tuple[str, ...]
    """The attention layers that are sparse."""
    laws: Mapping[str, Law]
    """By phase: the ecosystem's law (power 1), for tiles visited forward."""
    target_sparsity: Mapping[str, float]
    """By phase; 0: dense."""
    ignore: tuple[str, ...] = ()
    """Those of them that stay dense."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """By phase."""
    producer: tuple[str, str] = ("blasst", "0.1.0")
    """Name and version of what wrote it."""
    _tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def with_targets(self, **target_sparsity: float) -> "SparseAttention":
        """The same thresholds for other targets, by phase."""
        for phase, target in target_sparsity.items():
            _check(phase in PHASES, f"phase is {phase!r}; it must be one of {PHASES}")
            _fraction(target, f"target_sparsity of {phase}")
        return replace(self, target_sparsity={**self.target_sparsity, **target_sparsity})

    def under_the_law(self) -> "SparseAttention":
        """The ecosystem's law, fitted on the same tiles, instead of the measured tables."""
        laws = {phase: replace(m, policies=()) for phase, m in self.measured.items()}
        return replace(self, measured={p: m for p, m in laws.items() if p in self.laws})

    def tile_shape(self, phase: str) -> tuple[int, int]:
        """Query rows and keys of the tiles that the thresholds of this phase belong to."""
        measured = self.measured.get(phase)
        return measured.tile_shape if measured else ECOSYSTEM_TILE_SHAPE

    def is_target(self, attention_class: str, name: str) -> bool:
        """Whether `targets` lists the attention layer of this class, at this place in the model."""
        return self.targets == GENERIC_TARGETS or is_listed(self.targets, attention_class, name)

    def is_dense(self, attention_class: str, name: str) -> bool:
        """Whether `ignore` lists the attention layer of this class, at this place in the model."""
        return is_listed(self.ignore, attention_class, name)

    def rule(
        self,
        attention_class: str,
        layer: int,
        phase: str,
        lengths: Sequence[int],
        keys: int,
        name: str | None = None,
    ) -> Rule:
        """The thresholds and the order of one layer: see `thresholds_for`."""
        if not self._is_sparse(attention_class, layer, phase, name):
            return DENSE
        # Every layer of a pass asks for the same lengths, so the whole model's table is kept. It is
        # read once: another thread may put its own in the place.
        target = self.target_sparsity[phase]
        key = (target, keys, *lengths)
        found = self._tables.get(phase)
        if found is None or found[0] != key:
            schedule = self._schedule(phase).of_call(keys)
            for length in lengths:
                self._tell_outside(phase, target, length)
            table = schedule.at(_on_host(lengths, torch.float64))
            self._tables[phase] = found = (key, schedule.order, table)
        _, order, table = found
        return Rule(_of_layer(table, layer), order)

    def schedule(
        self, attention_class: str, layer: int, phase: str, name: str | None = None
    ) -> Schedule | None:
        """One layer's thresholds at every length, [lengths, 1, heads]; None: dense."""
        if not self._is_sparse(attention_class, layer, phase, name):
            return None
        return self._schedule_of(self._schedule(phase), layer)

    def _schedule_of(self, whole: Schedule, layer: int) -> Schedule:
        return whole._replace(
            ln_threshold=_of_layer(whole.ln_threshold, layer)[:, None],
            shorter=whole.shorter and self._schedule_of(whole.shorter, layer),
        )

    def _is_sparse(self, attention_class: str, layer: int, phase: str, name: str | None) -> bool:
        name = f"model.layers.{layer}.self_attn" if name is None else name
        has_threshold = phase in self.measured or phase in self.laws
        if not self.target_sparsity.get(phase) or not has_threshold:
            return False
        if self.is_dense(attention_class, name):
            return False
        if not self.is_target(attention_class, name):
            raise ValueError(
                f"sparse_attention_config targets {', '.join(self.targets)}; layer {layer} is a "
                f"{attention_class}: list it under targets, or the layer under ignore"
            )
        return True

    def _schedule(self, phase: str) -> Schedule:
        """The whole model's."""
        target = self.target_sparsity[phase]
        if not self._has_table(phase):
            return self.laws[phase].schedule(target)
        return self.measured[phase].policy(target).schedule(target)

    def _has_table(self, phase: str) -> bool:
        return phase in self.measured and bool(self.measured[phase].policies)

    def tell_tiles(self, phase: str, running: Callable[[], tuple[int, int]]) -> None:
        """Say, once a phase, that the kernel that runs has other tiles than the thresholds."""
        if ("tiles", phase) in self._tables:
            return
        self._tables["tiles", phase] = True
        measured, runs = self.tile_shape(phase), tuple(running())
        if measured != runs:
            more = "more" if math.prod(runs) < math.prod(measured) else "less"
            _log.warning(
                "%s: thresholds are for tiles of %d x %d, the kernel's are %d x %d; expect %s "
                "sparsity than the target",
                *(phase, *measured, *runs, more),
            )

    def _tell_outside(self, phase: str, target: float, length: int) -> None:
        """Say, once a phase, how far a request or the target is outside what was measured."""
        if not self._has_table(phase):
            return
        policy = self.measured[phase].policy(target)
        low, high = self.measured[phase].policies[0], self.measured[phase].policies[-1]
        messages = []
        if length > NEAR * policy.lengths[-1]:
            times = length / policy.lengths[-1]
            messages.append(
                f"{length} keys are {times:.2f}x the longest calibrated length, "
                f"{policy.lengths[-1]}; thresholds are extrapolated"
            )
        if not low.targets[0] <= target <= high.targets[-1]:
            messages.append(
                f"target sparsity {target} is outside the calibrated {low.targets[0]} to "
                f"{high.targets[-1]}; the nearest is used"
            )
        for message in messages:
            told = (phase, message.split()[-1])
            if told not in self._tables:
                self._tables[told] = True
                _log.warning("%s: %s", phase, message)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        group: dict[str, Any] = {"algorithm": ALGORITHM, "targets": list(self.targets)}
        if self.ignore:
            group["ignore"] = list(self.ignore)
        group["threshold_scale_factor"] = {"formula": FORMULA} | {
            phase: {"a": law.a, "b": law.b} for phase, law in self.laws.items()
        }
        group["target_sparsity"] = dict(self.target_sparsity)
        name, version = self.producer
        entry: dict[str, Any] = {
            "config_groups": {"group_0": group},
            "producer": {"name": name, "version": version},
        }
        if self.measured:
            entry["blasst"] = {"version": VERSION} | {
                phase: {
                    "tile_shape": list(measured.tile_shape),
                    "policies": [_policy_to_dict(p) for p in measured.policies],
                }
                for phase, measured in self.measured.items()
            }
        return entry


def _of_layer(table: Tensor, layer: int) -> Tensor:
    """[n, heads of the layer] of a table [n, layers, heads], or of one for all, [n, 1, 1]."""
    layers = table.shape[1]
    if layers > 1 and layer >= layers:
        raise ValueError(
            f"sparse_attention_config holds thresholds for {layers} layers; the model asks for "
            f"layer {layer}"
        )
    own = table[:, layer if layers > 1 else 0]
    return own[:, ~own[0].isnan()]


def is_listed(names: Sequence[str], attention_class: str, name: str) -> bool:
    """Whether one of the names is this class, or this module or one around it."""
    return any(entry == attention_class or _pattern(entry).search(name) for entry in names)


@cache
def _pattern(entry: str) -> re.Pattern[str]:
    """Finds a module name with its wildcards, from a dot to a dot."""
    anchored = fnmatch.translate(entry)  # ends in \Z, or \z from Python 3.14 on
    return re.compile(rf"(?:^|\.){anchored[:-2]}(?:\.|$)")


def thresholds_for(
    entry: Mapping[str, Any],
    attention_class: str,
    layer: int,
    phase: str,
    lengths: Sequence[int],
    keys: int | None = None,
    name: str | None = None,
) -> Rule:
    """Thresholds and visit order of one attention call.

    Args:
        entry: the model's `sparse_attention_config`.
        attention_class: class name of the attention layer.
        layer: its index.
        phase: "prefill" or "decode".
        lengths: keys of each request.
        keys: how many the call has room for a request; default: those of the longest.
        name: of the module, which `targets` and `ignore` may list; default:
            "model.layers.LAYER.self_attn".

    Returns:
        `Rule.threshold` [requests, heads or 1] float32 on the CPU, None for dense; `Rule.order`.

    Raises:
        ValueError: the entry cannot be honoured; the message says why.
    """
    keys = max(lengths) if keys is None else keys
    return parsed(entry, layer).rule(attention_class, layer, phase, lengths, keys, name)


class _Read(NamedTuple):
    """An entry, what it held when it was read, and what was made of that."""

    entry: Mapping[str, Any]
    held: Mapping[str, Any]
    result: SparseAttention


_READ_AT_MOST = 8
_reading = threading.Lock()
_read: tuple[_Read, ...] = ()
"""Replaced, never changed, so that any thread may look through it."""


def parsed(entry: Mapping[str, Any], layer: int) -> SparseAttention:
    """`parse`, once for each entry and again after an edit that this layer can see."""
    global _read  # noqa: PLW0603
    for known in _read:
        if known.entry is entry and _is_unchanged(known.held, entry, layer):
            return known.result
    found = _Read(entry, deepcopy(dict(entry)) if isinstance(entry, Mapping) else {}, parse(entry))
    with _reading:
        others = [known for known in _read if known.entry is not entry]
        _read = (*others[1 - _READ_AT_MOST :], found)
    return found.result


def _is_unchanged(held: Any, entry: Any, layer: int) -> bool:
    """Whether nothing but other layers' thresholds differs: one layer's are quick to compare."""
    if not isinstance(held, Mapping):
        if isinstance(held, list) and isinstance(entry, list) and len(held) == len(entry):
            return all(_is_unchanged(*pair, layer) for pair in zip(held, entry, strict=True))
        return held == entry
    if not isinstance(entry, Mapping) or held.keys() != entry.keys():
        return False
    return all(
        _is_row_unchanged(held[key], entry[key], layer)
        if key == "ln_threshold"
        else _is_unchanged(held[key], entry[key], layer)
        for key in held
    )


def _is_row_unchanged(held: list, table: list, layer: int) -> bool:
    """The same for a table: [lengths][targets][layers][heads]."""
    if len(held) != len(table) or any(len(a) != len(b) for a, b in zip(held, table, strict=True)):
        return False
    return all(
        len(layers) == len(now)
        and layers[min(layer, len(layers) - 1)] == now[min(layer, len(now) - 1)]
        for by_target, by_target_now in zip(held, table, strict=True)
        for layers, now in zip(by_target, by_target_now, strict=True)
    )


def parse(entry: Any) -> SparseAttention:
    """Read a `sparse_attention_config`.

    Raises:
        ValueError: an unknown key or formula, a value out of range, or an algorithm that blasst
            does not do; the message names it and says what is accepted.
    """
    where = "sparse_attention_config"
    entry = _mapping(entry, where, {"config_groups", "producer", "blasst"}, {"config_groups"})
    groups = _mapping(entry["config_groups"], f"{where}.config_groups")
    _check(len(groups) == 1, f"{where}.config_groups holds {len(groups)} groups; blasst reads one")
    [(name, group)] = groups.items()
    where = f"{where}.config_groups.{name}"
    algorithm = _mapping(group, where, required={"algorithm"})["algorithm"]
    _check(
        algorithm == ALGORITHM,
        f"{where}.algorithm is {algorithm!r}; blasst does {ALGORITHM!r} only",
    )
    known = {"algorithm", "targets", "ignore", "threshold_scale_factor", "target_sparsity"}
    group = _mapping(group, where, known, {"targets", "threshold_scale_factor"})
    ignore = _strings(group.get("ignore", []), f"{where}.ignore")
    name, version = _producer(entry.get("producer", {}))
    laws = _laws(group["threshold_scale_factor"], f"{where}.threshold_scale_factor")
    measured = _measured(entry.get("blasst"))
    for phase, found in measured.items():
        _check(
            bool(found.policies) or phase in laws,
            f"sparse_attention_config.blasst.{phase}.policies is empty and {where}."
            f"threshold_scale_factor has no {phase}: there is nothing to go by",
        )
    return SparseAttention(
        targets=_strings(group["targets"], f"{where}.targets"),
        laws=laws,
        target_sparsity=_targets(
            group.get("target_sparsity"), f"{where}.target_sparsity", {*laws, *measured}
        ),
        ignore=ignore,
        measured=measured,
        producer=(name, version),
    )


def _laws(value: Any, where: str) -> dict[str, Law]:
    factor = _mapping(value, where, {"formula", *PHASES}, {"formula"})
    _check(
        factor["formula"] == FORMULA,
        f"{where}.formula is {factor['formula']!r}; blasst knows {FORMULA!r} only",
    )
    return {
        phase: _law(factor[phase], f"{where}.{phase}", {"a", "b"})
        for phase in PHASES
        if phase in factor
    }


def _law(value: Any, where: str, keys: set[str]) -> Law:
    numbers = _mapping(value, where, keys, keys - {"formula"})
    law = Law(**{key: _number(numbers[key], f"{where}.{key}") for key in keys - {"formula"}})
    _check(law.a >= 0, f"{where}.a is {law.a}; it must not be negative")
    return law


def _targets(value: Any, where: str, phases: set[str]) -> dict[str, float]:
    if value is None:
        value = {}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = dict.fromkeys(PHASES, value)
    given = _mapping(value, where, set(PHASES))
    return {
        phase: _fraction(given.get(phase, ECOSYSTEM_TARGET), f"{where}.{phase}")
        for phase in PHASES
        if phase in phases
    }


def _producer(value: Any) -> tuple[str, str]:
    producer = _mapping(value, "sparse_attention_config.producer")
    return str(producer.get("name", "unknown")), str(producer.get("version", "unknown"))


def _measured(value: Any) -> dict[str, Measured]:
    if value is None:
        return {}
    where = "sparse_attention_config.blasst"
    entry = _mapping(value, where, {"version", *PHASES}, {"version"})
    _check(
        entry["version"] == VERSION,
        f"{where}.version is {entry['version']!r}; this blasst reads {VERSION}",
    )
    return {
        phase: _measured_phase(entry[phase], f"{where}.{phase}")
        for phase in PHASES
        if phase in entry
    }


def _measured_phase(value: Any, where: str) -> Measured:
    keys = {"tile_shape", "policies"}
    phase = _mapping(value, where, keys, keys)
    shape = _numbers(phase["tile_shape"], f"{where}.tile_shape")
    _check(
        len(shape) == 2 and all(n > 0 and n == int(n) for n in shape),
        f"{where}.tile_shape is {phase['tile_shape']!r}; it must be [query rows, keys]",
    )
    policies = phase["policies"]
    _check(isinstance(policies, list), f"{where}.policies must be a list")
    return Measured(
        (int(shape[0]), int(shape[1])),
        tuple(_policy(policy, f"{where}.policies[{i}]") for i, policy in enumerate(policies)),
    )


def _policy(value: Any, where: str, optional: Iterable[str] = ("shorter",)) -> Policy:
    keys = {"order", "heads", "law", "lengths", "target_sparsity", "ln_threshold"}
    policy = _mapping(value, where, keys | set(optional), keys)
    for key, choices in (("order", ORDERS), ("heads", HEAD_SCHEMES)):
        _check(
            policy[key] in choices,
            f"{where}.{key} is {policy[key]!r}; it must be one of {', '.join(choices)}",
        )
    law_keys = {"formula", "a", "b", "power"}
    formula = _mapping(policy["law"], f"{where}.law", law_keys, law_keys)["formula"]
    _check(
        formula == LENGTH_FORMULA,
        f"{where}.law.formula is {formula!r}; blasst knows {LENGTH_FORMULA!r} only",
    )
    lengths = _ascending(policy["lengths"], f"{where}.lengths")
    _check(lengths[0] >= 1, f"{where}.lengths start at {lengths[0]}; they must be positive")
    targets = _ascending(policy["target_sparsity"], f"{where}.target_sparsity")
    for target in targets:
        _fraction(target, f"{where}.target_sparsity")
    table = _table(policy["ln_threshold"], f"{where}.ln_threshold")
    _check(
        table.shape[:2] == (len(lengths), len(targets)),
        f"{where}.ln_threshold has shape {list(table.shape)}; it must be [{len(lengths)} lengths, "
        f"{len(targets)} targets, layers, heads]",
    )
    law = _law(policy["law"], f"{where}.law", law_keys)
    found = Policy(
        policy["order"], policy["heads"], law, tuple(int(n) for n in lengths), targets, table
    )
    if "shorter" not in policy:
        return found
    return _with_shorter(found, policy["shorter"], f"{where}.shorter")


def _table(value: Any, where: str) -> Tensor:
    """[lengths, targets, layers, heads]; NaN in layers that have fewer heads than others."""
    try:
        heads = max(len(row) for by_target in value for layers in by_target for row in layers)
        padded = [
            [[[*row, *[math.nan] * (heads - len(row))] for row in layers] for layers in by_target]
            for by_target in value
        ]
        table = _on_host(padded, torch.float32)
        own = [len(row) for by_target in value for layers in by_target for row in layers]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no table of numbers: {error}") from None
    _check(table.dim() == 4, f"{where} has {table.dim()} dimensions; it must have 4")
    missing = table.isnan()
    own_heads = torch.tensor(own, device="cpu").reshape(table.shape[:3])
    _check(
        bool(((table <= HIGHEST_LN_THRESHOLD) | missing).all())
        and torch.equal((~missing).sum(-1), own_heads),
        f"{where} has a value above {HIGHEST_LN_THRESHOLD:g} or NaN",
    )
    _check(
        bool((own_heads == own_heads[0, 0]).all()) and bool(own_heads.all()),
        f"{where}: each layer must have the same number of heads, at least one, everywhere",
    )
    return table


def _with_shorter(policy: Policy, value: Any, where: str) -> Policy:
    keys = {"below", "policy"}
    shorter = _mapping(value, where, keys, keys)
    below = _numbers(shorter["below"], f"{where}.below")
    _check(
        len(below) == len(policy.targets) and all(n >= 0 and n == int(n) for n in below),
        f"{where}.below is {shorter['below']!r}; it must be {len(policy.targets)} numbers of keys, "
        "one a target (0: nowhere)",
    )
    other = _policy(shorter["policy"], f"{where}.policy", optional=())
    _check(
        other.targets == policy.targets,
        f"{where}.policy.target_sparsity is {list(other.targets)}; it must be that of the policy "
        f"it stands in for, {list(policy.targets)}",
    )
    return replace(policy, below=tuple(int(n) for n in below), shorter=other)


def _policy_to_dict(policy: Policy) -> dict[str, Any]:
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
        shorter = _policy_to_dict(policy.shorter)
        entry["shorter"] = {"below": list(policy.below), "policy": shorter}
    return entry


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value if not isinstance(v, float) or not math.isnan(v)]
    return round(value, 3)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _mapping(
    value: Any, where: str, known: set[str] | None = None, required: Iterable[str] = ()
) -> Mapping[str, Any]:
    _check(isinstance(value, Mapping), f"{where} is a {type(value).__name__}; it must be an object")
    if known is not None and (unknown := set(value) - known):
        raise ValueError(
            f"{where} has unknown key {', '.join(map(repr, sorted(unknown)))}; known keys: "
            f"{', '.join(sorted(known))}"
        )
    if missing := set(required) - set(value):
        raise ValueError(f"{where} lacks {', '.join(map(repr, sorted(missing)))}")
    return value


def _number(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _check(number and math.isfinite(value), f"{where} is {value!r}; it must be a finite number")
    return float(value)


def _fraction(value: Any, where: str) -> float:
    _check(0 <= _number(value, where) <= 1, f"{where} is {value}; it must be 0 to 1")
    return float(value)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    _check(isinstance(value, list) and bool(value), f"{where} must be a list of numbers, not empty")
    return tuple(_number(v, where) for v in value)


def _ascending(value: Any, where: str) -> tuple[float, ...]:
    numbers = _numbers(value, where)
    _check(list(numbers) == sorted(set(numbers)), f"{where} is {value!r}; it must ascend")
    return numbers


def _strings(value: Any, where: str) -> tuple[str, ...]:
    _check(
        isinstance(value, list) and all(isinstance(v, str) for v in value),
        f"{where} must be a list of names",
    )
    return tuple(value)
