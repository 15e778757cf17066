"""Multi-head latent attention: the operator, models of Transformers, and decode over latents."""

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn
from transformers import DynamicCache, StaticCache

import blasst
from blasst import NotSupportedError, Threshold
from blasst.evaluation import Options, evaluate
from blasst.hf.latents import LatentLayer, joined
from blasst.hf.models import Loaded
from latent_models import make_latent_model, make_recency_latent_model, present
from recency_model import make_tokenizer
from tiny_models import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
models = pytest.mark.skipif(
    not present(), reason="the models of this Transformers cache no latents"
)
DEEPSEEK = ("DeepseekV2", "DeepseekV3")
LENGTH = 150


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the left, and the attention mask."""
    shape = len(lengths), max(lengths)
    ids = torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


def generate(model, ids, mask, **options) -> torch.Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)


# The operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 4])
def test_decode_over_latents_whose_values_are_a_view_of_the_keys(dtype, positions):
    torch.manual_seed(0)
    q = torch.randn(2, positions, 16, 576, dtype=dtype)
    latents = torch.randn(2, 300, 1, 576, dtype=dtype)
    values = latents[..., :512]
    out = blasst.attention(q, latents, values, causal=True, phase="decode")
    same = blasst.attention(q, latents, values.clone(), causal=True, phase="decode")
    assert torch.equal(out, same)
    mask = torch.ones(positions, 300, dtype=torch.bool).tril(300 - positions)
    expected = nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2).double() for t in (q, latents, values)), attn_mask=mask, enable_gqa=True
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        out.double(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance
    )
    paged = latents.reshape(-1, 60, 1, 576)[torch.tensor([3, 0, 4, 1, 2, 8, 5, 7, 6, 9])]
    where = torch.tensor([[1, 3, 4, 0, 2], [6, 8, 7, 5, 9]])
    lengths = torch.tensor([300, 300])
    from_pages = blasst.attention(
        q,
        paged,
        paged[..., :512],
        page_table=where,
        lengths=lengths,
        causal=True,
        phase="decode",
    )
    assert torch.equal(out, from_pages)


def test_gradients_of_latents_that_are_keys_and_values():
    torch.manual_seed(0)
    q = torch.randn(1, 70, 2, 48, requires_grad=True)
    latents = torch.randn(1, 90, 1, 48, requires_grad=True)
    weight = torch.randn(1, 70, 2, 32)
    (blasst.attention(q, latents, latents[..., :32], causal=True) * weight).sum().backward()
    got = [t.grad.clone() for t in (q, latents)]
    q.grad = latents.grad = None
    mask = torch.ones(70, 90, dtype=torch.bool).tril(20)
    out = nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, latents, latents[..., :32])),
        attn_mask=mask,
        enable_gqa=True,
    )
    (out.transpose(1, 2) * weight).sum().backward()
    torch.testing.assert_close(got, [q.grad, latents.grad], atol=1e-4, rtol=1e-4)


# Models


@models
@pytest.mark.parametrize("name", present())
def test_models_give_the_tokens_of_transformers_own_attention_expanded_and_absorbed(name):
    ids, mask = prompts(LENGTH, 90)
    if name in ("KimiLinear", "BailingHybrid"):  # whose linear layers know no padding
        ids, mask = prompts(LENGTH, LENGTH)
    expected = generate(make_latent_model(name, "eager"), ids, mask)
    assert len(expected[:, LENGTH:].unique()) > 3, "a model that repeats itself shows nothing"
    model = make_latent_model(name)
    blasst.configure(model, prefill=Threshold(0.0), decode=Threshold(0.0))
    assert torch.equal(generate(model, ids, mask), expected)
    blasst.absorb(model)
    assert torch.equal(generate(model, ids, mask), expected)
    cache = blasst.latent_cache(model)
    assert torch.equal(generate(model, ids, mask, cache=cache), expected)
    assert any(isinstance(layer, LatentLayer) for layer in cache.layers)


@models
@pytest.mark.parametrize("situation", ["static", "beams", "chunked", "without_cache"])
def test_absorbed_generation(situation):
    options = {
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 2},
        "chunked": {"prefill_chunk_size": 33},
        "without_cache": {"use_cache": False},
    }[situation]
    ids, mask = prompts(LENGTH, 90)
    expected = generate(make_latent_model("DeepseekV3", "eager"), ids, mask, **options)
    model = make_latent_model("DeepseekV3")
    blasst.absorb(model)
    assert torch.equal(generate(model, ids, mask, **options), expected)
    if situation == "beams":
        got = generate(model, ids, mask, cache=blasst.latent_cache(model), **options)
        assert torch.equal(got, expected)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_absorbed_logits_differ_by_rounding(dtype):
    ids, _ = prompts(LENGTH, LENGTH)
    logits = []
    for absorbed in (False, True):
        # Without experts, of which rounding may choose others.
        model = make_latent_model("DeepseekV2", initializer_range=0.1, first_k_dense_replace=2)
        model = model.to(dtype)
        cache = DynamicCache(config=model.config)
        if absorbed:
            blasst.absorb(model)
            cache = blasst.latent_cache(model)
        parts = [model(ids[:, :100], cache=cache).logits]
        parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(100, LENGTH)]
        logits.append(torch.cat(parts, 1).float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(*logits, atol=tolerance, rtol=tolerance)


@models
@torch.inference_mode()
def test_a_compiled_step_over_latents():
    ids, _ = prompts(60, 60)
    model = make_latent_model("DeepseekV3", first_k_dense_replace=2)
    blasst.absorb(model)

    def run(step):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = [model(ids[:, :50], cache=cache).logits]
        for i in range(50, 60):
            at = torch.full((2, 1), i)
            logits.append(step(ids[:, i : i + 1], position_ids=at, cache=cache).logits)
        return torch.cat(logits, 1)

    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(model.forward), atol=1e-4, rtol=1e-4)


@torch.library.custom_op("blasst_tests::apart", mutates_args=())
def apart(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Bytes from where keys begin to where values do."""
    return torch.tensor(v.data_ptr() - k.data_ptr())


