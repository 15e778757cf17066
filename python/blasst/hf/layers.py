"""Which modules of a model call Transformers' attention interface, and where each stands."""

import gc
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blasst.errors import NotSupportedError
from blasst.heads import heads_of_layer
from blasst.hf.tracing import module_of

NAME = "blasst"
PHASES = ("prefill", "decode")
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What modeling files call the interface."""


@dataclass(frozen=True)
class Place:
    """Where an attention module stands in its model."""

    name: str | None
    """Of the module in the whole model, as `named_modules` has it, with "model." before it if the
    whole model is one without a head; None outside of any."""
    layer: int
    """`layer_idx`, or where a tower's modules have none, their order."""
    tower: str = ""
    """Model type of the tower that it belongs to; "": the language model, or the only tower."""
    outer: PreTrainedConfig | None = None
    """The configuration of the whole model, if the module has another."""
    siblings: tuple[tuple[str, str], ...] = ()
    """Class and name of every attention module of the whole model."""
    is_only_mixer: bool = True
    """Whether tokens meet in attention alone, and not in recurrences or convolutions as well."""
    heads: int | None = None
    """Query heads, those of other processes too; None: the configuration does not say."""


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, or of what wraps one, that call the attention interface."""
    return [module for module in model.modules() if _calls_interface(type(module))]


def modules_of_layers(model: nn.Module, layers: Iterable[int] | None) -> list[nn.Module]:
    """The attention modules that run blasst, of these layers of the language model or of all.

    Raises:
        TypeError: no model, or layers that are no whole numbers.
        ValueError: the model runs another attention, or has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    wanted = None if layers is None else _checked(layers)
    modules = attention_modules(model)
    if not modules:
        raise NotSupportedError(
            f"{type(model).__name__} does not call Transformers' attention interface; "
            f"attn_implementation={NAME!r} cannot reach it"
        )
    running = [module for module in modules if runs_blasst(module)]
    if not running:
        used = modules[0].config._attn_implementation
        raise ValueError(f"the model's attn_implementation is {used!r}; load it with {NAME!r}")
    if wanted is None:
        return running
    places = {module: place_of(module) for module in running}
    known = {place.layer for place in places.values() if not place.tower}
    if unknown := wanted - known:
        raise ValueError(f"no attention layer {sorted(unknown)}; the model has {sorted(known)}")
    return [module for module, place in places.items() if not place.tower and place.layer in wanted]


def _checked(layers: Iterable[int]) -> set[int]:
    numbers = list(layers) if isinstance(layers, Iterable) else [None]
    if isinstance(layers, str) or not all(isinstance(number, Integral) for number in numbers):
        raise TypeError(f"layers is {layers!r}; it must be a list of layers' numbers, or None")
    if not numbers:
        raise ValueError("layers is empty; it must name one layer at least, or be None: all")
    return set(numbers)


def runs_blasst(module: nn.Module) -> bool:
    """Whether an attention module's configuration asks for blasst."""
    return module.config._attn_implementation == NAME


def place_of(module: nn.Module) -> Place:
    """Where an attention module stands; remembered by the module."""
    place = getattr(module, "blasst_place", None)
    if place is not None:
        return place
    for model in _whole_models():
        modules = dict(model.named_modules())
        if any(inner is module for inner in modules.values()):
            for inner, found in _places(model, modules):
                inner.blasst_place = found
    if getattr(module, "blasst_place", None) is None:
        layer = getattr(module, "layer_idx", None) or 0
        module.blasst_place = Place(None, layer, heads=_heads_of(module))
    return module.blasst_place


