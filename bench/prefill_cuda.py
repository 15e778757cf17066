"""Causal prefill on a GPU of compute capability 9.0, dense and sparse.

FlashAttention-3 (fa3-fwd) is measured beside it if it is installed. Every line checks the output
first. Rates are the operations of dense attention divided by the time of one call, in steady state:
the contenders take turns, each warm, in another order every round.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import blasst

try:
    from fa3_fwd_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

AMPLITUDE = 22.0  # a matching key beats another by e^43
THRESHOLD = 1e-3
QUERY_BLOCK = 384  # rows that match the same keys
KEY_BLOCK = 128  # keys that score alike


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.length}, {self.heads}/{self.kv_heads}, d {self.dim}"

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.length**2 * self.dim * self.heads


WORKS = (
    Work(1, 65536, 64, 4),
    Work(1, 16384, 64, 4),
    Work(1, 32768, 32, 8),
    Work(1, 16384, 32, 8, 64),
    Work(1, 16384, 16, 4, 256),
    Work(4, 1024, 32, 8),
)


def planted(work: Work, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v. Blocks of queries and keys draw one of 1 / (1 - sparsity) orthogonal directions.

    A query block scores high on key blocks of its direction and on the first, which has them all.
    """
    w = work
    ways = max(1, round(1 / (1 - sparsity)))
    signs = torch.ones(1, 1)
    while signs.shape[0] < w.dim:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    directions = AMPLITUDE / math.sqrt(w.dim) * signs[1 : ways + 1].cuda()

    def blocks(size: int) -> Tensor:
        draw = torch.randint(0, ways, (w.batch, -(-w.length // size), w.kv_heads), device="cuda")
        return draw.repeat_interleave(size, 1)[:, : w.length]

    def noise(heads: int) -> Tensor:
        return 0.5 * torch.randn(w.batch, w.length, heads, w.dim, device="cuda")

    group = w.heads // w.kv_heads
    q = noise(w.heads) + directions[blocks(QUERY_BLOCK)].repeat_interleave(group, 2)
    k = directions[blocks(KEY_BLOCK)]
    k[:, :KEY_BLOCK] = directions.sum(0)
    k += noise(w.kv_heads)
    v = 2 * noise(w.kv_heads)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def error(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Of some rows of the first request, relative to dense attention in float32."""
    group = q.shape[2] // k.shape[2]
    worst = 0.0
    for row in {0, q.shape[1] // 3, q.shape[1] - 1}:
        keys, values = (t[0, : row + 1].float().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("hd,nhd->hn", q[0, row].float(), keys) / math.sqrt(q.shape[3])
        exact = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
        worst = max(worst, ((out[0, row] - exact).norm() / exact.norm()).item())
    return worst


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of one call of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, count = runs[name], 1
            while True:  # long enough to be steady; the first attempts warm up
                start.record()
                for _ in range(count):
                    run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
                if elapsed > 100:
                    break
                count = max(count + 1, math.ceil(150 * count / elapsed))
            times[name].append(elapsed / count)
    return {name: sorted(samples)[rounds // 2] for name, samples in times.items()}


def measure(work: Work, sparsities: list[float], rounds: int) -> None:
    """Prints a line for each sparsity."""
    threshold = torch.full((1, 1), THRESHOLD, device="cuda")
    for sparsity in sparsities:
        q, k, v = planted(work, sparsity)
        dense = blasst.attention(q, k, v, causal=True)
        sparse = blasst.attention(q, k, v, causal=True, threshold=threshold, return_stats=True)
        off = max(error(q, k, v, dense), error(q, k, v, sparse.out))
        if not off < 1e-2:
            raise SystemExit(f"{work.name}: the output is off by {off:.1e}")
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda q=q, k=k, v=v: blasst.attention(q, k, v, causal=True),
            "sparse": lambda q=q, k=k, v=v: blasst.attention(
                q, k, v, causal=True, threshold=threshold
            ),
        }
        if flash_attn_func:
            runs["FA3"] = lambda q=q, k=k, v=v: flash_attn_func(q, k, v, causal=True)
        rate = {n: work.operations / ms / 1e9 for n, ms in milliseconds(runs, rounds).items()}
        line = f"{work.name:26} {100 * sparse.stats.sparsity:5.1f} % | "
        line += " | ".join(f"{name} {tflops:6.0f} TFLOP/s" for name, tflops in rate.items())
        if flash_attn_func:
            line += f" | {rate['dense'] / rate['FA3']:4.2f}x, {rate['sparse'] / rate['FA3']:4.2f}x"
        print(line, flush=True)


def main() -> None:
    """Measures every line, or those whose number is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lines", type=int, nargs="*", default=range(len(WORKS)))
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0, 0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), flush=True)
    for line in arguments.lines:
        measure(WORKS[line], arguments.sparsity, arguments.rounds)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
