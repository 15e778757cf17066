"""What each method saves of dense attention on this machine, all in one run.

    python bench/methods.py

SmolLM2's shapes: 9 query heads on 3 KV heads, head dimension 64, causal, float32. Rounds alternate,
so that a machine that slows down slows all; medians are printed, and the tiles that are computed.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from run import median_ms, planted
from torch import Tensor
from torch.nn import functional

from blasst import attention
from blasst.methods.dhsa import Dhsa
from blasst.policies import Call, head_bands

HEADS, KV_HEADS, DIM, LAYERS = 9, 3, 64, 30
THRESHOLD = 1e-3
PLANTED_HALF = 12.0
"""Half of what a planted match scores."""
CHUNKS = {
    "fixed": {"most": 64},
    "shift": {"least": 16, "most": 64, "threshold": -0.1},
    "trained": {"least": 16, "most": 64},
}


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


def planted_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in which three of four tiles miss by far."""
    q, k, v = planted(length, HEADS, DIM, 0.75)
    group = HEADS // KV_HEADS
    return q, k[:, :, ::group].contiguous(), v[:, :, ::group].contiguous()


def tests(length: int, rounds: int) -> None:
    """The absolute test against the relative one, at equal sparsity: forward."""
    q, k, v = planted_inputs(length)

    def run(**test: object) -> object:
        return attention(q, k, v, causal=True, **test)

    relative, absolute = {"threshold": THRESHOLD}, {"absolute_threshold": PLANTED_HALF}
    dense, by_gap, by_maximum = median_ms(
        [run, lambda: run(**relative), lambda: run(**absolute)], rounds
    )
    print(f"tests, {length} tokens, forward: dense {dense:.1f} ms")
    for name, test, time_ in (("relative", relative, by_gap), ("absolute", absolute, by_maximum)):
        sparsity = run(return_stats=True, **test).stats.sparsity
        print(f"  {name}: {sparsity:6.1%} skipped {time_:8.1f} ms {dense / time_:6.2f}x")


def chunk_policy(budget: float, chunker: str, predictors: str | None = None) -> Dhsa:
    """Of its own, with nothing seen yet; `predictors` is the file of the trained chunker."""
    file = predictors if chunker == "trained" else None
    return Dhsa(budget, chunker=chunker, predictors=file, **CHUNKS[chunker])


def chunk_prefill(length: int, rounds: int, budget: float, chunker: str, file: str | None) -> None:
    """Chunks chosen before scoring against dense, prediction included."""
    q, k, v = planted_inputs(length)

    def predict() -> Tensor:
        policy = chunk_policy(budget, chunker, file)
        return policy.visit(Call(0, "prefill", q, k, None)).blocks

    def run(sparse: bool = True, **options: object) -> object:
        return attention(q, k, v, causal=True, blocks=predict() if sparse else None, **options)

    calls = [lambda: run(False), run, predict, lambda: run(threshold=THRESHOLD)]
    dense, by_chunks, alone, tested = median_ms(calls, rounds)
    tiles = run(return_stats=True, threshold=THRESHOLD).stats
    share = tiles.visitable.sum() / run(False, return_stats=True).stats.visitable.sum()
    print(f"chunks ({chunker}), {length} tokens, {budget:.0%} of the keys seen, prefill")
    print(f"  {share:.1%} of the tiles visited: dense {dense:.1f} ms, chunks {by_chunks:.1f} ms")
    print(f"  ({alone:.1f} ms of them prediction), {dense / by_chunks:.2f}x")
    print(f"  and threshold {THRESHOLD}: {tiles.sparsity:.1%} of these skipped, {tested:.1f} ms")


