"""What is calibrated, and for what: checked before the work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blasst import hf
from blasst.calibration.emulation import Emulation
from blasst.config import HEAD_SCHEMES, ORDERS, PHASES, SCORES
from blasst.hf.models import attention_layers, check_length, context_length, unwindowed_layers
from blasst.hf.operator import KERNELS, Operator
from blasst.hf.reading import check_chunk, read
from blasst.ops.arguments import check_choice
from blasst.ops.library import tile_of
from blasst.progress import Progress, silent
from blasst.prompts import DocumentMaker, PromptMaker

LONGEST_ON_CPU = 4096
"""Tokens: a longer default would take hours there."""
SHORTEST = 256
"""Of a default prompt: fewer tokens have no room for a question."""
DECODE_STEPS = 16


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
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
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


def lengths_of(model: PreTrainedModel, given: Sequence[int] | None) -> list[int]:
    """Lengths of prompts, ascending: those given, else a quarter, half and all of the context.

    On the CPU of no more than `LONGEST_ON_CPU` tokens of it.

    Raises:
        ValueError: the context is too short for a default.
    """
    if given:
        return sorted(set(given))
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
    given: float | Mapping[str, float] | Sequence[float],
) -> dict[str, list[float]]:
    """Targets by phase, prefill first, without those that are 0: dense needs no threshold.

    Raises:
        ValueError: an unknown phase, a target outside 0 to 1, or none above 0.
    """
    if isinstance(given, Mapping):
        by_phase = {phase: [float(target)] for phase, target in given.items()}
    else:
        several = given if isinstance(given, Sequence) else [given]
        by_phase = {phase: [float(target) for target in several] for phase in PHASES}
    for phase, targets in by_phase.items():
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")
        for target in targets:
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
    positive = {p: list(dict.fromkeys(t for t in some if t)) for p, some in by_phase.items()}
    if not any(positive.values()):
        raise ValueError("every target sparsity is 0: dense needs no calibration")
    return {phase: positive[phase] for phase in PHASES if positive.get(phase)}


def operator_for(
    given: tuple[int, int] | Mapping[str, tuple[int, int]] | None, model: PreTrainedModel
) -> Operator:
    """What measures on tiles of these shapes: the kernels, where they have them.

    Args:
        given: query rows and keys, or those by phase; None: what the kernels have.
        model: what is calibrated.

    Raises:
        ValueError: shapes that no kernel could have.
    """
    if given is None:
        return KERNELS
    by_phase = dict(given) if isinstance(given, Mapping) else dict.fromkeys(PHASES, given)
    for phase, shape in by_phase.items():
        if phase not in PHASES:
            raise ValueError(f"tile_shape is for {phase!r}; it must be for {' or '.join(PHASES)}")
        is_shape = isinstance(shape, Sequence) and len(shape) == 2
        if not is_shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(
                f"tile_shape is {shape!r}; it must be (query rows, keys), like (64, 128)"
            )
    weight, layers = next(model.parameters()), attention_layers(model)
    sizes = {size for layer in layers.values() if (size := _head_sizes(layer)) is not None}
    own = {p: {tile_of(p, weight.device, weight.dtype, *d) for d in sizes} for p in PHASES}
    wanted = {phase: by_phase.get(phase, min(own[phase])) for phase in PHASES}
    return KERNELS if all(_are_all(own[p], p, wanted[p]) for p in PHASES) else Emulation(wanted)


def _head_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Elements of a query and of a value, where the layer says so."""
    size = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    return size and (size, getattr(layer, "v_head_dim", None) or size)


def _are_all(own: set[tuple[int, int]], phase: str, wanted: tuple[int, int]) -> bool:
    """Whether all the kernel's tiles are these; of decode, as far as keys go."""
    if phase == "decode":
        return {keys for _, keys in own} == {wanted[1]}
    return own == {tuple(wanted)}
