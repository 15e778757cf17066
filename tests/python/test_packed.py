"""Packed sequences give what each of them gives alone: forward, backward, with masks and caches."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    GPTBigCodeConfig,
    PersimmonConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)

import blasst
from blasst import NotSupportedError, Threshold
from blasst.versions import cache_name
from tiny_models import MODELS, VOCABULARY, make_model, with_quiet_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (70, 33, 150)
ENDS = torch.tensor([0, 70, 103, 253])


def cached(model, cache):
    """The argument of this version of Transformers."""
    return {cache_name(type(model)): cache}


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCABULARY, (1, n), generator=generator) for n in LENGTHS]


def packed():
    """[1, tokens] ids and position_ids of all sequences, one after the other."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return torch.cat(sequences(), 1), positions


def alone(model):
    """[1, tokens, vocabulary] logits of each sequence by itself."""
    return torch.cat([model(ids).logits for ids in sequences()], 1)


SITUATIONS = {
    "plain": {"use_cache": False},
    "with a cache": {"use_cache": True},
    "mask of ones": {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)},
    "cumulative lengths": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "use_cache": False},
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sequences_do_not_see_each_other(name, situation):
    model = make_model(name)
    ids, positions = packed()
    got = model(ids, position_ids=positions, **SITUATIONS[situation]).logits
    assert torch.equal(got, alone(model))


SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.3}
OLD_SIZES = {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
KEEP_POSITIONS = [
    CTRLConfig(**OLD_SIZES, dff=64),
    GPTBigCodeConfig(**OLD_SIZES),
    PersimmonConfig(
        **SIZES,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
]
"""Of models that do not hand position_ids on to the attention interface."""


def make_of(config):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="blasst").eval()


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "cumulative lengths"])
@pytest.mark.parametrize("config", KEEP_POSITIONS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_layers_that_are_not_told_position_ids(config, situation):
    model = make_of(config)
    ids, positions = packed()
    got = model(ids, position_ids=positions, **SITUATIONS[situation]).logits
    torch.testing.assert_close(got, alone(model), rtol=1e-4, atol=1e-4)


def qwen2_vl():
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}
    config = Qwen2VLConfig(
        text_config=SIZES | text | heads | {"rope_parameters": rope}, vision_config=vision
    )
    torch.manual_seed(1)
    return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="blasst").eval()


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "cumulative lengths"])
@torch.no_grad()
def test_positions_in_several_axes(situation):
    """Such a model forgets those of the text on the way to its layers."""
    model = qwen2_vl()
    ids, positions = packed()
    got = model(ids, position_ids=positions, **SITUATIONS[situation]).logits
    torch.testing.assert_close(got, alone(model), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
        compiled(ids, position_ids=positions, **SITUATIONS[situation])


@torch.no_grad()
def test_packed_sequences_behind_a_cache_of_layers_that_are_not_told():
    model = make_of(KEEP_POSITIONS[1])
    ids, positions = packed()
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=400)):
        model(ids, position_ids=positions, **cached(model, cache))
        with pytest.raises(NotSupportedError, match="a sequence starts behind other tokens"):
            model(ids[:, :1], position_ids=torch.tensor([[LENGTHS[-1]]]), **cached(model, cache))


@torch.no_grad()
def test_padded_requests_of_layers_that_are_not_told_position_ids():
    """Nothing is packed: a cache, padding on the left, and one step after it."""
    model = make_of(KEEP_POSITIONS[1])
    ids = torch.cat([sequences()[0], sequences()[2][:, :70]])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, expected)


@torch.no_grad()
def test_packed_rows_with_padding_on_both_sides():
    model = make_model("llama")
    ids, positions = packed()
    rows, places, mask = (torch.zeros(2, 260, dtype=torch.long) for _ in range(3))
    rows[0, :253], places[0, :253], mask[0, :253] = ids[0], positions[0], 1
    rows[1, 13:213], places[1, 13:213], mask[1, 13:213] = ids[0, :200], positions[0, :200], 1
    got = model(rows, position_ids=places, attention_mask=mask).logits
    first, second, third = sequences()
    assert torch.equal(got[0, :253], alone(model)[0])
    cut = torch.cat([model(s).logits for s in (first, second, third[:, :97])], 1)
    assert torch.equal(got[1, 13:213], cut[0])


