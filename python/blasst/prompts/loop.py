"""Prompts made of what a loop of the user's own feeds to the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blasst.versions import CACHE_NAMES

ForwardLoop = Callable[[PreTrainedModel], Any]
"""Runs the model on inputs of its own; what it returns does not matter."""


class _EnoughError(Exception):
    """Ends a loop that has fed enough."""


def fed_by(forward: ForwardLoop, model: PreTrainedModel, most: int) -> list[list[int]]:
    """The token sequences that a loop feeds to a model, padding left out.

    Args:
        forward: is called with the model, which runs as ever. Calls with a cache go on with the
            sequences of the call before.
        model: a decoder.
        most: so many tokens are needed at most; the loop is then ended.

    Raises:
        ValueError: a call without `input_ids`, or none at all.
    """
    found: list[list[int]] = []
    body = model.base_model

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "the forward loop runs the model without input_ids; prompts are made of tokens"
            )
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        goes_on = cache is not None and cache.get_seq_length() > 0 and len(found) >= len(ids)
        if not goes_on:
            found.extend([] for _ in ids)
        for sequence, row in zip(found[-len(ids) :], _in_use(ids, kwargs), strict=True):
            sequence.extend(row)
        if sum(map(len, found)) >= most:
            raise _EnoughError

    hook = body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        forward(model)
    except _EnoughError:
        pass
    finally:
        hook.remove()
    if not found:
        raise ValueError("the forward loop does not run the model")
    return found


def _in_use(ids: Tensor, kwargs: dict[str, Any]) -> list[list[int]]:
    """Each row's tokens, without those that its padding mask leaves out."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return ids.tolist()
    used = mask[:, -ids.shape[1] :].to(ids.device, torch.bool)
    return [row[kept].tolist() for row, kept in zip(ids, used, strict=True)]
