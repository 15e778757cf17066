"""Prefill on a GPU, dense and sparse.

FlashAttention-2, which torch has, is measured beside it, FlashAttention-3 (fa3-fwd) if it is
installed and has the sizes, FSA (flash-sparse-attn), dense and sparse, on inputs of one sparsity,
FlashInfer's fmha_v2 with skip-softmax if --fmha-v2 names its compiled module and tvm_ffi is
installed, and for latent attention cuDNN, as torch calls it. With --backend cuda-sm80 FSA runs its
kernels for compute capability 8.0, too. Every line checks the output first. Rates are the
operations of dense attention divided by the time of one call, in steady state: the contenders take
turns, each warm, in another order every round.

Groups of lines: long prompts, the expanded heads of latent attention (MLA), full attention, short
prompts, ragged requests beside the same as a batch, heads of different sparsity, absolute
thresholds by head and place beside a relative one, and the recorded tensors of a real model
(bench/record_qkv.py makes the file).
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import recorded
import torch
from peers import FSA_THRESHOLD, installed, reason
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import blasst

try:
    import tvm_ffi
except ImportError:
    tvm_ffi = None

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
    causal: bool = True
    value_dim: int | None = None
    """None: as dim."""

    @property
    def values(self) -> int:
        return self.value_dim or self.dim

    @property
    def name(self) -> str:
        full = "" if self.causal else ", full"
        size = f"{self.dim}/{self.values}" if self.value_dim else f"{self.dim}"
        return f"{self.batch} x {self.length}, {self.heads}/{self.kv_heads}, d {size}{full}"

    @property
    def operations(self) -> float:
        pairs = self.length**2 / (2 if self.causal else 1)
        return 2.0 * self.batch * pairs * (self.dim + self.values) * self.heads


LONG = (
    Work(1, 65536, 64, 4),
    Work(1, 16384, 64, 4),
    Work(1, 32768, 32, 8),
    Work(1, 16384, 32, 8, 64),
    Work(1, 16384, 16, 4, 256),
    Work(1, 16384, 32, 8),
    Work(1, 65536, 32, 8),
)
MLA = tuple(Work(1, length, 128, 128, 192, value_dim=128) for length in (8192, 16384, 32768))
FULL = (Work(1, 16384, 64, 4, causal=False),)
SHORT = tuple(
    Work(batch, length, 32, 8) for length in (512, 1024, 2048, 4096) for batch in (1, 4, 8)
)
RAGGED = (Work(64, 1024, 32, 8), Work(256, 256, 32, 8))
HEADS = (Work(1, 65536, 64, 4), Work(1, 16384, 64, 4), Work(1, 32768, 32, 8))


def orthogonal(dim: int) -> Tensor:
    """Orthogonal rows of length 1: Hadamard's, of as many elements as are a power of two."""
    signs = torch.ones(1, 1)
    while 2 * signs.shape[0] <= dim:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return torch.nn.functional.pad(signs / math.sqrt(len(signs)), (0, dim - len(signs)))