@apart.register_fake
def _(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


def test_values_stay_a_view_of_keys_when_compiled():
    def step(latents, rotary):
        keys = joined(2 * latents, rotary).transpose(1, 2)
        return apart(keys, keys[..., :64])

    inputs = torch.randn(2, 1, 40, 64), torch.randn(2, 1, 40, 8)
    with torch._inductor.config.patch(force_pointwise_cat=True):  # as for a GPU
        assert torch.compile(step, fullgraph=True)(*inputs) == 0


@models
@torch.inference_mode()
def test_absorbed_steps_attend_to_one_head_of_latents(monkeypatch):
    model = make_latent_model("DeepseekV3")
    asked = []

    def attention(**arguments):
        asked.append([tuple(arguments[name].shape[-2:]) for name in "qkv"])
        shared = arguments["k"].untyped_storage().data_ptr()
        asked[-1].append(arguments["v"].untyped_storage().data_ptr() == shared)
        return blasst.attention(**arguments)

    operator = copy.copy(blasst.hf.operator.KERNELS)
    operator.attention = attention
    blasst.absorb(model, layers=[1])
    with blasst.hf.operator.calling(operator):
        generate(model, *prompts(LENGTH), cache=blasst.latent_cache(model))
    expanded, absorbed = [(4, 24), (4, 24), (4, 16)], [(4, 40), (1, 40), (1, 32)]
    assert [call[:3] for call in asked[:4]] == [expanded, expanded, expanded, absorbed]
    assert all(call[3] for call in asked if call[:3] == absorbed)


@models
def test_absorbing_is_undone_and_does_not_touch_other_attention():
    ids, mask = prompts(LENGTH)
    model = make_latent_model("DeepseekV3")
    layer = model.model.layers[0].self_attn
    with blasst.absorb(model):
        assert "expand_kv" in vars(layer)
        again = copy.deepcopy(model)
        assert again.model.layers[0].self_attn.expand_kv.__self__ is again.model.layers[0].self_attn
    assert "expand_kv" not in vars(layer)
    blasst.absorb(model)
    model.set_attn_implementation("eager")
    expected = generate(make_latent_model("DeepseekV3", "eager"), ids, mask)
    assert torch.equal(generate(model, ids, mask), expected)
    model.set_attn_implementation("blasst")
    blasst.reset(model)
    assert "expand_kv" not in vars(layer)


@models
def test_training_expands():
    ids, _ = prompts(60)
    gradients = []
    for absorbed in (False, True):
        model = make_latent_model("DeepseekV3")
        if absorbed:
            blasst.absorb(model)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.kv_b_proj.weight.grad)
    torch.testing.assert_close(*gradients)


