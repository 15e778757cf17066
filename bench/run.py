"""Kernels against torch on this machine: one run, one table, every ratio from the same minutes.

    python bench/run.py [--json FILE] [--plot FILE] [--quick]

Prefill runs through the torch operator beside torch's scaled_dot_product_attention, in turns.
Decode and growth come from `blasst bench`, which measures the memory's read bandwidth beside each
call.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import blasst

COMMAND = Path(__file__).parent.parent / "build/release/tools/blasst/blasst"
TILE = 64
THRESHOLD = 1e-3
DIRECTIONS = 8


def planted(length: int, heads: int, dim: int, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [1, length, heads, dim] whose causal key tiles miss by far or match.

    Every query tile and key tile has directions; a query scores high on the key tiles that share
    its own. Key tile 0 has all of them, so that the running maximum is final after it. `sparsity`:
    of the tiles that the causal mask leaves whole.
    """
    generator = torch.Generator().manual_seed(0)
    tiles = length // TILE
    axes = torch.linalg.qr(torch.randn(dim, DIRECTIONS, generator=generator))[0].T
    amplitude = (24 * dim**0.5) ** 0.5
    query_axis = torch.randint(DIRECTIONS, (tiles, heads), generator=generator)
    has_axis = torch.rand(tiles, heads, DIRECTIONS, generator=generator) >= sparsity
    has_axis[0] = True
    q = amplitude * axes[query_axis]
    k = amplitude * has_axis.float() @ axes

    def rows(tile_values: Tensor) -> Tensor:
        noise = 0.5 * torch.randn(length, heads, dim, generator=generator)
        return (tile_values.repeat_interleave(TILE, 0) + noise)[None]

    return rows(q), rows(k), torch.randn(1, length, heads, dim, generator=generator)


def median_ms(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each call; every round times all of them, one after the other."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):  # the first warms up
        for samples, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if round_ > 0:
                samples.append(1e3 * (time.perf_counter() - start))
    return [median(samples) for samples in times]


def prefill_ms(
    length: int, heads: int, dim: int, dtype: torch.dtype, sparsity: float, rounds: int
) -> tuple[list[float], float]:
    """Milliseconds of torch, dense and sparse on one problem, and the sparsity it has."""
    q, k, v = (x.to(dtype) for x in planted(length, heads, dim, sparsity))
    contiguous = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # as torch likes them
    in_torch = partial(scaled_dot_product_attention, *contiguous, is_causal=True)
    dense = partial(blasst.attention, q, k, v, causal=True)
    sparse = partial(dense, threshold=THRESHOLD)
    exact = in_torch().transpose(1, 2)
    for out in (dense(), sparse()):
        error = ((out - exact).double().norm() / exact.double().norm()).item()
        if not error < 2e-2:
            sys.exit(f"wrong result: relative error {error} against torch")
    stats = sparse(return_stats=True).stats
    return median_ms([in_torch, dense, sparse], rounds), stats.sparsity


def prefill(length: int, heads: int, dim: int, dtype: torch.dtype, rounds: int) -> dict:
    """Dense, and 0 %, about 50 % and 75 % skipped, beside torch."""
    flops = 2 * length * length * dim * heads  # causal: half of 4 L^2 d
    row: dict = {"length": length, "heads": heads, "head_dim": dim, "dtype": str(dtype)[6:]}
    for wanted in (0.0, 0.5, 0.75):
        ms, sparsity = prefill_ms(length, heads, dim, dtype, wanted, rounds)
        if wanted == 0.0:
            row["torch_gflops"] = flops / ms[0] / 1e6
            row["dense_gflops"] = flops / ms[1] / 1e6
            row["dense_over_torch"] = ms[0] / ms[1]
            row["test_over_dense"] = ms[2] / ms[1]
        else:
            row[f"sparsity_{wanted}"] = sparsity
            row[f"speedup_{wanted}"] = ms[1] / ms[2]
            row[f"speedup_over_torch_{wanted}"] = ms[0] / ms[2]
    return row


def command(*arguments: object) -> list[dict]:
    """Rows of `blasst bench ... --json`."""
    call = [str(COMMAND), "bench", *(str(a) for a in arguments), "--json"]
    lines = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in lines.splitlines()]