@torch.inference_mode()
def chunk_decode(length: int, rounds: int, budget: float, chunker: str, file: str | None) -> None:
    """The same for one token more at each step, through as many layers as SmolLM2 has.

    One layer alone would stay in the cache, which no layer of a model does.
    """
    steps = length + rounds + 1
    q, _, _ = random_inputs(steps)
    shape = (LAYERS, 1, KV_HEADS, steps, DIM)  # as Transformers' caches lie in memory
    k, v = (torch.randn(shape).transpose(2, 3) for _ in range(2))
    policies = [chunk_policy(budget, chunker, file) for _ in range(2)]
    for policy in policies:
        for layer in range(LAYERS):
            policy.visit(Call(layer, "prefill", q[:, :length], k[layer][:, :length], None))
    counts = [iter(range(length + 1, steps + 1)) for _ in range(3)]

    def step(count: Iterator[int], policy: Dhsa | None, attend: bool = True) -> None:
        n = next(count)
        query = q[:, n - 1 : n]
        for layer in range(LAYERS):
            keys, blocks = k[layer][:, :n], None
            if policy is not None:
                blocks = policy.visit(Call(layer, "decode", query, keys, None)).blocks
            if attend:
                attention(query, keys, v[layer][:, :n], causal=True, blocks=blocks)

    dense, by_chunks, alone = median_ms(
        [
            lambda: step(counts[0], None),
            lambda: step(counts[1], policies[0]),
            lambda: step(counts[2], policies[1], attend=False),
        ],
        rounds,
    )
    print(f"chunks ({chunker}), {length} tokens, {budget:.0%} of the keys seen, decode")
    print(f"  {LAYERS} layers: dense {dense:.1f} ms, chunks {by_chunks:.1f} ms "
          f"({alone:.1f} ms of them prediction), {dense / by_chunks:.2f}x")  # fmt: skip


def peak_bytes(chunker: str, length: int, budget: float, threads: int) -> int:
    """Most memory that a prefill took beyond its inputs, in a process of its own.

    Args:
        chunker: of the chunks; "dense": none; "torch": torch's own attention.
        length: tokens.
        budget: share of the keys seen.
        threads: each has some memory of its own.
    """
    torch.set_num_threads(threads)
    q, k, v = random_inputs(length)

    def run(tokens: int) -> object:
        query, key, value = (t[:, :tokens] for t in (q, k, v))
        if chunker == "torch":
            heads_first = [t.transpose(1, 2) for t in (query, key, value)]
            return functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            )
        blocks = None
        if chunker != "dense":
            policy = chunk_policy(budget, chunker)
            blocks = policy.visit(Call(0, "prefill", query, key, None)).blocks
        return attention(query, key, value, causal=True, blocks=blocks)

    run(256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status_bytes("VmRSS")
    run(length)
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A line of Linux' account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def memory(length: int, budget: float) -> None:
    """Peak memory of a prefill with chunks, against dense."""
    output = 4 * length * HEADS * DIM
    print(f"memory, {length} tokens, prefill, beyond inputs; {output / 1e6:.1f} MB are the output")
    for chunker in ("torch", "dense", "fixed", "shift"):
        measure = partial(peak_bytes, chunker, length, budget, torch.get_num_threads())
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(f"  {chunker}: {pool.submit(measure).result() / 1e6:8.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parts = ("bands", "tests", "prefill", "decode", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--predictors", metavar="FILE", help="of SmolLM2, from `python -m blasst chunks smollm2`"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{HEADS}/{KV_HEADS} heads, d {DIM}, float32, {options.threads} threads")
    if "bands" in options.parts:
        bands(options.length, options.rounds)
    if "tests" in options.parts:
        tests(options.length, options.rounds)
    if "memory" in options.parts:
        memory(options.length, options.budget)
    with torch.inference_mode():
        for chunker in ("fixed", "shift", *(["trained"] if options.predictors else [])):
            work = (options.length, options.rounds, options.budget, chunker, options.predictors)
            if "prefill" in options.parts:
                chunk_prefill(*work)
            if "decode" in options.parts:
                chunk_decode(*work)


if __name__ == "__main__":
    main()