@models
@pytest.mark.parametrize(
    ("name", "absorbed"), [*((n, False) for n in DEEPSEEK), (DEEPSEEK[1], True)]
)
def test_calibration_recording_and_evaluation(name, absorbed, tmp_path):
    model, tokenizer = make_recency_latent_model(name), make_tokenizer()
    if absorbed:
        blasst.absorb(model)
    target = {"prefill": 0.15, "decode": 0.3}
    blasst.calibrate(
        model,
        tokenizer,
        lengths=(512,),
        target_sparsity=target,
        prompts=2,
        held_out=[],
        schemes=("one_threshold", "least_error"),
    )
    ids = torch.tensor([tokenizer.encode("Which of them was it? " * 40)[:512]])
    with blasst.record() as r:
        generate(model, ids, torch.ones_like(ids))
    for phase, share in target.items():
        assert r.sparsity(phase) == pytest.approx(share, abs=0.15)
        assert r.heads(phase) == [4, 4]
    results = evaluate(
        Loaded("tiny", model, tokenizer, ""),
        Options(targets=(0, 0.15), length=600, texts={"one": "Which of them was it? " * 80}),
        out=tmp_path,
    )
    assert results is not None


# Caches


def test_a_latent_layer_keeps_what_a_growing_one_keeps_in_one_tensor():
    torch.manual_seed(0)
    layer = LatentLayer()
    parts = [(torch.randn(2, 1, n, 32), torch.randn(2, 1, n, 8)) for n in (100, 1, 1, 400, 1)]
    keys = values = None
    for a, b in parts:
        keys = a if keys is None else torch.cat([keys, a], -2)
        values = b if values is None else torch.cat([values, b], -2)
        got = layer.update(a, b)
        assert torch.equal(got[0], keys)
        assert torch.equal(got[1], values)
        both = joined(*got)
        assert both.data_ptr() == got[0].data_ptr(), "a view"
        assert torch.equal(both, torch.cat([keys, values], -1))
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([1, 1]))
    keys, values = (t[:, :, :-3][[1, 1]] for t in (keys, values))
    for _ in range(2):
        a, b = torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 8)
        keys, values = torch.cat([keys, a], -2), torch.cat([values, b], -2)
        got = layer.update(a, b)
        assert torch.equal(got[0], keys)
        assert torch.equal(got[1], values)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(*parts[0])[0], parts[0][0])


def test_what_lies_apart_is_copied_together():
    a, b = torch.randn(2, 1, 5, 32), torch.randn(2, 1, 5, 8)
    assert torch.equal(joined(a, b), torch.cat([a, b], -1))
    whole = torch.randn(2, 1, 5, 40)
    swapped = joined(whole[..., 8:], whole[..., :8])
    assert torch.equal(swapped, torch.cat([whole[..., 8:], whole[..., :8]], -1))


# Errors


def test_models_without_latents_are_refused():
    with pytest.raises(NotSupportedError, match="LlamaForCausalLM has no layer with multi-head"):
        blasst.absorb(make_model("llama"))


@models
def test_attention_that_is_not_linear_in_the_latent_is_refused():
    model = make_latent_model("DeepseekV3", "eager")
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"):
        blasst.absorb(model)
    model = make_latent_model("DeepseekV3")
    layer = model.model.layers[1].self_attn
    layer.kv_b_proj = nn.Sequential(layer.kv_b_proj)
    with pytest.raises(NotSupportedError, match="kv_b_proj of DeepseekV3Attention is Sequential"):
        blasst.absorb(model)
    assert "expand_kv" not in vars(model.model.layers[0].self_attn), "all or none"
    kind = type(layer)
    layer = model.model.layers[1].self_attn = copy.deepcopy(model.model.layers[0].self_attn)
    layer.__class__ = type(
        "Odd",
        (kind,),
        {"expand_kv": lambda self, a, b: [t.flip(1) for t in kind.expand_kv(self, a, b)]},
    )
    with pytest.raises(NotSupportedError, match=r"Odd.expand_kv makes keys and values in another"):
        blasst.absorb(model)
