"""Draws what bench/prefill_cuda.py --out wrote: effective TFLOP/s against skipped tiles."""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

PEERS = {"FA3": "FlashAttention-3", "fmha_v2": "TensorRT-LLM fmha_v2, skip-softmax"}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="IMAGE")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    works = defaultdict(list)
    for row in results["rows"]:
        works[row["work"]].append(row)
    columns = len(works)
    figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, 3.4), squeeze=False)
    for axis, (work, rows) in zip(axes[0], works.items(), strict=True):
        rows.sort(key=lambda row: row["sparsity"])
        skipped = [100 * row["sparsity"] for row in rows]
        axis.plot(skipped, [row["tflops"]["sparse"] for row in rows], "o-", label="blasst")
        axis.plot(skipped, [row["tflops"]["dense"] for row in rows], "o:", label="blasst, dense")
        for name, label in PEERS.items():
            if all(name in row["tflops"] for row in rows):
                axis.plot(skipped, [row["tflops"][name] for row in rows], "s--", label=label)
        axis.set(title=work, xlabel="tiles skipped, %", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("effective TFLOP/s")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"{results['device']}, bf16, causal prefill", fontsize="medium")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
