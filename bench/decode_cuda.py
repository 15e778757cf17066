"""Decode on a GPU, dense and sparse.

FlashAttention-3 is measured beside it if it is installed: fa3-fwd, which has no pages, and a build
that has them (tokenspeed-fa3). Every line checks the output first. Rates are bytes of the keys and
values that dense attention reads, divided by the time of one call in a replayed graph.
The same keys and values in 8 bits are measured beside them, against 16 bits dense ("int8-keys":
values stay in 16 bits).
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import blasst

try:
    from fa3_fwd_interface import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None
try:
    from flash_attn_interface import flash_attn_with_kvcache as paged_flash_attn
except ImportError:
    paged_flash_attn = None

BLOCK = 128  # keys that score alike
AMPLITUDE = 22.0  # a matching key beats another by e^43
THRESHOLD = 1e-3
CACHES = {
    "fp8": (torch.float8_e4m3fn, 448),
    "int8": (torch.int8, 127),
    "int8-keys": (torch.int8, 127),
}


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    name: str
    batch: int
    keys: int
    heads: int
    kv_heads: int
    dim: int = 128
    page: int = 0
    """0: contiguous keys."""
    least: int = 0
    """Lengths are drawn from it to `keys`; 0: all keys are in use."""
    room: int = 0
    """Keys that a request has pages for, as in a graph of a server; 0: `keys`."""


WORKS = (
    Work("batch 64, 16K, 64/4", 64, 16384, 64, 4),
    Work("batch 64, 64K, 64/4", 64, 65536, 64, 4),
    Work("batch 16, 32K, 32/8", 16, 32768, 32, 8),
    Work("batch 1, 128K, 32/8", 1, 131072, 32, 8),
    Work("batch 1, 16K, 32/8", 1, 16384, 32, 8),
    Work("batch 256, 1K-64K, pages of 64, 32/8", 256, 65536, 32, 8, page=64, least=1024),
    Work("batch 16, 16K, pages of 64, 32/8", 16, 16384, 32, 8, page=64, room=16640),
    Work("batch 64, 4K, pages of 64, 32/8", 64, 4096, 32, 8, page=64, room=16640),
)


class Inputs:
    """Random values; queries and keys of a planted sparsity that differs by request and head."""

    def __init__(self, work: Work, device: torch.device):
        w = self.work = work
        room = w.room or w.keys
        shape = (w.batch, room, w.kv_heads, w.dim)
        self.q = torch.empty(w.batch, 1, w.heads, w.dim, dtype=torch.bfloat16, device=device)
        self.k = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.v = torch.empty_like(self.k)
        for request in self.v:
            request.normal_()
        self.lengths = torch.full((w.batch,), w.keys, dtype=torch.int32, device=device)
        self.table = None
        if w.page:
            if w.least:
                self.lengths.random_(w.least, w.keys + 1)
            pages = torch.randperm(w.batch * room // w.page, device=device)
            self.table = pages.int().view(w.batch, -1)

    def plant(self, sparsity: float) -> None:
        """Gives each block of keys one of two directions: the queries' own, or another."""
        w, device = self.work, self.k.device
        signs = torch.ones(2, w.dim, device=device)
        signs[1, 1::2] = -1
        directions = AMPLITUDE * signs / math.sqrt(w.dim)
        self.q.normal_(0, 0.5).add_(directions[0])
        block = w.page or BLOCK
        for request in self.k:
            share = (1 - sparsity) * (0.5 + torch.rand(w.kv_heads, device=device))
            match = torch.rand(len(request) // block, w.kv_heads, device=device) < share
            if sparsity == 0:
                match[:] = True
            match[0] = True
            blocks = request.view(-1, block, w.kv_heads, w.dim)
            blocks.normal_(0, 0.5).add_(directions[(~match).long()].to(torch.bfloat16)[:, None])
        if self.table is not None:  # a request's first page is not the first in memory
            first = self.pages(self.k)[self.table[:, 0].long()]
            self.pages(self.k)[self.table[:, 0].long()] = first.normal_(0, 0.5).add_(directions[0])

    def pages(self, t: Tensor) -> Tensor:
        return t.view(-1, self.work.page, self.work.kv_heads, self.work.dim)

    def blasst(self, threshold: float | Tensor | None, stats: bool = False, cache=None):
        k, v, k_scale, v_scale = cache or (self.k, self.v, None, None)
        paged = self.table is not None
        return blasst.attention(
            self.q,
            self.pages(k) if paged else k,
            self.pages(v) if paged else v,
            k_scale=k_scale,
            v_scale=v_scale,
            lengths=self.lengths,
            page_table=self.table,
            threshold=threshold,
            return_stats=stats,
        )

    def in_8_bits(self, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys and values, and the scale of each; None: not in 8 bits."""
        dtype, most = CACHES[kind]
        small, scales = [], []
        for t in (self.k, self.v):
            if kind == "int8-keys" and t is self.v:
                small.append(t)
                scales.append(None)
                continue
            scale = max(request.abs().max() for request in t).float() / most
            small.append(torch.empty_like(t, dtype=dtype))
            for into, request in zip(small[-1], t, strict=True):
                units = request.float() / scale
                into.copy_(units.round() if dtype == torch.int8 else units)
            scales.append(scale.view(1, 1))
        return (*small, *scales)

    def peers(self) -> dict[str, Callable[[], Tensor]]:
        """FA3 without pages reads the same lengths of contiguous keys."""
        q, k, v, lengths = self.q, self.k, self.v, self.lengths
        runs = {}
        if flash_attn_with_kvcache:
            # Contiguous keys that are all in use need no lengths.
            used = {} if self.table is None else {"cache_seqlens": lengths}
            runs["FA3"] = lambda: flash_attn_with_kvcache(q, k, v, causal=True, **used)
        if paged_flash_attn and self.table is not None:
            runs["FA3 paged"] = lambda: paged_flash_attn(
                *(q, self.pages(k), self.pages(v)),
                cache_seqlens=lengths,
                page_table=self.table,
                causal=True,
            )
        return runs

    def error(self, out: Tensor, cache=None) -> float:
        """Of some requests, relative to dense attention in float32."""
        w, worst = self.work, 0.0
        stored_k, stored_v, k_scale, v_scale = cache or (self.k, self.v, 1, 1)
        for b in {0, w.batch // 2, w.batch - 1}:
            k, v = stored_k[b], stored_v[b]
            if self.table is not None:
                at = self.table[b].long()
                k, v = (
                    self.pages(t).view(torch.uint8)[at].flatten(0, 1).view(t.dtype)
                    for t in (stored_k, stored_v)
                )
            k = k[: self.lengths[b]].float() * k_scale
            v = v[: self.lengths[b]].float() * (1 if v_scale is None else v_scale)
            q = self.q[b, 0].float().view(w.kv_heads, -1, w.dim)
            p = (torch.einsum("hgd,nhd->hgn", q, k) / math.sqrt(w.dim)).softmax(-1)
            exact = torch.einsum("hgn,nhd->hgd", p, v).reshape(w.heads, w.dim)
            worst = max(worst, ((out[b, 0] - exact).norm() / exact.norm()).item())
        return worst

    def bytes(self, k: Tensor, v: Tensor) -> int:
        """Of such keys and values, those that are in use."""
        elements = int(self.lengths.sum()) * self.work.kv_heads * self.work.dim
        return elements * (k.element_size() + v.element_size())


class Replayed:
    """A call from a CUDA graph, in which the host takes no part. Keeps what the call reads."""

    def __init__(self, run: Callable[[], object]):
        self.run = run
        run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()

    def __call__(self) -> None:
        self.graph.replay()


def microseconds(run: Callable[[], object]) -> float:
    """Median time of one call, replayed from a graph, the GPU warm."""
    replay = Replayed(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    while len(times) < 40 or sum(times) < 60:
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    steady = sorted(times[len(times) // 2 :])
    return 1e3 * steady[len(steady) // 2]


def caches_of(dim: int, backend: str | None) -> list[str]:
    """Those in 8 bits that decode has kernels for."""
    if backend == "cuda-sm80" or torch.cuda.get_device_capability() != (9, 0):
        return []
    return [kind for kind in CACHES if kind != "int8-keys" or dim == 128]


def measure(work: Work, sparsities: list[float], caches: list[str]) -> None:
    """Prints a line for each sparsity, and one for each cache under it."""
    inputs = Inputs(work, torch.device("cuda"))
    threshold = torch.full((1, 1), THRESHOLD, device="cuda")
    for sparsity in sparsities:
        inputs.plant(sparsity)
        error = inputs.error(inputs.blasst(None))
        result = inputs.blasst(threshold, stats=True)
        error = max(error, inputs.error(result.out))
        if not error < 5e-3:
            raise SystemExit(f"{work.name}: the output is off by {error:.1e}")
        dense = microseconds(lambda: inputs.blasst(None))
        sparse = microseconds(lambda: inputs.blasst(threshold))
        rate = inputs.bytes(inputs.k, inputs.v) / 1e6
        line = f"{work.name:37} {100 * result.stats.sparsity:5.1f} % | "
        line += f"dense {rate / dense:5.2f} TB/s"
        for name, run in inputs.peers().items():
            peer = microseconds(run)
            line += f" ({peer / dense:4.2f}x {name}'s {rate / peer:5.2f})"
        print(f"{line} | sparse {rate / sparse:5.2f} ({dense / sparse:5.3f}x dense)", flush=True)
        for kind in caches:
            cache = inputs.in_8_bits(kind)
            result = inputs.blasst(threshold, stats=True, cache=cache)
            error = inputs.error(inputs.blasst(None, cache=cache), cache)
            error = max(error, inputs.error(result.out, cache))
            if not error < 5e-3:
                raise SystemExit(f"{work.name}, {kind}: the output is off by {error:.1e}")
            small = microseconds(lambda cache=cache: inputs.blasst(None, cache=cache))
            sparse = microseconds(lambda cache=cache: inputs.blasst(threshold, cache=cache))
            line = f"{kind:>37} {100 * result.stats.sparsity:5.1f} % | of 16 bits dense: "
            small_rate = inputs.bytes(*cache[:2]) / 1e6 / small
            line += f"dense {dense / small:5.3f}x ({small_rate:5.2f} TB/s), "
            print(f"{line}sparse {dense / sparse:5.3f}x", flush=True)
            del cache


def main() -> None:
    """Measures every line, or those whose number is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lines", type=int, nargs="*", default=range(len(WORKS)))
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0, 0.73, 0.87])
    parser.add_argument("--backend", choices=("cuda-sm90", "cuda-sm80"), help="default: the first")
    parser.add_argument("--dim", type=int, nargs="*", default=[128], help="of a head")
    parser.add_argument(
        "--cache", nargs="*", choices=list(CACHES), help="default: those that there are kernels for"
    )
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["BLASST_CUDA_BACKEND"] = arguments.backend  # read at the first call
    print(torch.cuda.get_device_name(), arguments.backend or "", flush=True)
    for dim in arguments.dim:
        print(f"head size {dim}", flush=True)
        caches = caches_of(dim, arguments.backend) if arguments.cache is None else arguments.cache
        for line in arguments.lines:
            measure(replace(WORKS[line], dim=dim), arguments.sparsity, caches)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
