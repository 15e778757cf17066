"""Layers of any kind of model: what they attend to, which are reached, how they are named."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AlignTextConfig,
    AlignTextModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BridgeTowerConfig,
    BridgeTowerModel,
    ClapTextConfig,
    ClapTextModel,
    CLIPVisionConfig,
    DogeConfig,
    LayoutLMConfig,
    LayoutLMModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarkupLMConfig,
    MarkupLMModel,
    MllamaForCausalLM,
    PreTrainedModel,
    SplinterConfig,
    SplinterModel,
)
from transformers.masking_utils import bidirectional_mask_function, create_bidirectional_mask
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import blasst
from blasst import Bands, NotSupportedError, Threshold
from blasst.calibration import calibrate
from blasst.config.laws import heads_of
from blasst.hf import attention_forward, key_ranges
from blasst.hf.layers import attention_modules, place_of
from recency_model import make_tokenizer
from tiny_models import VOCABULARY, asked, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "pad_token_id": 0}
DECODER = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def make(kind: type[PreTrainedModel], config, implementation="blasst") -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
    return model


# Who attends to whom


@pytest.mark.parametrize("states", [9, 20, 35])
@torch.no_grad()
def test_cross_attention_that_says_nothing_sees_every_key(states):
    config = MllamaTextConfig(
        **{k: v for k, v in DECODER.items() if k != "head_dim"}, cross_attention_layers=[1]
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    options = {
        "cross_attention_states": torch.randn(1, states, 64),
        "use_cache": False,
    }
    got, expected = (
        make(MllamaForCausalLM, config, implementation)(tokens(1, 20), **options).logits
        for implementation in ("blasst", "eager")
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


ENCODER = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
}
ENCODERS = {
    AlignTextModel: AlignTextConfig(**ENCODER),
    ClapTextModel: ClapTextConfig(**ENCODER),
    LayoutLMModel: LayoutLMConfig(**ENCODER),
    MarkupLMModel: MarkupLMConfig(**ENCODER),
    SplinterModel: SplinterConfig(**ENCODER),
}


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_encoders_that_never_say_whether_they_are_causal(kind, padding):
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 20:] = 0
    got, expected = (
        make(kind, ENCODERS[kind], implementation)(ids, attention_mask=mask).last_hidden_state
        for implementation in ("blasst", "eager")
    )
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], rtol=1e-3, atol=1e-3)


def test_the_mask_decides_what_is_causal():
    """Some layers pass is_causal=False where the mask has it."""
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16)
    mask = key_ranges(1, 30, 30)
    out, _ = attention_forward(module, q, k, k, mask, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_queries_that_are_the_same_for_all_requests_are_given_once():
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(3, 2, 30, 16)
    mask = key_ranges(3, 5, 30, mask_function=bidirectional_mask_function)
    out, _ = attention_forward(module, q, k, k, mask, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(
        q.expand(3, -1, -1, -1), k, k, enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_layer_that_says_it_is_causal_and_has_no_mask():
    """Eager attention then sees every key, SDPA the earlier ones: only the call can say which."""
    module = make_model("llama").model.layers[0].self_attn
    sdpa = functools.partial(nn.functional.scaled_dot_product_attention, enable_gqa=True)
    k = torch.randn(1, 2, 9, 16)
    for queries in (5, 9):
        q = torch.randn(1, 4, queries, 16)
        message = f"{queries} queries over 9 keys, but the model made no mask"
        with pytest.raises(NotSupportedError, match=message):
            attention_forward(module, q, k, k, None)
        out, _ = attention_forward(module, q, k, k, None, is_causal=False)
        torch.testing.assert_close(out.transpose(1, 2), sdpa(q, k, k))
    out, _ = attention_forward(module, q, k, k, None, is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), sdpa(q, k, k, is_causal=True))
    with pytest.raises(
        NotSupportedError, match="5 queries over 9 keys, but the model made no mask"
    ):
        attention_forward(module, q[:, :, :5], k, k, None, is_causal=True)
    out, _ = attention_forward(module, q[:, :, :1], k, k, None)  # sees all in either case
    torch.testing.assert_close(out.transpose(1, 2), sdpa(q[:, :, :1], k, k))


@torch.no_grad()
def test_image_layers_that_say_they_are_causal():
    """BridgeTower's: refused, until told that they are not; its text has a mask for one query."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 1}
    image = {"image_size": 32, "patch_size": 16, "num_channels": 3}
    config = BridgeTowerConfig(
        **sizes,
        intermediate_size=64,
        text_config=sizes | text | {"num_hidden_layers": 3, "intermediate_size": 64},
        vision_config=image | {"hidden_size": 64, "num_hidden_layers": 3},
    )
    batch = {"input_ids": tokens(2, 12), "pixel_values": torch.randn(2, 3, 32, 32)}
    batch["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    batch["attention_mask"][0, 9:] = 0
    expected, model = (make(BridgeTowerModel, config, i) for i in ("eager", "blasst"))
    with pytest.raises(NotSupportedError, match="set is_causal=False on the layer"):
        model(**batch)
    for module in attention_modules(model):
        module.is_causal = False
    got, expected = model(**batch), expected(**batch)
    used = batch["attention_mask"] > 0
    torch.testing.assert_close(
        got.text_features[used], expected.text_features[used], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(got.image_features, expected.image_features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [3, 11])
def test_a_mask_for_other_keys_is_refused(keys):
    """As where a layer adds keys of its own to those of the tokens."""
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, keys, 16)
    with pytest.raises(NotSupportedError, match=f"has {keys} keys, but the model's mask is for 5"):
        attention_forward(module, q, k, k, key_ranges(1, 5, 5))


# A mask, and another number of queries than it was made for

KEYS = 12
PADDED = torch.ones(2, KEYS, dtype=torch.bool)
PADDED[0, 9:] = False


def bert_layer():
    return attention_modules(make(BertModel, BertConfig(**ENCODER)))[0]


def padding_masks(layer):
    """Of each kind that a layer may be handed for `PADDED`, made for one query and for all."""
    states = torch.randn(2, KEYS, 64)
    return {
        "for one query": create_bidirectional_mask(layer.config, states[:, :1], PADDED),
        "for all": create_bidirectional_mask(layer.config, states, PADDED),
        "the model's own": PADDED[:, None, None].clone(),
        "added to the scores": torch.zeros(2, 1, 1, KEYS).masked_fill(
            ~PADDED[:, None, None], torch.finfo(torch.float32).min
        ),
    }


def expected_of(q, kv, used):
    out = nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=used[:, None, None])
    return out.transpose(1, 2)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["for one query", "for all", "the model's own",
                                  "added to the scores"])  # fmt: skip
