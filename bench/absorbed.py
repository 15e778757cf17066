"""One decode step of a model with latent attention (MLA): expanded as Transformers does it, and
absorbed (`blasst.absorb`, `blasst.latent_cache`).

A random DeepSeek-V3 of few layers, its attention of full size, over a cache of random latents. The
step of one token is timed with Transformers' own attention (sdpa), with blasst on the expanded keys
and values, and with blasst on the latents; the last two must agree within rounding. --graph times
a step as a replayed CUDA graph, too: the work of the GPU alone, which else may wait for Python.

    python bench/absorbed.py --length 32768 --heads 16
    python bench/absorbed.py --length 32768 --heads 128 --device cuda --batch 4
"""

import argparse
import statistics
import time

import torch
from decode_cuda import microseconds
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

import blasst
from blasst.versions import cache_name

DTYPES = ("bfloat16", "float16", "float32")


def make_model(given: argparse.Namespace, implementation: str) -> DeepseekV3ForCausalLM:
    """The same weights every time; no experts, of which rounding could choose others."""
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=given.layers,
        first_k_dense_replace=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        initializer_range=0.05,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation=implementation, dtype=getattr(torch, given.dtype)
    )
    return model.to(given.device).eval()


def filled(cache: DynamicCache, model: DeepseekV3ForCausalLM, batch: int, length: int):
    """The cache with `length` random tokens in every layer."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(1)
    for layer in range(config.num_hidden_layers):
        parts = (
            torch.randn(
                (batch, 1, length, size),
                generator=generator,
                device=model.device,
                dtype=model.dtype,
            )
            for size in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(*parts, layer)
    return cache


@torch.inference_mode()
def step(
    model: DeepseekV3ForCausalLM, cache, steps: int, as_graph: bool
) -> tuple[list[float], Tensor]:
    """Median seconds of a step, those of its graph if wanted, and the logits of the first."""
    batch = cache.layers[0].keys.shape[0]
    token = torch.full((batch, 1), 7, device=model.device)
    logits, times = None, []

    def run() -> Tensor:
        return model(token, **{cache_name(type(model)): cache}).logits

    for _ in range(steps + 1):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = run()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        logits = out if logits is None else logits
    seconds = [statistics.median(times[1:])]
    if as_graph:
        seconds.append(microseconds(run) / 1e6)
    return seconds, logits


def measure(given: argparse.Namespace, name: str) -> tuple[list[float], Tensor, float]:
    """As `step`, and GB that the GPU held at most (CPU: 0)."""
    on_gpu = given.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make_model(given, "sdpa" if name == "sdpa" else "blasst")
    cache = DynamicCache(config=model.config)
    if name == "absorbed":
        blasst.absorb(model)
        cache = blasst.latent_cache(model)
    seconds, logits = step(
        model, filled(cache, model, given.batch, given.length), given.steps, given.graph
    )
    return seconds, logits, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--graph", action="store_true", help="on a GPU: a step as a CUDA graph")
    given = parser.parse_args()
    if given.graph and not given.device.startswith("cuda"):
        parser.error(f"--graph needs --device cuda, not {given.device}")
    measured = {name: measure(given, name) for name in ("sdpa", "expanded", "absorbed")}
    logits = {name: each for name, (_, each, _) in measured.items()}
    off = (logits["absorbed"] - logits["expanded"]).float().norm() / logits["expanded"].norm()
    if not off < 0.05:
        raise SystemExit(f"absorbed and expanded steps differ by {off:.1e}")
    for name, (seconds, _, gigabytes) in measured.items():
        absorbed = measured["absorbed"][0]
        line = ", as a graph ".join(
            f"{1e3 * own:.2f} ms a step ({own / least:.1f}x the absorbed one)"
            for own, least in zip(seconds, absorbed, strict=True)
        )
        line += f", {gigabytes:.1f} GB" if gigabytes else ""
        print(
            f"{given.length} tokens, {given.heads} heads, {given.layers} layers, batch "
            f"{given.batch}, {name:8}: {line}"
        )


if __name__ == "__main__":
    main()
