"""Dense passes in which every attention call is measured."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from blasst import hf
from blasst.calibration.curves import BIN_EDGES
from blasst.calibration.emulation import gaps
from blasst.calibration.measurement import DECODE_SWEEP, LAW, SWEEP, Measurement, Measurements
from blasst.calibration.setup import Setup
from blasst.config import ECOSYSTEM_TILE_SHAPE
from blasst.hf.latents import CALIBRATION, Taken, take
from blasst.ops.attention import Result
from blasst.policies import Call


@dataclass(frozen=True)
class _Asked:
    """One attention call of a layer."""

    module: nn.Module
    phase: str
    inputs: list[Tensor]
    """q, k, v as `blasst.attention` takes them."""
    taken: Taken
    """What they are of."""
    options: dict[str, Any]
    """What else it takes, but for the order."""


class Collector:
    """Measures the attention calls of a model that runs dense."""

    def __init__(self, setup: Setup, measurements: Measurements) -> None:
        self._setup, self._into = setup, measurements
        self._length, self._sweeps = 0, False
        self._residuals: dict[int, Tensor] = {}
        self._grams: dict[int, Tensor] = {}
        self._sums: dict[tuple[int, Any], tuple[np.ndarray, Any, Tensor]] = {}

    @contextmanager
    def collecting(self, length: int, *, sweep: bool) -> Iterator[None]:
        """The model runs dense inside, and every attention call is measured.

        Args:
            length: of the prompt: what is measured goes to that of this length.
            sweep: whether to measure what dropping costs, too.
        """
        self._length, self._sweeps = length, sweep
        AttentionInterface.register(CALIBRATION, self._forward)
        AttentionMaskInterface.register(CALIBRATION, hf.key_ranges)
        with ExitStack() as stack:
            for layer, module in self._setup.modules.items():
                stack.callback(self._noting_residual(layer, module).remove)
            stack.enter_context(_running(self._setup.model, CALIBRATION))
            yield
        for array, index, values in self._sums.values():
            array[index][: len(values)] += values.cpu().numpy()
        self._sums.clear()

    def _add(self, array: np.ndarray, index: Any, values: Tensor) -> None:
        """Add to a layer's part of a sum when the block ends: until then on the device, unread."""
        key = id(array), index
        if key in self._sums:
            values = self._sums[key][2] + values
        self._sums[key] = array, index, values

    def _noting_residual(self, layer: int, module: nn.Module) -> Any:
        """A hook that notes the squared residual stream that the layer reads and adds to."""

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._residuals[layer] = torch.linalg.vector_norm(hidden, dtype=torch.float32).square()

        parent = _parent(self._setup.model, module)
        return parent.register_forward_pre_hook(note, with_kwargs=True)

    def _forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention interface."""
        phase = "decode" if query.shape[2] == 1 else "prefill"
        if module.layer_idx not in self._setup.layers or phase not in self._setup.targets:
            return hf.attention_forward(module, query, key, value, attention_mask, **kwargs)
        scores = self._setup.scores_of(phase)
        taken = take(module, phase, query, key, value)
        asked = _asked(module, phase, taken, kwargs, scores)
        inputs = asked.inputs
        self._into.tile_shapes[phase] = _tile_of(self._setup.operator, phase, *inputs)
        return taken.finish(self._measure(asked)), None

    def _measure(self, asked: _Asked) -> Tensor:
        """Measure a call in every order; its output."""
        setup, phase = self._setup, asked.phase
        query, key, value = asked.inputs
        needed = asked.inputs if setup.needs_error else [query, key, _few_values(value)]
        out = None
        # The paper's scheme is for the forward order, at one threshold: no sweep.
        for order in dict.fromkeys([*setup.orders, "forward"]):
            # Of decode, every other step: neighbours say much the same.
            sweeps = self._sweeps and order in setup.orders
            sweeps = sweeps and (phase == "prefill" or key.shape[1] % 2 == 1)
            inputs = asked.inputs if out is None else needed
            options = asked.options | {"order": order}
            dense = setup.operator.attention(
                *inputs, **options, return_gaps=True, return_lse=sweeps
            )
            out = dense.out if out is None else out
            into = self._place_for(asked, order)
            self._add(into.gaps, asked.module.layer_idx, dense.gaps)
            if sweeps:
                self._sweep(into, asked, needed, options, dense)
        self._measure_law(asked)
        return out

    def _place_for(self, asked: _Asked, order: str) -> Measurement:
        """Where to add what a call tells."""
        heads, kv_heads = (t.shape[2] for t in asked.inputs[:2])
        layer = asked.module.layer_idx
        return self._into.place_for(asked.phase, order, self._length, layer, heads, kv_heads)

    def _measure_law(self, asked: _Asked) -> None:
        """Gaps on the tiles that readers of the ecosystem's law run, visited forward."""
        query, key, _ = asked.inputs
        if asked.options["bands"] is not None or asked.options["blocks"] is not None:
            return  # they run no policies
        into = self._place_for(asked, LAW)
        counts = gaps(query, key, ECOSYSTEM_TILE_SHAPE, asked.options | {"order": "forward"})
        self._add(into.gaps, asked.module.layer_idx, counts)

    def _sweep(
        self,
        into: Measurement,
        asked: _Asked,
        inputs: list[Tensor],
        options: dict[str, Any],
        dense: Result,
    ) -> None:
        """Repeat a call at several thresholds and add up what each costs."""
        module, query = asked.module, inputs[0]
        layer = module.layer_idx
        if layer == self._setup.layers[0]:
            into.rows += query.shape[0] * query.shape[1]
        for point in range(into.swept.shape[0]):
            sparse = self._setup.operator.attention(
                *inputs,
                **options,
                threshold=_thresholds(point, options["phase"], dense.gaps),
                return_lse=True,
                return_stats=True,
            )
            self._add(into.swept, (point, layer), sparse.stats.skipped.sum(0))
            # The denominator over the kept tiles, of the whole: what is missing was dropped.
            dropped = -torch.expm1((sparse.lse - dense.lse).clamp(max=0))
            self._add(into.mass, (point, layer), dropped.sum((0, 2), dtype=torch.float64))
            if self._setup.needs_error:
                change = asked.taken.finish(sparse.out - dense.out)
                squared = _squared_change(change, self._gram(module, query))
                residual = self._residuals[layer].clamp(min=1e-30)
                self._add(into.error, (point, layer), (squared / residual).double())
        self._add(into.visitable, layer, sparse.stats.visitable.sum(0))

    def _gram(self, module: nn.Module, query: Tensor) -> Tensor:
        if module.layer_idx not in self._grams:
            gram = output_gram(module.o_proj, query.shape[2], query)
            self._grams[module.layer_idx] = gram
        return self._grams[module.layer_idx]


