"""What position_ids say of packed sequences, and how layers come to know them.

Models hand position_ids on to their masks, their layers, both, or neither. So each model notes what
it is given while its forward runs: masks are made with it, and a layer whose mask does not know it
asks for it.

Key ranges are [batch, 6], see `blasst.hf.masks.key_ranges`.
"""

import inspect
import threading
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

from blasst.hf.layers import NAME


class _Passes(threading.local):
    """What this thread is doing."""

    def __init__(self) -> None:
        self.running: tuple[tuple[nn.Module, Tensor], ...] = ()
        """Models whose forward runs and was given position_ids, with those; the innermost last."""
        self.of_mask: tuple[Tensor | None, Any] = None, None
        """See `take`."""


_PASSES = _Passes()


def note_positions(model: nn.Module) -> None:
    """Let a model, and the models in it, note position_ids while its forward runs."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not hasattr(part, "blasst_notes_positions"):
            names = list(inspect.signature(type(part).forward).parameters)
            place = names.index("position_ids") - 1 if "position_ids" in names else len(names)
            part.register_forward_pre_hook(partial(_begin, place), with_kwargs=True)
            part.register_forward_hook(_end, always_call=True)
            part.blasst_notes_positions = True


def _begin(place: int, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    position_ids = args[place] if place < len(args) else kwargs.get("position_ids")
    if isinstance(position_ids, Tensor):
        _PASSES.running = (*_PASSES.running, (model, position_ids))


def _end(model: nn.Module, *_: Any) -> None:
    if _PASSES.running and _PASSES.running[-1][0] is model:
        _PASSES.running = _PASSES.running[:-1]


def given(config: PreTrainedConfig) -> Tensor | None:
    """position_ids of the innermost running model with this configuration that was given some."""
    for model, position_ids in reversed(_PASSES.running):
        if model.config is config:
            return position_ids
    return None


def hand_positions_to_masks() -> None:
    """Let Transformers' mask functions keep position_ids for the mask interface, in every pass.

    They look at them themselves only where there is neither a cache nor a padding mask, and the
    patterns that they make of them then are not needed.
    """
    prepare = masking_utils._preprocess_mask_arguments

    @wraps(prepare)
    def prepare_with_positions(
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Any,
        position_ids: Tensor | None,
        layer_idx: int | None,
        encoder_hidden_states: Tensor | None = None,
    ) -> tuple:
        found = prepare(
            *(config, inputs_embeds, attention_mask, cache),
            *(position_ids, layer_idx, encoder_hidden_states),
        )
        if config._attn_implementation != NAME or found[0]:
            return found
        of_mask = None
        if encoder_hidden_states is None:  # the keys are the queries' own sequences
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            for known in (position_ids, given(config)):
                if of_mask is None and of_text(known, *shape) and known.device == device:
                    of_mask = known
        _PASSES.of_mask = of_mask, cache
        return *found[:2], None, *found[3:]

    masking_utils._preprocess_mask_arguments = prepare_with_positions


def take() -> tuple[Tensor | None, Any]:
    """Of the mask that is being made: position_ids [1 or batch, rows] and cache; None: unknown."""
    found, _PASSES.of_mask = _PASSES.of_mask, (None, None)
    return found


def of_text(position_ids: Any, batch: int, rows: int) -> bool:
    """Whether these are [1 or batch, rows] numbers, and not those of images in several axes."""
    return (
        isinstance(position_ids, Tensor)
        and position_ids.dim() == 2
        and position_ids.shape[0] in (1, batch)
        and position_ids.shape[1] == rows
    )


def of_rows(position_ids: Any, batch: int, rows: int) -> bool:
    """Whether these are positions of requests: [1 or batch, tokens] or [axes, 1 or batch, rows]."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() not in (2, 3):
        return False
    is_of_rows = position_ids.dim() == 2 or position_ids.shape[2] == rows
    return is_of_rows and position_ids.shape[-2] in (1, batch)


def offset(ranges: Tensor) -> Tensor:
    """[batch]: the key at which the first row stands; causal rows end where the keys do."""
    _, last, queries, _, causal, _ = ranges.unbind(1)
    return torch.where(causal > 0, last - queries, 0)


def used(ranges: Tensor, rows: int) -> Tensor:
    """[batch, rows] bool: rows that are no padding."""
    first, last, queries = (column[:, None] for column in ranges[:, :3].unbind(1))
    row = torch.arange(rows, device=ranges.device)
    position = row + offset(ranges)[:, None]
    return (row < queries) & (position >= first) & (position < last)


def cached(ranges: Tensor) -> Tensor:
    """[batch]: tokens in the cache, before the first row."""
    return (offset(ranges) - ranges[:, 0]).clamp(min=0)


def starts(position_ids: Tensor, in_use: Tensor) -> Tensor:
    """[batch, rows] bool: the first row of each sequence.

    Args:
        position_ids: [batch, rows].
        in_use: what `used` returned.
    """
    follows = torch.zeros_like(in_use)
    follows[:, 1:] = (position_ids.diff(dim=-1) == 1) & in_use[:, :-1]
    return in_use & ~follows


def several_unclear(position_ids: Tensor, ranges: Tensor, rows: int) -> Tensor:
    """[] bool: whether position_ids that are no number for every row start anew all the same.

    Args:
        position_ids: [1 or batch, other rows], the last of the pass or more than it has; or
            [axes, 1 or batch, rows]: within a sequence a text follows itself or what is at its
            greatest position, so that only a first token stands at 0 in every axis.
        ranges: of the pass.
        rows: of the pass.
    """
    in_use = used(ranges, rows)
    if position_ids.dim() == 3:
        position_ids = position_ids.expand(-1, len(ranges), -1)
        first, behind = position_ids[:, :, 1:], in_use[:, 1:] & in_use[:, :-1]
        is_text = (position_ids == position_ids[:1]).all(0)
        falls = is_text[:, 1:] & is_text[:, :-1] & (position_ids[0].diff(dim=-1) <= 0)
        return (behind & (falls | (first == 0).all(0))).any()
    count = position_ids.shape[1]
    in_use = in_use[:, -count:] if count <= rows else in_use.new_ones(len(ranges), count)
    return (starts(position_ids.expand(len(ranges), -1), in_use).sum(-1) > 1).any()


def follow(position_ids: Tensor, cached: int) -> bool:
    """Whether the rows of requests without padding go on one sequence each, behind `cached` keys.

    So nearly all do. Waits for the device.
    """
    in_a_row = (position_ids.diff() == 1).all()
    return bool(in_a_row & (position_ids[:, 0] >= cached).all())


def begin_later(ranges: Tensor, position_ids: Tensor, in_use: Tensor) -> Tensor:
    """[batch] bool: whether the first row belongs to a sequence that began behind another one."""
    first = position_ids.gather(1, in_use.int().argmax(-1, keepdim=True))[:, 0]
    return (first < cached(ranges)) & in_use.any(-1)


def are_packed(ranges: Tensor, position_ids: Tensor) -> Tensor:
    """[batch] bool: whether a request holds several sequences, in this pass or in the cache."""
    position_ids = position_ids.expand(ranges.shape[0], -1)
    in_use = used(ranges, position_ids.shape[1])
    later = begin_later(ranges, position_ids, in_use)
    return later | (starts(position_ids, in_use).sum(-1) > 1)