def test_a_padding_mask_holds_for_any_number_of_queries(kind, inference):
    with torch.inference_mode(inference), torch.no_grad():
        layer = bert_layer()
        mask, kv = padding_masks(layer)[kind], torch.randn(2, 4, KEYS, 16)
        for queries in (4, 12, 1, 20, 3):
            q = torch.randn(2, 4, queries, 16)
            got, _ = attention_forward(layer, q, kv, kv, mask)
            torch.testing.assert_close(got, expected_of(q, kv, PADDED))


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_edited_in_place_is_read_again(inference):
    with torch.inference_mode(inference), torch.no_grad():
        layer = bert_layer()
        mask = torch.ones(2, 1, 1, KEYS, dtype=torch.bool)
        q, kv = torch.randn(2, 4, 5, 16), torch.randn(2, 4, KEYS, 16)
        attention_forward(layer, q, kv, kv, mask)
        mask[..., 7:] = False
        got, _ = attention_forward(layer, q, kv, kv, mask)
        torch.testing.assert_close(got, expected_of(q, kv, mask[:, 0, 0]))


@pytest.mark.parametrize("queries", [3, 20])
def test_a_causal_mask_for_other_queries_is_refused(queries):
    layer = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 4, queries, 16), torch.randn(2, 2, KEYS, 16)
    message = f"a layer has {queries} queries, but the model's causal mask is for 12"
    for mask in (key_ranges(2, KEYS, KEYS), key_ranges(2, KEYS, KEYS, attention_mask=PADDED)):
        with pytest.raises(NotSupportedError, match=message):
            attention_forward(layer, q, k, k, mask)
    static = key_ranges(2, KEYS, KEYS, q_offset=torch.tensor(0))
    with pytest.raises(NotSupportedError, match=message):
        attention_forward(layer, q, k, k, static)


