"""What a `sparse_attention_config` says: which layers are sparse, and at which thresholds."""

import fnmatch
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blasst.config.laws import Law, Measured, Schedule, heads_of, on_host, row_of
from blasst.config.messages import longer, other_target, other_tiles
from blasst.config.writing import ecosystem_entry, own_entry

PHASES = ("prefill", "decode")
ECOSYSTEM_TILE_SHAPE = (128, 128)
GENERIC_TARGETS = ("Attention",)
"""What Model-Optimizer writes where it does not know the class: any."""
_log = logging.getLogger("blasst")


class Rule(NamedTuple):
    """What one attention call needs to know."""

    threshold: Tensor | None
    """[requests, heads] or [requests, 1] float32, 0 to 1; None: dense."""
    order: str
    scores: str


class Rules(NamedTuple):
    """What the attention calls of all layers in one pass need to know."""

    rows: tuple[Tensor, ...]
    """[requests, heads, 1] float32, 0 to 1, of each layer; one of [requests, 1, 1] for all. One row
    for requests that are all as long. As the operator takes them: each layer's call costs a step
    less."""
    heads: list[int] | None
    """Of each layer; None: as many as the rows have."""
    order: str

    def of_layer(self, layer: int) -> Tensor:
        """[requests, heads, 1] or [requests, 1, 1]."""
        row = self.rows[row_of(layer, len(self.rows))]
        return row if self.heads is None else row[:, : self.heads[layer]]


