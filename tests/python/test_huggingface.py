"""attn_implementation="blasst": the tokens of Transformers' own, thresholds, statistics."""

import copy
import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BertConfig,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    Gemma3Config,
    GPTNeoConfig,
    Llama4TextConfig,
    MptConfig,
    OpenAIGPTConfig,
    StaticCache,
    T5Config,
)

import blasst
from blasst import Threshold
from blasst.config import LENGTH_FORMULA
from blasst.hf import key_ranges, operator, recording
from tiny_models import MODELS, QUIET, VOCABULARY, make_model, with_quiet_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (150, 80, 147)


def prompts(lengths=LENGTHS, side="left"):
    """[requests, longest] token ids, padded with 0, and the attention mask.

    Every other stretch of 64 tokens is quiet (see `with_quiet_tokens`).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    position = torch.arange(max(lengths))
    loud = torch.randint(2, QUIET, shape, generator=generator)
    quiet = torch.randint(QUIET, VOCABULARY, shape, generator=generator)
    ids = torch.where(position // 64 % 2 == 0, loud, quiet)
    n = torch.tensor(lengths)[:, None]
    mask = position >= max(lengths) - n if side == "left" else position < n
    return ids * mask, mask.long()


# The same tokens as sdpa, or eager where sdpa lacks the soft cap or the sinks

GENERATION = {
    "one_length": {},
    "left_padded": {"padded": True},
    "static_cache": {"padded": True, "cache_implementation": "static"},
    "chunked_prefill": {"padded": True, "prefill_chunk_size": 33},
    "without_cache": {"padded": True, "use_cache": False},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("situation", GENERATION)
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_tokens_of_transformers_own_attention(name, situation):
    options = dict(GENERATION[situation])
    ids, mask = prompts(LENGTHS if options.pop("padded", False) else (150, 150))
    threshold = Threshold(0.0)
    model = make_model(name)
    blasst.configure(model, prefill=threshold, decode=threshold)
    options |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    got = model.generate(ids, **options)
    expected = make_model(name, MODELS[name][2]).generate(ids, **options)
    assert torch.equal(got, expected)
    assert len(got[:, ids.shape[1] :].unique()) > 3, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_logits_of_padded_batches(name, side):
    ids, mask = prompts(side=side)
    got = make_model(name)(ids, attention_mask=mask).logits
    expected = make_model(name, MODELS[name][2])(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.inference_mode()
def test_passes_of_any_size_with_a_cache(name, cache):
    ids, mask = prompts()
    logits = []
    for implementation in ("blasst", MODELS[name][2]):
        model = make_model(name, implementation)
        kv = (
            DynamicCache(config=model.config)
            if cache == "dynamic"
            else StaticCache(config=model.config, max_cache_len=200)
        )
        parts, start = [], 0
        for size in (100, 1, 7, 1, 41):
            end = start + size
            parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=kv).logits)
            start = end
        logits.append(torch.cat(parts, 1)[mask > 0])
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_unused_slots_of_a_static_cache_are_not_read():
    model = make_model("llama")
    ids, _ = prompts((60, 60))
    cache = StaticCache(config=model.config, max_cache_len=512)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.keys.fill_(math.nan)
        layer.values.fill_(math.nan)
    with blasst.record() as r:
        logits = model(ids, cache=cache).logits
        step = model(ids[:, :1], cache=cache).logits
    assert logits.isfinite().all()
    assert step.isfinite().all()
    assert r.tiles("decode").sum() == 2 * 4 * 2, "one tile of 61 keys a layer, head and request"


@torch.inference_mode()
def test_bidirectional_models():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    ids, mask = prompts(side="right")
    outputs = []
    for implementation in ("blasst", "sdpa"):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=implementation).eval()
        outputs.append(model(ids, attention_mask=mask).last_hidden_state[mask > 0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_encoder_and_decoder():
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.3,
    )
    ids, mask = prompts(side="right")
    outputs = []
    for implementation in ("blasst", "sdpa"):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=implementation).eval()
        if implementation == "blasst":
            blasst.configure(model, prefill=Threshold())
        out = model(ids, attention_mask=mask, decoder_input_ids=ids[:, :20])
        outputs.append(out.last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_half_precision_and_autocast():
    ids, mask = prompts()
    model = make_model("llama")
    expected = model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(ids, attention_mask=mask).logits
    half = model.to(torch.bfloat16)(ids, attention_mask=mask).logits
    for logits in (autocast, half):
        error = (logits.float() - expected)[mask > 0]
        assert error.abs().mean() < 0.05 * expected.abs().mean()


class TypesOfTiles(operator.Kernels):
    """The types that tiles were asked for."""

    def __init__(self):
        self.types = set()

    def tile_of(self, phase, device, dtype, *sizes):
        self.types.add(dtype)
        return super().tile_of(phase, device, dtype, *sizes)


@torch.inference_mode()
def test_thresholds_under_autocast_are_those_of_its_type():
    model = make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG))
    tiles = TypesOfTiles()
    with operator.calling(tiles), torch.autocast("cpu", torch.bfloat16):
        model(prompts()[0])  # whose rotation makes queries float32 again
    assert tiles.types == {torch.bfloat16}


def test_set_attn_implementation_later():
    model = make_model("llama", "sdpa")
    model.set_attn_implementation("blasst")
    with torch.inference_mode(), blasst.record() as r:
        model(prompts()[0])
    assert r.layers("prefill") == [0, 1]


def whole(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def each_layer(model):
    """A copy, whose mask is made outside of what is compiled."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    return model