@torch.no_grad()
def test_a_mask_and_other_queries_when_compiled():
    layer, causal = bert_layer(), make_model("llama").model.layers[0].self_attn

    @torch.compile(fullgraph=True, backend="aot_eager")
    def encoder(q, kv, states):
        mask = create_bidirectional_mask(layer.config, states[:, :1], PADDED)
        return attention_forward(layer, q, kv, kv, mask)[0]

    q, kv = torch.randn(2, 4, 20, 16), torch.randn(2, 4, KEYS, 16)
    got = encoder(q, kv, torch.randn(2, KEYS, 64))
    torch.testing.assert_close(got, expected_of(q, kv, PADDED))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def decoder(q, kv):
        return attention_forward(causal, q, kv, kv, key_ranges(2, KEYS, KEYS))[0]

    kv = torch.randn(2, 2, KEYS, 16)
    with pytest.raises(RuntimeError, match="causal mask is for another number"):
        decoder(torch.randn(2, 4, 20, 16), kv)


@torch.no_grad()
def test_a_model_that_computes_with_its_mask_is_refused():
    doge = DogeConfig(**DECODER)
    model = AutoModelForCausalLM.from_config(doge, attn_implementation="blasst").eval()
    ids = tokens(2, 20)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    for options in ({}, {"attention_mask": padded}):
        with pytest.raises(NotSupportedError, match=r"computes .* with its attention mask"):
            model(ids, **options)


# Parts of a model, and what is around it


def llava(text="blasst", vision="blasst") -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**DECODER),
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        image_token_index=90,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    implementation = {"text_config": text, "vision_config": vision}
    return LlavaForConditionalGeneration._from_config(
        config, attn_implementation=implementation
    ).eval()


