"""Reading tokens with a model, for its last hidden states: its output layer is left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from blasst.ops.arguments import is_integer
from blasst.versions import cache_name

CHUNK = 8192
"""Tokens that are read at once, unless another number is asked for."""
TILE = 128
"""A multiple of the query rows of every kernel's tiles, so that chunks have the whole's tiles."""


def check_chunk(chunk: int) -> None:
    """An error if prompts cannot be read in chunks of so many tokens.

    Raises:
        TypeError: no whole number.
        ValueError: they cannot.
    """
    if not is_integer(chunk):
        raise TypeError(f"chunk is {chunk!r}; it must be a whole number")
    if chunk < TILE or chunk % TILE:
        raise ValueError(f"chunk is {chunk}; it must be a multiple of {TILE} tokens")


@contextmanager
def put_back(cache: Cache) -> Iterator[None]:
    """What is read inside is forgotten again, and the cache is what it was; no copy is made of it.

    Layers of other kinds than keys and values, which hold little, are copied.
    """
    before = [
        (layer, _state(layer), layer.get_seq_length() if _grows(layer) else None)
        for layer in cache.layers
    ]
    try:
        yield
    finally:
        for layer, state, length in before:
            if length is None:
                vars(layer).update(state)
            elif length < layer.get_seq_length():
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]


def _grows(layer: CacheLayerMixin) -> bool:
    """Whether a layer of a cache holds all keys and values, old ones first."""
    return type(layer) is DynamicLayer


def _state(layer: CacheLayerMixin) -> dict[str, Any]:
    """What a layer is put back to; a window's tensors are replaced at each step, never written."""
    if _grows(layer):
        return {}
    return dict(vars(layer)) if isinstance(layer, DynamicLayer) else deepcopy(vars(layer))


def read(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Cache | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Read tokens that follow those in the cache, which takes them up.

    Args:
        model: with or without its output layer.
        tokens: [batch, length] int64, on any device.
        cache: of what was read before; None: the tokens are read alone, and not kept.
        chunk: read so many tokens at once, so that what a layer computes fits in memory; None: all.

    Returns:
        [batch, length, hidden] last hidden states.

    Raises:
        ValueError: the model takes no cache.
    """
    if chunk is not None and tokens.shape[1] > chunk:
        cache = DynamicCache(config=model.config) if cache is None else cache
        return torch.cat([read(model, part, cache) for part in tokens.split(chunk, 1)], 1)
    body = model.base_model
    kept = {"use_cache": False} if cache is None else {cache_name(type(body)): cache}
    return body(tokens.to(body.device), **kept).last_hidden_state
