"""Multi-head latent attention (MLA), and its decode over the latents themselves.

The layers of DeepSeek, Kimi and GLM cache one latent a token, which all heads share, and a rotary
part of its key. Transformers makes the keys and values of every head of the whole cache anew at
each step. Both are linear in the latent, so one may as well take the keys' matrix into the query
("absorb" it) and apply the values' to the output: attention of all heads over one head of keys,
latent and rotary part, whose values are its latent part.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blasst.errors import NotSupportedError
from blasst.hf.layers import NAME, modules_of_layers
from blasst.hf.settings import Setting
from blasst.hf.weights import is_quantised

CALIBRATION = "blasst_calibration"
"""The interface of a calibration, which takes latents as this package's own does."""
ROOM = 256
"""Tokens that a cache has room for at first."""


def absorb(model: nn.Module, layers: Iterable[int] | None = None) -> Setting:
    """Decode over the latents of a model with multi-head latent attention, without expanding them.

    The same numbers within rounding: for DeepSeek-V3 a step reads 576 elements a token, where it
    otherwise makes 40,960 of them. Passes of more than one query a request, and those that are
    trained on, expand as before. The heads of a layer then decide together which tiles of a step
    are dropped: calibrate thresholds for decode in this form. `latent_cache` makes a cache that
    needs no copies.

    Args:
        model: runs with `attn_implementation="blasst"`; also wrapped, or a part of a model.
        layers: of the language model; default: all that have such attention.

    Returns:
        For a `with` statement, after which the model is as it was before. `reset` undoes it, too.

    Raises:
        ValueError: the model runs another attention, or has no such layer.
        NotSupportedError: no layer has such attention, or it is not linear in the latent: its
            `kv_b_proj` is quantised or adapted, say.
    """
    modules = [m for m in modules_of_layers(model, layers) if hasattr(m, "expand_kv")]
    if not modules:
        raise NotSupportedError(
            f"{type(model).__name__} has no layer with multi-head latent attention (a method "
            "expand_kv, as Transformers' DeepSeek, Kimi and GLM have it) that could be absorbed"
        )
    for module in modules:
        _check(module)
    setting = Setting(modules)
    for module in modules:
        module.blasst_absorbs = True
        module.expand_kv = MethodType(_latents_of, module)
    return setting


class Taken(NamedTuple):
    """What an attention call is to compute."""

    query: Tensor
    """[batch, heads, query_length, head_dim]"""
    key: Tensor
    """[batch, kv_heads, keys, head_dim]"""
    value: Tensor
    """[batch, kv_heads, keys, value_dim]"""
    of_values: Tensor | None = None
    """[heads, head's value_dim, value_dim]: what the output is still to be multiplied by."""

    def finish(self, out: Tensor) -> Tensor:
        """[batch, query_length, heads, the head's value_dim] of the call's output."""
        if self.of_values is None:
            return out
        return torch.einsum("bqhr,hvr->bqhv", out, self.of_values.to(out.dtype))


def take(module: nn.Module, phase: str, query: Tensor, key: Tensor, value: Tensor) -> Taken:
    """The inputs of a layer's attention call, which are latents if the layer absorbs."""
    if not vars(module).get("blasst_absorbs"):
        return Taken(query, key, value)
    rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
    if phase != "decode":
        return Taken(query, *_expanded(module, key[..., :rank], key[..., rank:]))
    of_keys, of_values = _matrices(module)
    latent = torch.einsum("bhqd,hdr->bhqr", query[..., :nope], of_keys.to(query.dtype))
    return Taken(torch.cat([latent, query[..., nope:]], -1), key, value, of_values)