def image_prompt() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.cat([torch.full((1, 16), 90), torch.arange(3, 83)[None]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


def set_layers(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if hasattr(m, "blasst_thresholds")]


@torch.no_grad()
def test_text_and_images_of_a_multimodal_model():
    both, text, own = llava(), llava(vision="sdpa"), llava("sdpa", "sdpa")
    for model in (both, text):
        blasst.configure(model, prefill=Threshold(0.0))
        got, expected = model(**image_prompt()).logits, own(**image_prompt()).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert set_layers(both) == ["CLIPAttention"] * 3 + ["LlamaAttention"] * 2
    assert set_layers(text) == ["LlamaAttention"] * 2


@torch.no_grad()
def test_recordings_keep_the_language_model_and_the_towers_apart():
    model = llava()
    with blasst.record(gaps=True) as both:
        model(**image_prompt())
    assert both.layers("prefill") == [0, 1]
    assert both.by_head("prefill").shape == (2, 4)
    vision = both.towers["clip_vision_model"]
    assert vision.layers("prefill") == [0, 1, 2]
    assert vision.by_head("prefill").shape == (3, 2)
    assert vision.gaps("prefill").sum() > 0


def test_layers_are_those_of_the_language_model():
    model = llava()
    blasst.configure(model, prefill=Threshold(0.5), layers=[1])
    assert set_layers(model) == ["LlamaAttention"]
    with pytest.raises(ValueError, match=r"no attention layer \[2\]; the model has \[0, 1\]"):
        blasst.configure(model, prefill=Threshold(0.5), layers=[2])
    part = llava()
    blasst.configure(part.model.language_model, prefill=Threshold(0.5))
    assert set_layers(part) == ["LlamaAttention"] * 2


@torch.no_grad()
def test_policies_of_a_multimodal_model_are_for_its_causal_layers():
    model = llava()
    dense = model(**image_prompt()).logits
    blasst.set_policy(model, Bands(200))
    assert not torch.equal(model(**image_prompt()).logits, dense)
    with pytest.raises(NotSupportedError, match="has no causal attention layers"):
        blasst.set_policy(model.model.vision_tower, Bands(200))


class Wrapper(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile], ids=["module", "compiled"])
@torch.no_grad()
def test_a_wrapped_model_is_reached(wrap):
    model = make_model("llama")
    blasst.configure(wrap(model), prefill=Threshold(0.5), layers=[1])
    blasst.set_policy(wrap(model), Bands(200), layers=[1])
    first, second = attention_modules(model)
    assert not hasattr(first, "blasst_thresholds")
    assert second.blasst_thresholds == {"prefill": Threshold(0.5)}
    assert second.blasst_policy == Bands(200)


def test_what_has_no_attention_of_transformers():
    with pytest.raises(NotSupportedError, match="Linear does not call Transformers' attention"):
        blasst.configure(nn.Linear(2, 2), prefill=Threshold(0.5))


# Layers with other numbers of heads


def laguna(implementation="blasst", **options) -> PreTrainedModel:
    torch.manual_seed(0)
    modeling = pytest.importorskip("transformers.models.laguna")  # not in the oldest version
    config = modeling.LagunaConfig(
        **{
            **DECODER,
            "num_attention_heads_per_layer": [4, 6],
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **options,
        }
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def step(implementation="blasst") -> PreTrainedModel:
    configuration = pytest.importorskip("transformers.models.step3p7.configuration_step3p7")
    modeling = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    torch.manual_seed(0)
    config = configuration.Step3p7TextConfig(
        **DECODER,
        num_sliding_attention_heads=6,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
        sliding_window=40,
    )
    return modeling.Step3p7TextModel._from_config(config, attn_implementation=implementation).eval()


def dots(implementation="blasst", **options) -> PreTrainedModel:
    configuration = pytest.importorskip("transformers.models.dots3_note.configuration_dots3_note")
    modeling = pytest.importorskip("transformers.models.dots3_note.modeling_dots3_note")
    torch.manual_seed(0)
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 24, "v_head_dim": 16}
    sizes = {**DECODER, **latent, "qk_rope_head_dim": 8, "head_dim": 32, "num_key_value_heads": 4}
    sliding = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 40, **latent}
    config = configuration.Dots3NoteTextConfig(
        **sizes,
        **{f"swa_{name}": value for name, value in sliding.items()},
        **{"use_dsa": False, **options},
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
        sliding_window=40,
    )
    return modeling.Dots3NoteForCausalLM._from_config(
        config, attn_implementation=implementation
    ).eval()


@pytest.mark.parametrize("build", [laguna, step, dots])
@torch.no_grad()
def test_layers_that_differ_in_their_heads(build):
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    model = build()
    blasst.configure(model, prefill=Threshold((0.0, 0.5, 0.5, 0.5)), layers=[0])
    blasst.configure(model, prefill=Threshold((0.0,) * 6), layers=[1])
    with blasst.record(gaps=True) as r:
        model(ids, attention_mask=mask)
    assert r.heads("prefill") == [4, 6]
    assert r.gaps("prefill").shape == (2, 6, 514)
    tiles, by_head = r.tiles("prefill"), r.by_head("prefill")
    assert (tiles[0, :, 4:] == 0).all()
    assert (tiles[:, 0, :4] > 0).all()
    assert by_head[0, 4:].isnan().all()
    assert by_head[1].tolist() == [0.0] * 6
    blasst.configure(model, prefill=Threshold())
    got, expected = (m(ids, attention_mask=mask)[0][mask > 0] for m in (model, build("sdpa")))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_layers_that_choose_keys_for_each_query_are_refused():
    with pytest.raises(NotSupportedError, match=r"computes .* with its attention mask, as models"):
        dots(use_dsa=True)(tokens(1, 20))


def test_a_policy_must_suit_the_layer_with_the_most_heads():
    with pytest.raises(ValueError, match="6 heads cannot have bands of 5 distances"):
        blasst.set_policy(laguna(), Bands(5))


