"""What is calibrated, and for what: checked before the work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blasst import hf
from blasst.calibration.emulation import Emulation
from blasst.config import HEAD_SCHEMES, ORDERS, PHASES, SCORES
from blasst.heads import heads_of_layer, query_size
from blasst.hf.models import attention_layers, check_length, context_length, unwindowed_layers
from blasst.hf.operator import KERNELS, Operator
from blasst.hf.reading import check_chunk, read
from blasst.ops.arguments import check_choice, check_whole_number, is_number, whole_numbers
from blasst.ops.library import DEVICES, TileShape, plan
from blasst.progress import Progress, silent
from blasst.prompts import DocumentMaker, PromptMaker

LONGEST_ON_CPU = 4096
"""Tokens: a longer default would take hours there."""
SHORTEST = 256
"""Of a default prompt: fewer tokens have no room for a question."""
DECODE_STEPS = 16

TileShapes = str | tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""A device: what its kernels have; or query rows and keys (as `TileShape`), of both phases or by
phase."""


@dataclass(frozen=True)
class Setup:
    """A model, and what is asked of its calibration."""

    model: PreTrainedModel
    maker: PromptMaker | DocumentMaker
    lengths: Sequence[int]
    """Of prompts, ascending."""
    targets: Mapping[str, Sequence[float]]
    """By phase, those above 0; the first becomes the configuration's."""
    orders: Sequence[str]
    """Visit orders to choose from."""
    schemes: Sequence[str]
    """Ways to share thresholds among heads to choose from."""
    progress: Progress = silent
    chunk: int | None = None
    """Tokens of a prompt that are read at once; None: all."""
    scores: str = "exact"
    """How prefill computes scores."""
    operator: Operator = KERNELS
    """What attention layers call: this device's kernels, or others' tiles emulated."""
    batch: int = 1
    """Prompts that are read at once."""

    def __post_init__(self) -> None:
        check_attention(self.model)
        check_choice("scores", self.scores, SCORES)
        check_whole_number("batch", self.batch)
        if self.chunk is not None:
            check_chunk(self.chunk)
        for length in self.lengths:
            check_length(self.model, length, "a calibration prompt")
        for name, given, known in (
            ("order", self.orders, ORDERS),
            ("scheme", self.schemes, HEAD_SCHEMES),
        ):
            if not given or set(given) - set(known):
                raise ValueError(f"{name}s are {list(given)}; choose from {', '.join(known)}")
        for module in (self.modules[i] for i in self.layers if self.needs_error):
            if not hasattr(module, "o_proj"):
                raise ValueError(
                    f"least_error needs the output projection, and {type(module).__name__} has no "
                    f"o_proj; choose from {', '.join(HEAD_SCHEMES[:-1])}"
                )

    @cached_property
    def modules(self) -> dict[int, nn.Module]:
        """The attention modules, by layer."""
        return attention_layers(self.model)

    @cached_property
    def layers(self) -> list[int]:
        """The layers that are calibrated.

        One with a sliding window has few tiles to skip and another length: it stays dense.
        """
        return unwindowed_layers(self.model)

    @property
    def needs_error(self) -> bool:
        """Whether a scheme asks what dropping changes in a layer's output."""
        return "least_error" in self.schemes

    @property
    def needs_costs(self) -> bool:
        """Whether a scheme asks what dropping costs a head."""
        return any(scheme != "one_threshold" for scheme in self.schemes)

    def scores_of(self, phase: str) -> str:
        """How this phase computes scores."""
        return self.scores if phase == "prefill" else "exact"

    @property
    def longest(self) -> int:
        """The longest prompt, at which candidates are compared."""
        return self.lengths[-1]

    def read(self, tokens: Tensor) -> None:
        """Prefill of [batch, length] tokens, and some steps of decode if that is calibrated."""
        cache = DynamicCache(config=self.model.config)
        hidden = read(self.model, tokens, cache, self.chunk)
        if "decode" not in self.targets:
            return
        head = self.model.get_output_embeddings()
        for _ in range(DECODE_STEPS):
            hidden = read(self.model, head(hidden[:, -1:]).argmax(-1), cache)


