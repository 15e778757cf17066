"""Two or more builds of the operator library on one GPU, in turns.

    python bench/two_builds.py before=old/_ops.so after=build/release/bindings/torch/_ops.so
    python bench/two_builds.py a=a.so b=b.so --works decode:64x16384:64/4:128:0.73:fp8

Each build is a process of its own, with this tree's Python; they take turns of some milliseconds,
in another order every round, so that one card, one temperature and one host serve all. A line is a
work, the median microseconds of a call of each, and the ratio of the first one's to it: more than 1
is faster. The same library under two names shows how much of a ratio means nothing (1 to 2 %).

    prefill:BATCHxLENGTH:HEADS/KV_HEADS:DIM[/VALUE_DIM]:SPARSITY:exact|int8
    backward:BATCHxLENGTH:HEADS/KV_HEADS:DIM[/VALUE_DIM]:SPARSITY
    decode:BATCHxLENGTH:HEADS/KV_HEADS:DIM:SPARSITY:bf16|fp8|int8|int8-keys[:PAGE]
    latent:BATCHxLENGTH:HEADS:SPARSITY[:POSITIONS]

SPARSITY: dense, 0 (a threshold that skips nothing), or a share of tiles, planted. Decode is
replayed from a CUDA graph. BLASST_CUDA_BACKEND chooses the kernels, as everywhere.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

WORKS = (
    *(f"prefill:1x16384:64/4:128:{s}:exact" for s in ("dense", "0", "0.75")),
    *(f"prefill:1x16384:64/4:128:{s}:int8" for s in ("dense", "0.75")),
    "prefill:8x2048:32/8:128:dense:exact",
    *(f"decode:64x16384:64/4:128:{s}:{c}" for c in ("bf16", "fp8") for s in ("dense", "0", "0.73")),
    *(f"decode:16x32768:32/8:128:{s}:{c}" for c in ("bf16", "fp8") for s in ("dense", "0", "0.73")),
    *(f"latent:64x16384:128:{s}" for s in ("dense", "0.75")),
)


def main() -> None:
    """Starts a process for each build, and prints a line for each work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=LIBRARY", type=named)
    parser.add_argument("--works", nargs="+", default=WORKS, metavar="WORK")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=20, help="milliseconds of a turn, at least")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        builds = {name: Build(Path(place) / name, library) for name, library in args.builds}
        for work in args.works:
            print(f"{work:44s} {line(builds, work, args.rounds, args.turn)}", flush=True)


def named(text: str) -> tuple[str, Path]:
    """NAME=LIBRARY."""
    name, _, library = text.partition("=")
    if not name or not Path(library).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=LIBRARY, the file of an operator library")
    return name, Path(library).resolve()


class Build:
    """A process that has the package with one library, and answers a line with a line."""

    def __init__(self, place: Path, library: Path):
        package = Path(__file__).parent.parent / "python" / "blasst"
        shutil.copytree(package, place / "blasst", ignore=shutil.ignore_patterns("_ops.so"))
        (place / "blasst" / "_ops.so").symlink_to(library)
        path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, SERVE],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: object) -> float:
        """Microseconds, or 0; SystemExit with what went wrong there."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a build ended with {self.process.wait()}")
        result = json.loads(answer)
        if "error" in result:
            raise SystemExit(f"{question}: {result['error']}")
        return result["microseconds"]


def line(builds: dict[str, Build], work: str, rounds: int, turn: float) -> str:
    """Of one work."""
    times: dict[str, list[float]] = {name: [] for name in builds}
    for build in builds.values():
        build.ask(make=work)
    for shift in range(rounds):
        for name in list(builds)[:: 1 if shift % 2 == 0 else -1]:
            times[name].append(builds[name].ask(turn=turn))
    for build in builds.values():
        build.ask(make=None)
    medians = {name: median(samples) for name, samples in times.items()}
    first = next(iter(medians.values()))
    return "  ".join(f"{name} {time:.1f} us {first / time:.3f}x" for name, time in medians.items())


SERVE = "--serve"


def serve() -> None:
    """A build's process: makes a work, or runs it for a turn."""
    from prefill_cuda import milliseconds  # it takes the library, which the first process has not

    run: Callable[[], object] | None = None
    for text in sys.stdin:
        question, microseconds = json.loads(text), 0.0
        try:
            if "make" in question:
                run = None
                torch.cuda.empty_cache()
                run = question["make"] and make(question["make"])
            else:
                assert run
                [time] = milliseconds({"": run}, 1, question["turn"]).values()
                microseconds = 1000 * time
            answer: dict[str, object] = {"microseconds": microseconds}
        except Exception as error:  # told to who asked
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