def _latents_of(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a layer's `expand_kv`: key and value, [batch, 1, keys, size], one memory."""
    if module.config._attn_implementation not in (NAME, CALIBRATION):
        return _expanded(module, kv_nope, k_rot)
    key = joined(kv_nope, k_rot)
    return key, key[..., : kv_nope.shape[-1]]


def _expanded(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    return type(module).expand_kv(module, kv_nope, k_rot)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Both along the last dimension: a view where they lie side by side, as in a `LatentLayer`."""
    size = a.shape[-1] + b.shape[-1]
    if a.requires_grad or b.requires_grad:
        return torch.cat([a, b], -1)
    if torch.compiler.is_compiling():
        return _joined_once(a, b)
    side_by_side = (
        a.stride() == b.stride()
        and a.stride()[-2:] == (max(a.stride(-2), size), 1)
        and a.data_ptr() + a.shape[-1] * a.element_size() == b.data_ptr()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )
    return (
        a.as_strided((*a.shape[:-1], size), a.stride()) if side_by_side else torch.cat([a, b], -1)
    )


@torch.library.custom_op("blasst::join_latents", mutates_args=())
def _joined_once(a: Tensor, b: Tensor) -> Tensor:
    """As torch.cat, which a compiler would do once for keys and once more for values."""
    return torch.cat([a, b], -1)


@_joined_once.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], a.shape[-1] + b.shape[-1])


def _matrices(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Of latents: keys [heads, qk_nope_head_dim, rank] and values [heads, v_head_dim, rank]."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    return module.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))).split(sizes, 1)


@torch.no_grad()
def _check(module: nn.Module) -> None:
    """An error unless a layer's keys and values are what `take` has for them, on one latent."""
    name, projection = type(module).__name__, module.kv_b_proj
    is_linear = type(projection) is nn.Linear and not is_quantised(projection.weight)
    if not is_linear or projection.bias is not None:
        raise NotSupportedError(
            f"kv_b_proj of {name} is {projection}; to be absorbed it must be a plain Linear "
            "without bias, neither quantised nor adapted"
        )
    weight = projection.weight
    latent, rotary = (
        torch.linspace(-1, 2, size, dtype=torch.float32).to(weight)[None, None, None]
        for size in (module.kv_lora_rank, module.qk_rope_head_dim)
    )
    got = [t[0, :, 0].float() for t in _expanded(module, latent, rotary)]
    of_keys, of_values = (m.float() @ latent[0, 0, 0].float() for m in _matrices(module))
    wanted = [torch.cat([of_keys, rotary[0, 0].float().expand(len(of_keys), -1)], -1), of_values]
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0.05, atol=0.02 * b.abs().max()):
            raise NotSupportedError(
                f"{name}.expand_kv makes keys and values in another way than DeepSeek's, which "
                "blasst can absorb"
            )


def latent_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache for `absorb`: latents and rotary parts of a layer lie in one tensor, which grows.

    Any other cache of Transformers does as well; what it holds apart is copied at each step.

    Args:
        model: whose layers it is for.

    Raises:
        NotSupportedError: no layer of the model keeps all tokens.

    >>> blasst.absorb(model)
    >>> model.generate(**inputs, cache=blasst.latent_cache(model))
    """
    cache = DynamicCache(config=model.config)
    grows = [type(layer) is DynamicLayer for layer in cache.layers]
    if not any(grows):
        raise NotSupportedError(
            f"{type(model).__name__} has no layer whose cache grows with the text; a latent cache "
            "is for multi-head latent attention over all tokens"
        )
    for layer, it_grows in enumerate(grows):
        if it_grows:
            cache.layers[layer] = LatentLayer()
    return cache


class LatentLayer(DynamicLayer):
    """A cache layer whose keys (latents) and values (rotary parts) are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._both: Tensor | None = None
        """[batch, 1, room, size]; `keys` and `values` begin at its first token, unless somebody
        has replaced them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [batch, 1, tokens, size] of each.

        Returns:
            The same of all tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, rank = self.get_seq_length(), key_states.shape[-1]
        end = begin + key_states.shape[-2]
        if not self._has_room(begin, end):
            self._make_room(begin, end, key_states, value_states)
        self._both[:, :, begin:end, :rank] = key_states
        self._both[:, :, begin:end, rank:] = value_states
        self.keys, self.values = self._both[:, :, :end, :rank], self._both[:, :, :end, rank:]
        return self.keys, self.values

    def reset(self) -> None:
        """Empty, as at first; Transformers 5.6 would keep the length, and zeros."""
        self._both = self.keys = self.values = None
        self.is_initialized = False

    def _has_room(self, begin: int, end: int) -> bool:
        own = begin > 0 and self._both is not None
        return own and self.keys.data_ptr() == self._both.data_ptr() and end <= self._both.shape[-2]

    def _make_room(self, begin: int, end: int, key_states: Tensor, value_states: Tensor) -> None:
        """Another tensor, half as large again as is needed, with the tokens that there are."""
        batch, heads, _, rank = key_states.shape
        room, size = max(ROOM, end + end // 2), rank + value_states.shape[-1]
        self._both = key_states.new_empty(batch, heads, room, size)
        if begin > 0:
            self._both[:, :, :begin, :rank] = self.keys
            self._both[:, :, :begin, rank:] = self.values
