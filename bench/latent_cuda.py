"""Decode over latents (MLA) on a GPU of compute capability 9.0, dense and sparse.

FlashMLA is measured beside it if it is installed (sgl-flash-mla). Every line checks the output
first. Rates are the operations of dense attention, 2 * (576 + 512) for each query head and key, and
the bytes of the latents, each divided by the time of one call in a replayed graph. Where memory is
the limit, with 64 query rows or fewer, no gain is to be expected of skipping: a latent is read
whether or not its tile is kept, so there the column to look at is what a threshold costs.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from decode_cuda import microseconds
from torch import Tensor

import blasst

try:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata
except ImportError:
    flash_mla_with_kvcache = None

SIZE, VALUES, PAGE = 576, 512, 64
SCALE = 1 / math.sqrt(192)  # of DeepSeek's heads, before they are absorbed
AMPLITUDE = 40.0
THRESHOLD = 1e-3


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    batch: int
    keys: int
    heads: int
    positions: int = 1

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.keys // 1024}K, {self.heads} heads x {self.positions}"


WORKS = (
    Work(64, 16384, 128),
    Work(64, 16384, 128, 2),
    Work(64, 16384, 64),
    Work(64, 16384, 16),
    Work(1, 131072, 128),
    Work(1, 16384, 16),
)


class Inputs:
    """Queries, and pages of latents in a random order."""

    def __init__(self, work: Work):
        w = self.work = work
        pages = w.batch * w.keys // PAGE
        self.q = torch.empty(w.batch, w.positions, w.heads, SIZE, dtype=torch.bfloat16).cuda()
        self.latents = torch.empty(pages, PAGE, 1, SIZE, dtype=torch.bfloat16, device="cuda")
        self.table = torch.randperm(pages, device="cuda").int().view(w.batch, -1)
        self.lengths = torch.full((w.batch,), w.keys, dtype=torch.int32, device="cuda")

    def plant(self, sparsity: float) -> None:
        """Gives each page one of two directions, in the rotary part: the queries' own, or none."""
        w = self.work
        direction = torch.zeros(SIZE, device="cuda")
        direction[VALUES:] = AMPLITUDE / 8
        self.q.normal_(0, 0.3).add_(direction)
        match = torch.rand(w.batch * w.keys // PAGE, device="cuda") >= sparsity
        match[self.table[:, [0, -1]].long()] = True
        for page in range(0, len(match), 1024):
            part = slice(page, page + 1024)
            self.latents[part].normal_(0, 0.5)
            self.latents[part] += (match[part, None, None, None] * direction).bfloat16()

    def blasst(self, threshold: Tensor | None, stats: bool = False):
        return blasst.attention(
            self.q,
            self.latents,
            self.latents[..., :VALUES],
            lengths=self.lengths,
            page_table=self.table,
            causal=True,
            scale=SCALE,
            threshold=threshold,
            phase="decode",
            return_stats=stats,
        )

    def flash_mla(self) -> Callable[[], Tensor]:
        """The first call plans the work of all."""
        plan, _ = get_mla_metadata()
        return lambda: flash_mla_with_kvcache(
            self.q,
            self.latents,
            self.table,
            self.lengths,
            VALUES,
            plan,
            softmax_scale=SCALE,
            causal=True,
            use_legacy=True,  # what has dense attention
        )[0]

    def error(self, out: Tensor) -> float:
        """Of some requests, relative to dense attention in float32."""
        w, worst = self.work, 0.0
        for b in {0, w.batch // 2, w.batch - 1}:
            k = self.latents[self.table[b].long()].view(-1, SIZE).float()
            scores = torch.einsum("qhd,nd->qhn", self.q[b].float(), k) * SCALE
            hidden = torch.ones(w.positions, w.keys, dtype=torch.bool, device="cuda")
            scores.masked_fill_(hidden.triu(w.keys - w.positions + 1)[:, None], -math.inf)
            exact = scores.softmax(-1) @ k[:, :VALUES]
            worst = max(worst, ((out[b] - exact).norm() / exact.norm()).item())
        return worst

    @property
    def operations(self) -> float:
        w = self.work
        return 2.0 * (SIZE + VALUES) * w.batch * w.keys * w.heads * w.positions

    @property
    def bytes(self) -> int:
        return self.work.batch * self.work.keys * SIZE * 2


def measure(work: Work, sparsities: list[float]) -> None:
    """Prints a line for each sparsity."""
    inputs = Inputs(work)
    threshold = torch.full((1, 1), THRESHOLD, device="cuda")
    for sparsity in sparsities:
        inputs.plant(sparsity)
        result = inputs.blasst(threshold, stats=True)
        error = max(inputs.error(inputs.blasst(None)), inputs.error(result.out))
        if not error < 1e-2:
            raise SystemExit(f"{work.name}: the output is off by {error:.1e}")
        runs = {"dense": lambda: inputs.blasst(None), "sparse": lambda: inputs.blasst(threshold)}
        if flash_mla_with_kvcache:
            runs["FlashMLA"] = inputs.flash_mla()
            off = inputs.error(runs["FlashMLA"]())
            if not off < 1e-2:
                raise SystemExit(f"{work.name}: FlashMLA is off by {off:.1e}; is it called right?")
        times = {name: microseconds(run) for name, run in runs.items()}
        line = f"{work.name:34} {100 * result.stats.sparsity:5.1f} % | " + " | ".join(
            f"{name} {us:8.1f} us, {inputs.operations / us / 1e6:4.0f} TFLOP/s, "
            f"{inputs.bytes / us / 1e6:4.2f} TB/s"
            for name, us in times.items()
        )
        line += f" | sparse {times['dense'] / times['sparse']:5.3f}x of dense"
        if "FlashMLA" in times:
            line += f", dense {times['FlashMLA'] / times['dense']:4.2f}x of FlashMLA"
        if work.heads * work.positions <= 64:
            line += " (memory is the limit: no gain is to be expected)"
        print(line, flush=True)


def main() -> None:
    """Measures every line, or those whose number is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lines", type=int, nargs="*", default=range(len(WORKS)))
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0, 0.75])
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), flush=True)
    for line in arguments.lines:
        measure(WORKS[line], arguments.sparsity)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
