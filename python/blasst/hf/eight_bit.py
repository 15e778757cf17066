"""A cache of Transformers whose keys and values lie in 8 bits, and what attention makes of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from blasst.errors import NotSupportedError
from blasst.hf.layers import NAME, modules_of_layers
from blasst.hf.tracing import is_at_hand
from blasst.ops.arguments import check_flags, check_whole_number
from blasst.ops.library import CACHES
from blasst.ops.quantize import check_finite, in_units, rotate, unit_of

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ROOM = 256
"""Tokens that a growing cache has room for at first."""
SETTLED = 1024
"""Tokens from which on a single new one no longer changes the unit of those before it."""
SHORT = 64
"""A prompt of fewer tokens says little about the range of those to come."""


def eight_bit_cache(
    model: PreTrainedModel,
    *,
    keys: str = "int8",
    values: str | None = "int8",
    max_cache_len: int | None = None,
    center: bool = True,
) -> Cache:
    """A cache that keeps a model's keys and values in 8 bits, for prefill in chunks and decode.

    Of each request and KV head in one unit, which the first pass chooses; that pass itself attends
    to what it is given. Int8 keys are rotated by a Hadamard matrix, and so are their queries. Later
    chunks may make a unit larger; a single token after the first 1,024 (in a static cache: any) is
    cut off at its range. Layers with a sliding window, or whose cache is of another kind, keep what
    Transformers gives them. NaN and infinities have no bytes: a pass that makes them is a
    ValueError on the CPU; on a GPU nothing looks for them.

    Args:
        model: runs with `attn_implementation="blasst"`.
        keys: "int8" or "fp8" (e4m3).
        values: likewise, or None: in 16 or 32 bits, as the model makes them.
        max_cache_len: tokens of a static cache; default: it grows.
        center: take the mean of the first pass off int8 keys: better where they have a large common
            part. It moves all scores of a row alike, so layers with sinks or a soft cap, absolute
            thresholds and recorded maxima need False.

    Raises:
        NotSupportedError: no layer of the model keeps all tokens by head.
        TypeError: no model, or a length that is no whole number.
        ValueError: another kind, a length below 1, or a model that runs another attention, which
            would take the bytes for numbers.

    >>> model.generate(**inputs, cache=blasst.eight_bit_cache(model))
    """
    for name, kind, choices in (("keys", keys, [*KINDS]), ("values", values, [*KINDS, None])):
        if kind not in choices:
            raise ValueError(
                f"{name} is {kind!r}; it must be one of {', '.join(map(repr, choices))}"
            )
    check_flags(center=center)
    if max_cache_len is not None:
        check_whole_number("max_cache_len", max_cache_len)
    modules_of_layers(model, None)  # or says which attention it runs
    kept = Kinds(KINDS[keys], None if values is None else KINDS[values], center and keys == "int8")
    if max_cache_len is None:
        cache, replaced = DynamicCache(config=model.config), DynamicLayer
    else:
        cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
        replaced = StaticLayer
    plain = [type(layer) is replaced for layer in cache.layers]
    if not any(plain) or hasattr(model.config.get_text_config(), "kv_lora_rank"):
        raise NotSupportedError(
            f"{type(model).__name__} has no layer that caches the keys and values of each head and "
            "token; a cache in 8 bits is for those (latents: blasst.latent_cache)"
        )
    for layer, is_plain in enumerate(plain):
        if is_plain and max_cache_len is None:
            cache.layers[layer] = EightBitLayer(kept)
        elif is_plain:
            cache.layers[layer] = StaticEightBitLayer(kept, max_cache_len)
    return cache


class Kinds(NamedTuple):
    """What a layer keeps."""

    keys: torch.dtype
    values: torch.dtype | None
    """None: as they come."""
    center: bool
    """Whether the keys' mean is taken off."""


class Plain:
    """Keeps states as they come."""

    def encode(self, states: Tensor, _: Tensor | None, **__: bool) -> Tensor:
        """What is stored of them."""
        return states

    def as_given(self, stored: Tensor) -> Tensor:
        """What is stored, as attention takes it."""
        return stored

    def choose(self, requests: Tensor) -> None:
        """Take these requests."""


