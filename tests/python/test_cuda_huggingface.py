"""attn_implementation="blasst" on a GPU, against Transformers' own."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import blasst
from blasst import NotSupportedError, Threshold
from blasst.methods import bsfa
from blasst.versions import cache_name
from gpu import hopper, needs_gpu
from latent_models import ON_GPUS, make_latent_model, present
from recency_model import make_recency_model, make_tokenizer
from tiny_models import MODELS, VOCABULARY, make_model

pytestmark = needs_gpu


def on_gpu(name: str, implementation: str, dtype: torch.dtype, **options: float) -> PreTrainedModel:
    model = make_model(name, implementation, head_dim=64, **options).to("cuda", dtype)
    if implementation == "blasst":
        blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).cuda()


def errors(name: str, run) -> tuple[float, float]:
    """Of sdpa (or eager) and of blasst in bfloat16, against the former in float32."""
    own = MODELS[name][2]
    exact = run(on_gpu(name, own, torch.float32))
    return tuple(
        (run(on_gpu(name, implementation, torch.bfloat16)).float() - exact).norm().item()
        for implementation in (own, "blasst")
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2_softcap"])
@torch.inference_mode()
def test_logits_of_padded_batches(name: str, side: str) -> None:
    ids = tokens(3, 150)
    position = torch.arange(150, device="cuda")
    lengths = torch.tensor([[150], [80], [147]], device="cuda")
    mask = position >= 150 - lengths if side == "left" else position < lengths
    own, ours = errors(name, lambda model: model(ids, attention_mask=mask.long()).logits[mask])
    assert ours < 2 * own


@hopper
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2_softcap"])
def test_gradients_of_training(name: str, checkpointed: bool) -> None:
    ids = tokens(2, 300)

    def run(model: PreTrainedModel) -> torch.Tensor:
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    own, ours = errors(name, run)
    assert ours < 2 * own


@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_decode_with_a_static_cache(compiled: bool) -> None:
    ids = tokens(2, 130)

    def run(model: PreTrainedModel) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=256)
        logits = [model(ids[:, :120], past_key_values=cache).logits]
        step = model.forward
        if compiled:
            step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for i in range(120, 130):
            out = step(
                ids[:, i : i + 1],
                past_key_values=cache,
                position_ids=torch.full((2, 1), i, device="cuda"),
                attention_mask=torch.ones(2, i + 1, dtype=torch.long, device="cuda"),
            )
            logits.append(out.logits.clone())
        return torch.cat(logits, 1)

    own, ours = errors("llama", run)
    assert ours < 2 * own


absorbed_or_not = pytest.mark.parametrize("absorbed", [False, pytest.param(True, marks=hopper)])


@absorbed_or_not
@pytest.mark.parametrize("name", [n for n in ON_GPUS if n in present()])
@torch.inference_mode()
def test_latent_attention(name: str, absorbed: bool) -> None:
    if absorbed and ON_GPUS[name]["kv_lora_rank"] != 512:
        pytest.skip("no kernel over its latents: see below")
    ids = tokens(2, 300)

    def run(implementation: str, dtype: torch.dtype) -> torch.Tensor:
        model = make_latent_model(name, implementation, initializer_range=0.1, **ON_GPUS[name])
        model.to("cuda", dtype)
        cache = DynamicCache(config=model.config)
        if absorbed and implementation == "blasst":
            blasst.absorb(model)
            cache = blasst.latent_cache(model)
        options = {cache_name(type(model)): cache}
        parts = [model(ids[:, :290], **options).logits]
        parts += [model(ids[:, i : i + 1], **options).logits for i in range(290, 300)]
        return torch.cat(parts, 1).float()

    exact = run("eager", torch.float32)
    own, ours = (
        (run(implementation, torch.bfloat16) - exact).norm()
        for implementation in ("eager", "blasst")
    )
    assert ours < 2 * own


@hopper
@pytest.mark.parametrize("how", ["whole", "checkpointed", "packed"])
@pytest.mark.parametrize("name", [n for n in ("DeepseekV2", "DeepseekV3") if n in present()])
def test_gradients_of_latent_attention(name: str, how: str) -> None:
    lengths = [200, 100] if how == "packed" else [300]
    places = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    ids = tokens(1, 300)

    def run(implementation: str, dtype: torch.dtype) -> torch.Tensor:
        model = make_latent_model(name, implementation, initializer_range=0.1, **ON_GPUS[name])
        model.to("cuda", dtype).train()
        if implementation == "blasst":
            blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, position_ids=places, use_cache=False).loss.backward()
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        return torch.cat([g.flatten() for g in grads]).float()

    exact = run("eager", torch.float32)
    own, ours = (
        (run(implementation, torch.bfloat16) - exact).norm()
        for implementation in ("eager", "blasst")
    )
    assert ours < 2 * own


@pytest.mark.skipif("DeepseekV3" not in present(), reason="needs models that cache latents")
@absorbed_or_not
@torch.inference_mode()
def test_latent_attention_compiled(absorbed: bool) -> None:
    ids = tokens(2, 130)
    sizes = {"initializer_range": 0.1, **ON_GPUS["DeepseekV3"]}
    model = make_latent_model("DeepseekV3", **sizes).to("cuda", torch.bfloat16)
    if absorbed:
        blasst.absorb(model)

    def run(step) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=256)
        name = cache_name(type(model))
        logits = [model(ids[:, :120], **{name: cache}).logits]
        for i in range(120, 130):
            at = torch.full((2, 1), i, device="cuda")
            logits.append(step(ids[:, i : i + 1], position_ids=at, **{name: cache}).logits.clone())
        return torch.cat(logits, 1).float()

    eager = run(model.forward)
    got = run(torch.compile(model.forward, mode="reduce-overhead", fullgraph=True))
    assert (got - eager).norm() < 0.01 * eager.norm()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MiniCPM3", "head_dim is 288 and value_dim 256"),
        ("Mistral4", "head_dim is 320 and value_dim 256"),
    ],
)
@torch.inference_mode()
def test_latents_of_other_sizes_are_refused(name: str, message: str) -> None:
    if name not in present():
        pytest.skip(f"{name} is not in this Transformers")
    model = make_latent_model(name, **ON_GPUS[name]).to("cuda", torch.bfloat16)
    blasst.absorb(model)
    with pytest.raises(NotSupportedError, match=message):
        model.generate(tokens(2, 100), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def calibrated() -> PreTrainedModel:
    """With a threshold that falls with the length, in prefill and decode."""
    group = {
        "algorithm": "skip_softmax",
        "targets": ["LlamaAttention"],
        "threshold_scale_factor": {
            "formula": "a * exp(b * target_sparsity)",
            "prefill": {"a": 2.0, "b": 6.0},
            "decode": {"a": 2.0, "b": 6.0},
        },
    }
    entry = {"config_groups": {"group_0": group}}
    model = make_model("llama", head_dim=64, sparse_attention_config=entry)
    return model.to("cuda", torch.bfloat16)


@torch.inference_mode()
def test_decode_of_a_calibrated_model_is_captured_in_a_graph() -> None:
    model, ids = calibrated(), tokens(2, 400)
    name = cache_name(type(model))

    def cache_after(length: int) -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=512)
        model(ids[:, :length], **{name: cache})
        return cache

    def cached_step(cache: StaticCache, i: int) -> torch.Tensor:
        at = torch.full((2, 1), i, device="cuda")
        return model(ids[:, i : i + 1], position_ids=at, **{name: cache}).logits

    eager = cache_after(299)
    expected = [cached_step(eager, i) for i in range(299, 400)][1:]
    cache, token = cache_after(299), ids[:, 299:300].clone()
    position = torch.full((2, 1), 299, device="cuda")

    def step() -> torch.Tensor:
        return model(token, position_ids=position, **{name: cache}).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # takes the cache to 300 tokens
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for i, wanted in zip(range(300, 400), expected, strict=True):
        token.copy_(ids[:, i : i + 1])
        position.fill_(i)
        graph.replay()
        assert torch.equal(logits, wanted), i


@torch.inference_mode()
def test_decode_of_a_calibrated_model_never_waits_for_the_device() -> None:
    model, ids = calibrated(), tokens(2, 400)
    cache = DynamicCache(config=model.config)
    name = cache_name(type(model))
    model(ids[:, :300], **{name: cache})
    model(ids[:, 300:301], **{name: cache})
    whole = [module for module in model.modules() if hasattr(module, "layer_idx")]

    def waits(_: torch.nn.Module, *__: object) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def may_wait(_: torch.nn.Module, *__: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    for module in whole:  # within the layers; a pass's mask may be read once
        module.register_forward_pre_hook(waits)
        module.register_forward_hook(may_wait)
    try:
        model(ids[:, 301:302], **{name: cache})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_logits_as_close_as_sdpa(cache: str) -> None:
    ids = tokens(2, 100)
    exact = on_gpu("llama", "sdpa", torch.float32)

    def error(implementation: str) -> float:
        """Of the logits that generate() chose from, against those of the same tokens."""
        out = on_gpu("llama", implementation, torch.bfloat16).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        with torch.inference_mode():
            wanted = exact(out.sequences[:, :-1]).logits[:, 99:]
        return ((torch.stack(out.logits, 1).float() - wanted).norm() / wanted.norm()).item()

    assert error("blasst") < 2 * error("sdpa")


def test_absolute_thresholds_by_place() -> None:
    model = make_recency_model(head_dim=64).to("cuda", torch.bfloat16)
    found = bsfa.calibrate(model, make_tokenizer(), length=1024, keeps=(1, 3), prompts=3)
    assert found.tile_shape == (64, 128)
    ids = torch.randint(5, 50, (1, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    for keep in (1, 3):
        found.apply(model, keep)
        with torch.no_grad(), blasst.record() as recording:
            model(ids)
        assert recording.sparsity("prefill") == pytest.approx(found.sparsity(keep, 1024), abs=0.2)
    with pytest.raises(ValueError, match="for tiles of 64 x 128; on cpu"):
        found.apply(model.cpu(), 1)


@hopper
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keys": "fp8", "values": "fp8"},
        {"max_cache_len": 256},
        {"max_cache_len": 256, "keys": "fp8", "values": "fp8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("compiles", [False, True])
@torch.inference_mode()
def test_caches_in_8_bits(options: dict, compiles: bool) -> None:
    if compiles and "max_cache_len" not in options:
        pytest.skip("a compiled step has a static cache")
    model = on_gpu("llama", "blasst", torch.bfloat16, initializer_range=0.05)
    name, ids = cache_name(type(model)), tokens(2, 200)

    def logits(cache) -> torch.Tensor:
        forward = model.forward
        if compiles:
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        parts = [model(ids[:, :90], **{name: cache}).logits]
        parts += [model(ids[:, 90:190], **{name: cache}).logits]
        for i in range(190, 200):
            parts.append(forward(ids[:, i : i + 1], **{name: cache}).logits.clone())
        return torch.cat(parts, 1).float()

    exact = logits(
        StaticCache(config=model.config, max_cache_len=256)
        if "max_cache_len" in options
        else DynamicCache(config=model.config)
    )
    got = logits(blasst.eight_bit_cache(model, **options))
    assert torch.equal(got[:, :90], exact[:, :90])
    error = (got[:, 90:] - exact[:, 90:]).norm() / exact[:, 90:].norm()
    assert 1e-5 < error < (0.03 if options.get("keys") == "fp8" else 0.02)  # as on the CPU