def make(work: str) -> Callable[[], object]:
    """A call of it, on the same inputs in every process."""
    torch.manual_seed(0)
    phase, size, *rest = work.split(":")
    batch, length = map(int, size.split("x"))
    if phase == "prefill":
        return prefill(batch, length, *rest)
    if phase == "backward":
        return backward(batch, length, *rest)
    from decode_cuda import Replayed

    return Replayed(
        decode(batch, length, *rest) if phase == "decode" else latent(batch, length, *rest)
    )


def threshold_and_share(sparsity: str, threshold: float):
    """What skips, and the share that is planted."""
    if sparsity == "dense":
        return None, 0.75
    return torch.full((1, 1), threshold, device="cuda"), float(sparsity)


def causal(batch: int, length: int, heads: str, dims: str, sparsity: str):
    """Queries, keys and values, and the options of a causal call."""
    import prefill_cuda as bench

    query_heads, kv_heads = map(int, heads.split("/"))
    dim, _, value_dim = dims.partition("/")
    sizes = (batch, length, query_heads, kv_heads, int(dim), True)
    work = bench.Work(*sizes, int(value_dim) if value_dim else None)
    threshold, share = threshold_and_share(sparsity, bench.THRESHOLD)
    return bench.planted(work, share), {"causal": True, "threshold": threshold, "phase": "prefill"}


def prefill(batch: int, length: int, heads: str, dims: str, sparsity: str, scores: str):
    """Causal."""
    import blasst

    inputs, options = causal(batch, length, heads, dims, sparsity)
    return lambda: blasst.attention(*inputs, **options, scores=scores)


def backward(batch: int, length: int, heads: str, dims: str, sparsity: str):
    """Of a causal prefill, along the tiles that it kept."""
    from backward_cuda import backward_of

    import blasst

    tensors, options = causal(batch, length, heads, dims, sparsity)
    inputs = [t.requires_grad_() for t in tensors]
    out = blasst.attention(*inputs, **options)
    return backward_of(out, inputs, torch.randn_like(out))


def decode(
    batch: int, length: int, heads: str, dim: str, sparsity: str, cache: str, page: str = "0"
):
    """One position of each request."""
    import decode_cuda as bench

    query_heads, kv_heads = map(int, heads.split("/"))
    sizes = (batch, length, query_heads, kv_heads, int(dim), int(page))
    inputs = bench.Inputs(bench.Work("", *sizes), torch.device("cuda"))
    threshold, share = threshold_and_share(sparsity, bench.THRESHOLD)
    inputs.plant(share)
    stored = None if cache == "bf16" else inputs.in_8_bits(cache)
    return lambda: inputs.blasst(threshold, cache=stored)


def latent(batch: int, length: int, heads: str, sparsity: str, positions: str = "1"):
    """Over latents, in pages."""
    import latent_cuda as bench

    inputs = bench.Inputs(bench.Work(batch, length, int(heads), int(positions)))
    threshold, share = threshold_and_share(sparsity, bench.THRESHOLD)
    inputs.plant(share)
    return lambda: inputs.blasst(threshold)


if __name__ == "__main__":
    serve() if sys.argv[1:] == [SERVE] else main()