@pytest.mark.parametrize("compiling", [whole, each_layer])
@pytest.mark.parametrize("name", ["llama", "gemma3_sliding_and_global", "gpt_oss_sinks"])
@torch.no_grad()
def test_compiled_passes_have_no_graph_break(name, compiling):
    torch.compiler.reset()  # a function is compiled anew only so many times
    model = make_model(name)
    blasst.configure(model, prefill=Threshold(0.1), decode=Threshold(threshold_scale_factor=5.0))
    compiled = compiling(model)
    ids, mask = prompts((70, 60))
    for given in (mask, torch.ones_like(mask)):
        wanted = model(ids, attention_mask=given, use_cache=False).logits
        assert torch.equal(compiled(ids, attention_mask=given, use_cache=False).logits, wanted)
    cache, own = (StaticCache(config=model.config, max_cache_len=128) for _ in "12")
    prefill = model(ids, attention_mask=mask, cache=cache).logits
    assert torch.equal(compiled(ids, attention_mask=mask, use_cache=False).logits, prefill)
    assert torch.equal(compiled(ids, attention_mask=mask, cache=own).logits, prefill)
    token = prefill[:, -1:].argmax(-1)
    mask = torch.cat([mask, torch.ones_like(token)], 1)
    step = model(token, attention_mask=mask, cache=copy.deepcopy(cache)).logits
    assert torch.equal(compiled(token, attention_mask=mask, cache=cache).logits, step)
    assert torch.equal(compiled(token, attention_mask=mask, cache=own).logits, step)


def test_compiled_pass_still_finds_padding_between_tokens():
    model = make_model("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = prompts((70, 60))
    mask[0, 20:30] = 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="padding between tokens"):
        compiled(ids, attention_mask=mask, use_cache=False)


# Thresholds


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_factor_is_divided_by_the_length_of_each_request(side):
    ids, mask = prompts((400, 330, 147), side)
    model = with_quiet_tokens(make_model("llama"))
    blasst.configure(model, prefill=Threshold(threshold_scale_factor=3.0))
    with blasst.record(gaps=True) as batch:
        model(ids, attention_mask=mask)
    with blasst.record(gaps=True) as singles:
        for row, used in zip(ids, mask, strict=True):
            model(row[used > 0][None])
    assert 0 < batch.sparsity("prefill") < 1
    assert torch.equal(batch.tiles("prefill"), singles.tiles("prefill"))
    assert (batch.gaps("prefill") - singles.gaps("prefill")).abs().sum() <= 4  # rounding in GEMMs