def _whole_models() -> Iterator[PreTrainedModel]:
    """The models that are no part of another.

    A layer does not know what it is a part of, and Transformers keeps no list of models. So this
    asks Python's garbage collector, once for each model that runs.
    """
    models = [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    return (model for model in models if id(model) not in inner)


def _places(
    model: PreTrainedModel, modules: dict[str, nn.Module]
) -> Iterator[tuple[nn.Module, Place]]:
    """The attention modules of a whole model, each with its place."""
    found = {name: m for name, m in modules.items() if _calls_interface(type(m))}
    main = type(_language_config(model.config, [m.config for m in found.values()]))
    is_headless = model.base_model is model and model.base_model_prefix
    prefix = f"{model.base_model_prefix}." if is_headless else ""
    siblings = tuple((type(module).__name__, prefix + name) for name, module in found.items())
    counted: dict[str, int] = {}
    parts = [part for part in modules.values() if isinstance(part, PreTrainedModel)]
    mixing = {type(part.config) for part in parts if _mixes_elsewhere(part)}
    for name, module in found.items():
        tower = "" if type(module.config) is main else module.config.model_type
        number = getattr(module, "layer_idx", None)
        if number is None:
            number = counted.get(tower, 0)
            counted[tower] = number + 1
        outer = None if module.config is model.config else model.config
        is_only_mixer = type(module.config) not in mixing
        heads = _heads_of(module)
        yield module, Place(prefix + name, number, tower, outer, siblings, is_only_mixer, heads)


def _heads_of(module: nn.Module) -> int | None:
    return heads_of_layer(module.config, getattr(module, "layer_idx", None) or 0)


def _mixes_elsewhere(model: PreTrainedModel) -> bool:
    """Whether tokens meet without attention: in layers, or in the embeddings (MobileBERT)."""
    types = getattr(model.config, "layer_types", None) or ()
    trigrams = getattr(model.config, "trigram_input", False)
    return model._is_stateful or trigrams or not _RECURRENT.isdisjoint(types)


_RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
"""Of Transformers' `layer_types`: those that are not attention alone."""


def _language_config(
    config: PreTrainedConfig, of_modules: list[PreTrainedConfig]
) -> PreTrainedConfig:
    """The configuration of a model's language part, where attention modules have one like it."""
    kinds = {type(of_module) for of_module in of_modules}
    for which in ({}, {"decoder": True}):
        try:
            found = config.get_text_config(**which)
        except (AttributeError, TypeError, ValueError):  # several candidates, or none
            continue
        if type(found) in kinds:
            return found
    return of_modules[0] if of_modules else config


def entry_of(module: nn.Module, key: str) -> Any | None:
    """What stands under a key of the layer's configuration, or of the model's around it."""
    return place_of_entry(module, key)[1]


def place_of_entry(module: nn.Module, key: str) -> tuple[dict[str, Any], Any | None]:
    """The attributes of the configuration that has an entry under the key, and the entry."""
    own = attributes_of(module.config)
    found = own.get(key)
    if found is not None:
        return own, found
    outer = place_of(module).outer
    around = own if outer is None else attributes_of(outer)
    return around, around.get(key)


def wants_weights(config: PreTrainedConfig) -> bool:
    """Whether a configuration asks attention for its weights."""
    if torch.compiler.is_compiling():
        return bool(getattr(config, "output_attentions", False))
    return bool(attributes_of(config).get("_output_attentions"))


def attributes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Its attributes; Transformers makes getattr slow, and every layer of every pass asks."""
    return object.__getattribute__(config, "__dict__")


@torch.compiler.assume_constant_result
def _place_when_compiled(identity: int) -> tuple[str, int]:
    """Tower and layer of the module with this `id`, for a pass that is being compiled."""
    place = place_of(module_of(identity))
    return place.tower, place.layer


def heads_of(module: nn.Module) -> int | None:
    """Query heads of a layer, see `Place`."""
    return _heads_of(module) if torch.compiler.is_compiling() else place_of(module).heads


def tower_and_layer(module: nn.Module) -> tuple[str, int]:
    """What recordings and policies know a layer by."""
    if torch.compiler.is_compiling():
        return _place_when_compiled(id(module))
    place = place_of(module)
    return place.tower, place.layer


@cache
def _calls_interface(kind: type) -> bool:
    """Whether modules of this class compute attention through Transformers' interface."""
    if issubclass(kind, PreTrainedModel):
        return False
    methods = {}
    for base in reversed(kind.__mro__):
        methods |= {name: f for name, f in vars(base).items() if isinstance(f, FunctionType)}
    return any(INTERFACE in _names(inspect.unwrap(f).__code__) for f in methods.values())


def _names(code: CodeType) -> Iterator[str]:
    """The global names that a function uses, and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