def planted(work: Work, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v. Blocks of queries and keys draw one of 1 / (1 - sparsity) orthogonal directions.

    A query block scores high on key blocks of its direction and on the first, which has them all.
    """
    w = work
    ways = max(1, round(1 / (1 - sparsity)))
    directions = AMPLITUDE * orthogonal(w.dim)[1 : ways + 1].cuda()

    def blocks(size: int) -> Tensor:
        draw = torch.randint(0, ways, (w.batch, -(-w.length // size), w.kv_heads), device="cuda")
        return draw.repeat_interleave(size, 1)[:, : w.length]

    group = w.heads // w.kv_heads
    q = directions[blocks(QUERY_BLOCK)].repeat_interleave(group, 2)
    q += noise(w, w.heads)
    k = directions[blocks(KEY_BLOCK)]
    k[:, :KEY_BLOCK] = directions.sum(0)
    k += noise(w, w.kv_heads)
    return q.bfloat16(), k.bfloat16(), 4 * noise(w, w.kv_heads, w.values).bfloat16()


def planted_by_head(work: Work, sparsity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v. Query head h has a direction of its own, and a block of keys has it, too, with a
    chance of 1 - sparsity[h], or lacks it for all queries.
    """
    w, group = work, work.heads // work.kv_heads
    directions = AMPLITUDE * orthogonal(w.dim)[1 : group + 1].cuda()
    chance = 1 - sparsity.cuda().view(w.kv_heads, group)
    shape = (w.batch, w.length // KEY_BLOCK, w.kv_heads, group)
    match = (torch.rand(shape, device="cuda") < chance).float()
    match[:, 0] = 1
    k = (match @ directions).repeat_interleave(KEY_BLOCK, 1)
    k += noise(w, w.kv_heads)
    q = noise(w, w.heads) + directions.repeat(w.kv_heads, 1)
    return q.bfloat16(), k.bfloat16(), 4 * noise(w, w.kv_heads, w.values).bfloat16()


def noise(work: Work, heads: int, dim: int | None = None) -> Tensor:
    return 0.5 * torch.randn(work.batch, work.length, heads, dim or work.dim, device="cuda")


def error(q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool) -> float:
    """Of some rows of the first request, relative to dense attention in float64."""
    group = q.shape[2] // k.shape[2]
    worst = 0.0
    for row in {0, q.shape[1] // 3, q.shape[1] - 1}:
        end = row + 1 if causal else k.shape[1]
        keys, values = k[0, :end], v[0, :end]
        exact = torch.empty(q.shape[2], v.shape[3], dtype=torch.float64, device="cuda")
        for h in range(q.shape[2]):
            scores = keys[:, h // group].double() @ q[0, row, h].double() / math.sqrt(q.shape[3])
            exact[h] = scores.softmax(-1) @ values[:, h // group].double()
        worst = max(worst, ((out[0, row] - exact).norm() / exact.norm()).item())
    return worst


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's own, which takes fewer heads of keys, too."""
    lengths = q.shape[1], k.shape[1]
    attend = torch.ops.aten._flash_attention_forward
    return attend(q, k, v, None, None, *lengths, 0.0, causal, False)[0]


def milliseconds(
    runs: dict[str, Callable[[], object]], rounds: int, turn: float
) -> dict[str, float]:
    """Median time of one call of each; a turn takes at least `turn` milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for shift in range(rounds):
        for name in names[shift % len(names) :] + names[: shift % len(names)]:
            run, count = runs[name], 1
            while True:  # long enough to be steady; the first attempts warm up
                start.record()
                for _ in range(count):
                    run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
                if elapsed > turn:
                    break
                count = max(count + 1, math.ceil(1.5 * turn * count / elapsed))
            times[name].append(elapsed / count)
    return {name: sorted(samples)[rounds // 2] for name, samples in times.items()}


def dense_peers(
    work: Work, q: Tensor, k: Tensor, v: Tensor, packages: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """Those of dense attention that have the sizes."""
    runs: dict[str, Callable[[], object]] = {}
    if work.value_dim is None:
        runs["FA2"] = lambda: flash_attention_2(q, k, v, work.causal)
    if fa3 := packages.get("FA3"):
        runs["FA3"] = lambda: fa3(q, k, v, causal=work.causal)
    if work.value_dim:
        transposed = [t.transpose(1, 2) for t in (q, k, v)]

        def cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    *transposed, is_causal=work.causal
                )

        runs["cuDNN"] = cudnn
    return able(work, runs)


def fsa_runs(work: Work, q: Tensor, k: Tensor, v: Tensor, fsa: Any) -> dict[str, Callable]:
    """FSA with and without a threshold, each if its output is right."""
    attend = partial(fsa, q, k, v, is_causal=work.causal)
    runs = {"FSA dense": attend, "FSA": partial(attend, softmax_threshold=FSA_THRESHOLD)}

    def check(run: Callable) -> None:
        off = error(q, k, v, run()[0], work.causal)
        if not off < 1e-2:
            raise ValueError(f"the output is off by {off:.1e}")

    return able(work, runs, check)


def able(
    work: Work, runs: dict[str, Callable], check: Callable[[Callable], object] = lambda run: run()
) -> dict[str, Callable]:
    """Those that pass; a line is printed for each that does not."""
    passed = {}
    for name, run in runs.items():
        try:
            check(run)
            passed[name] = run
        except Exception as error:  # whatever a peer dies of, the others are measured
            print(f"{work.name}: no {name}: {reason(error)}", flush=True)
            check_gpu(f"{work.name}: after {name}'s error")
    return passed


def check_gpu(when: str) -> None:
    """Some errors take the GPU from the whole process: it ends here."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(
            f"{when} this process has no GPU any more ({reason(error)}); "
            "measure this work without that package"
        ) from None


class FmhaV2:
    """FlashInfer's fmha_v2, of one compiled module for bfloat16 and head dimension 128."""

    def __init__(self, module: str):
        self.module = tvm_ffi.load_module(module)
        self.workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """A causal call for one request; its threshold is factor / length."""
        length, dim = q.shape[1], q.shape[3]
        kv = torch.stack([k[0], v[0]], 1)
        out = torch.empty_like(q[0])
        ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        scale = 1 / math.sqrt(dim)

        def run() -> Tensor:
            self.module.run(
                *(q[0], kv, kv, out, self.workspace, self.workspace.numel(), None, 0),
                *(ends[1:], ends, ends, "contiguous_q_kv", length, length, 1, "causal"),
                *(1.0, scale, 1.0, -1, 0, False, 0.0, THRESHOLD * length, None, None),
            )
            return out[None]

        return run


class Table:
    """Prints lines, and keeps their numbers."""

    def __init__(
        self,
        rounds: int,
        turn: float,
        packages: dict[str, Any],
        fmha_v2: FmhaV2 | None,
        int8: bool,
    ):
        self.rounds, self.turn, self.packages = rounds, turn, packages
        self.fmha_v2, self.int8 = fmha_v2, int8
        self.rows: list[dict[str, object]] = []

    def line(
        self,
        work: Work,
        inputs: tuple[Tensor, Tensor, Tensor],
        threshold: float | Tensor,
        most: float,
        sparse_peers: bool = False,
    ) -> tuple[float, float]:
        """Sparsity, and the sparse rate; an output that is off by more than `most` ends it all.

        sparse_peers: measure FSA, too, which must find the same tiles to skip.
        """
        q, k, v = inputs
        causal = work.causal
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device="cuda").view(1, -1)

        def attend(threshold: Tensor | None = None, scores: str = "exact", stats: bool = False):
            return blasst.attention(
                *(q, k, v),
                causal=causal,
                threshold=threshold,
                scores=scores,
                phase="prefill",
                return_stats=stats,
            )

        sparse = attend(threshold, stats=True)
        off = [error(q, k, v, out, causal) for out in (attend(), sparse.out)]
        if not (off[0] < 1e-2 and off[1] < most):
            raise SystemExit(f"{work.name}: the output is off by {max(off):.1e}")
        runs: dict[str, Callable[[], object]] = {
            "dense": attend,
            "sparse": lambda: attend(threshold),
        }
        if self.int8 and not work.value_dim:
            off.append(error(q, k, v, attend(threshold, "int8"), causal))
            # A planted direction is a row of the Hadamard matrix: the rotation makes it one spike,
            # the worst that can be rounded.
            if not off[2] < 0.5:
                raise SystemExit(f"{work.name}: with scores in int8 the output is off by {off[2]}")
            runs["dense int8"] = lambda: attend(scores="int8")
            runs["sparse int8"] = lambda: attend(threshold, "int8")
        runs |= dense_peers(work, q, k, v, self.packages)
        if sparse_peers and "FSA" in self.packages:
            runs |= fsa_runs(work, q, k, v, self.packages["FSA"])
        if self.fmha_v2 and causal and work.batch == 1 and work.dim == 128:
            runs["fmha_v2"] = self.fmha_v2.bind(q, k, v)
        times = milliseconds(runs, self.rounds, self.turn)
        rate = {name: work.operations / ms / 1e9 for name, ms in times.items()}
        line = f"{work.name:30} {100 * sparse.stats.sparsity:5.1f} % | "
        line += " | ".join(f"{name} {tflops:6.0f}" for name, tflops in rate.items())
        line += (
            " TFLOP/s | error "
            + ", ".join(f"{x:.1e}" for x in off)
            + f" | {rate['sparse'] / rate['dense']:4.2f}x"
        )
        beside = [name for name in rate if name in ("FA2", "FA3", "cuDNN")]
        own = [name for name in rate if name not in (*beside, "FSA dense", "FSA", "fmha_v2")]
        for peer in beside:
            line += f", of {peer} " + " ".join(f"{rate[name] / rate[peer]:4.2f}x" for name in own)
        for name, peer in (("dense", "FSA dense"), ("sparse", "FSA")):
            if peer in rate:
                line += f", {name} of {peer} {rate[name] / rate[peer]:4.2f}x"
        print(line, flush=True)
        row = {"work": work.name, "sparsity": sparse.stats.sparsity, "tflops": rate}
        self.rows.append(row)
        return sparse.stats.sparsity, rate["sparse"]

    def planted(self, works: tuple[Work, ...], sparsities: list[float]) -> None:
        for work in works:
            for sparsity in sparsities:
                inputs = planted(work, sparsity)
                self.line(work, inputs, THRESHOLD, 1e-2, sparse_peers=work.value_dim is None)
            torch.cuda.empty_cache()

    def ragged(self) -> None:
        """Requests one behind the other, the longest known or not, beside the same as a batch."""
        for work in RAGGED:
            batch = [noise(work, heads).bfloat16() for heads in (work.heads, *[work.kv_heads] * 2)]
            flat = [t.flatten(0, 1) for t in batch]
            ends = torch.arange(work.batch + 1, dtype=torch.int32, device="cuda") * work.length
            nothing = torch.zeros(1, 1, device="cuda")
            for name, threshold in (("dense", None), ("0 %", nothing)):
                attend = partial(
                    blasst.attention, causal=True, threshold=threshold, phase="prefill"
                )
                ragged = partial(attend, *flat, cu_seqlens_q=ends, cu_seqlens_k=ends)
                longest = {"max_seqlen_q": work.length, "max_seqlen_k": work.length}
                runs: dict[str, Callable[[], Tensor]] = {
                    "batch": partial(attend, *batch),
                    "ragged": ragged,
                    "ragged, longest known": partial(ragged, **longest),
                }
                wanted = runs["batch"]().flatten(0, 1)
                if not all(torch.equal(run().view_as(wanted), wanted) for run in runs.values()):
                    raise SystemExit(f"{work.name}: ragged requests give other bits")
                times = milliseconds(runs, self.rounds, self.turn)
                line = " | ".join(
                    f"{run} {ms:6.3f} ms ({ms / times['batch']:4.2f}x)" for run, ms in times.items()
                )
                print(f"{work.name:30} {name:5} | {line}", flush=True)
            torch.cuda.empty_cache()

    def by_head(self) -> None:
        """Sparsities from 0 to 95 %, 60 % in the mean, beside 60 % on every head."""
        for work in HEADS:
            u = (torch.randperm(work.heads) + 0.5) / work.heads
            mixed = 0.95 * u ** (0.95 / 0.6 - 1)
            got, rate = self.line(work, planted_by_head(work, mixed), THRESHOLD, 1e-2)
            alike = torch.full_like(mixed, mixed.mean().item())
            of_mean, wanted = self.line(work, planted_by_head(work, alike), THRESHOLD, 1e-2)
            # Time falls with sparsity as 2 - sparsity.
            wanted *= (2 - of_mean) / (2 - got)
            print(
                f"  heads of 0 to 95 %: {rate / wanted:4.2f}x what their mean predicts", flush=True
            )
            torch.cuda.empty_cache()

    def absolute(self) -> None:
        """A threshold by head and place that skips the tiles that the relative one skips."""
        for work in LONG[:2]:
            inputs = planted(work, 0.75)
            middle = AMPLITUDE**2 / math.sqrt(work.dim) / 2  # matching scores are twice that
            places = torch.full((1, work.heads, work.length // 64), middle, device="cuda")
            tests = {
                "relative": {"threshold": torch.full((1, 1), THRESHOLD, device="cuda")},
                "absolute": {"absolute_threshold": places},
            }

            attend = partial(blasst.attention, *inputs, causal=True, phase="prefill")
            found = {name: attend(**test, return_stats=True) for name, test in tests.items()}
            if not torch.equal(found["relative"].out, found["absolute"].out):
                raise SystemExit(f"{work.name}: the two tests skip different tiles")
            runs = {name: partial(attend, **test) for name, test in tests.items()}
            times = milliseconds(runs, self.rounds, self.turn)
            rates = " | ".join(f"{n} {work.operations / ms / 1e9:6.0f}" for n, ms in times.items())
            ratio = times["relative"] / times["absolute"]
            skipped = 100 * found["absolute"].stats.sparsity
            print(f"{work.name:30} {skipped:5.1f} % | {rates} TFLOP/s | {ratio:4.2f}x", flush=True)
            torch.cuda.empty_cache()

    def recorded(self, file: Path) -> None:
        """At thresholds for 50 and 75 % on these very tensors, one for each layer."""
        for layer, tensors in torch.load(file, weights_only=True).items():
            q, k, v = (t.cuda() for t in tensors)
            work = Work(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
            for sparsity in (0.5, 0.75):
                threshold = recorded.threshold_for(sparsity, q, k, v)
                print(f"layer {layer}, threshold {threshold:.2e}: ", end="")
                self.line(work, (q, k, v), threshold, 1.0)


def main() -> None:
    """Measures every group, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    groups = ("long", "mla", "full", "short", "ragged", "heads", "absolute", "recorded")
    parser.add_argument("--groups", nargs="*", choices=groups, default=groups)
    parser.add_argument("--lines", type=int, nargs="*", default=range(len(LONG)), help="of long")
    parser.add_argument(
        "--dim", type=int, nargs="*", help="of a head, in long (default: of each line its own)"
    )
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0, 0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=100, help="least milliseconds of a turn")
    parser.add_argument("--backend", choices=("cuda-sm90", "cuda-sm80"), help="default: the first")
    parser.add_argument(
        "--scores", choices=("exact", "int8"), default="int8", help="int8 (default): beside exact"
    )
    recorded.add_option(parser)
    parser.add_argument("--fmha-v2", metavar="SO", help="compiled module of FlashInfer's fmha_v2")
    parser.add_argument("--out", type=Path, metavar="JSON", help="for bench/plot_prefill.py")
    arguments = parser.parse_args()
    if arguments.fmha_v2 and not tvm_ffi:
        parser.error("--fmha-v2 needs tvm_ffi (PyPI: apache-tvm-ffi)")
    if arguments.backend:
        os.environ["BLASST_CUDA_BACKEND"] = arguments.backend  # read at the first call
    if arguments.backend == "cuda-sm80":
        # FSA has one kernel for 8.0 and 12.0; only as the latter does it compile for Hopper.
        os.environ["FLASH_ATTENTION_ARCH"] = "sm_120"  # read at its first call
    print(torch.cuda.get_device_name(), arguments.backend or "", flush=True)
    fmha_v2 = FmhaV2(arguments.fmha_v2) if arguments.fmha_v2 else None
    packages = installed("FA3", "FSA")
    table = Table(arguments.rounds, arguments.turn, packages, fmha_v2, arguments.scores == "int8")
    if "long" in arguments.groups:
        works = [LONG[line] for line in arguments.lines]
        if arguments.dim:
            works = [replace(work, dim=dim) for work in works for dim in arguments.dim]
        table.planted(tuple(works), arguments.sparsity)
    if "mla" in arguments.groups:
        table.planted(MLA, arguments.sparsity)
    if "full" in arguments.groups:
        table.planted(FULL, arguments.sparsity)
    if "short" in arguments.groups:
        table.planted(SHORT, [0, 0.5])
    if "ragged" in arguments.groups:
        table.ragged()
    if "heads" in arguments.groups:
        table.by_head()
    if "absolute" in arguments.groups:
        table.absolute()
    if "recorded" in arguments.groups:
        if arguments.recorded.exists():
            table.recorded(arguments.recorded)
        else:
            print(f"no {arguments.recorded}: bench/record_qkv.py makes it", flush=True)
    if arguments.out:
        measured = {"device": torch.cuda.get_device_name(), "rows": table.rows}
        arguments.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
