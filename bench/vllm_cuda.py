"""vLLM with blasst beside vLLM's FlashAttention, one GPU, a Llama-shaped model with dummy weights.

    python bench/vllm_cuda.py
    python bench/vllm_cuda.py --layers 8 --eager-prefill --prefill 32768x1 --decode 16384x16

Each engine is a process: FLASH_ATTN, CUSTOM dense, and CUSTOM with three quarters of the tiles
dropped. Dummy weights have nothing to skip, so that is planted: three quarters of the KV heads get
an absolute threshold that no score reaches, the others one that every score does. A line is an
engine and a workload, LENGTHxREQUESTS: seconds from the prompts to the first tokens (prefill), or
milliseconds a step of all requests behind that (decode), the median of the repeats with the lowest
and highest, and how long the engine took to start.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
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
STEPS = 64


def main() -> None:
    """Prints the lines of every engine, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prefill", nargs="*", default=["32768x1", "4096x8"])
    parser.add_argument("--decode", nargs="*", default=["16384x16", "4096x64"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
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
    from vllm import LLM, SamplingParams

    works = [(phase, work) for phase in ("prefill", "decode") for work in getattr(arguments, phase)]
    sizes = [tuple(map(int, work.split("x"))) for _, work in works]
    longest, most = (max(size[i] for size in sizes) for i in (0, 1))
    options = dict(ENGINES[arguments.engine])
    graphs = {"cudagraph_capture_sizes": sorted({n for _, n in sizes} | {1})}
    if arguments.eager_prefill:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | {"num_hidden_layers": arguments.layers}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        start = perf_counter()
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=longest + STEPS + 1,
            max_num_seqs=most,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            compilation_config=graphs,
            seed=0,
            **options,
        )
        started = perf_counter() - start

    draw = random.Random(1)

    def run(length: int, requests: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [draw.randrange(3, 32000) for _ in range(length)]}
            for _ in range(requests)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return perf_counter() - start

    for (phase, work), (length, requests) in zip(works, sizes, strict=True):
        run(length, requests, 2)
        first = [run(length, requests, 1) for _ in range(arguments.repeats)]
        times = first
        if phase == "decode":
            whole = [run(length, requests, STEPS + 1) for _ in range(arguments.repeats)]
            times = [(t - median(first)) / STEPS * 1000 for t in whole]
        line = {"engine": arguments.engine, "phase": phase, "work": work, "start": started}
        line |= {"median": median(times), "lowest": min(times), "highest": max(times)}
        print(json.dumps(line), flush=True)


def tell(lines: list[dict]) -> None:
    """The lines as a table, each beside FLASH_ATTN."""
    base = {(x["phase"], x["work"]): x["median"] for x in lines if x["engine"] == "FLASH_ATTN"}
    print("| engine | start | work | median | lowest to highest | of FLASH_ATTN |")
    print("|---|---|---|---|---|---|")
    for x in lines:
        unit = "s" if x["phase"] == "prefill" else "ms a step"
        other = base.get((x["phase"], x["work"]))
        share = f"{x['median'] / other:.3f}" if other else "-"
        print(
            f"| {x['engine']} | {x['start']:.1f} s | {x['phase']} {x['work']} | {x['median']:.3f} "
            f"{unit} | {x['lowest']:.3f} to {x['highest']:.3f} | {share} |"
        )


if __name__ == "__main__":
    main()
