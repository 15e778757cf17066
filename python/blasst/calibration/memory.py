"""Whether prompts fit in a GPU's memory, said before the work."""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from blasst.calibration.emulation import SCORES_AT_ONCE
from blasst.heads import query_size
from blasst.hf.models import attention_layers
from blasst.hf.reading import TILE
from blasst.measure.agreement import FLOAT, prediction_bytes


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
    vocabulary: int
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
        config.vocab_size,
        model.dtype.itemsize,
    )


class Reading(NamedTuple):
    """Prompts that are read at once, and what is done with them."""

    length: int
    """Tokens of each."""
    batch: int = 1
    compared: int | None = None
    """Positions whose predictions are compared with dense; None: they are not."""
    what: str = "a prompt"
    """For messages."""


def bytes_needed(sizes: Sizes, reading: Reading, chunk: int | None) -> int:
    """Besides the weights, at the prompts' end.

    Args:
        sizes: of the model.
        reading: what is read.
        chunk: tokens that are read at once; None: all.
    """
    s, length, batch = sizes, reading.length, reading.batch
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
    needed = batch * (length * whole + min(chunk or length, length) * row) + scores
    if reading.compared is not None:  # dense hidden states, and predictions
        needed += batch * length * s.hidden * s.bytes
        needed += prediction_bytes(s.vocabulary, reading.compared)
    return needed


def check_memory(
    model: PreTrainedModel,
    layers: Collection[int],
    readings: Collection[Reading],
    chunk: int | None = None,
) -> None:
    """An error if a GPU of the model's has too little memory, with the chunk that would fit.

    Args:
        model: where it will run.
        layers: those that keep all keys.
        readings: what is read, one after the other.
        chunk: tokens that are read at once; None: all.

    Raises:
        ValueError: it has.
    """
    for device, here in layers_by_device(model, layers).items():
        if device.type == "cuda":
            check_fits(sizes_of(model, here), readings, chunk, str(device), free_bytes(device))


def layers_by_device(model: PreTrainedModel, layers: Collection[int]) -> Counter[torch.device]:
    """How many of these layers each device has; a model may be split over several."""
    modules = attention_layers(model)
    here = [next(modules[layer].parameters()).device for layer in layers]
    return Counter(here or {next(model.parameters()).device: 0})


def free_bytes(device: torch.device) -> int:
    """What torch can still give out on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_fits(
    sizes: Sizes, readings: Collection[Reading], chunk: int | None, device: str, free: int
) -> None:
    """The same, of a device with so many free bytes."""

    def needed(chunk: int | None) -> dict[Reading, int]:
        return {reading: bytes_needed(sizes, reading, chunk) for reading in readings}

    most = max(needed(chunk).items(), key=lambda item: item[1])
    if most[1] <= free:
        return
    length, batch, _, what = most[0]
    longest = min(chunk or length, length)
    chunks = range(longest // TILE * TILE, 0, -TILE)
    fits = next((c for c in chunks if max(needed(c).values()) <= free), None)
    advice = f"a chunk of {fits} tokens fits" if fits else "no chunk fits: shorter prompts would"
    if batch > 1 and not fits:
        advice = "no chunk fits: a smaller batch, or shorter prompts, would"
    prompts = f"{batch} prompts" if batch > 1 else what
    raise ValueError(
        f"{prompts} of {length} tokens in chunks of {longest} need about {most[1] / 1e9:.1f} GB "
        f"besides the weights; {device} has {max(free, 0) / 1e9:.1f} GB free: {advice}"
    )