def print_table(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """Print `rows`; `columns`: key -> format."""
    print(f"\n{title}")
    cells = [list(columns)] + [[columns[c].format(r[c]) for c in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def plot(rows: list[dict], path: Path) -> None:
    """Draw time against length, dense and sparse, with the laws they should follow."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, phase, power in zip(axes, ("prefill", "decode"), (2, 1), strict=True):
        phase_rows = [r for r in rows if r["phase"] == phase]
        lengths = [r["length"] for r in phase_rows]
        for key, label in (("dense_ms", "dense"), ("sparse_ms", "75 % skipped")):
            ax.loglog(lengths, [r[key] for r in phase_rows], "o-", label=label)
        first = phase_rows[0]
        law = [first["dense_ms"] * (n / lengths[0]) ** power for n in lengths]
        ax.loglog(lengths, law, "k:", label=f"length^{power}")
        ax.set(title=phase, xlabel="tokens", ylabel="ms")
        ax.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows there")
    parser.add_argument("--plot", type=Path, help="draw growth with length there (PNG)")
    parser.add_argument("--quick", action="store_true", help="shorter prompts, fewer rounds")
    options = parser.parse_args()
    length, rounds = (2048, 3) if options.quick else (8192, 5)
    torch.set_grad_enabled(False)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    prefill_rows = [
        prefill(length, 8, dim, dtype, rounds)
        for dim in (128, 64)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print_table(
        f"Prefill, causal, batch 1, 8 heads, {length} tokens",
        prefill_rows,
        {
            "head_dim": "{}",
            "dtype": "{}",
            "torch_gflops": "{:.0f}",
            "dense_gflops": "{:.0f}",
            "dense_over_torch": "{:.2f}x",
            "test_over_dense": "{:.3f}",
            "sparsity_0.5": "{:.1%}",
            "speedup_0.5": "{:.2f}x",
            "sparsity_0.75": "{:.1%}",
            "speedup_0.75": "{:.2f}x",
            "speedup_over_torch_0.75": "{:.2f}x",
        },
    )

    lengths = (4096, 16384) if options.quick else (8192, 16384, 32768, 65536, 131072)
    decode_rows = command(
        *("decode", "--length", *lengths, "--heads", 32, "--kv-heads", 8, "--head-dim", 128),
        *("--dtype", "bfloat16", "--sparsity", 0.73, "--repeat", 3 * rounds),
    )
    for row in decode_rows:
        row["of_read_bandwidth"] = row["gb_per_s"] / row["read_gb_per_s"]
        row["ns_per_key"] = 1e6 * row["dense_ms"] / row["length"]
    print_table(
        "Decode, batch 1, 32/8 heads, d 128, bfloat16: constant time a key is length^1",
        decode_rows,
        {
            "length": "{}",
            "dense_ms": "{:.3f}",
            "ns_per_key": "{:.1f}",
            "gb_per_s": "{:.1f}",
            "read_gb_per_s": "{:.1f}",
            "of_read_bandwidth": "{:.0%}",
            "sparsity": "{:.1%}",
            "speedup": "{:.2f}x",
            "workspace_mb": "{:.2f}",
        },
    )

    lengths = (1024, 2048) if options.quick else (2048, 4096, 8192, 16384, 32768)
    growth_rows = command(
        *("prefill", "--length", *lengths, "--heads", 2, "--kv-heads", 2, "--head-dim", 128),
        *("--sparsity", 0.75, "--repeat", 3),
    )
    for row in growth_rows:
        row["ns_per_pair"] = 1e6 * row["dense_ms"] / row["length"] ** 2
    print_table(
        "Growth of prefill, float32, 2 heads, d 128: constant time a pair is length^2",
        growth_rows,
        {
            "length": "{}",
            "dense_ms": "{:.1f}",
            "ns_per_pair": "{:.3f}",
            "sparsity": "{:.1%}",
            "speedup": "{:.2f}x",
            "workspace_mb": "{:.2f}",
        },
    )
    if options.json:
        rows = [{"phase": "prefill_vs_torch", **r} for r in prefill_rows]
        text = "".join(json.dumps(r) + "\n" for r in rows + decode_rows + growth_rows)
        options.json.write_text(text)
    if options.plot:
        plot(growth_rows + decode_rows, options.plot)


if __name__ == "__main__":
    main()