def check_attention(model: PreTrainedModel) -> None:
    """An error unless the model can be calibrated: it runs blasst, in one process."""
    if not hasattr(model, "config"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a model of Transformers")
    used = model.config._attn_implementation
    if used != hf.NAME:
        raise ValueError(f"the model's attn_implementation is {used!r}; load it with {hf.NAME!r}")
    devices = {str(weight.device) for weight in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"the model is split over {', '.join(sorted(devices))}; calibrate it on one device "
            "(--device, no --device-map): thresholds then hold wherever it runs"
        )
    if hf.is_sharded(model):
        raise ValueError(
            "the model is split over processes; calibrate it in one process: the thresholds "
            "that its configuration then holds are those of all heads"
        )


def lengths_of(model: PreTrainedModel, given: Iterable[int] | int | None) -> list[int]:
    """Lengths of prompts, ascending: those given, else a quarter, half and all of the context.

    On the CPU of no more than `LONGEST_ON_CPU` tokens of it.

    Raises:
        ValueError: the context is too short for a default.
    """
    if given is not None and len(found := whole_numbers("lengths", given)):
        return sorted(set(found))
    longest = context_length(model)
    if next(model.parameters()).device.type == "cpu":
        longest = min(longest, LONGEST_ON_CPU)
    lengths = [n for n in (longest // 4, longest // 2, longest) if n >= SHORTEST]
    if not lengths:
        raise ValueError(
            f"the model's context is {longest} tokens; default prompts have at least {SHORTEST}: "
            "give lengths"
        )
    return lengths


def targets_by_phase(
    given: float | Mapping[str, float] | Iterable[float],
) -> dict[str, list[float]]:
    """Targets by phase, prefill first, without those that are 0: dense needs no threshold.

    Raises:
        TypeError: what is no number.
        ValueError: an unknown phase, a target outside 0 to 1, or none above 0.
    """
    if isinstance(given, Mapping):
        by_phase = {phase: [target] for phase, target in given.items()}
    else:
        is_one = isinstance(given, str) or not isinstance(given, Iterable)
        by_phase = dict.fromkeys(PHASES, [given] if is_one else [*given])
    for phase, targets in by_phase.items():
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")
        for target in targets:
            if not is_number(target):
                raise TypeError(f"target sparsity is {target!r}; it must be a number, 0 to 1")
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
    positive = {
        phase: list(dict.fromkeys(float(target) for target in some if target))
        for phase, some in by_phase.items()
    }
    if not any(positive.values()):
        raise ValueError("every target sparsity is 0: dense needs no calibration")
    return {phase: positive[phase] for phase in PHASES if positive.get(phase)}


def operator_for(given: TileShapes | None, model: PreTrainedModel) -> Operator:
    """What measures on tiles of these shapes: the kernels, in the phases where they have them.

    Args:
        given: the shapes; None: what the kernels have.
        model: what is calibrated.

    Raises:
        NotSupportedError: a device whose kernels do not take this model, or that has none.
        ValueError: shapes that no kernel could have, or that differ from layer to layer.
    """
    if given is None:
        return KERNELS
    if isinstance(given, str):
        wanted = {phase: _shape_on(given, phase, model) for phase in PHASES}
    else:
        wanted = dict(given) if isinstance(given, Mapping) else dict.fromkeys(PHASES, given)
        for phase, shape in wanted.items():
            _check_shape(phase, shape)
    others = {
        phase: shape
        for phase, shape in wanted.items()
        if any(not _is_same(own, phase, shape) for own in shapes_on(model.device, phase, model))
    }
    return Emulation(others) if others else KERNELS


def shapes_on(device: torch.device, phase: str, model: PreTrainedModel) -> set[TileShape]:
    """Of the tiles that a device's kernels have for the layers of a model."""
    config, dtype = model.config.get_text_config(), model.dtype
    if device.type == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16  # as a model is loaded there
    found = set()
    for layer, module in attention_layers(model).items():
        heads = heads_of_layer(config, layer)
        size, value_size = _head_sizes(module) or (query_size(config), None)
        kv_heads = heads // getattr(module, "num_key_value_groups", 1)
        numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "value_dim": value_size}
        found.add(plan(phase, device, dtype, **numbers).shape)
    return found


def _shape_on(device: str, phase: str, model: PreTrainedModel) -> TileShape:
    check_choice("tile_shape", device, DEVICES)
    first, *others = sorted(shapes_on(torch.device(device), phase, model))
    if not all(_is_same(other, phase, first) for other in others):
        shapes = ", ".join(str(tuple(shape)) for shape in (first, *others))
        raise ValueError(
            f"tile_shape is {device!r}, where {phase} decides on tiles that differ from layer to "
            f"layer: {shapes}; give one of them"
        )
    return first


def _check_shape(phase: str, shape: tuple[int, ...]) -> None:
    if phase not in PHASES:
        raise ValueError(f"tile_shape is for {phase!r}; it must be for {' or '.join(PHASES)}")
    numbers = tuple(shape) if isinstance(shape, Sequence) else ()
    is_shape = 2 <= len(numbers) <= 4 and all(isinstance(n, int) and n >= 0 for n in numbers)
    if not is_shape or 0 in numbers[:2]:
        raise ValueError(
            f"tile_shape is {shape!r}; it must be (query rows, keys), like (64, 128), of decode "
            "also with the tiles of a split and the most splits, or a device"
        )
    if phase == "prefill" and any(numbers[2:]):
        raise ValueError(f"tile_shape is {shape!r}; only decode has splits")


def _head_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Elements of a query and of a value, where the layer says so."""
    size = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    return size and (size, getattr(layer, "v_head_dim", None) or size)


def _is_same(own: TileShape, phase: str, wanted: tuple[int, ...]) -> bool:
    """Whether a kernel's tiles are these, as far as they are said; decode: of any rows."""
    first = 1 if phase == "decode" else 0
    return own[first : len(wanted)] == tuple(wanted[first:])