@dataclass(frozen=True)
class SparseAttention:
    """A parsed `sparse_attention_config`.

    `targets` and `ignore` hold class names of attention layers or names of modules, as
    `named_modules` gives them, in whole or in part ("layers.0.self_attn", "model.visual"), with the
    wildcards of fnmatch, or "re:" and a regular expression for its beginning. A module's name
    covers all that is inside it.
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
    _told: set[Any] = field(default_factory=set, repr=False, compare=False)
    """What `tell` has said, at whatever target."""
    _tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def with_targets(self, **target_sparsity: float) -> "SparseAttention":
        """The same thresholds for other targets, by phase."""
        for phase, target in target_sparsity.items():
            check_target(phase, target)
        return replace(self, target_sparsity={**self.target_sparsity, **target_sparsity})

    def with_scores(self, **scores: str) -> "SparseAttention":
        """The same thresholds with scores computed so, "exact" or "int8", by phase.

        Raises:
            ValueError: a phase that is not calibrated.
        """
        changed = {}
        for phase, how in scores.items():
            if phase not in self.target_sparsity:
                raise ValueError(f"the model's sparse_attention_config has no {phase}")
            known = self.measured.get(phase, Measured(ECOSYSTEM_TILE_SHAPE, ()))
            if how != known.scores:
                changed[phase] = replace(known, scores=how)
        return replace(self, measured={**self.measured, **changed})

    def beside(self, older: "SparseAttention | None") -> "SparseAttention":
        """With what an older calibration measured on other tiles, for runs on those.

        Its thresholds must be for as many layers and heads; those for other scores are left out.
        """
        if older is None:
            return self
        old = older.measured
        measured = {p: m.beside(old[p]) if p in old else m for p, m in self.measured.items()}
        return replace(self, measured=measured)

    def at_targets(self, targets: Mapping[str, float] | None) -> "SparseAttention":
        """`with_targets`, kept: the same targets give the same object, with what it has worked out.

        Phases that are not calibrated have no target.
        """
        if not targets:
            return self
        key = ("targets", *sorted(targets.items()))
        if key not in self._tables:
            known = {p: t for p, t in targets.items() if p in self.target_sparsity}
            self._tables[key] = self.with_targets(**known)
        return self._tables[key]

    def under_the_law(self) -> "SparseAttention":
        """The ecosystem's law, fitted on the same tiles, instead of the measured tables."""
        known = {p: m.under_the_law(self.laws.get(p)) for p, m in self.measured.items()}
        return replace(self, measured={p: m for p, m in known.items() if m is not None})

    def on(self, phase: str, tile: tuple[int, int] | None = None) -> Measured:
        """What the thresholds of this phase come from where a kernel has such tiles.

        Args:
            phase: a calibrated one.
            tile: query rows and keys; None: those of the last calibration.
        """
        found = self.measured.get(phase, Measured(ECOSYSTEM_TILE_SHAPE, ()))
        return found.on(tile, keys_only=phase == "decode")

    def is_target(self, attention_class: str, name: str) -> bool:
        """Whether `targets` lists the attention layer of this class, at this place in the model."""
        return self.targets == GENERIC_TARGETS or is_listed(self.targets, attention_class, name)

    def is_dense(self, attention_class: str, name: str) -> bool:
        """Whether `ignore` lists the attention layer of this class, at this place in the model."""
        return is_listed(self.ignore, attention_class, name)

    def scores(self, attention_class: str, phase: str, name: str) -> str:
        """How the layer of this class, at this place in the model, computes scores."""
        measured = self.measured.get(phase)
        if measured is None or self.is_dense(attention_class, name):
            return "exact"
        return measured.scores

    def rule(
        self,
        attention_class: str,
        layer: int,
        phase: str,
        lengths: Sequence[int],
        keys: int,
        name: str | None = None,
    ) -> Rule:
        """The thresholds, order and scores of one layer: see `thresholds_for`."""
        name = _default_name(layer) if name is None else name
        scores = self.scores(attention_class, phase, name)
        if not self.is_sparse(attention_class, layer, phase, name):
            return Rule(None, "sink_first", scores)
        rules = self.rules(phase, on_host(lengths, torch.float64), keys)
        return Rule(rules.of_layer(layer).squeeze(-1), rules.order, scores)

    def rules(
        self,
        phase: str,
        lengths: Tensor | int,
        keys: int,
        tile: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> Rules:
        """The thresholds of all layers in one pass, on a device of which nothing is read.

        Args:
            phase: one that has a target and thresholds.
            lengths: [requests] keys in use; a number: of every request.
            keys: how many the call has room for a request.
            tile: query rows and keys on which the kernel decides.
            device: None: that of `lengths`.
        """
        device = lengths.device if device is None else device
        key = "schedule", device, phase, tile
        if key not in self._tables:
            found = self._schedule(phase, tile)
            self._tables[key] = found.to(device), heads_of(found.ln_threshold)
        whole, heads = self._tables[key]
        schedule = whole.of_call(keys)
        return Rules(schedule.at(lengths)[..., None].unbind(1), heads, schedule.order)

    def schedule(
        self,
        attention_class: str,
        layer: int,
        phase: str,
        name: str | None = None,
        tile: tuple[int, int] | None = None,
    ) -> Schedule | None:
        """One layer's thresholds at every length, [lengths, 1, heads]; None: dense."""
        if not self.is_sparse(attention_class, layer, phase, name):
            return None
        return self._schedule(phase, tile).of_layer(layer)

    def is_sparse(
        self, attention_class: str, layer: int, phase: str, name: str | None = None
    ) -> bool:
        """Whether a layer has thresholds in this phase.

        Raises:
            ValueError: `targets` lists neither its class nor its name.
        """
        name = _default_name(layer) if name is None else name
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

    def _schedule(self, phase: str, tile: tuple[int, int] | None) -> Schedule:
        """The whole model's."""
        target, found = self.target_sparsity[phase], self.on(phase, tile)
        if found.tables:
            return found.table(target).schedule(target)
        return (found.law or self.laws[phase]).schedule(target)

    def tell(self, phase: str, tile: tuple[int, int], lengths: Callable[[], Sequence[int]]) -> None:
        """Say, each once a phase (of targets each), how a call differs from what was measured.

        Args:
            phase: of the call.
            tile: query rows and keys on which the kernel decides.
            lengths: of requests, as far as they are known.
        """
        found = self.on(phase, tile)
        messages: dict[Any, str] = {"tiles": other_tiles(phase, found.tile_shape, tile)}
        if found.tables:
            target, longest = self.target_sparsity[phase], max(lengths(), default=0)
            messages["length"] = longer(found.table(target).lengths[-1], longest)
            messages[target] = other_target(found.tables, target)
        for what, message in messages.items():
            if message and (what, phase) not in self._told:
                self._told.add((what, phase))
                _log.warning("%s: %s", phase, message)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        name, version = self.producer
        groups = ecosystem_entry(self.targets, self.ignore, self.laws, self.target_sparsity)
        entry = {"config_groups": groups, "producer": {"name": name, "version": version}}
        return entry | {"blasst": own_entry(self.measured)} if self.measured else entry


def _default_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


@lru_cache(4096)
def is_listed(names: tuple[str, ...], attention_class: str, name: str) -> bool:
    """Whether one of the names is this class, or this module or one around it."""
    return any(entry == attention_class or _pattern(entry).search(name) for entry in names)


@cache
def _pattern(entry: str) -> re.Pattern[str]:
    """Finds a module name with its wildcards, from a dot to a dot; "re:" from its beginning."""
    if entry.startswith("re:"):
        try:
            return re.compile(rf"\A(?:{entry[3:]})")
        except re.error as error:
            raise ValueError(
                f"{entry!r} among targets or ignore is no regular expression: {error}"
            ) from None
    anchored = fnmatch.translate(entry)  # ends in \Z, or \z from Python 3.14 on
    return re.compile(rf"(?:^|\.){anchored[:-2]}(?:\.|$)")


def check_phase(phase: str) -> None:
    """A ValueError unless this is a phase."""
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")


def check_target(phase: str, target: float) -> None:
    """An error unless a phase may have this target sparsity.

    Raises:
        TypeError: no number.
        ValueError: another phase, or a number out of range.
    """
    check_phase(phase)
    if not isinstance(target, int | float) or isinstance(target, bool):
        raise TypeError(f"target sparsity of {phase} is {target!r}; it must be a number, 0 to 1")
    if not 0 <= target <= 1:
        raise ValueError(f"target sparsity of {phase} is {target}; it must be 0 to 1")
