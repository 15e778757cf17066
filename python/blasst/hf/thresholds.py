"""Thresholds of a layer: what `configure` set, else what the model's configuration says."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blasst.config import ORDERS, SCORES, Read, Rules, Schedule, SparseAttention, is_listed, parsed
from blasst.hf.layers import Place, attributes_of, entry_of, place_of, place_of_entry
from blasst.hf.saving import CONFIG_KEY, beside
from blasst.hf.tracing import is_deferred, module_of
from blasst.ops.arguments import check_choice
from blasst.ops.library import tile_of

POLICY_KEY = "blasst_policy"
_log = logging.getLogger("blasst")


@dataclass(frozen=True)
class Threshold:
    """When a layer drops a key tile, in which order, by what scores: see `blasst.attention`.

    At most one of the three thresholds; each a number, one per head, or a tensor. None: dense. Of
    a tensor-parallel model: one per head of the whole model.

    Raises:
        TypeError: a threshold that is no number, or an order or scores that are no text.
        ValueError: a number out of range, several thresholds, or an order or scores that there are
            not.
    """

    threshold: float | tuple[float, ...] | Tensor | None = None
    threshold_scale_factor: float | tuple[float, ...] | Tensor | None = None
    absolute_threshold: float | tuple[float, ...] | Tensor | None = None
    order: str = "sink_first"
    scores: str = "exact"

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _RANGES}
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both given, more than one threshold; they exclude each "
                "other"
            )
        for name, value in given.items():
            _check_threshold(name, value)
        check_choice("order", self.order, ORDERS)
        check_choice("scores", self.scores, SCORES)

    def options(self) -> dict[str, Any]:
        """As `blasst.attention` takes them."""
        return {name: getattr(self, name) for name in (*_RANGES, *NAMES)}


NAMES = ("order", "scores")
"""Of a call's options, those that are no numbers by head."""
_RANGES = {
    "threshold": (0.0, 1.0, "a number from 0 to 1"),
    "threshold_scale_factor": (0.0, math.inf, "a number of 0 or more"),
    "absolute_threshold": (-math.inf, math.inf, "a number"),
}