@torch.inference_mode()
def test_phases_layers_and_heads_have_their_own_thresholds():
    model = with_quiet_tokens(make_model("llama"))
    blasst.configure(model, prefill=Threshold((0.0, 0.5, 0.5, 0.5)), layers=[0])
    blasst.configure(model, decode=Threshold(0.5, order="reverse"), layers=[1])
    with blasst.record() as r:
        model.generate(prompts((400,))[0], max_new_tokens=4, do_sample=False)
    prefill, decode = r.by_head("prefill"), r.by_head("decode")
    assert prefill[0, 0] == 0
    assert (prefill[0, 1:] > 0).all()
    assert (prefill[1] == 0).all()
    assert (decode[0] == 0).all()
    assert (decode[1] > 0).any()
    assert r.sparsity("prefill") == pytest.approx(prefill.mean().item())
    assert torch.allclose(r.by_layer("prefill"), prefill.mean(-1))


CONFIG = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 0.5, "b": 6.0},
            },
            "target_sparsity": {"prefill": 0.5},
        }
    }
}


@torch.inference_mode()
def test_thresholds_come_from_the_models_configuration():
    ids, mask = prompts((400, 150))
    model = with_quiet_tokens(make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG)))
    with blasst.record() as from_config:
        model(ids, attention_mask=mask)
        model(ids[:, :1])
    factor = 0.5 * math.exp(6.0 * 0.5)
    by_hand = with_quiet_tokens(make_model("llama"))
    blasst.configure(by_hand, prefill=Threshold(threshold_scale_factor=factor, order="forward"))
    with blasst.record() as expected:
        by_hand(ids, attention_mask=mask)
    assert 0 < from_config.sparsity("prefill") < 1
    assert torch.equal(from_config.tiles("prefill"), expected.tiles("prefill"))
    assert from_config.sparsity("decode") == 0


@torch.inference_mode()
def test_a_changed_target_and_configure_take_effect():
    ids, _ = prompts((400,))
    model = with_quiet_tokens(make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG)))

    def sparsity():
        with blasst.record() as r:
            model(ids)
        return r.sparsity("prefill")

    assert sparsity() > 0.1
    group = model.config.sparse_attention_config["config_groups"]["group_0"]
    group["target_sparsity"]["prefill"] = 0
    assert sparsity() == 0
    blasst.configure(model, prefill=Threshold(0.5))
    assert sparsity() > 0.1


def test_configuration_survives_saving(tmp_path):
    model = make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG))
    with torch.inference_mode():
        model(prompts()[0])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blasst")
    assert loaded.config.sparse_attention_config == CONFIG


TABLE = {
    "version": 1,
    "prefill": {
        "tile_shape": [64, 64],
        "policies": [
            {
                "order": "reverse",
                "heads": "equal_mass",
                "law": {"formula": LENGTH_FORMULA, "a": 1.0, "b": 1.0, "power": 1.2},
                "lengths": [100, 200],
                "target_sparsity": [0.5],
                # [2 lengths, 1 target, 2 layers, 4 heads]
                "ln_threshold": [[[[-1, -2, -1, -1], [-2, -1, 1, 0]]], [[[-3, -2, -1, -3]] * 2]],
            }
        ],
    },
}


def with_shorter(table: dict) -> dict:
    """Its order stands for fewer than 450 keys."""
    table = copy.deepcopy(table)
    [policy] = table["prefill"]["policies"]
    policy["shorter"] = {"below": [450], "policy": {**policy, "order": "forward"}}
    return table


@pytest.mark.parametrize(
    "ours",
    [{}, {"blasst": TABLE}, {"blasst": with_shorter(TABLE)}],
    ids=["law", "table", "shorter"],
)
@torch.no_grad()
def test_compiled_passes_follow_the_models_configuration_for_each_requests_length(ours):
    torch.compiler.reset()  # a function is compiled anew only so many times
    config = copy.deepcopy(CONFIG) | ours
    factors = config["config_groups"]["group_0"]["threshold_scale_factor"]
    factors["decode"] = {"a": 0.5, "b": 6.0}
    model = with_quiet_tokens(make_model("llama", sparse_attention_config=config))
    ids, mask = prompts((400, 150))
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
    cache = StaticCache(config=model.config, max_cache_len=512)
    token = model(ids, attention_mask=mask, cache=cache).logits[:, -1:].argmax(-1)
    mask = torch.cat([mask, torch.ones_like(token)], 1)
    step = model(token, attention_mask=mask, cache=copy.deepcopy(cache)).logits
    assert torch.equal(compiled(token, attention_mask=mask, cache=cache).logits, step)
    dense = make_dense(model)
    assert not torch.equal(expected, dense(*prompts((400, 150)), use_cache=False).logits)


