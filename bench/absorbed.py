"""One decode step of a model with latent attention (MLA): expanded as Transformers does it, and
absorbed (`blasst.absorb`, `blasst.latent_cache`).

A random DeepSeek-V3 of few layers, its attention of full size, over a cache of random latents. The
step of one token is timed with Transformers' own attention (sdpa), with blasst on the expanded keys
and values, and with blasst on the latents; the last two must agree within rounding.

    python bench/absorbed.py --length 32768 --heads 16
    python bench/absorbed.py --length 32768 --heads 128 --device cuda
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

import blasst
from blasst.versions import cache_name


def make_model(heads: int, layers: int, implementation: str, device: str) -> DeepseekV3ForCausalLM:
    """The same weights every time; no experts, of which rounding could choose others."""
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.05,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation=implementation, dtype=torch.bfloat16
    )
    return model.to(device).eval()


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
                dtype=torch.bfloat16,
            )
            for size in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(*parts, layer)
    return cache


@torch.inference_mode()
def step(model: DeepseekV3ForCausalLM, cache, steps: int) -> tuple[float, Tensor]:
    """Median seconds of a step, and the logits of the first."""
    batch = cache.layers[0].keys.shape[0]
    token = torch.full((batch, 1), 7, device=model.device)
    logits, times = None, []
    for _ in range(steps + 1):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(token, **{cache_name(type(model)): cache}).logits
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        logits = out if logits is None else logits
    return statistics.median(times[1:]), logits


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
    given = parser.parse_args()
    seconds, logits = {}, {}
    for name, implementation in (("sdpa", "sdpa"), ("expanded", "blasst"), ("absorbed", "blasst")):
        model = make_model(given.heads, given.layers, implementation, given.device)
        cache = DynamicCache(config=model.config)
        if name == "absorbed":
            blasst.absorb(model)
            cache = blasst.latent_cache(model)
        seconds[name], logits[name] = step(
            model, filled(cache, model, given.batch, given.length), given.steps
        )
        del model, cache
    off = (logits["absorbed"] - logits["expanded"]).float().norm() / logits["expanded"].norm()
    if not off < 0.05:
        raise SystemExit(f"absorbed and expanded steps differ by {off:.1e}")
    for name, each in seconds.items():
        print(
            f"{given.length} tokens, {given.heads} heads, {given.layers} layers, batch "
            f"{given.batch}, {name:8}: {1e3 * each:9.2f} ms a step "
            f"({each / seconds['absorbed']:5.1f}x the absorbed one)"
        )


if __name__ == "__main__":
    main()
