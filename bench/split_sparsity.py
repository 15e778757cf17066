"""What cutting decode into splits costs in sparsity, on recorded queries and keys of a real model.

    python bench/record_qkv.py --length 4096 --layers $(seq 0 29) --out build/decode_qkv.pt
    python bench/split_sparsity.py build/decode_qkv.pt

The last 64 positions are decode steps, each of whose KV heads decides on 64-key tiles, in one pass
or in splits that start from the maxima of the visit's first tiles. Prints the share of tiles that
are skipped, in per cent, by order and threshold; the compiled seeds are BLASST_SEED_TILES.
"""

import argparse
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

KEYS, STEPS = 64, 64
THRESHOLDS = (0.3, 0.03, 0.003)
ORDERS = ("sink_first", "reverse")


def tile_maxima(q: Tensor, k: Tensor) -> Tensor:
    """[kv_heads, steps, group, tiles] largest scores.

    Args:
        q: [1, length, heads, head_dim].
        k: [1, length, kv_heads, head_dim]; length a multiple of 64.
    """
    length, kv_heads, dim = k.shape[1:]
    rows = q[0, -STEPS:].float().view(STEPS, kv_heads, -1, dim)
    scores = torch.einsum("skgd,lkd->ksgl", rows, k[0].float()) / math.sqrt(dim)
    unseen = torch.arange(length) > torch.arange(length - STEPS, length)[:, None]
    scores.masked_fill_(unseen[None, :, None], -math.inf)
    return scores.unflatten(-1, (-1, KEYS)).amax(-1)


def visited(tiles: Tensor, order: str) -> Tensor:
    """[..., tiles] in the order of the visit."""
    first = 1 if order == "sink_first" else 0
    return torch.cat([tiles[..., :first], tiles[..., first:].flip(-1)], -1)


def skipped(maxima: Tensor, threshold: float, split_tiles: int, seeds: int) -> float:
    """Per cent of the tiles; seeds: tiles from which each split but the first starts."""
    count, least = 0, math.log(threshold)
    for i in range(maxima.shape[-1]):
        if i == 0:
            running = torch.full_like(maxima[..., 0], -math.inf)
        elif i % split_tiles == 0 and maxima.shape[-1] - i > 4:  # what joins the split before it
            running = maxima[..., :seeds].amax(-1)
        tile = maxima[..., i]
        count += (tile - running < least).all(-1).sum().item()
        running = torch.maximum(running, tile)
    return 100 * count / maxima[..., 0, :].numel()


def rows(recorded: dict[int, tuple[Tensor, ...]]) -> Iterable[tuple[str, ...]]:
    """The table's."""
    found = torch.stack([tile_maxima(q, k) for q, k, _ in recorded.values()])
    splits = [(n, seeds) for n in (8, 16, 32) for seeds in (2, 4)]
    yield ("order", "threshold", "unsplit", *(f"{n} tiles, {s} seeds" for n, s in splits))
    for order, threshold in product(ORDERS, THRESHOLDS):
        maxima = visited(found, order)
        shares = [skipped(maxima, threshold, *split) for split in ((found.shape[-1], 0), *splits)]
        yield (order, str(threshold), *(f"{share:.1f}" for share in shares))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("recorded", type=Path, help="as bench/record_qkv.py writes it")
    for row in rows(torch.load(parser.parse_args().recorded)):
        print("  ".join(f"{cell:>16}" for cell in row))


if __name__ == "__main__":
    main()