def make_dense(model):
    model = copy.deepcopy(model)
    del model.config.sparse_attention_config
    return model


@torch.inference_mode()
def test_a_multimodal_models_own_configuration_reaches_its_text_layers():
    text = make_model("gemma3_sliding_and_global").config
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    config.sparse_attention_config = copy.deepcopy(CONFIG)
    group = config.sparse_attention_config["config_groups"]["group_0"]
    group |= {"targets": ["Gemma3Attention"], "ignore": ["model.language_model.layers.0.self_attn"]}
    group["threshold_scale_factor"]["prefill"]["a"] = 20.0
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="blasst").eval()
    ids = prompts((400,))[0]
    with blasst.record() as r:
        model.model.language_model(ids)
    assert r.by_layer("prefill")[0] == 0
    assert r.by_layer("prefill")[1] > 0
    group["target_sparsity"]["prefill"] = 0
    with blasst.record() as r:
        model.model.language_model(ids)
    assert r.sparsity("prefill") == 0
    group["target_sparsity"]["prefill"] = 0.5
    nearer = copy.deepcopy(config.sparse_attention_config)
    nearer["config_groups"]["group_0"]["target_sparsity"]["prefill"] = 0
    model.model.language_model(ids)
    model.config.text_config.sparse_attention_config = nearer
    with blasst.record() as r:
        model.model.language_model(ids)
    assert r.sparsity("prefill") == 0


# Statistics


@torch.inference_mode()
def test_recordings():
    model = make_model("gemma3_sliding_and_global")
    ids, _ = prompts((150, 150))
    with blasst.record(gaps=True) as outer:
        model(ids)
        with blasst.record() as inner:
            model(ids)
    model(ids)  # not recorded
    assert torch.equal(outer.tiles("prefill"), 2 * inner.tiles("prefill"))
    gaps, tiles = outer.gaps("prefill"), outer.tiles("prefill")
    assert gaps.shape == (2, 4, 514)
    assert torch.equal(gaps.sum(-1), tiles[:, 0])
    assert (tiles[:, 1] <= tiles[:, 0]).all()
    assert tiles[0, 0, 0] < tiles[1, 0, 0], "a sliding layer visits fewer tiles"
    assert inner.layers("decode") == []
    assert inner.sparsity("decode") == 0
    with pytest.raises(ValueError, match="no gaps; use record"):
        inner.gaps("prefill")
    with pytest.raises(ValueError, match="phase is 'train'; it must be one of"):
        inner.sparsity("train")


def test_an_error_ends_the_recording():
    with pytest.raises(KeyError), blasst.record():
        raise KeyError
    assert recording.active == []


# What cannot be honoured is an error that names it


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


IDS, MASK = prompts((60, 60))
HOLE = MASK.clone()
HOLE[0, 20:30] = 0
BAD_CALLS = [
    ({"attention_mask": HOLE}, "attention_mask has padding between tokens of a request"),
    ({"attention_mask": MASK[:, :50]}, "attention_mask covers 50 positions, but this pass ends at"),
    ({"attention_mask": MASK[:, None, None].expand(2, 1, 60, 60) > 0}, "no prepared 4-d ones"),
    ({"attention_mask": torch.zeros(2, 1, 60, 60)}, "torch.float32 tensor of shape [2, 1, 60, 60]"),
    ({"attention_mask": torch.ones(2, 60, 60)}, "attention_mask is [2, 60, 60]; it must be [batch"),
    ({"output_attentions": True}, "output_attentions is not supported"),
    ({"head_mask": torch.ones(2, 4)}, "head_mask (of LlamaAttention) is not supported"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_calls_that_are_refused(llama, call, message):
    with torch.inference_mode(), pytest.raises(ValueError) as error:
        llama(IDS, **call)
    assert message in str(error.value)


def causal_lm(config):
    return AutoModelForCausalLM.from_config(config, attn_implementation="blasst").eval()


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64}


def llama4():
    return causal_lm(
        Llama4TextConfig(
            **_SMALL,
            intermediate_size_mlp=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=2,
            attention_chunk_size=16,
            pad_token_id=0,
        )
    )


BAD_MODELS = {
    "attention dropout 0.1": lambda: make_model("llama", attention_dropout=0.1).train(),
    "output_attentions is not supported": lambda: make_model("llama", output_attentions=True),
    "head_dim is 20; it must be a multiple of 8": lambda: make_model("llama", head_dim=20),
    "unknown key 'x'": lambda: make_model("llama", sparse_attention_config={"x": 1}),
    "q is torch.float64": lambda: make_model("llama").double(),
    "mask pattern causal_mask_function & chunked_overlay": llama4,
    "position_bias (of T5Attention) is not supported": lambda: AutoModel.from_config(
        T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4),
        attn_implementation="blasst",
    ).encoder.eval(),
}