class Quantizer:
    """Makes 8 bits of a layer's keys, or of its values."""

    def __init__(self, dtype: torch.dtype, *, rotates: bool = False, centers: bool = False) -> None:
        self.dtype, self.rotates, self.centers = dtype, rotates, centers
        self.unit: Tensor | None = None
        """[batch, kv_heads] float32; None: nothing has come yet."""
        self.mean: Tensor | None = None
        """[batch, kv_heads, 1, size] float32, if one is taken off."""

    def encode(self, states: Tensor, stored: Tensor | None, *, widens: bool) -> Tensor:
        """[batch, kv_heads, tokens, size] as int8 that holds the bits of `dtype`.

        Args:
            states: that are to be stored.
            stored: those before them; None: they are the first and choose mean and unit.
            widens: the unit grows to hold them, and what is stored is rounded anew; otherwise they
                are cut off at its range.
        """
        if stored is None and self.centers:
            self._keep("mean", states.double().mean(2, keepdim=True).float())
        turned = states.float() if self.mean is None else states.float() - self.mean
        if self.rotates:
            turned = rotate(turned)
        if stored is None or widens:
            largest = turned.abs().amax((2, 3))
            if stored is None:
                self._keep("unit", unit_of(largest * self._spare(states.shape[2]), self.dtype))
            else:
                self._widen(unit_of(largest, self.dtype), stored)
        return in_units(turned, self.unit[..., None, None], self.dtype).view(torch.int8)

    def as_given(self, stored: Tensor) -> Tensor:
        """What is stored, as attention takes it (`read`)."""
        t = stored.view(self.dtype)
        t.blasst_scale, t.blasst_rotated, t.blasst_centered = self.unit, self.rotates, self.centers
        return t

    def choose(self, requests: Tensor) -> None:
        """Take these requests, in this order, one perhaps several times."""
        self._keep("unit", self.unit.index_select(0, requests))
        if self.mean is not None:
            self._keep("mean", self.mean.index_select(0, requests))

    def _spare(self, tokens: int) -> float:
        """How much larger the range is than the first states: fp8 has exponents to spare."""
        if self.dtype != torch.int8:
            return 4.0
        return 1.125 if tokens >= SHORT else 2.0

    def _widen(self, unit: Tensor, stored: Tensor) -> None:
        wider = torch.maximum(self.unit, unit)
        if is_at_hand(unit.device) and torch.equal(wider, self.unit):
            return
        factor = (wider / self.unit)[..., None, None]
        stored.copy_(in_units(stored.view(self.dtype), factor, self.dtype).view(torch.int8))
        self._keep("unit", wider)

    def _keep(self, name: str, t: Tensor) -> None:
        """In the same memory, if that is as large: a graph that was captured reads it there."""
        old = getattr(self, name)
        if old is None or old.shape != t.shape:
            setattr(self, name, t.clone())
        else:
            old.copy_(t)


def _stores(kept: Kinds) -> tuple[Plain | Quantizer, Plain | Quantizer]:
    return (
        Quantizer(kept.keys, rotates=kept.keys == torch.int8, centers=kept.center),
        Plain() if kept.values is None else Quantizer(kept.values),
    )


def _check_finite(stores: tuple[Plain | Quantizer, ...], states: tuple[Tensor, ...]) -> None:
    for name, store, t in zip(("keys", "values"), stores, states, strict=True):
        if isinstance(store, Quantizer):
            check_finite(name, t)


