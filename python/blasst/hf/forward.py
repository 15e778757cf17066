"""`attn_implementation="blasst"` for Transformers models: registration, thresholds, statistics.

Transformers asks twice: the mask interface, once a forward pass, which keys each request may see;
the attention interface, once a layer, for the attention itself. `key_ranges` answers the first with
None (all keys) or a small int32 tensor of key ranges, which `attention_forward` takes as its mask.
A mask that is no range, and everything else that the operator does not do, is an error.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from blasst.attention import Result, attention, tile_shape
from blasst.config import Schedule, parsed, thresholds_for
from blasst.operators import GAP_BINS
from blasst.policies import Call, Visit, VisitPolicy, from_dict

NAME = "blasst"
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Threshold:
    """When a layer drops a key tile, and in which order it visits them: see `blasst.attention`.

    At most one of the three thresholds; each a number, one per head, or a tensor. None: dense. Of
    a tensor-parallel model: one per head of the whole model.
    """

    threshold: float | tuple[float, ...] | Tensor | None = None
    threshold_scale_factor: float | tuple[float, ...] | Tensor | None = None
    absolute_threshold: float | tuple[float, ...] | Tensor | None = None
    order: str = "sink_first"

    def __post_init__(self) -> None:
        values = (self.threshold, self.threshold_scale_factor, self.absolute_threshold)
        if sum(value is not None for value in values) > 1:
            raise ValueError(f"{self} holds more than one threshold; they exclude each other")


DENSE = Threshold()


def configure(
    model: PreTrainedModel,
    *,
    prefill: Threshold = DENSE,
    decode: Threshold = DENSE,
    layers: Iterable[int] | None = None,
) -> None:
    """Set the thresholds of a model that was loaded with `attn_implementation="blasst"`.

    Args:
        model: the model; its attention layers keep the setting.
        prefill: for passes with more than one query a request.
        decode: for passes with one query a request.
        layers: the layers to set; default: all.

    Raises:
        ValueError: the model runs another attention, or has no such layer.
    """
    for module in _chosen_modules(model, layers):
        module.blasst_thresholds = {"prefill": prefill, "decode": decode}


def set_policy(
    model: PreTrainedModel, policy: VisitPolicy | None, layers: Iterable[int] | None = None
) -> None:
    """Say which tiles a model's attention may visit; its thresholds stay as they are.

    A whole model can also carry its policy in its configuration: `blasst_policy`, a mapping with a
    "kind", for example `LlamaConfig(..., blasst_policy={"kind": "bands", "length": 2048})`.

    Args:
        model: loaded with `attn_implementation="blasst"`.
        policy: of these layers; None: what the configuration says.
        layers: default: all.

    Raises:
        ValueError: the model runs another attention, or has no such layer, or the policy is for
            another model.
    """
    modules = _chosen_modules(model, layers)
    if policy is not None:
        policy.check(model)
    for module in modules:
        module.blasst_policy = policy


def _chosen_modules(model: PreTrainedModel, layers: Iterable[int] | None) -> list[nn.Module]:
    """The attention modules of these layers, of a model that runs blasst."""
    used = model.config._attn_implementation
    if used != NAME:
        raise ValueError(f"the model's attn_implementation is {used!r}; load it with {NAME!r}")
    _check_model(type(model.config))
    modules = _attention_modules(model)
    wanted = set(modules) if layers is None else set(layers)
    if unknown := wanted - set(modules):
        raise ValueError(f"no attention layer {sorted(unknown)}; the model has {sorted(modules)}")
    return [module for layer in wanted for module in modules[layer]]


def _attention_modules(model: PreTrainedModel) -> dict[int, list[nn.Module]]:
    """The modules that call the attention interface, by layer: two where it has cross-attention."""
    modules = defaultdict(list)
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "is_causal"):
            modules[module.layer_idx].append(module)
    return modules


_OUTER = "blasst_outer_config"


def _note_outer(outer: nn.Module, _name: str, inner: nn.Module | None) -> None:
    """Torch calls this when a module gets a submodule: tell a text model's layers of the whole."""
    if isinstance(outer, PreTrainedModel) and isinstance(inner, PreTrainedModel):
        text = outer.config.get_text_config()
        for module in inner.modules() if text is not outer.config else ():
            if hasattr(module, "is_causal") and module.config is text:
                setattr(module, _OUTER, outer.config)