def _check_threshold(name: str, value: Any) -> None:
    """An error unless these are numbers in range; tensors on other devices are not read."""
    low, high, what = _RANGES[name]
    try:
        numbers = torch.as_tensor(value, device=None if isinstance(value, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.dtype == torch.bool or numbers.is_complex():
        raise TypeError(f"{name} is {value!r}; it must be {what}, a list of them, or a tensor")
    if numbers.device.type != "cpu":
        return
    inside = (numbers >= low) & (numbers <= high)
    if not inside.all():
        wrong = numbers[~inside].flatten()[0].item()
        raise ValueError(f"{name} is {wrong:g}; it must be {what}")


DENSE = Threshold()


class Pass(NamedTuple):
    """A layer's attention call, and what it shares with the other layers of its pass."""

    phase: str
    """"prefill" or "decode"."""
    query: Tensor
    """For its device, type and head_dim."""
    value_dim: int
    heads: int
    """Of the layer, those of other processes too."""
    room: int
    """Keys that a request may have."""
    lengths: Callable[[], Tensor | int]
    """[requests] keys in use, on the device; a number: of every request."""
    known: Callable[[], list[int]]
    """Those of them that the host knows."""
    noted: dict[Any, Any]
    """Kept from layer to layer."""
    tile_of: Callable[..., tuple[int, int]] = tile_of
    """Of a phase, device, type and sizes: query rows and keys of the tiles that decide."""


def options_of(module: nn.Module, call: Pass) -> dict[str, Any]:
    """Threshold, order and scores of a call, as `blasst.attention` takes them.

    The thresholds of a calibration are worked out for all layers when the first one asks, on the
    device and without waiting for it.
    """
    own = vars(module)
    configured = own.get("blasst_thresholds")
    if configured and call.phase in configured:
        return _configured(configured[call.phase], call)
    last = own.get("blasst_last")
    if last is not None and last.answers(own, call):
        return last.options
    found = _calibration_of(module, call.noted)
    if found is None:
        _tell_uncalibrated(module)
        return {}
    read, place = found
    kind = type(module).__name__
    scores = read.scores(kind, call.phase, place.name or "")
    if not read.is_sparse(kind, place.layer, call.phase, place.name):
        return {"scores": scores}
    key = id(read), call.phase, call.room, call.query.device, call.query.shape[-1], call.value_dim
    of, rules = call.noted.get(key, (None, None))
    if of is not read:
        rules = _rules_of_pass(read, module, call)
        call.noted[key] = read, rules
    threshold = rules.of_layer(place.layer)
    if threshold.shape[1] not in (1, call.heads):
        raise ValueError(
            f"sparse_attention_config holds thresholds for {threshold.shape[1]} heads of layer "
            f"{place.layer}; the model has {call.heads}: it is another model's"
        )
    options = {"threshold": threshold, "order": rules.order, "scores": scores}
    where, entry = place_of_entry(module, CONFIG_KEY)
    held, seen = call.noted.get(call.phase), call.noted.get(id(entry))
    is_kept = held is not None and held.rules is rules and seen is not None
    if is_kept and (last is None or not last.answers(own, call)):
        state = call.room, call.query.device, own.get("config"), own.get("blasst_targets")
        nearer = attributes_of(module.config)
        module.blasst_last = _Last(nearer, where, seen, *state, held, options)
    return options


class _Held(NamedTuple):
    """The thresholds of a pass, and what they depend on beside the calibration."""

    phase: str
    rules: Rules
    about: tuple


class _Last(NamedTuple):
    """What a layer was answered last, and from what.

    Between two kernels everything that Python touches is cold: to look a calibration up anew takes
    30 us a layer, this takes 10.
    """

    nearer: dict[str, Any]
    """Attributes of the layer's configuration, whose entry goes before that of the model's."""
    where: dict[str, Any]
    """Attributes of the configuration that holds the entry."""
    read: Read
    room: int
    device: torch.device
    config: Any
    """Of the layer; it has the entry, or the model's around it."""
    targets: Any
    held: _Held
    options: dict[str, Any]

    def __reduce__(self) -> tuple[type, tuple]:
        """Copies and pickles of a model forget it: it is tensors on a device, and no state."""
        return type(None), ()

    def answers(self, own: dict[str, Any], call: Pass) -> bool:
        """Whether it holds for this call, too.

        An earlier layer of the pass has the same rules: it has seen that the entry is as it was.
        """
        return (
            self.room == call.room
            and own.get("config") is self.config
            and own.get("blasst_targets") is self.targets
            and self.where.get(CONFIG_KEY) is self.read.entry
            and (self.nearer is self.where or self.nearer.get(CONFIG_KEY) is None)
            and self.device == call.query.device
            and (call.noted.get(call.phase) is self.held or self._begins(call))
        )

    def _begins(self, call: Pass) -> bool:
        """Whether no layer of the pass has asked, and what was held for the last holds for it."""
        if call.phase != self.held.phase or call.phase in call.noted or is_deferred(self.device):
            return False
        if _about(call, call.lengths(), _tile_of(call)) != self.held.about:
            return False
        entry = self.read.entry
        seen = call.noted.get(id(entry))
        if seen is None and self.read.watch.is_unchanged(layer=0):
            seen = call.noted[id(entry)] = self.read
        if seen is not self.read:
            return False
        call.noted[call.phase] = self.held
        return True


def _configured(threshold: Threshold, call: Pass) -> dict[str, Any]:
    """The options of what `configure` set, made once a pass."""
    key = id(threshold), call.query.device
    of, options = call.noted.get(key, (None, None))
    if of is not threshold:
        options = threshold.options()
        if isinstance(options["threshold"], int | float):
            options["threshold"] = _tensor_of(options["threshold"], call.query.device)
        call.noted[key] = threshold, options
    return options


def _tensor_of(threshold: float, device: torch.device) -> Tensor:
    """For all layers: on a GPU each would be a launch."""

    def make() -> Tensor:
        return torch.full((1, 1, 1), threshold, dtype=torch.float32, device=device)

    return make() if is_deferred(device) else _kept(threshold, _stream_of(device), make)


def _rules_of_pass(read: SparseAttention, module: nn.Module, call: Pass) -> Rules:
    """The thresholds of all layers."""
    device, lengths, tile = call.query.device, call.lengths(), _tile_of(call)

    def make() -> Rules:
        read.tell(call.phase, tile, call.known)
        return read.rules(call.phase, lengths, call.room, tile, device)

    # In training and evaluation most passes are as long as one before.
    about = _about(call, lengths, tile)
    rules = make() if about is None else _kept(read, about, make)
    layers = getattr(module.config, "num_hidden_layers", None)
    if layers is not None and len(rules.rows) > 1 and layers < len(rules.rows):
        raise ValueError(  # of kept ones, too: two models may share an entry
            f"sparse_attention_config holds thresholds for {len(rules.rows)} layers; the model "
            f"has {layers}: it is another model's"
        )
    call.noted[call.phase] = None if about is None else _Held(call.phase, rules, about)
    return rules


def _tile_of(call: Pass) -> tuple[int, int]:
    sizes = call.query.shape[-1], call.value_dim
    return call.tile_of(call.phase, call.query.device, call.query.dtype, *sizes)


def _about(call: Pass, lengths: Tensor | int, tile: tuple[int, int]) -> tuple | None:
    """What a pass's thresholds depend on beside the calibration; None: not known on the host."""
    device = call.query.device
    if is_deferred(device) or not isinstance(lengths, int):
        return None
    return call.phase, lengths, call.room, tile, *_stream_of(device)


def _stream_of(device: torch.device) -> tuple:
    """Where a tensor is made that others may use."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return device, stream, torch.is_inference_mode_enabled()


KEPT = 64
"""Of what passes work out on a device, the last that are kept for others."""
_kept_values: dict[Any, tuple[Any, Any]] = {}
_keeping = Lock()


def _kept(of: Any, about: tuple, make: Callable[[], Any]) -> Any:
    """What was made of an object before, with all else the same; else it is made."""
    key = id(of), about
    known, value = _kept_values.get(key, (None, None))
    if known is not of:
        value = make()
        with _keeping:
            _kept_values[key] = of, value
            while len(_kept_values) > KEPT:
                del _kept_values[next(iter(_kept_values))]
    return value


def options_when_compiled(
    module: nn.Module,
    phase: str,
    query: Tensor,
    value_dim: int,
    keys: int,
    lengths: Callable[[], Tensor],
) -> dict[str, Any]:
    """The same of a pass that is being compiled, for which lengths is a tensor."""
    configured = vars(module).get("blasst_thresholds")
    if configured and phase in configured:
        return configured[phase].options()
    scores = _scores_of(id(module), phase)
    if getattr(module, "blasst_targets", {}).get(phase) == 0:  # looks, so another compiles anew
        return {"scores": scores}
    sizes = int(query.shape[-1]), int(value_dim)
    schedule = _schedule_of(id(module), phase, query.dtype, *sizes)
    if schedule is None:
        return {"scores": scores}
    schedule = schedule.of_call(keys)
    threshold = schedule.at(lengths())[:, 0]
    return {"threshold": threshold, "order": schedule.order, "scores": scores}


@torch.compiler.assume_constant_result
def _schedule_of(
    identity: int, phase: str, dtype: torch.dtype, head_dim: int, value_dim: int
) -> Schedule | None:
    """What a compiled pass computes thresholds from; it keeps what held when it was compiled."""
    module = module_of(identity)
    found = _calibration_of(module, {})
    if found is None:
        return None
    read, place = found
    weight = next(module.parameters())
    tile = tile_of(phase, weight.device, dtype, head_dim, value_dim)
    schedule = read.schedule(type(module).__name__, place.layer, phase, place.name, tile)
    return schedule and schedule.to(weight.device)


@torch.compiler.assume_constant_result
def _scores_of(identity: int, phase: str) -> str:
    """How a compiled pass computes scores."""
    module = module_of(identity)
    found = _calibration_of(module, {})
    if found is None:
        return "exact"
    read, place = found
    return read.scores(type(module).__name__, phase, place.name or "")


def _calibration_of(
    module: nn.Module, noted: dict[Any, Any]
) -> tuple[SparseAttention, Place] | None:
    """What the configuration says, for the targets of `set_target`, and where the layer is.

    None: nothing.

    Nothing for a layer that `targets` leaves out in favour of others, either.
    """
    place, kind = place_of(module), type(module).__name__
    read = calibration_read(module, noted)
    if read is None:
        return None
    is_left_out = place.name is not None and not read.is_target(kind, place.name)
    if is_left_out and _any_target(read.targets, place.siblings):
        return None
    return read.at_targets(vars(module).get("blasst_targets")), place


def calibration_read(
    module: nn.Module, noted: dict[Any, Any] | None = None
) -> SparseAttention | None:
    """The calibration in the configuration of a layer, or of the model around it.

    Args:
        module: the layer.
        noted: of the pass, in which an entry is looked at once, if any layer sees its edits.
    """
    entry = entry_of(module, CONFIG_KEY)
    if entry is None:
        return None
    found = None if noted is None else noted.get(id(entry))
    if found is None:
        place = place_of(module)
        config = module.config if place.outer is None else place.outer
        found = parsed(entry, place.layer, partial(beside, config))
        if noted is not None and found.is_same_for_all:
            noted[id(entry)] = found
    return found.result


_told: set[str] = set()
_on_purpose = ContextVar("dense_on_purpose", default=False)


@contextmanager
def dense_on_purpose() -> Iterator[None]:
    """Models without thresholds run inside, and are meant to: nothing is said."""
    before = _on_purpose.set(True)
    try:
        yield
    finally:
        _on_purpose.reset(before)


def _tell_uncalibrated(module: nn.Module) -> None:
    """Say, once a model, that blasst has nothing to go by, unless that is meant."""
    if _on_purpose.get():
        return
    place, config = place_of(module), module.config
    whole = place.outer or config
    name = whole.name_or_path or type(whole).__name__
    if name in _told or getattr(module, "blasst_policy", None) or entry_of(module, POLICY_KEY):
        return
    _told.add(name)
    _log.warning(
        "%s has neither a sparse_attention_config nor thresholds set: blasst computes every tile "
        "(blasst.calibrate finds thresholds, blasst.configure sets them)",
        name,
    )


@cache
def _any_target(targets: tuple[str, ...], modules: tuple[tuple[str, str], ...]) -> bool:
    """Whether a module, class and name, is one of the targets."""
    return any(is_listed(targets, kind, name) for kind, name in modules)