@torch.no_grad()
def test_thresholds_and_recordings_are_those_of_each_sequence():
    model = with_quiet_tokens(make_model("llama"))
    blasst.configure(model, prefill=Threshold(threshold_scale_factor=3.0))
    ids, positions = packed()
    with blasst.record() as together:
        model(ids, position_ids=positions)
    with blasst.record() as single:
        alone(model)
    assert torch.equal(together.tiles("prefill"), single.tiles("prefill"))


def gradients(model, **batch):
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_flattened_batch_trains_like_its_sequences_by_themselves():
    features = [{"input_ids": ids[0].tolist()} for ids in sequences()]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features)
    got = gradients(make_model("llama").train(), **batch)
    ids, positions = packed()
    labels = batch["labels"]
    expected = gradients(
        make_model("llama", "sdpa").train(),
        input_ids=ids,
        position_ids=positions,
        labels=labels,
        use_cache=False,
    )
    for name, wanted in expected.items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_takes_one_packed_pass_and_no_more(cache):
    model = make_model("llama")
    ids, positions = packed()

    def make():
        if cache == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=400)

    kv = make()
    assert torch.equal(model(ids, position_ids=positions, **cached(model, kv)).logits, alone(model))
    message = "a sequence starts behind other tokens in the cache"
    with pytest.raises(NotSupportedError, match=message):
        model(ids[:, :1], position_ids=torch.tensor([[LENGTHS[-1]]]), **cached(model, kv))
    kv = make()
    model(ids[:, :20], **cached(model, kv))
    with pytest.raises(NotSupportedError, match=message):
        model(ids, position_ids=positions, **cached(model, kv))


@torch.no_grad()
def test_a_compiled_pass_takes_one_sequence_and_refuses_several():
    model = make_model("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, positions = packed()
    one = sequences()[0]
    assert torch.equal(compiled(one, use_cache=False).logits, model(one).logits)
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
            compiled(ids, position_ids=positions, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("situation", ["plain", "with a cache", "mask of ones"])
@pytest.mark.parametrize("config", KEEP_POSITIONS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_compiled_layers_that_are_not_told_position_ids(config, situation):
    model = make_of(config)
    compiled = torch.compile(model, backend="aot_eager")
    ids, positions = packed()
    options = SITUATIONS[situation]
    one = torch.arange(ids.shape[1])[None]
    wanted = model(ids, position_ids=one, **options).logits
    assert torch.equal(compiled(ids, position_ids=one, **options).logits, wanted)
    with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
        compiled(ids, position_ids=positions, **options)


@torch.no_grad()
def test_a_compiled_padded_batch_of_layers_that_are_not_told_position_ids():
    model = make_of(KEEP_POSITIONS[1])
    ids = torch.cat([sequences()[0], sequences()[2][:, :70]])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(ids, attention_mask=mask, position_ids=places).logits
    assert torch.equal(got, model(ids, attention_mask=mask, position_ids=places).logits)


def test_a_compiled_pass_trains_on_a_flattened_batch():
    features = [{"input_ids": ids[0].tolist()} for ids in sequences()]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features)
    assert "position_ids" in batch and "cu_seq_lens_q" in batch
    model = make_model("llama").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch, use_cache=False).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    for name, wanted in gradients(make_model("llama").train(), **batch).items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cu_seq_lens_q": ENDS}, TypeError, "cu_seq_lens_k is a NoneType"),
        ({"cu_seq_lens_q": ENDS[None], "cu_seq_lens_k": ENDS}, ValueError, "must be .sequences"),
        ({"cu_seq_lens_q": ENDS[:-1], "cu_seq_lens_k": ENDS}, ValueError, "must end at the 253"),
    ],
)
@torch.no_grad()
def test_lengths_that_are_not_those_of_the_batch(options, error, message):
    with pytest.raises(error, match=message):
        make_model("llama")(packed()[0], use_cache=False, **options)


@torch.no_grad()
def test_a_policy_that_chooses_blocks_is_refused():
    model = make_model("llama", blasst_policy={"kind": "dhsa", "budget": 64})
    ids, positions = packed()
    with pytest.raises(NotSupportedError, match="chooses blocks is not supported for packed"):
        model(ids, position_ids=positions)