@cache
def _check_model(config_class: type) -> None:
    """An error for a model that computes attention itself, whatever implementation it is given."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    module = sys.modules.get(name)
    if module is not None and not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"the model of {config_class.__name__} does not call Transformers' attention "
            f"interface; attn_implementation={NAME!r} cannot reach it"
        )


def _threshold(
    module: nn.Module, phase: str, ranges: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> Threshold:
    """What `configure` set for this layer, else what the model's configuration says, else dense."""
    configured = getattr(module, "blasst_thresholds", None)
    if configured is not None:
        return configured[phase]
    holder = _holder(module, "sparse_attention_config")
    if holder is None:
        return DENSE
    name, layer = type(module).__name__, _layer(module)
    if torch.compiler.is_compiling():
        schedule = _schedule(holder, name, layer, phase)
        if schedule is None:
            return DENSE
        schedule = schedule.of_call(key.shape[2])
        thresholds = schedule.at((ranges[:, 1] - ranges[:, 0]).cpu())[:, 0]
        return Threshold(thresholds, order=schedule.order)
    if ranges is None:
        lengths = [key.shape[2]] * key.shape[0]
    else:
        lengths = (ranges[:, 1] - ranges[:, 0]).tolist()
    entry = holder.sparse_attention_config
    rule = thresholds_for(entry, name, layer, phase, lengths, key.shape[2])
    if rule.threshold is not None:
        inputs = (t.transpose(1, 2) for t in (query, key, value))
        parsed(entry).tell_tiles(phase, lambda: tile_shape(*inputs, phase=phase)[:2])
    return Threshold(rule.threshold, order=rule.order)


def _holder(module: nn.Module, key: str) -> PreTrainedConfig | None:
    """The configuration that holds this key: the layer's, else that of the model around it."""
    for config in (module.config, getattr(module, _OUTER, None)):
        if getattr(config, key, None) is not None:
            return config
    return None


@torch.compiler.assume_constant_result
def _schedule(
    holder: PreTrainedConfig, attention_class: str, layer: int, phase: str
) -> Schedule | None:
    """What a compiled pass computes thresholds from; it keeps what held when it was compiled."""
    return parsed(holder.sparse_attention_config).schedule(attention_class, layer, phase)


def visit_of(module: nn.Module, call: Call, ranges: Tensor | None, causal: bool) -> Visit:
    """What the layer's policy, or the configuration's, lets the call visit."""
    policy = getattr(module, "blasst_policy", None)
    if policy is None:
        holder = _holder(module, "blasst_policy")
        if holder is None:
            return Visit()
        policy = from_dict(holder.blasst_policy)
    if not causal:
        raise ValueError(
            f"{type(module).__name__} is not causal; blasst_policy needs causal layers"
        )
    visit = policy.visit(call)
    if visit.longest is not None:
        keys = call.key.shape[1]
        longest = torch.tensor(keys) if ranges is None else (ranges[:, 1] - ranges[:, 0]).max()
        _require(
            longest <= visit.longest,
            f"blasst_policy is {policy.to_dict()}, which is for at most {visit.longest} keys; a "
            f"request has more (the cache has room for {keys})",
        )
    return visit


@dataclass(frozen=True)
class _Share:
    """The heads of a layer that this process holds under tensor parallelism."""

    first: int
    end: int
    total: int
    """Heads of the whole model."""
    group: "torch.distributed.ProcessGroup"
    """The processes that hold the others."""

    def of_thresholds(self, values: Any) -> Any:
        """This process's part of thresholds that `Threshold` takes for the whole model."""
        if values is None:
            return None
        values = torch.as_tensor(values, dtype=torch.float32)
        if values.dim() == 0 or values.shape[-1] == 1:
            return values
        if values.shape[-1] != self.total:
            raise ValueError(
                f"thresholds are {list(values.shape)}; the last dimension must be 1 or the "
                f"model's {self.total} heads (not only those of this process)"
            )
        return values[..., self.first : self.end]

    def spread(self, own: Tensor, dim: int) -> Tensor:
        """This process's heads among zeros for the others, along `dim`."""
        shape = list(own.shape)
        shape[dim] = self.total
        whole = own.new_zeros(shape)
        whole.narrow(dim, self.first, self.end - self.first).copy_(own)
        return whole


