"""Dense passes in which every attention call is measured."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from blasst import hf
from blasst.calibration.curves import ln_threshold_at, share_below
from blasst.calibration.measurement import DECODE_SWEEP, SWEEP, Measurement, Measurements
from blasst.calibration.setup import Setup
from blasst.ops.attention import Result, attention, tile_shape
from blasst.policies import Call

OWN_ATTENTION = "blasst_calibration"


@dataclass(frozen=True)
class _Asked:
    """One attention call of a layer."""

    module: nn.Module
    phase: str
    inputs: list[Tensor]
    """q, k, v as `blasst.attention` takes them."""
    options: dict[str, Any]
    """What else it takes, but for the order."""


class Collector:
    """Measures the attention calls of a model that runs dense."""

    def __init__(self, setup: Setup, measurements: Measurements) -> None:
        self._setup, self._into = setup, measurements
        self._length, self._sweeps = 0, False
        self._residuals: dict[int, float] = {}

    @contextmanager
    def collecting(self, length: int, *, sweep: bool) -> Iterator[None]:
        """The model runs dense inside, and every attention call is measured.

        Args:
            length: of the prompt: what is measured goes to that of this length.
            sweep: whether to measure what dropping costs, too.
        """
        self._length, self._sweeps = length, sweep
        AttentionInterface.register(OWN_ATTENTION, self._forward)
        AttentionMaskInterface.register(OWN_ATTENTION, hf.key_ranges)
        with ExitStack() as stack:
            for layer, module in self._setup.modules.items():
                stack.callback(self._noting_residual(layer, module).remove)
            stack.enter_context(_running(self._setup.model, OWN_ATTENTION))
            yield

    def _noting_residual(self, layer: int, module: nn.Module) -> Any:
        """A hook that notes the squared residual stream that the layer reads and adds to."""

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._residuals[layer] = (
                torch.linalg.vector_norm(hidden, dtype=torch.float64).item() ** 2
            )

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
        inputs = [t.transpose(1, 2) for t in (query, key, value)]
        asked = _asked(module, phase, inputs, kwargs, scores)
        self._into.tile_shapes[phase] = tuple(tile_shape(*asked.inputs, phase=phase)[:2])
        return self._measure(asked), None

    def _measure(self, asked: _Asked) -> Tensor:
        """Measure a call in every order; its output."""
        setup, phase = self._setup, asked.phase
        query, key, value = asked.inputs
        needed = asked.inputs if setup.needs_error else [query, key, _few_values(value)]
        out = None
        # The ecosystem's law is for the forward order, at one threshold: no sweep.
        for order in dict.fromkeys([*setup.orders, "forward"]):
            # Of decode, every other step: neighbours say much the same.
            sweeps = self._sweeps and order in setup.orders
            sweeps = sweeps and (phase == "prefill" or key.shape[1] % 2 == 1)
            inputs = asked.inputs if out is None else needed
            options = asked.options | {"order": order}
            dense = attention(*inputs, **options, return_gaps=True, return_lse=sweeps)
            out = dense.out if out is None else out
            into = self._into.place_for(phase, order, self._length, query.shape[2], key.shape[2])
            into.gaps[asked.module.layer_idx] += dense.gaps.cpu().numpy()
            if sweeps:
                self._sweep(into, asked.module, needed, options, dense)
        return out

    def _sweep(
        self,
        into: Measurement,
        module: nn.Module,
        inputs: list[Tensor],
        options: dict[str, Any],
        dense: Result,
    ) -> None:
        """Repeat a call at several thresholds and add up what each costs."""
        layer, query = module.layer_idx, inputs[0]
        into.rows += query.shape[1] if layer == self._setup.layers[0] else 0
        projection = _output_gram(module, query.shape[2]) if self._setup.needs_error else None
        for point in range(into.swept.shape[0]):
            sparse = attention(
                *inputs,
                **options,
                threshold=_thresholds(point, options["phase"], dense.gaps).to(query.device),
                return_lse=True,
                return_stats=True,
            )
            into.swept[point, layer] += sparse.stats.skipped.sum(0).cpu().numpy()
            # The denominator over the kept tiles, of the whole: what is missing was dropped.
            kept = (sparse.lse - dense.lse).double().exp().clamp(max=1)
            into.mass[point, layer] += (1 - kept).sum((0, 2)).cpu().numpy()
            if projection is not None:
                squared = _squared_change(sparse.out - dense.out, projection)
                into.error[point, layer] += squared / max(self._residuals[layer], 1e-30)
        into.visitable[layer] += sparse.stats.visitable.sum(0).cpu().numpy()


def _asked(
    module: nn.Module, phase: str, inputs: list[Tensor], kwargs: dict[str, Any], scores: str
) -> _Asked:
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
    return _Asked(module, phase, inputs, options)


def _thresholds(point: int, phase: str, gaps: Tensor) -> Tensor:
    """[heads] thresholds of one point of the sweep, from the heads' own gaps."""
    counts = gaps.cpu().numpy()
    if phase == "decode":
        ln = [DECODE_SWEEP[point]] * len(counts)
    else:
        shares = SWEEP[point] * share_below(counts)[:, -1]
        ln = [ln_threshold_at(head, share) for head, share in zip(counts, shares, strict=True)]
    return torch.tensor(ln).exp().clamp(max=1)


def _squared_change(change: Tensor, projection: Tensor) -> Any:
    """[heads]: the square of what a change of the heads' values changes in the layer's output."""
    by_head = change.flatten(0, 1).transpose(0, 1).float()
    gram = by_head.transpose(1, 2) @ by_head
    return (gram * projection).sum((1, 2)).double().cpu().numpy()


def _output_gram(module: nn.Module, heads: int) -> Tensor:
    """[heads, value_dim, value_dim]: W^T W of each head's part of the output projection W.

    The squared change of the layer's output is then a trace, and no product with W.
    """
    by_head = module.o_proj.weight.float().unflatten(1, (heads, -1)).transpose(0, 1)
    return by_head.transpose(1, 2) @ by_head


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
