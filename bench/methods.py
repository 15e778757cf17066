"""What each method saves of dense attention on this machine, all in one run.

    python bench/methods.py

SmolLM2's shapes: 9 query heads on 3 KV heads, head dimension 64, causal, float32. Rounds alternate,
so that a machine that slows down slows all; medians are printed, and the tiles that are computed.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blasst import attention
from blasst.bsfa import thresholds_of
from blasst.curves import ln_threshold_at
from blasst.policies import head_bands

HEADS, KV_HEADS, DIM = 9, 3, 64


def median_ms(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each call; every round times all of them, one after the other."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):  # the first warms up
        for samples, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if round_ > 0:
                samples.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(samples) for samples in times]


def random_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def bands(length: int, rounds: int) -> None:
    """A band of distances per head against dense causal attention: forward plus backward."""
    q, k, v = (t.requires_grad_() for t in random_inputs(length))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    of_heads = head_bands(HEADS, length)

    def forward(**policy: object) -> object:
        with torch.no_grad():
            return attention(q, k, v, causal=True, **policy)

    def both(**policy: object) -> object:
        return torch.autograd.grad(attention(q, k, v, causal=True, **policy), (q, k, v), dout)

    tiles = [
        attention(q, k, v, causal=True, return_stats=True, **policy).stats.visitable.sum().item()
        for policy in ({}, {"bands": of_heads})
    ]
    dense_forward, banded_forward, dense, banded = median_ms(
        [forward, lambda: forward(bands=of_heads), both, lambda: both(bands=of_heads)], rounds
    )
    print(f"bands, {length} tokens: {tiles[0]} tiles dense, {tiles[1]} in the bands")
    print(f"  forward           {dense_forward:8.1f} ms {banded_forward:8.1f} ms "
          f"{dense_forward / banded_forward:6.2f}x")  # fmt: skip
    print(f"  forward, backward {dense:8.1f} ms {banded:8.1f} ms {dense / banded:6.2f}x")


def absolute(length: int, rounds: int) -> None:
    """The absolute test against the relative one, at equal sparsity: forward."""
    q, k, v = random_inputs(length)
    dense = attention(q, k, v, causal=True, order="reverse", return_tile_maxima=True,
                      return_gaps=True)  # fmt: skip
    tiles = -(-length // 64)
    keep = tiles // 8
    rule = thresholds_of(dense.tile_maxima[0], (keep,))[0].float()[None]

    def run(**test: object) -> object:
        return attention(q, k, v, causal=True, order="reverse", **test)

    sparsity = run(absolute_threshold=rule, return_stats=True).stats.sparsity
    relative = math.exp(ln_threshold_at(dense.gaps.sum(0).numpy(), sparsity))
    reached = run(threshold=relative, return_stats=True).stats.sparsity
    plain, by_maximum, by_gap = median_ms(
        [run, lambda: run(absolute_threshold=rule), lambda: run(threshold=relative)], rounds
    )
    print(f"tests, {length} tokens, forward: dense {plain:.1f} ms")
    print(f"  absolute, {keep} tiles kept: {sparsity:.1%} skipped {by_maximum:8.1f} ms")
    print(f"  relative, one threshold: {reached:.1%} skipped {by_gap:8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{HEADS}/{KV_HEADS} heads, d {DIM}, float32, {options.threads} threads")
    bands(options.length, options.rounds)
    absolute(options.length, options.rounds)


if __name__ == "__main__":
    main()