def _share(module: nn.Module, heads: int) -> _Share | None:
    """Which of the layer's heads the `heads` are that this process has; None: all of them."""
    total = getattr(module.config, "num_attention_heads", heads)
    if heads == total or not is_sharded(module):
        return None
    projection = getattr(getattr(module, "q_proj", None), "weight", None)
    mesh = getattr(projection, "device_mesh", None)
    name = type(module).__name__
    if mesh is None:
        raise ValueError(
            f"{name} is split over processes and has no q_proj that is; blasst cannot tell which "
            "heads this process holds"
        )
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if heads * mesh.size() != total:
        raise ValueError(
            f"{name} has {heads} of {total} heads on one of {mesh.size()} processes; blasst needs "
            "the same number on each"
        )
    first = heads * mesh.get_local_rank()
    return _Share(first, first + heads, total, mesh.get_group())


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of this module are split over processes."""
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


class Recording:
    """What `record` collected while it was active, by phase, layer and head.

    Of a tensor-parallel model: of all its heads, on every process, once the block has ended there.
    """

    wants_maxima = False
    """Whether results shall have their tile maxima."""

    def __init__(self, gaps: bool = False) -> None:
        self.wants_gaps = gaps
        self._counts: dict[tuple[str, int], Tensor] = {}
        self._gaps: dict[tuple[str, int], Tensor] = {}
        self._partial: dict[tuple[str, int], _Share] = {}

    def add(self, phase: str, layer: int, result: Result, share: _Share | None) -> None:
        """Count one attention call."""
        key = (phase, layer)
        counts = torch.stack([result.stats.visitable.sum(0), result.stats.skipped.sum(0)])
        gaps = result.gaps
        if share is not None:
            self._partial[key] = share
            counts = share.spread(counts, 1)
            gaps = None if gaps is None else share.spread(gaps, 0)
        self._counts[key] = self._counts[key] + counts if key in self._counts else counts
        if self.wants_gaps:
            self._gaps[key] = self._gaps[key] + gaps if key in self._gaps else gaps

    def gather(self) -> None:
        """Add up what the processes counted, each its own heads; all of them must call it."""
        for key in sorted(self._partial):
            group = self._partial[key].group
            for counted in (self._counts, self._gaps):
                if key in counted:
                    torch.distributed.all_reduce(counted[key], group=group)
        self._partial.clear()

    def gaps(self, phase: str) -> Tensor:
        """[layers, heads, 514] int64: visited tiles by gap, see `Result.gaps`."""
        if not self.wants_gaps:
            raise ValueError("this recording has no gaps; use record(gaps=True)")
        gaps = [self._gaps[phase, layer] for layer in self.layers(phase)]
        return torch.stack(gaps) if gaps else torch.zeros(0, 1, GAP_BINS, dtype=torch.int64)

    def layers(self, phase: str) -> list[int]:
        """Layers that ran in this phase."""
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")
        if self._partial:
            raise ValueError(
                "the recording of a tensor-parallel model can be read after the block of "
                "blasst.record has ended, which is when its processes add up their heads"
            )
        return sorted(layer for p, layer in self._counts if p == phase)

    def tiles(self, phase: str) -> Tensor:
        """[layers, 2, heads] int64: visitable tiles and skipped tiles."""
        counts = [self._counts[phase, layer] for layer in self.layers(phase)]
        return torch.stack(counts) if counts else torch.zeros(0, 2, 1, dtype=torch.int64)

    def by_head(self, phase: str) -> Tensor:
        """[layers, heads] float64: skipped tiles over visitable tiles."""
        counts = self.tiles(phase).double()
        return counts[:, 1] / counts[:, 0].clamp(min=1)

    def by_layer(self, phase: str) -> Tensor:
        """[layers] float64: skipped tiles over visitable tiles, over all heads."""
        counts = self.tiles(phase).double().sum(-1)
        return counts[:, 1] / counts[:, 0].clamp(min=1)

    def sparsity(self, phase: str, layers: Iterable[int] | None = None) -> float:
        """Skipped tiles over visitable tiles, over all heads of these layers (default: all)."""
        wanted = set(self.layers(phase) if layers is None else layers)
        picked = [layer in wanted for layer in self.layers(phase)]
        visitable, skipped = self.tiles(phase)[picked].sum((0, 2)).tolist()
        return skipped / max(1, visitable)


_active: list[Recording] = []


@contextmanager
def record(*, gaps: bool = False) -> Iterator[Recording]:
    """Count visitable and skipped tiles of every attention call of `blasst` models inside.

    Of a tensor-parallel model every process must record: at the end they add up their heads.

    Args:
        gaps: count the visited tiles by gap as well: what calibration reads thresholds from.

    >>> with blasst.record() as r:
    ...     model.generate(**inputs)
    >>> r.sparsity("prefill"), r.by_layer("prefill"), r.by_head("decode")
    """
    with recording_with(Recording(gaps)) as recording:
        yield recording


@contextmanager
def recording_with(recording: Recording) -> Iterator[Recording]:
    """Every attention call of `blasst` models inside is added to this recording."""
    _active.append(recording)
    try:
        yield recording
    finally:
        _active.remove(recording)
    recording.gather()


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask interface: which keys, and which of its queries, each request uses.

    Args:
        batch_size: requests.
        q_length: queries a request.
        kv_length: keys a request has room for.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: the pattern: causal, sliding window or all keys.
        attention_mask: [batch, positions] bool, false at padding.
        local_size: keys that a query sees in a sliding window, itself included.
        config: the model's.
        device: where the ranges go.

    Returns:
        None for a causal mask over all keys and queries, else [batch, 1, 1, 5] int32: first key,
        end of the keys, end of the queries; sliding window (0: none), causal. The last two are
        the same for all requests. Four dimensions, for Transformers passes those on untouched.
    """
    causal, sliding = _pattern(mask_function)
    window = local_size if sliding and local_size < kv_length else 0
    tracing = torch.compiler.is_compiling()
    if not tracing:
        q_offset = int(q_offset)
        if config is not None:
            _check_model(type(config))
    first_query = q_offset - kv_offset if causal else 0
    end = first_query + q_length if causal else kv_length
    _check_padding(attention_mask, kv_offset + end)
    plain = not tracing and causal and not window and end == kv_length
    if plain and (attention_mask is None or attention_mask[:, kv_offset : kv_offset + end].all()):
        return None

    index = torch.arange(kv_length, device=device)
    used = (index < end).expand(batch_size, -1)
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        used = used & padding[:, kv_offset : kv_offset + kv_length]
    first = used.int().argmax(-1)
    last = first + used.sum(-1)
    _require(
        (used == ((index >= first[:, None]) & (index < last[:, None]))).all(),
        "attention_mask has padding between tokens of a request; blasst needs the tokens of a "
        "request to follow each other (pad on the left for generation)",
    )
    # A request that is padded on the right has as many trailing queries of padding.
    queries = (last - first_query).clamp(0, q_length) if causal else torch.full_like(last, q_length)
    same = torch.ones_like(last)
    ranges = torch.stack([first, last, queries, same * window, same * causal], -1)
    return ranges.to(torch.int32)[:, None, None]


