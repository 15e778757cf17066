"""Whether prompts fit in a GPU's memory, said before the work."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from blasst.calibration.emulation import SCORES_AT_ONCE
from blasst.heads import query_size
from blasst.hf.reading import TILE

FLOAT = 4
"""Bytes of a float32."""


class Sizes(NamedTuple):
    """What memory depends on."""

    layers: int
    """Those that keep all keys."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    cached: int
    """Elements of a token in a layer's cache."""
    bytes: int
    """Of a number of the model's type."""


def sizes_of(model: PreTrainedModel, layers: int) -> Sizes:
    """Of a model of which so many layers keep all keys."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads, size = getattr(config, "num_key_value_heads", None) or heads, query_size(config)
    rank = getattr(config, "kv_lora_rank", None)  # of latents, from which keys are made anew
    return Sizes(
        layers,
        hidden,
        getattr(config, "intermediate_size", None) or 4 * hidden,
        heads,
        kv_heads,
        size,
        rank + config.qk_rope_head_dim if rank else 2 * kv_heads * size,
        next(model.parameters()).element_size(),
    )


def bytes_needed(sizes: Sizes, length: int, batch: int, chunk: int) -> int:
    """Besides the weights, at a prompt's end.

    Args:
        sizes: of the model.
        length: tokens of a prompt.
        batch: prompts at once.
        chunk: tokens that are read at once.
    """
    s = sizes
    keys = 2 * s.kv_heads * s.head_dim * s.bytes
    # The cache, a layer of it that grows expanded, the hidden states of all chunks and all in one.
    whole = (
        s.layers * s.cached * s.bytes
        + keys
        + 2 * s.hidden * s.bytes
        + s.kv_heads * s.head_dim * FLOAT
    )
    # A layer's: the residual stream and what is made of it, two attention outputs and their
    # difference in float32 twice, the row results, the gate and what it multiplies.
    row = 4 * s.hidden * s.bytes + 2 * keys + s.heads * s.head_dim * (3 * s.bytes + 2 * FLOAT)
    row += 4 * s.heads * FLOAT + 3 * s.intermediate * s.bytes
    group = s.heads // s.kv_heads
    scores = 4 * FLOAT * max(SCORES_AT_ONCE, batch * group * TILE * length)
    return batch * (length * whole + min(chunk, length) * row) + scores


def chunk_that_fits(sizes: Sizes, length: int, batch: int, chunk: int, free: int) -> int | None:
    """The largest one, up to `chunk` tokens; None: no chunk does."""
    tiles = range(min(chunk, length) // TILE, 0, -1)
    fitting = (t * TILE for t in tiles if bytes_needed(sizes, length, batch, t * TILE) <= free)
    return next(fitting, None)


def check_memory(
    model: PreTrainedModel,
    layers: int,
    length: int,
    *,
    batch: int = 1,
    chunk: int | None = None,
    kept: int = 0,
) -> None:
    """An error if the model's GPU has too little memory, with the chunk that would fit.

    Args:
        model: where it will run.
        layers: those that keep all keys.
        length: tokens of a prompt.
        batch: prompts at once.
        chunk: tokens that are read at once; None: all.
        kept: bytes that the caller keeps besides.

    Raises:
        ValueError: it has.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        free = free_bytes(device) - kept
        check_fits(sizes_of(model, layers), length, batch, chunk or length, str(device), free)


def free_bytes(device: torch.device) -> int:
    """What torch can still give out on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_fits(sizes: Sizes, length: int, batch: int, chunk: int, device: str, free: int) -> None:
    """The same, of a device with so many free bytes."""
    needed = bytes_needed(sizes, length, batch, chunk)
    if needed <= free:
        return
    fits = chunk_that_fits(sizes, length, batch, chunk, free)
    advice = f"a chunk of {fits} tokens fits" if fits else "no chunk fits: shorter prompts would"
    if batch > 1 and not fits:
        advice = "no chunk fits: a smaller batch, or shorter prompts, would"
    prompts = f"{batch} prompts" if batch > 1 else "a prompt"
    raise ValueError(
        f"{prompts} of {length} tokens in chunks of {chunk} need about {needed / 1e9:.1f} GB "
        f"besides the weights; {device} has {max(free, 0) / 1e9:.1f} GB free: {advice}"
    )
