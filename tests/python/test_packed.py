"""Packed sequences give what each of them gives alone: forward, backward, with masks and caches."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CTRLConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    GPTBigCodeConfig,
    LayoutLMConfig,
    Lfm2Config,
    PersimmonConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3NextConfig,
    SiglipTextConfig,
    SiglipTextModel,
    StaticCache,
)
from transformers.models.kosmos2_5 import configuration_kosmos2_5, modeling_kosmos2_5

import blasst
from blasst import NotSupportedError, Threshold
from blasst.hf.masks import KeyRanges
from blasst.hf.positions import several_unclear
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


def grid(first, size):
    """[3, size * size] positions of an image's patches, in one frame, behind `first` tokens."""
    places = torch.cartesian_prod(torch.arange(1), torch.arange(size), torch.arange(size))
    return places.T + first


def with_an_image(first, size, then):
    """[3, 1, tokens]: some text, an image, and more text, as Qwen2-VL numbers them."""
    text = torch.arange(first).expand(3, -1)
    behind = torch.arange(then).expand(3, -1) + first + size
    return torch.cat([text, grid(first, size), behind], 1)[:, None]


@torch.no_grad()
def test_positions_in_three_axes_are_refused_where_they_start_anew():
    """They do not say enough to be honoured; where they belong to one sequence, nothing changes."""
    model = qwen2_vl()
    one = with_an_image(30, 9, 20)
    ids = torch.randint(2, 40, (1, one.shape[2]), generator=torch.Generator().manual_seed(0))
    got = model(ids, position_ids=one, use_cache=False).logits
    several = torch.cat([one, one], 2), torch.cat([grid(0, 9)[:, None], one[..., :1]], 2)
    compiled = torch.compile(model, backend="aot_eager")
    for positions in (*several, packed()[1].expand(3, 1, -1)):
        tokens = torch.full((1, positions.shape[2]), 5)
        for options in ({"use_cache": False}, {"attention_mask": torch.ones_like(tokens)}):
            with pytest.raises(NotSupportedError, match="cannot be told apart"):
                model(tokens, position_ids=positions, **options)
        with pytest.raises(RuntimeError, match="cannot be told apart"):
            compiled(tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(compiled(ids, position_ids=one, use_cache=False).logits, got)
    model.set_attn_implementation("sdpa")
    expected = model(ids, position_ids=one, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_requests_in_three_axes():
    """Padding stands at any position, before a sequence or behind it."""
    model = qwen2_vl()
    ids = torch.randint(2, 40, (2, 60), generator=torch.Generator().manual_seed(0))
    mask, places = torch.ones_like(ids), torch.ones(3, 2, 60, dtype=torch.long)
    mask[0, :20], mask[1, 50:] = 0, 0
    places[:, 0, 20:], places[:, 1, :50] = torch.arange(40), torch.arange(50)
    got = model(ids, position_ids=places, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    expected = model(ids, position_ids=places, attention_mask=mask).logits
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)


def kosmos2_5():
    config = configuration_kosmos2_5.Kosmos2_5TextConfig(
        vocab_size=VOCABULARY, embed_dim=64, layers=2, ffn_dim=64, attention_heads=4, init_std=0.3
    )
    return modeling_kosmos2_5.Kosmos2_5TextForCausalLM._from_config(
        config, attn_implementation="blasst"
    )


TOWER = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_factor": 20.0}


def siglip_text():
    return SiglipTextModel._from_config(SiglipTextConfig(**TOWER), attn_implementation="blasst")


def clip_text():
    return CLIPTextModel._from_config(CLIPTextConfig(**TOWER), attn_implementation="blasst")


def bert():
    return AutoModel.from_config(BertConfig(**TOWER), attn_implementation="blasst")


TELL_NOBODY = [bert, clip_text, kosmos2_5, siglip_text]
"""Models that hand position_ids neither to masks nor to the attention interface."""


def made(make):
    torch.manual_seed(1)
    return make().eval()


def hidden(model, *args, **kwargs):
    """The first that it returns: logits, or hidden states."""
    return model(*args, **kwargs, return_dict=False)[0]


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "cumulative lengths"])
@pytest.mark.parametrize("make", TELL_NOBODY)
@torch.no_grad()
def test_models_that_keep_position_ids_to_themselves(make, situation):
    model = made(make)
    options = SITUATIONS[situation]
    ids, positions = packed()
    places = positions.split(LENGTHS, 1)
    wanted = [hidden(model, i, position_ids=p) for i, p in zip(sequences(), places, strict=True)]
    got = hidden(model, ids, position_ids=positions, **options)
    torch.testing.assert_close(got, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)
    one = torch.arange(ids.shape[1])[None]
    mixed = hidden(model, ids, position_ids=one, **options)
    assert (mixed - got)[:, LENGTHS[0] :].abs().max() > 1e-2
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(hidden(compiled, ids, position_ids=one, **options), mixed)
    with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
        hidden(compiled, ids, position_ids=positions, **options)


@torch.no_grad()
def test_position_ids_without_their_name():
    model = made(clip_text)
    ids, positions = packed()
    wanted = hidden(model, ids, position_ids=positions)
    assert torch.equal(hidden(model, ids, None, positions), wanted)