def table_of(rows: list) -> dict:
    law = {"formula": "a * exp(b * target_sparsity) / length ** power", "a": 1, "b": 1, "power": 1}
    policy = {
        "order": "forward",
        "heads": "equal_mass",
        "law": law,
        "lengths": [200],
        "target_sparsity": [0.5],
        "ln_threshold": [[rows]],
    }
    group = {
        "algorithm": "skip_softmax",
        "targets": ["LagunaAttention"],
        "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)"},
        "target_sparsity": {"prefill": 0.5},
    }
    measured = {"version": 1, "prefill": {"tile_shape": [64, 64], "policies": [policy]}}
    return {"config_groups": {"group_0": group}, "blasst": measured}


@torch.no_grad()
def test_a_calibration_of_layers_that_differ_in_their_heads():
    rows = [[-1.0, -2.0, -3.0, -4.0], [-1.0, -1.5, -2.0, -2.5, -3.0, -3.5]]
    calibrated, by_hand = laguna(sparse_attention_config=table_of(rows)), laguna()
    for layer, row in enumerate(rows):
        values = torch.tensor(row).exp() * 200 / 400  # beyond the table: power 1
        threshold = Threshold(values, order="forward")
        blasst.configure(by_hand, prefill=threshold, layers=[layer])
    with blasst.record() as got:
        calibrated(tokens(1, 400))
    with blasst.record() as expected:
        by_hand(tokens(1, 400))
    assert torch.equal(got.tiles("prefill"), expected.tiles("prefill"))


class NearlyConstant(nn.Module):
    """In place of a norm: a score then falls with the distance, through the rotation."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value + 0.1 * x


def recency_laguna() -> PreTrainedModel:
    """Every layer sees the whole text and prefers near keys."""
    model = laguna(layer_types=["full_attention"] * 2, vocab_size=257, max_position_embeddings=512)
    for module in attention_modules(model):
        module.q_norm, module.k_norm = NearlyConstant(4.0), NearlyConstant(1.0)
    return model


@pytest.mark.parametrize("scheme", ["equal_mass", "water_filling", "least_error"])
def test_layers_that_differ_in_their_heads_can_be_calibrated(scheme):
    model = recency_laguna()
    options = {"lengths": [256, 512], "prompts": 1, "held_out": [384], "schemes": [scheme]}
    targets = {"prefill": 0.3, "decode": 0.3}
    found = calibrate(model, make_tokenizer(), target_sparsity=targets, **options)
    for phase in ("prefill", "decode"):
        [table, *_] = found.config.measured[phase].tables
        assert table.ln_threshold.shape[2:] == (2, 6)
        assert heads_of(table.ln_threshold.flatten(0, 1)) == [4, 6]
    with blasst.record() as recording, torch.inference_mode():
        model(tokens(1, 512))
    assert recording.sparsity("prefill") == pytest.approx(0.3, abs=0.1)
    assert recording.heads("prefill") == [4, 6]


# Names of modules


CONFIG = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 300.0, "b": 0.0},
            },
            "target_sparsity": {"prefill": 0.5},
        }
    }
}


def sparse_layers(model, **group) -> list[bool]:
    """Which attention layers, in their order, a configuration makes sparse."""
    entry = copy.deepcopy(CONFIG)
    entry["config_groups"]["group_0"] |= group
    model.config.sparse_attention_config = entry
    modules = attention_modules(model)
    return [asked(m, "prefill").get("threshold") is not None for m in modules]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, [True, True]),
        ({"ignore": ["model.layers.1.self_attn"]}, [True, False]),
        ({"ignore": ["layers.0"]}, [False, True]),
        ({"ignore": ["*.layers.[01].self_attn"]}, [False, False]),
        ({"ignore": [r"re:.*\.layers\.[1-9]\d*\."]}, [True, False]),
        ({"ignore": ["re:layers"]}, [True, True]),  # a name begins so
        ({"ignore": ["model.layers.11.self_attn", "lm_head"]}, [True, True]),
        ({"ignore": ["LlamaAttention"]}, [False, False]),
        ({"targets": ["model.layers.1.self_attn"]}, [False, True]),
        ({"targets": ["Attention"]}, [True, True]),
    ],
)
def test_ignore_and_targets_match_names_of_modules(group, expected):
    model = make_model("llama")
    assert sparse_layers(model, **group) == expected
    headless = make_model("llama").model
    assert sparse_layers(headless, **group) == expected, "a model without a head has the same names"


def test_a_wrong_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"'re:layers\.\(' among targets or ignore"):
        sparse_layers(make_model("llama"), ignore=["re:layers.("])


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"targets": ["CLIPAttention"]}, [True] * 3 + [False] * 2),
        ({"targets": ["Attention"], "ignore": ["vision_tower"]}, [False] * 3 + [True] * 2),
        (
            {"ignore": ["model.vision_tower.vision_model.encoder.layers.0"]},
            [False] * 3 + [True] * 2,
        ),
        ({"ignore": ["model.language_model.layers.0.self_attn"]}, [False] * 4 + [True]),
        ({"ignore": ["model.layers.0.self_attn"]}, [False] * 3 + [True] * 2),
    ],
)
def test_a_name_in_one_tower_says_nothing_of_another(group, expected):
    model = llava()
    assert sparse_layers(model, **group) == expected
    assert place_of(attention_modules(model)[0]).tower == "clip_vision_model"


def test_targets_that_reach_no_layer_are_an_error():
    with pytest.raises(ValueError, match="targets OtherAttention; layer 0 is a LlamaAttention"):
        sparse_layers(make_model("llama"), targets=["OtherAttention"])


def test_a_copy_of_a_model_has_its_own_configuration():
    model = llava()
    assert sparse_layers(model) == [False] * 3 + [True] * 2
    other = copy.deepcopy(model)
    assert sparse_layers(other, ignore=["language_model.layers.0"]) == [False] * 4 + [True]
    assert sparse_layers(model) == [False] * 3 + [True] * 2
    assert place_of(attention_modules(other)[-1]).outer is other.config


# Importing


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_blasst_imports_no_transformers():
    loaded = "print(sorted(m for m in sys.modules if m.split('.')[0] in ('transformers', 'rich')))"
    assert python(f"import sys, blasst; {loaded}") == "[]\n"


MUSICGEN = """
from transformers import EncodecConfig, MusicgenConfig, MusicgenForConditionalGeneration, T5Config
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
text = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
audio = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=64, codebook_dim=16)
decoder = MusicgenDecoderConfig(vocab_size=97, hidden_size=32, ffn_dim=32, num_hidden_layers=1,
                                num_attention_heads=4, num_codebooks=2)
config = MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
print(type(MusicgenForConditionalGeneration(config)).__name__)
"""


def test_importing_blasst_changes_nothing_for_other_models():
    watched = """
import torch.nn.modules.module as m
hooks = {name: dict(value) for name, value in vars(m).items() if name.startswith("_global_")
         and hasattr(value, "keys")}
import blasst, transformers.modeling_utils
assert hooks == {name: dict(getattr(m, name)) for name in hooks}
"""
    assert python(watched + MUSICGEN) == "MusicgenForConditionalGeneration\n"


@pytest.mark.parametrize(
    "order",
    [
        "import blasst, transformers",
        "import transformers, blasst",
        "import transformers.modeling_utils, blasst",
        "from transformers import AutoModelForCausalLM, LlamaConfig; import blasst",
    ],
)
def test_the_implementation_is_known_in_whichever_order_things_are_imported(order):
    found = "from transformers import AttentionInterface, AttentionMaskInterface"
    answer = "print('blasst' in AttentionInterface(), 'blasst' in AttentionMaskInterface())"
    assert python(f"{order}; {found}; {answer}") == "True True\n"


def test_a_bidirectional_model_with_a_policy_in_its_configuration():
    config = BertConfig(**ENCODER, blasst_policy={"kind": "bands", "length": 300})
    with torch.no_grad(), pytest.raises(NotSupportedError, match="BertSelfAttention is not causal"):
        make(BertModel, config)(tokens(1, 20))


@torch.no_grad()
def test_encoder_and_decoder_layers_share_their_numbers():
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    with blasst.record() as r:
        make(BartModel, config)(tokens(1, 30), decoder_input_ids=tokens(1, 20))
    assert r.layers("prefill") == [0, 1]
    assert r.tiles("prefill")[:, 0].tolist() == [[3, 3, 2, 2], [2, 2, 2, 2]]
