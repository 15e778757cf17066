"""What bench/record_qkv.py wrote, and thresholds for it."""

import math
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor

import blasst

FILE = Path("build/qkv.pt")


def add_option(parser: ArgumentParser) -> None:
    """--recorded, the file."""
    parser.add_argument("--recorded", type=Path, default=FILE, metavar="FILE")


def load(parser: ArgumentParser, file: Path) -> dict[int, tuple[Tensor, ...]]:
    """q, k and v of each layer; ends the command if there is no such file."""
    if not file.exists():
        parser.error(f"no {file}: bench/record_qkv.py makes it")
    return torch.load(file, weights_only=True)


def threshold_for(sparsity: float, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The threshold, at most 1, that skips this share of the tiles of a causal prefill."""
    gaps = blasst.attention(q, k, v, causal=True, phase="prefill", return_gaps=True).gaps
    share = gaps.sum(0).cumsum(0) / gaps.sum()
    return math.exp(min(int((share < sparsity).sum()) / 16 - 32, 0.0))  # bins of 1/16 from -32 on