def test_gradient_checkpoints_know_the_sequences():
    """The second forward of a layer runs outside of its model's."""
    ids, positions = packed()
    gradients = []
    for checkpointing in (False, True):
        model = made(clip_text).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        hidden(model, ids, position_ids=positions).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, msg=name)


@torch.no_grad()
def test_two_threads_pass_other_positions_through_one_model():
    model = made(clip_text)
    ids, positions = packed()
    both = positions, torch.arange(ids.shape[1])[None]
    wanted = [hidden(model, ids, position_ids=p) for p in both]

    def run(which):
        with torch.no_grad():
            return [hidden(model, ids, position_ids=both[which]) for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        for outs, expected in zip(threads.map(run, (0, 1)), wanted, strict=True):
            assert all(torch.equal(out, expected) for out in outs)


@torch.no_grad()
def test_a_thread_may_begin_with_a_compiled_pass():
    model = made(clip_text)
    ids, positions = packed()
    one = torch.arange(ids.shape[1])[None]
    wanted = hidden(model, ids, position_ids=one)

    def run():
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager")
            got = hidden(compiled, ids, position_ids=one)
            with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
                hidden(compiled, ids, position_ids=positions)
            return got

    with ThreadPoolExecutor(1) as thread:
        torch.testing.assert_close(thread.submit(run).result(), wanted)


ROWS = 6


@pytest.mark.parametrize(
    ("places", "several"),
    [
        ([[0, 1, 2, 3]], False),
        ([[0, 1, 0, 1]], True),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], False),
        ([[0, 1, 2, 3, 0, 1, 2, 3]], True),
    ],
)
def test_positions_of_fewer_or_more_tokens_than_rows(places, several):
    """A model adds tokens of its own, before the text, or attends with fewer."""
    ranges = KeyRanges.plain(1, ROWS, ROWS, True, torch.device("cpu")).ranges
    assert bool(several_unclear(torch.tensor(places), ranges, ROWS)) is several


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_positions_behind():
    model = made(clip_text)
    ids, positions = packed()
    wanted = hidden(model, ids)
    with pytest.raises(ValueError, match="have to specify input_ids"):
        model(None, position_ids=positions)
    with pytest.raises(ValueError, match="attention_mask covers 3 positions"):
        model(ids, position_ids=positions, attention_mask=torch.ones(1, 3))
    assert torch.equal(hidden(model, ids), wanted)


@torch.no_grad()
def test_layers_whose_model_makes_its_own_mask():
    config = LayoutLMConfig(**TOWER)
    model = made(lambda: AutoModel.from_config(config, attn_implementation="blasst"))
    ids, positions = packed()
    hidden(model, ids, position_ids=torch.arange(ids.shape[1])[None])
    with pytest.raises(NotSupportedError, match="cannot be told apart"):
        hidden(model, ids, position_ids=positions)


MIX_ELSEWHERE = [
    Qwen3NextConfig(
        **SIZES,
        layer_types=["full_attention", "linear_attention"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    Lfm2Config(
        **SIZES,
        layer_types=["full_attention", "conv"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
]
"""Of models whose tokens meet in recurrences or convolutions, too."""


@pytest.mark.parametrize("situation", [s for s in SITUATIONS if s != "cumulative lengths"])
@pytest.mark.parametrize("config", MIX_ELSEWHERE, ids=lambda config: config.model_type)
@torch.no_grad()
def test_what_other_layers_would_mix_is_refused(config, situation):
    model = make_of(config)
    ids, positions = packed()
    model(ids, position_ids=torch.arange(ids.shape[1])[None], **SITUATIONS[situation])
    with pytest.raises(NotSupportedError, match="would mix outside of attention"):
        model(ids, position_ids=positions, **SITUATIONS[situation])


@pytest.mark.parametrize("config", [None, KEEP_POSITIONS[1]], ids=["told", "not told"])
@torch.no_grad()
def test_a_cache_knows_that_it_holds_several_sequences(config):
    """Without position_ids a step would stand behind all of them."""
    model = make_model("llama") if config is None else make_of(config)
    ids, positions = packed()
    one = sequences()[0]
    wanted = model(one, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=400)
    for kv in (DynamicCache(config=model.config), cache):
        model(ids, position_ids=positions, **cached(model, kv))
        with pytest.raises(NotSupportedError, match="continues one of several there"):
            model(ids[:, :1], **cached(model, kv))
    cache.reset()
    torch.testing.assert_close(model(one, **cached(model, cache)).logits, wanted)
    model(one[:, :1], **cached(model, cache))


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


@torch.no_grad()
def test_layers_that_are_compiled_each_alone_take_one_sequence_and_refuse_several():
    model = make_model("llama")
    one = sequences()[0]
    wanted = model(one).logits
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    ids, positions = packed()
    assert torch.equal(model(one, use_cache=False).logits, wanted)
    with pytest.raises(RuntimeError, match="must be told cu_seq_lens_q and cu_seq_lens_k"):
        model(ids, position_ids=positions, use_cache=False)


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
