"""Host time of looking a calibrated layer's thresholds up, without the attention itself.

    python bench/thresholds.py --layers 32 --heads 32

A model of random weights and so many layers is given a calibration of as many lengths and targets
as `calibrate` writes; then every layer asks, as in a decode step of one request. Prints, by repeat:
microseconds a layer, the pass's own share (the thresholds of all layers at once) included.
"""

import argparse
import statistics
from time import perf_counter

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from blasst.calibration.tables import TARGETS
from blasst.config import Law, Measured, SparseAttention, ThresholdTable
from blasst.hf.layers import attention_modules
from blasst.hf.thresholds import Pass, options_of

LENGTHS = (1024, 2048, 4096, 8192)
TILES = {"prefill": (64, 128), "decode": (1, 64)}


def make_calibration(layers: int, heads: int, phase: str = "decode") -> SparseAttention:
    """Of one phase, with random thresholds."""
    generator = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), len(TARGETS), layers, heads
    ln_threshold = -8 * torch.rand(shape, generator=generator)
    table = ThresholdTable("reverse", "equal_mass", Law(3, 5), LENGTHS, TARGETS, ln_threshold)
    return SparseAttention(
        ("LlamaAttention",),
        {phase: Law(3, 5)},
        {phase: 0.5},
        measured={phase: Measured(TILES[phase], (table,))},
    )


def make_modules(layers: int, heads: int) -> list[nn.Module]:
    """The attention layers of a calibrated model."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8 * heads,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            attn_implementation="blasst",
            sparse_attention_config=make_calibration(layers, heads).to_dict(),
        )
    )
    return attention_modules(model)


def microseconds(modules: list[nn.Module], device: torch.device) -> float:
    """Of one pass, a layer."""
    heads = modules[0].config.num_attention_heads
    query = torch.zeros(1, 1, heads, 64, device=device, dtype=torch.bfloat16)
    call = Pass("decode", query, 64, heads, 4000, lambda: 4000, lambda: [4000], {})
    began = perf_counter()
    for module in modules:
        options_of(module, call)
    return 1e6 * (perf_counter() - began) / len(modules)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--device", type=torch.device, default="cpu")
    options.add_argument("--passes", type=int, default=200)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    modules = make_modules(given.layers, given.heads)
    for _ in range(given.repeats):
        found = [microseconds(modules, given.device) for _ in range(given.passes)]
        print(f"{statistics.median(found):.1f} us a layer (median), worst {max(found):.1f}")


if __name__ == "__main__":
    main()
