"""Calibration of a Llama-shaped model with random weights at long lengths, on one GPU.

    python bench/calibration_cuda.py --shape 8b --layers 8 --lengths 32768 131072

Biases of the projections of queries and keys make heads prefer near keys, so that there is
something to skip. Prints the seconds of every step, the bytes that are said to be needed beside the
weights and those that were, and the sparsity that the longest prompt then reaches.
"""

import argparse
from time import perf_counter

import torch
from models_cuda import SHAPES, make_model
from torch import Tensor
from transformers import PreTrainedModel

import blasst
from blasst.calibration import calibrate
from blasst.calibration.memory import Reading, bytes_needed, sizes_of
from blasst.calibration.search import compared_every
from blasst.config import HEAD_SCHEMES
from blasst.hf.models import attention_layers
from blasst.hf.reading import read

SMALL = 0.004
"""Deviation of the weights: what tokens say then matters less to a score than where they are."""


class Steps:
    """Seconds of the steps of a calibration, as it tells of them."""

    def __init__(self) -> None:
        self._began, self._step = perf_counter(), "Start"

    def __call__(self, step: str, share: float, what: str) -> None:
        """As `blasst.progress`."""
        if step != self._step:
            self.end()
            self._step = step

    def end(self) -> None:
        """Print the step that ends now."""
        torch.cuda.synchronize()
        now = perf_counter()
        print(f"{self._step:20s} {now - self._began:8.1f} s", flush=True)
        self._began = now


def prefer_near_keys(model: PreTrainedModel) -> None:
    """Constant queries and keys, through the rotation; some heads more than others."""
    for layer in attention_layers(model).values():
        heads, size = model.config.num_attention_heads, layer.head_dim
        strength = torch.linspace(0.1, 0.6, heads).repeat_interleave(size)
        layer.q_proj.bias.copy_(strength)
        layer.k_proj.bias.fill_(1.0)


def tokens(length: int, seed: int) -> Tensor:
    """[length] random ones."""
    return torch.randint(0, 32000, (length,), generator=torch.Generator().manual_seed(seed))


def prefill(model: PreTrainedModel, length: int, chunk: int) -> tuple[float, float]:
    """Sparsity and seconds of a prompt that was not calibrated on."""
    ids = tokens(length, seed=99)[None].cuda()
    torch.cuda.synchronize()
    began = perf_counter()
    with blasst.record() as recording:
        read(model, ids, chunk=chunk)
    torch.cuda.synchronize()
    return recording.sparsity("prefill"), perf_counter() - began


@torch.inference_mode()
def main() -> None:
    """Calibrate and print."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--shape", choices=SHAPES, default="8b")
    options.add_argument("--layers", type=int)
    options.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    options.add_argument("--target-sparsity", type=float, nargs="+", default=[0.5])
    options.add_argument("--prompts", type=int, default=1)
    options.add_argument("--schemes", nargs="+", default=list(HEAD_SCHEMES))
    options.add_argument("--chunk", type=int, default=8192)
    given = options.parse_args()
    longest = max(given.lengths)
    model = make_model(
        given.shape, given.layers, longest, attention_bias=True, initializer_range=SMALL
    )
    prefer_near_keys(model)
    torch.cuda.reset_peak_memory_stats()
    weights, steps = torch.cuda.memory_allocated(), Steps()
    calibrate(
        model,
        None,  # prompts are tokens
        documents=[tokens(longest, seed) for seed in range(given.prompts + 2)],
        lengths=given.lengths,
        target_sparsity=given.target_sparsity,
        prompts=given.prompts,
        schemes=given.schemes,
        held_out=[],
        chunk=given.chunk,
        progress=steps,
    )
    steps.end()
    sizes = sizes_of(model, model.config.num_hidden_layers)
    reading = Reading(longest, compared=longest // compared_every(longest))
    said = bytes_needed(sizes, reading, given.chunk)
    used = torch.cuda.max_memory_allocated() - weights
    print(f"memory besides the weights: {used / 1e9:.1f} GB of {said / 1e9:.1f} GB said before")
    for target in (0.0, *given.target_sparsity):
        with blasst.set_target(model, prefill=target):
            sparsity, taken = prefill(model, longest, given.chunk)
        print(f"{longest} other tokens at {target:.0%}: {sparsity:.1%} skipped, {taken:.2f} s")


if __name__ == "__main__":
    main()
