"""What position_ids say of packed sequences, and how a mask comes to know them.

Key ranges are [batch, 6], see `blasst.hf.masks.key_ranges`.
"""

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, masking_utils

from blasst.hf.layers import NAME
from blasst.hf.tracing import TRACES_CELLS


def hand_positions_to_masks() -> None:
    """Let Transformers' mask functions put position_ids into the pattern of every pass.

    They look at them themselves only where there is neither a cache nor a padding mask, and some
    models do not hand them on to their layers. They travel in the place of the numbers of packed
    sequences that Transformers finds in them.
    """
    prepare = masking_utils._preprocess_mask_arguments

    @wraps(prepare)
    def prepare_with_positions(
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Any,
        position_ids: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        found = prepare(config, inputs_embeds, attention_mask, cache, position_ids, *args, **kwargs)
        if config._attn_implementation != NAME or found[0]:
            return found
        if torch.compiler.is_compiling() and not TRACES_CELLS:
            return found
        is_text = of_text(position_ids, *inputs_embeds.shape[:2])
        known = position_ids if is_text and position_ids.device == inputs_embeds.device else None
        return *found[:2], known, *found[3:]

    masking_utils._preprocess_mask_arguments = prepare_with_positions


def hand_on_text_positions(model: nn.Module) -> None:
    """Let a text model that knows positions in several axes tell its layers those of the text.

    Of [4, batch, rows] the first axis is the text's; [batch, rows] such a model (Qwen2-VL and its
    kin) spreads over the other three, and forgets.
    """
    forward = inspect.unwrap(type(model).forward)
    if "text_position_ids" in forward.__code__.co_varnames and not hasattr(model, "blasst_axes"):
        model.blasst_axes = model.register_forward_pre_hook(_with_text_axis, with_kwargs=True)


def _with_text_axis(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    position_ids = kwargs.get("position_ids")
    runs_blasst = model.config._attn_implementation == NAME
    if runs_blasst and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        kwargs["position_ids"] = position_ids[None].expand(4, -1, -1)
    return args, kwargs


def of_text(position_ids: Any, batch: int, rows: int) -> bool:
    """Whether these are [1 or batch, rows] numbers, and not those of images in several axes."""
    return (
        isinstance(position_ids, Tensor)
        and position_ids.dim() == 2
        and position_ids.shape[0] in (1, batch)
        and position_ids.shape[1] == rows
    )


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