def _check_padding(attention_mask: Tensor | None, end: int | Tensor) -> None:
    if attention_mask is None:
        return
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}; it must be [batch, positions]"
        )
    if isinstance(end, int) and attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but this pass ends at "
            f"position {end}; it must cover the tokens in the cache as well"
        )


def _require(condition: Tensor, message: str) -> None:
    """An error unless `condition` [] holds; while tracing, a check in the graph."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _pattern(mask_function: Callable) -> tuple[bool, bool]:
    """Whether a mask pattern is causal, and sliding; an error if the operator cannot do it."""
    if mask_function is masking_utils.causal_mask_function:
        return True, False  # without its name, which torch 2.11 cannot trace
    names = set(_pattern_names(mask_function))
    if names == {"bidirectional_mask_function"}:
        return False, False
    if "causal_mask_function" in names and names <= {
        "causal_mask_function",
        "sliding_window_overlay",
    }:
        return True, "sliding_window_overlay" in names
    raise ValueError(
        f"mask pattern {' & '.join(sorted(names))} is not supported by attn_implementation="
        f"{NAME!r}; it does causal, causal with a sliding window, and bidirectional masks with "
        "padding at either end (packed sequences: pass them as a padded batch with its "
        "attention_mask)"
    )


def _pattern_names(mask_function: Callable) -> Iterator[str]:
    """Names of the patterns that `masking_utils.and_masks` put together."""
    name = mask_function.__qualname__.split(".")[0]
    if name == "and_masks":
        for part in mask_function.__closure__[0].cell_contents:
            yield from _pattern_names(part)
    else:
        yield name


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface.

    Args:
        module: the attention layer.
        query: [batch, heads, query_length, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        value: [batch, kv_heads, keys, value_dim].
        attention_mask: what `key_ranges` returned.
        dropout: must be 0.
        scaling: softmax scale.
        is_causal: default: the layer's.
        sliding_window: keys that a query sees, itself included.
        softcap: cap of the scores.
        s_aux: [heads] sink logits.
        kwargs: what else the model passes on; an error if it changes the result.

    Returns:
        [batch, query_length, heads, value_dim], and no attention weights.
    """
    _refuse_unsupported(module, dropout, attention_mask, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    keys = key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < keys else 0
    ranges = None if attention_mask is None else attention_mask[:, 0, 0]
    _check_agreement(module, ranges, window, causal, query.shape[2])
    phase = "decode" if query.shape[2] == 1 else "prefill"
    thresholds = _threshold(module, phase, ranges, query, key, value)
    share = _share(module, query.shape[1])
    own = share.of_thresholds if share else lambda values: values
    starts, lengths, query_lengths = (None,) * 3 if ranges is None else ranges[:, :3].unbind(1)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    call = Call(_layer(module), phase, query, key, lengths)
    visit = visit_of(module, call, ranges, causal)
    if share is not None and any(part is not None for part in visit):
        raise ValueError(
            "a policy (blasst.set_policy, blasst_policy) is not supported for a tensor-parallel "
            "model: it would count the heads of this process only"
        )
    result = attention(
        query,
        key,
        value,
        bands=visit.bands,
        blocks=visit.blocks,
        threshold=own(thresholds.threshold),
        threshold_scale_factor=own(thresholds.threshold_scale_factor),
        absolute_threshold=own(thresholds.absolute_threshold),
        order=thresholds.order,
        phase=phase,
        causal=causal,
        scale=scaling,
        window=(window - 1, None) if window else None,
        softcap=softcap,
        sinks=s_aux,
        starts=starts,
        lengths=lengths,
        query_lengths=query_lengths,
        return_stats=bool(_active),
        return_gaps=any(recording.wants_gaps for recording in _active),
        return_tile_maxima=any(recording.wants_maxima for recording in _active),
    )
    if not isinstance(result, Result):
        return result, None
    for recording in _active:
        recording.add(phase, _layer(module), result, share)
    return result.out, None


def _check_agreement(
    module: nn.Module, ranges: Tensor | None, window: int, causal: bool, query_length: int
) -> None:
    """The mask and the layer must mean the same pattern, for only one of them can be followed."""
    name = type(module).__name__
    if window and not causal:
        raise ValueError(f"{name}: a sliding window without a causal mask is not supported")
    if ranges is None:
        if window:
            raise ValueError(
                f"{name} has a sliding window of {window}, but the model's mask has none"
            )
        return
    _require(
        ranges[0, 3] == window,
        f"{name} passes a sliding window of {window or None} to attention, but the model's mask "
        "has another",
    )
    if query_length > 1:
        _require(
            ranges[0, 4] == causal,
            f"{name} asks for is_causal={causal}, but the model's mask says otherwise",
        )


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(f"{type(module).__name__} has no layer_idx; blasst needs it")
    return layer


def _refuse_unsupported(
    module: nn.Module, dropout: float, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """An error for everything that would change the result and is not supported."""
    if dropout:
        raise ValueError(
            f"{type(module).__name__} asks for attention dropout {dropout}; blasst supports 0 only "
            "(model.eval(), or attention_dropout=0)"
        )
    if attention_mask is not None and (
        attention_mask.dtype != torch.int32 or attention_mask.shape[1:] != (1, 1, 5)
    ):
        raise ValueError(
            f"attention_mask is a {attention_mask.dtype} tensor of shape "
            f"{list(attention_mask.shape)}; blasst takes [batch, positions] padding masks, no "
            "prepared 4-d ones"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported by attn_implementation={NAME!r}")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError("output_attentions is not supported: blasst never forms the weights")


_UNSUPPORTED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "seq_idx",
    "position_bias",
    "head_mask",
    "block_table",
    "block_indices",
    "indices",
    "sinks",
)
"""Arguments that change what a layer computes, under the names that Transformers gives them."""


register_module_module_registration_hook(_note_outer)
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, key_ranges)
