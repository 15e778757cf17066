"""Thresholds of a step: what the engine was started with, else what the model was calibrated to."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blasst.config import Schedule, SparseAttention, parse
from blasst.errors import NotSupportedError
from blasst.hf import Threshold
from blasst.hf.saving import CONFIG_KEY, beside
from blasst.integrations.vllm.options import REQUESTS, Options
from blasst.ops.library import plan, tile_of

_log = logging.getLogger("blasst")


class Layer(NamedTuple):
    """An attention layer of the model, as this process has it."""

    name: str
    """As vLLM has it: "model.layers.3.self_attn.attn"."""
    heads: int
    """Query heads in this process."""
    head_dim: int

    @property
    def index(self) -> int:
        """Its place in the model."""
        numbers = [part for part in self.name.split(".") if part.isdigit()]
        if not numbers:
            raise ValueError(f"{self.name} has no number: which layer of the model it is, is open")
        return int(numbers[-1])

    @property
    def module(self) -> str:
        """The module's name in Transformers, which `targets` and `ignore` list."""
        return self.name.removesuffix(".attn")


@dataclass(frozen=True)
class Share:
    """Which of a layer's heads this process has."""

    rank: int = 0
    size: int = 1

    def of(self, values: Tensor, layer: Layer) -> Tensor:
        """Those of the last dimension, which has one for all heads or one each.

        Raises:
            ValueError: it has another number.
        """
        found, heads = values.shape[-1], layer.heads * self.size
        if found not in (1, heads):
            raise ValueError(
                f"blasst: thresholds for {found} heads; {layer.name} has {heads}: give one number, "
                f"or {heads}"
            )
        if found == 1:
            return values.expand(*values.shape[:-1], layer.heads)
        return values[..., self.rank * layer.heads : (self.rank + 1) * layer.heads]


class Decision(NamedTuple):
    """How a step's calls decide."""

    rows: Mapping[str, int | None]
    """Of a layer's name, its row among the thresholds; None: it stays dense."""
    test: str = "none"
    order: str = "sink_first"
    thresholds: Tensor | None = None
    """[layers, 1 or requests, heads, 1] float32."""

    def of_requests(self, requests: slice) -> "Decision":
        """Args: requests: some of the step's."""
        if self.thresholds is None or self.thresholds.shape[1] == 1:  # the same for all
            return self
        return self._replace(thresholds=self.thresholds[:, requests])

    def of_layer(self, name: str, heads: int) -> dict[str, Any]:
        """As the operator takes it."""
        row = self.rows[name]
        if row is None or self.thresholds is None:
            return {"test": "none", "order": self.order, "thresholds": None}
        thresholds = self.thresholds[row, :, :heads]
        return {"test": self.test, "order": self.order, "thresholds": thresholds}


