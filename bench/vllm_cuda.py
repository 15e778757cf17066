"""vLLM with blasst beside vLLM's FlashAttention, one GPU, a Llama-shaped model with dummy weights.

    python bench/vllm_cuda.py
    python bench/vllm_cuda.py --layers 8 --eager-prefill --prefill 32768x1 --decode 16384x16

Each engine is a process: FLASH_ATTN, CUSTOM dense, and CUSTOM with three quarters of the tiles
dropped. Dummy weights have nothing to skip, so that is planted: three quarters of the KV heads get
an absolute threshold that no score reaches, the others one that every score does. A line is an
engine and a workload, LENGTHxREQUESTS: seconds from the prompts to the first tokens (prefill), or
milliseconds a step of all requests behind that (decode), the median with the lowest and highest,
and how long the engine took to start. Beside it, from a profile of the same, the time of
attention's kernels and of all kernels. What attention allows the sparse engine is the dense one's
time with the sparse attention in the place of its own; the last column is the share of that gain
which is there.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 262144,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
DROPS, KEEPS = 1e30, -1e30
PLANTED = [DROPS] * 24 + [KEEPS] * 8
ENGINES = {
    "FLASH_ATTN": {"attention_backend": "FLASH_ATTN"},
    "blasst dense": {"attention_backend": "CUSTOM"},
    "blasst 75 %": {
        "attention_backend": "CUSTOM",
        "additional_config": {
            "blasst": {p: {"absolute_threshold": PLANTED} for p in ("prefill", "decode")}
        },
    },
}
STEP_TOKENS = 8192
STEPS = 64
GROUP = 16
"""Of the steps of a decode that are timed together."""
ATTENTION = ("blasst", "flash::")
"""In the names of attention's kernels."""


def main() -> None:
    """Prints the lines of every engine, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prefill", nargs="*", default=["32768x1", "4096x8", "131072x1"])
    parser.add_argument("--decode", nargs="*", default=["16384x16", "4096x64"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--block-size", type=int, help="tokens in a page; default: the backend's")
    parser.add_argument(
        "--eager-prefill", action="store_true", help="compile nothing; only decode is a graph"
    )
    parser.add_argument("--out", type=Path, help="the lines as JSON")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        measure(arguments)
        return
    lines = []
    for engine in arguments.engines:
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as measured:
            for line in measured.stdout:
                if not line.startswith("{"):
                    continue
                lines.append(json.loads(line))
                print(line, end="", file=sys.stderr, flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(lines, indent=1))
        if measured.returncode:
            print(f"{engine} ended with {measured.returncode}", flush=True)
    tell(lines)


def measure(arguments: argparse.Namespace) -> None:
    """One engine's lines, as JSON."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    works = [
        (phase, *map(int, work.split("x")))
        for phase in ("prefill", "decode")
        for work in getattr(arguments, phase)
    ]
    longest, most = max(work[1] for work in works), max(work[2] for work in works)
    options = dict(ENGINES[arguments.engine])
    graphs = {"cudagraph_capture_sizes": sorted({n for *_, n in works} | {1})}
    if arguments.eager_prefill:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if arguments.block_size:
        options["block_size"] = arguments.block_size
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | {"num_hidden_layers": arguments.layers}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        start = perf_counter()
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=longest + 256,
            max_num_seqs=most,
            max_num_batched_tokens=STEP_TOKENS,
            enable_prefix_caching=False,
            compilation_config=graphs,
            seed=0,
            **options,
        )
        started = perf_counter() - start
    engine = Engine(llm.llm_engine)
    for phase, length, requests in works:
        if phase == "prefill":
            times, kernels = engine.prefill(length, requests, arguments.repeats)
        else:
            times, kernels = engine.decode(length, requests)
        line = {"engine": arguments.engine, "phase": phase, "work": f"{length}x{requests}"}
        line |= {"start": started, "median": median(times)}
        line |= {"lowest": min(times), "highest": max(times)}
        print(json.dumps(line | kernels), flush=True)


class Engine:
    """Steps of vLLM's, timed and profiled."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._draw, self._names = engine, random.Random(1), count()

    def prefill(self, length: int, requests: int, repeats: int) -> tuple[list[float], dict]:
        """Seconds until the first tokens, and the kernels' time."""

        def run() -> None:
            self._add(length, requests, 1)
            self._finish()

        run()
        times = []
        for _ in range(repeats):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return times, profile(run, 1)

    def decode(self, length: int, requests: int) -> tuple[list[float], dict]:
        """Milliseconds of a step in which every request gets a token, and the kernels' time."""
        reading = -(-length * requests // STEP_TOKENS)  # a request decodes while others are read
        waiting = self._add(length, requests, reading + STEPS + 4 * GROUP)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        self._steps()
        times = []
        for _ in range(STEPS // GROUP):
            start = perf_counter()
            self._steps()
            times.append((perf_counter() - start) / GROUP * 1000)
        kernels = profile(self._steps, GROUP / 1000)
        self._finish()
        return times, kernels

    def _add(self, length: int, requests: int, tokens: int) -> set[str]:
        """Requests of random prompts; their names."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        names = [str(next(self._names)) for _ in range(requests)]
        for name in names:
            prompt = {"prompt_token_ids": [self._draw.randrange(3, 32000) for _ in range(length)]}
            self._engine.add_request(name, prompt, sampling)
        return set(names)

    def _steps(self) -> None:
        for _ in range(GROUP):
            self._engine.step()

    def _finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


def profile(run: Callable[[], None], unit: float) -> dict[str, Any]:
    """Time of attention's kernels, of all, and of the six that take most, in units of seconds."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    ranges: dict[str, list] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            ranges.setdefault(event.name, []).append(event.time_range)

    def covered(names: Iterable[str]) -> float:
        return covered_by(r for name in names for r in ranges[name]) / 1e6 / unit

    times = {name: covered([name]) for name in ranges}
    most = sorted(times, key=times.get, reverse=True)[:6]
    return {
        "attention": covered(name for name in ranges if any(a in name for a in ATTENTION)),
        "kernels": covered(ranges),
        "most": {name[:90]: times[name] for name in most},
    }


def covered_by(ranges: Iterable[Any]) -> float:
    """Length of what ranges with a start and an end cover: a kernel may wait beside another."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted((r.start, r.end) for r in ranges):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def tell(lines: list[dict]) -> None:
    """The lines as a table, each beside FLASH_ATTN."""
    found = {(x["engine"], x["phase"], x["work"]): x for x in lines}
    print(
        "| engine | start | work | median | lowest to highest | of FLASH_ATTN | attention | "
        "kernels | attention allows | of that gain |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for x in lines:
        unit = "s" if x["phase"] == "prefill" else "ms"
        other = found.get(("FLASH_ATTN", x["phase"], x["work"]))
        share = f"{x['median'] / other['median']:.3f}" if other else "-"
        dense, allowed, reached = found.get(("blasst dense", x["phase"], x["work"])), "-", "-"
        if dense and x["engine"] == "blasst 75 %":
            gain = dense["attention"] - x["attention"]
            allowed = f"{dense['median'] - gain:.3f}"
            reached = f"{(dense['median'] - x['median']) / gain:.0%}"
        print(
            f"| {x['engine']} | {x['start']:.1f} s | {x['phase']} {x['work']} | {x['median']:.3f} "
            f"{unit} | {x['lowest']:.3f} to {x['highest']:.3f} | {share} | {x['attention']:.3f} | "
            f"{x['kernels']:.3f} | {allowed} | {reached} |"
        )


if __name__ == "__main__":
    main()