@pytest.mark.parametrize("message", BAD_MODELS)
def test_models_that_are_refused(message):
    model = BAD_MODELS[message]()
    with torch.no_grad(), pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        model(IDS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (
            FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2),
            "FALCON_ATTENTION_CLASSES, which has eager, sdpa, flash_attention_2",
        ),
        (
            GPTNeoConfig(
                hidden_size=64, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
            ),
            "GPT_NEO_ATTENTION_CLASSES, which has eager, flash_attention_2",
        ),
    ],
    ids=["falcon", "gpt_neo"],
)
def test_models_that_pick_attention_from_a_table_of_their_own_are_refused(config, table):
    message = f"attn_implementation is 'blasst'; this model picks its attention from {table}"
    with pytest.raises(blasst.NotSupportedError, match=message):
        AutoModelForCausalLM.from_config(config, attn_implementation="blasst")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        model(IDS)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=64, n_layer=1, n_head=4),
        MptConfig(d_model=64, n_layers=1, n_heads=4),
        OpenAIGPTConfig(n_embd=64, n_layer=1, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_compute_attention_themselves_are_refused(config):
    message = "attn_implementation is 'blasst'; .* does not call Transformers' attention interface"
    with pytest.raises(blasst.NotSupportedError, match=message):
        AutoModelForCausalLM.from_config(config, attn_implementation="blasst")


def test_a_window_that_only_the_layer_knows_is_refused(llama):
    model = make_model("llama")
    forward = model.model.layers[1].self_attn.forward

    def sliding(*args, **kwargs):
        return forward(*args, sliding_window=8, **kwargs)

    model.model.layers[1].self_attn.forward = sliding
    with torch.no_grad(), pytest.raises(ValueError, match="LlamaAttention has a sliding window of"):
        model(IDS)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="window of 8, but the model's mask has none"),
    ):
        model(*prompts((60, 40)))


