"""Dense backward of blasst.attention against torch's own, side by side in one process.

    python bench/backward.py --length 8192 --head-dim 64 128

Both get the layout they like best: blasst [batch, length, heads, dim], torch [batch, heads, length,
dim]. Rounds alternate, so that a machine that slows down slows both; medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from blasst import attention


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(length: int, heads: int, dim: int, causal: bool, rounds: int) -> tuple[float, ...]:
    """Median milliseconds of torch's and of our backward, and the relative difference in dq."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, length, heads, dim, generator=generator) for _ in range(4))
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    theirs = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    dout_theirs = dout.transpose(1, 2).contiguous()
    out = attention(*ours, causal=causal)
    out_theirs = F.scaled_dot_product_attention(*theirs, is_causal=causal)

    def run_ours() -> torch.Tensor:
        return torch.autograd.grad(out, ours, dout, retain_graph=True)[0]

    def run_theirs() -> torch.Tensor:
        return torch.autograd.grad(out_theirs, theirs, dout_theirs, retain_graph=True)[0]

    wanted = run_theirs().transpose(1, 2)
    difference = ((run_ours() - wanted).norm() / wanted.norm()).item()  # also warms up
    times = [(milliseconds(run_theirs), milliseconds(run_ours)) for _ in range(rounds)]
    return *map(statistics.median, zip(*times, strict=True)), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, nargs="+", default=[8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.heads} heads, float32, {options.threads} threads, torch {torch.__version__}")
    print("length   dim   causal    torch ms   blasst ms   ratio   difference")
    for length in options.length:
        for dim in options.head_dim:
            for causal in (True, False):
                torch_ms, ms, difference = measure(
                    length, options.heads, dim, causal, options.rounds
                )
                print(
                    f"{length:6} {dim:5} {causal!s:>8} {torch_ms:11.1f} {ms:11.1f}"
                    f" {torch_ms / ms:6.2f}x {difference:12.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