class EightBitLayer(DynamicLayer):
    """A cache layer that grows; `keys` and `values` hold the bits."""

    def __init__(self, kept: Kinds) -> None:
        super().__init__()
        self._stores = _stores(kept)
        self._rooms: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, tokens, size] of each.

        Returns:
            All tokens as attention takes them, the first time as they came.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, states = self.get_seq_length(), (key_states, value_states)
        _check_finite(self._stores, states)
        widens = key_states.shape[-2] > 1 or length < SETTLED
        self.keys, self.values = (
            self._append(i, stored if length else None, states[i], widens=widens)
            for i, stored in enumerate((self.keys, self.values))
        )
        if not length:
            return states
        keys, values = self._stores
        return keys.as_given(self.keys), values.as_given(self.values)

    def _append(self, i: int, stored: Tensor | None, states: Tensor, *, widens: bool) -> Tensor:
        """What is stored with the new states behind it, in a room that grows by half."""
        new = self._stores[i].encode(states, stored, widens=widens)
        length = 0 if stored is None else stored.shape[-2]
        room, end = self._rooms[i], length + new.shape[-2]
        is_at_home = length > 0 and room is not None and stored.data_ptr() == room.data_ptr()
        if not is_at_home or end > room.shape[-2]:
            room = new.new_empty((*new.shape[:2], max(ROOM, end + end // 2), new.shape[-1]))
            if length > 0:
                room[:, :, :length] = stored
            self._rooms[i] = room
        room[:, :, length:end] = new
        return room[:, :, :end]

    def reset(self) -> None:
        """Empty, as at first."""
        self._rooms = [None, None]
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every request so many times."""
        if self.get_seq_length() > 0:
            requests = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(requests.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these requests."""
        if self.get_seq_length() > 0:
            indices = indices.to(self.keys.device)
            super().batch_select_indices(indices)
            for store in self._stores:
                store.choose(indices)


class StaticEightBitLayer(StaticLayer):
    """A cache layer of a fixed size; `keys` and `values` hold the bits."""

    def __init__(self, kept: Kinds, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self._stores = _stores(kept)
        self._is_empty = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, tokens, size] of each behind what is there.

        Returns:
            The whole room as attention takes it, the first time the states as they came.
        """
        states, is_first = (key_states, value_states), self._is_empty
        _check_finite(self._stores, states)
        widens = key_states.shape[-2] > 1
        parts = zip(self._stores, (self.keys, self.values), states, strict=True)
        super().update(
            *(
                store.encode(new, None if is_first else stored, widens=widens)
                for store, stored, new in parts
            )
        )
        self._is_empty = False
        keys, values = self._stores
        return states if is_first else (keys.as_given(self.keys), values.as_given(self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the next call, and where they begin."""
        return (query_length, 0) if self._is_empty else super().get_mask_sizes(query_length)

    def reset(self) -> None:
        """Empty; the memory stays."""
        super().reset()
        self._is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search."""
        if self._is_empty:
            return
        beam_idx = beam_idx.to(self.keys.device)
        for store, t in zip(self._stores, (self.keys, self.values), strict=True):
            t.copy_(t.index_select(0, beam_idx))
            store.choose(beam_idx)


def read(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A call's query as it goes with these keys, and the scales of keys and values in 8 bits.

    Args:
        query: [batch, heads, query_length, head_dim].
        key: what a cache layer returned, or any other.
        value: likewise.

    Raises:
        NotSupportedError: 8 bits from elsewhere, whose scales nobody knows.
    """
    scales = {}
    for name, t in (("k_scale", key), ("v_scale", value)):
        if t.dtype in CACHES:
            scale = getattr(t, "blasst_scale", None)
            if scale is None:
                raise NotSupportedError(
                    f"attention is given {t.dtype} of shape {list(t.shape)} without scales; under "
                    f"attn_implementation={NAME!r} 8 bits come from blasst.eight_bit_cache, and "
                    "straight from its layer"
                )
            scales[name] = scale
    return rotate(query) if getattr(key, "blasst_rotated", False) else query, scales


def check_level(key: Tensor, wanting: dict[str, bool]) -> None:
    """An error if the keys are centred and something looks at the level of their scores."""
    found = [name for name, is_wanted in wanting.items() if is_wanted]
    if found and getattr(key, "blasst_centered", False):
        raise NotSupportedError(
            f"the cache took the mean off its keys, which moves all scores of a row; a layer with "
            f"{' and '.join(found)} needs blasst.eight_bit_cache(model, center=False)"
        )