def test_generating_after_padding_on_the_right_is_refused(llama):
    ids, mask = prompts((60, 40), side="right")
    with pytest.raises(ValueError, match="pad on the left for generation"):
        llama.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_configure_refuses():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"no attention layer \[7\]; the model has \[0, 1\]"):
        blasst.configure(model, prefill=Threshold(), layers=[0, 7])
    with pytest.raises(ValueError, match="implementation is 'sdpa'; load it with 'blasst'"):
        blasst.configure(make_model("llama", "sdpa"), prefill=Threshold())
    for layers, error, message in (
        ([], ValueError, "layers is empty; it must name one layer at least, or be None"),
        (3, TypeError, "layers is 3; it must be a list of layers' numbers, or None"),
        ("12", TypeError, "layers is '12'; it must be a list of layers' numbers, or None"),
    ):
        with pytest.raises(error, match=message):
            blasst.configure(model, prefill=Threshold(), layers=layers)
    with pytest.raises(TypeError, match=r"model is str; it must be a torch\.nn\.Module"):
        blasst.configure("llama", prefill=Threshold())
    with pytest.raises(TypeError, match=r"policy is 3; it must be one, for example blasst\.Bands"):
        blasst.set_policy(model, 3)
    with pytest.raises(ValueError, match="more than one threshold; they exclude each other"):
        Threshold(0.1, 3.0)
    blasst.configure(model, prefill=Threshold((0.1, 0.2)))
    message = r"it must be \[1 or batch, 1 or heads, places\]"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(IDS)
    with pytest.raises(TypeError, match="configure sets prefill, decode or both; neither is given"):
        blasst.configure(model)
    with pytest.raises(TypeError, match=r"decode is 0.5; it must be a blasst.Threshold"):
        blasst.configure(model, decode=0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Threshold(1.5), ValueError, "threshold is 1.5; it must be a number from 0 to 1"),
        (lambda: Threshold((0.1, -0.2)), ValueError, "threshold is -0.2; it must be a number from"),
        (
            lambda: Threshold(torch.tensor([0.1, math.nan])),
            ValueError,
            "threshold is nan; it must be a number from 0",
        ),
        (lambda: Threshold(math.nan), ValueError, "threshold is nan; it must be a number from 0"),
        (lambda: Threshold(torch.tensor(2.0)), ValueError, "threshold is 2; it must be a number"),
        (lambda: Threshold("0.1"), TypeError, "threshold is '0.1'; it must be a number from 0 to"),
        (lambda: Threshold(True), TypeError, "threshold is True; it must be a number from 0 to 1"),
        (lambda: Threshold(None, -1.0), ValueError, "threshold_scale_factor is -1; it must be a"),
        (lambda: Threshold(0.1, order="up"), ValueError, "order is 'up'; it must be one of sink"),
        (lambda: Threshold(0.1, order=None), TypeError, "order is None; it must be one of sink"),
    ],
)
def test_a_threshold_checks_itself(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert type(raised.value) is error


@torch.inference_mode()
def test_configuring_one_phase_leaves_the_other():
    model = make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG))
    blasst.configure(model, decode=Threshold(0.5))
    blasst.configure(model, prefill=Threshold(0.25), layers=[0])
    first, second = (layer.self_attn.blasst_thresholds for layer in model.model.layers)
    assert first == {"prefill": Threshold(0.25), "decode": Threshold(0.5)}
    assert second == {"decode": Threshold(0.5)}


def test_a_pass_of_one_token_trains():
    gradients = []
    for implementation in ("sdpa", "blasst"):
        model = make_model("llama", implementation).train()
        model(IDS[:, :1]).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item() + 1e-4
        )


@torch.no_grad()
def test_a_prefix_in_the_cache_and_padding_behind_it(llama):
    """As prefix tuning does it."""
    cache = DynamicCache(config=llama.config)
    llama(IDS[:, :10], cache=cache)
    ids, mask = prompts((60, 40))
    mask = torch.cat([torch.ones(2, 10, dtype=torch.long), mask], 1)
    with pytest.raises(ValueError, match="as in prefix tuning, padding on the left lies between"):
        llama(ids, attention_mask=mask, cache=cache)


def test_a_model_trains_as_with_sdpa():
    gradients = []
    for implementation in ("sdpa", "blasst"):
        model = make_model("llama", implementation).train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-3, atol=1e-6, msg=name)


# The mask interface by itself


def test_a_mask_where_all_keys_count_says_so():
    full = torch.ones(2, 60, dtype=torch.bool)
    for mask in (
        key_ranges(2, 60, 60),
        key_ranges(2, 60, 60, attention_mask=full),
        key_ranges(2, 1, 60, q_offset=59, attention_mask=full),
    ):
        assert mask.everything
        assert mask.causal


def test_key_ranges_of_padding_and_offsets():
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, :7] = mask[1, 50:] = False
    ranges = key_ranges(2, 60, 60, attention_mask=mask)
    assert ranges.ranges.tolist() == [[7, 60, 60, 0, 1, 60], [0, 50, 50, 0, 1, 60]]
    chunk = key_ranges(2, 20, 60, q_offset=40, attention_mask=mask)
    assert chunk.ranges.tolist() == [[7, 60, 20, 0, 1, 20], [0, 50, 10, 0, 1, 20]]
    static = key_ranges(2, 1, 100, q_offset=torch.tensor(59), attention_mask=mask)
    assert static[:, 0, 0].tolist() == [[7, 60, 1, 0, 1, 1], [0, 50, 0, 0, 1, 1]]
