"""Draws which tiles a few heads of a real model keep and skip, on recorded tensors.

bench/record_qkv.py makes the file.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import recorded
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

import blasst

COLOURS = {"kept": "#1f6feb", "skipped": "#d8e6fb", "after the query": "#ffffff"}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    recorded.add_option(parser)
    parser.add_argument("--layer", type=int, help="default: the middle one of those recorded")
    parser.add_argument("--heads", type=int, nargs="*", default=[0, 3, 6])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--out", type=Path, required=True, metavar="IMAGE")
    arguments = parser.parse_args()
    layers = recorded.load(parser, arguments.recorded)
    layer = sorted(layers)[len(layers) // 2] if arguments.layer is None else arguments.layer
    if layer not in layers:
        parser.error(f"--layer is {layer}; the file has {sorted(layers)}")
    q, k, v = (t.float() for t in layers[layer])
    result = blasst.attention(
        *(q, k, v),
        causal=True,
        phase="prefill",
        threshold=recorded.threshold_for(arguments.sparsity, q, k, v),
        return_stats=True,
        return_tile_mask=True,
    )
    figure, axes = plt.subplots(
        1, len(arguments.heads), figsize=(3.4 * len(arguments.heads), 3.9), squeeze=False
    )
    for axis, head in zip(axes[0], arguments.heads, strict=True):
        kept = result.tile_mask[0, head]
        future = torch.ones_like(kept).triu(1)
        axis.imshow(torch.where(future, 2, (~kept).int()), cmap=ListedColormap(COLOURS.values()))
        skipped = result.stats.skipped[0, head] / result.stats.visitable[0, head]
        axis.set(title=f"head {head}: {100 * skipped:.0f} % skipped", xlabel="key tile")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("query tile")
    handles = [Patch(facecolor=c, label=n) for n, c in list(COLOURS.items())[:2]]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