class PhaseThresholds:
    """The thresholds of some layers in one phase, in a buffer whose place does not change.

    A captured graph reads that buffer, so what `decide` writes is what its next replay goes by.
    """

    def __init__(
        self,
        source: "Fixed | Calibrated | None",
        rows: Mapping[str, int | None],
        *,
        max_requests: int,
        by_request: bool,
        device: torch.device,
    ) -> None:
        """Args: source: None: dense. rows: of a layer's name, its row; None: it stays dense.

        Raises:
            ValueError: requests may have thresholds, and the engine has absolute ones.
        """
        if source is None and by_request:
            source = Fixed(torch.zeros(1, 1), "relative", "sink_first")
        self._rows, self._source, self._buffer = rows, source, None
        if source is None:
            return
        if source.test == "absolute" and by_request:
            raise ValueError(
                f"blasst: absolute_threshold and --logits-processors {REQUESTS} exclude each "
                "other: a request's threshold is a relative one"
            )
        source.to(device)
        self._is_fixed = source.is_same_for_all_lengths and not by_request
        layers, heads = source.shape
        shape = (layers, 1 if self._is_fixed else max_requests, heads, 1)
        self._buffer = torch.zeros(shape, dtype=torch.float32, device=device)
        if self._is_fixed:
            self._write(source.rows(torch.ones(1, device=device), 1))

    def _write(self, rows: Tensor) -> Tensor:
        """[requests, layers, heads] to the buffer's first requests; those of it."""
        into = self._buffer[:, : len(rows)]
        into.copy_(rows.movedim(0, 1)[..., None])
        return into

    def decide(self, lengths: Tensor, longest: int, room: int, own: Tensor | None) -> "Decision":
        """Of one step.

        Args:
            lengths: [requests] keys that each has, of a prompt in chunks the whole.
            longest: at least the largest of them.
            room: that a request may have; a call has one order, which can depend on it.
            own: [requests] float32 that requests asked for, NaN: none; None: of all requests none.
        """
        if self._source is None:
            return Decision(self._rows)
        order = self._source.order(longest, room)
        if self._is_fixed:
            return Decision(self._rows, self._source.test, order, self._buffer)
        rows = self._source.rows(lengths, room)
        if own is not None:
            asked = own[:, None, None]
            rows = torch.where(asked.isnan(), rows, asked)
        return Decision(self._rows, self._source.test, order, self._write(rows))


class Fixed:
    """Thresholds that somebody gave, the same for all layers or by head."""

    def __init__(self, values: Tensor, kind: str, order: str) -> None:
        """Args: values: [1, heads]. kind: "relative", "scale_factor" or "absolute"."""
        self.values, self._order = values.float(), order
        self.shape = tuple(values.shape)
        self.is_same_for_all_lengths = kind != "scale_factor"
        self.test = "absolute" if kind == "absolute" else "relative"

    def to(self, device: torch.device) -> None:
        """Work there from now on."""
        self.values = self.values.to(device)

    def order(self, longest: int, room: int) -> str:
        """In which tiles are visited."""
        return self._order

    def rows(self, lengths: Tensor, room: int) -> Tensor:
        """[requests, 1, heads] thresholds."""
        values = self.values[None].expand(len(lengths), -1, -1)
        if self.is_same_for_all_lengths:
            return values
        return (values / lengths.clamp(min=1)[:, None, None]).clamp(max=1)


class Calibrated:
    """Thresholds that were measured, or a law of them."""

    test = "relative"
    is_same_for_all_lengths = False

    def __init__(self, schedule: Schedule, tell: Callable[[int], None]) -> None:
        """What to go by.

        Args:
            schedule: of the layers that have thresholds, with this process's heads.
            tell: says, each once, how a step with such a longest request differs from what was
                measured.
        """
        self._schedule, self._tell = schedule, tell
        self.shape = tuple(schedule.ln_threshold.shape[1:])

    def to(self, device: torch.device) -> None:
        """Work there from now on."""
        self._schedule = self._schedule.to(device)

    def order(self, longest: int, room: int) -> str:
        """In which tiles are visited."""
        self._tell(longest)
        return self._schedule.of_call(room).order

    def rows(self, lengths: Tensor, room: int) -> Tensor:
        """[requests, layers, heads] thresholds."""
        return self._schedule.of_call(room).at(lengths.clamp(min=1))


def calibration_of(model_config: Any, options: Options) -> SparseAttention | None:
    """What the model's configuration says, with the targets of the options; None: nothing.

    Raises:
        ValueError: it cannot be honoured, or there is none that a target could be of.
    """
    for config in (model_config.hf_config, model_config.hf_text_config):
        entry = getattr(config, CONFIG_KEY, None)
        if entry is not None:
            found = parse(entry, partial(beside, model_config.hf_config))
            break
    else:
        if options.target_sparsity:
            raise ValueError(
                f"blasst: a target_sparsity is given, but {model_config.model} has no "
                f"{CONFIG_KEY}: calibrate it (blasst calibrate), or give thresholds"
            )
        return None
    for phase in options.target_sparsity:
        if phase not in found.target_sparsity:
            raise ValueError(f"blasst: the model's {CONFIG_KEY} has no {phase}")
    return found.with_targets(**options.target_sparsity)