def _asked(
    module: nn.Module, phase: str, taken: Taken, kwargs: dict[str, Any], scores: str
) -> _Asked:
    inputs = [t.transpose(1, 2) for t in (taken.query, taken.key, taken.value)]
    call = Call(module.layer_idx, phase, inputs[0], inputs[1], None)
    visit = hf.visit_of(module, call, causal=True)
    options = {
        "causal": True,
        "scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "scores": scores,
        "phase": phase,
        "bands": visit.bands,
        "blocks": visit.blocks,
    }
    return _Asked(module, phase, inputs, taken, options)


def _tile_of(
    operator: hf.operator.Operator, phase: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, int]:
    """Query rows, in decode those of a KV head, and keys of the tiles that are measured."""
    rows, keys = operator.tile_of(phase, q.device, q.dtype, q.shape[-1], v.shape[-1])
    return (q.shape[2] // k.shape[2] if phase == "decode" else rows), keys


def _thresholds(point: int, phase: str, counts: Tensor) -> Tensor:
    """[heads] thresholds of one point of the sweep, from the heads' own gaps, on their device."""
    if phase == "decode":
        limit = math.exp(DECODE_SWEEP[point])
        return torch.full(counts.shape[:1], limit, device=counts.device)
    edges = torch.tensor(BIN_EDGES[1:-1], dtype=torch.float32, device=counts.device)
    shares = counts.cumsum(-1)[:, :-1] / counts.sum(-1, keepdim=True).clamp(min=1)
    wanted = SWEEP[point] * shares[:, -1:]
    right = torch.searchsorted(shares, wanted).clamp(1, len(edges) - 1)
    low, high = shares.gather(1, right - 1), shares.gather(1, right)
    within = ((wanted - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return edges[right - 1].lerp(edges[right], within)[:, 0].exp()


def _squared_change(change: Tensor, projection: Tensor) -> Tensor:
    """[heads]: the square of what a change of the heads' values changes in the layer's output."""
    by_head = change.flatten(0, 1).transpose(0, 1).float()
    gram = by_head.transpose(1, 2) @ by_head
    return (gram * projection).sum((1, 2))


def output_gram(projection: nn.Module, heads: int, like: Tensor) -> Tensor:
    """[heads, value_dim, value_dim]: W^T W of each head's part of the output projection W.

    The squared change of the layer's output is then a trace, and no product with W. W is what the
    module does to unit vectors: its weights may be quantised, or adapted.

    Args:
        projection: from the heads' values to the layer's output.
        heads: of the layer.
        like: of the type and on the device of the heads' values.
    """
    size = projection.in_features
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    columns = projection(unit).float() - projection(torch.zeros_like(unit[:1])).float()
    by_head = columns.unflatten(0, (heads, size // heads))  # [heads, value_dim, hidden]
    return by_head @ by_head.transpose(1, 2)


def _few_values(value: Tensor) -> Tensor:
    """The fewest elements of each value that the backend takes, where outputs do not matter."""
    return value[..., :16] if value.device.type == "cpu" else value


def _parent(model: PreTrainedModel, module: nn.Module) -> nn.Module:
    """The layer that an attention module is part of: what it reads is the residual stream."""
    name = next(name for name, other in model.named_modules() if other is module)
    return model.get_submodule(name.rpartition(".")[0])


@contextmanager
def _running(model: PreTrainedModel, attention_name: str) -> Iterator[None]:
    """The model runs another attention inside, and without a configuration of sparsity."""
    before = model.config._attn_implementation
    entry = model.config.__dict__.pop("sparse_attention_config", None)
    model.set_attn_implementation(attention_name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        if entry is not None:
            model.config.sparse_attention_config = entry