class Found(NamedTuple):
    """What there is to go by in one phase."""

    source: "Fixed | Calibrated | None"
    """None: nothing; tiles are all computed."""
    rows: dict[str, int | None]
    """Of a layer's name, its row among the thresholds; None: it stays dense."""
    scores: dict[str, str]
    """Of a layer's name: how it computes scores."""


def thresholds_of(
    phase: str,
    layers: Sequence[Layer],
    options: Options,
    calibration: SparseAttention | None,
    share: Share,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Found:
    """Where these layers' thresholds come from.

    Raises:
        NotSupportedError: scores that the phase, or the device, does not have.
        ValueError: thresholds for another number of heads or layers, or a layer that `targets` of
            the calibration leaves out.
    """
    found = _found(phase, layers, options, calibration, share, device=device, dtype=dtype)
    if "int8" in found.scores.values():
        if phase == "decode":
            raise NotSupportedError(
                "blasst: scores in int8 are asked for in decode, which has none"
            )
        plan(phase, device, dtype, head_dim=layers[0].head_dim, scores="int8")  # or says why not
    return found


def _found(
    phase: str,
    layers: Sequence[Layer],
    options: Options,
    calibration: SparseAttention | None,
    share: Share,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Found:
    one_for_all = {layer.name: 0 for layer in layers}
    given = options.thresholds.get(phase)
    if given is not None:
        scores = dict.fromkeys(one_for_all, given.scores)
        return Found(_fixed(given, layers, share), one_for_all, scores)
    if calibration is None:
        return Found(None, one_for_all, dict.fromkeys(one_for_all, "exact"))
    kind = next((t for t in calibration.targets if t.isidentifier()), "Attention")
    scores = {n.name: calibration.scores(kind, phase, n.module) for n in layers}
    rows = {n.name: None if calibration.is_dense(kind, n.module) else 0 for n in layers}
    sparse = [n for n in layers if calibration.is_sparse(kind, n.index, phase, n.module)]
    if not sparse:
        return Found(None, rows, scores)
    tile = tile_of(phase, device, dtype, sparse[0].head_dim)
    schedules = [calibration.schedule(kind, n.index, phase, n.module, tile) for n in sparse]
    source = Calibrated(
        _together(schedules, sparse, share),
        lambda longest: calibration.tell(phase, tile, lambda: [longest]),
    )
    return Found(source, rows | {layer.name: i for i, layer in enumerate(sparse)}, scores)


def _fixed(given: Threshold, layers: Sequence[Layer], share: Share) -> Fixed | None:
    for test, value in (
        ("relative", given.threshold),
        ("scale_factor", given.threshold_scale_factor),
        ("absolute", given.absolute_threshold),
    ):
        if value is not None:
            values = torch.as_tensor(value, dtype=torch.float32).reshape(1, -1)
            by_layer = [share.of(values, layer) for layer in layers]
            return Fixed(max(by_layer, key=lambda rows: rows.shape[-1]), test, given.order)
    return None


def _together(schedules: Sequence[Schedule], layers: Sequence[Layer], share: Share) -> Schedule:
    """One schedule of all layers, [lengths, layers, heads of the widest]."""
    first, widest = schedules[0], max(layer.heads for layer in layers)
    tables = [
        torch.nn.functional.pad(share.of(schedule.ln_threshold, layer), (0, widest - layer.heads))
        for schedule, layer in zip(schedules, layers, strict=True)
    ]
    shorter = None
    if first.shorter is not None:
        shorter = _together([s.shorter for s in schedules], layers, share)
    return first._replace(ln_threshold=torch.cat(tables, 1), shorter=shorter)
