"""Calibration of a small random model, through to what it does at run time."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import blasst
from blasst.calibration import Calibration, calibrate, run, search
from blasst.calibration.curves import UnreachableError
from blasst.config import parse
from blasst.hf.reading import read
from blasst.prompts import (
    PROMPT_KINDS,
    PromptMaker,
    long_enough,
    maker,
    reference_text,
    text_tokens,
)
from recency_model import make_recency_model, make_tokenizer

TARGET = 0.2
LENGTHS = (512, 1024)


@pytest.fixture(scope="module")
def calibrated() -> tuple[LlamaForCausalLM, Calibration]:
    model = make_recency_model()
    found = calibrate(
        model,
        make_tokenizer(),
        lengths=LENGTHS,
        target_sparsity={"prefill": TARGET},
        prompts=2,
        held_out=[896],
        schemes=("one_threshold", "least_error"),
    )
    return model, found


def tokens(length: int, kind: str = "needle", seed: int = 5) -> torch.Tensor:
    return PromptMaker(make_tokenizer(), reference_text(), "text").make(kind, length, seed).tokens


def test_tries_every_order_and_scheme_and_marks_the_one_nearest_to_dense(calibrated):
    candidates = calibrated[1].candidates
    assert {(c.order, c.heads) for c in candidates} == {
        (order, heads)
        for order in ("sink_first", "reverse")
        for heads in ("one_threshold", "least_error")
    }
    [chosen] = [c for c in candidates if c.chosen]
    assert chosen.kl <= 1.5 * min(c.kl for c in candidates), "but for the sparsity reached"
    [policy] = calibrated[1].config.measured["prefill"].tables
    assert (policy.order, policy.heads) == (chosen.order, chosen.heads)


def test_the_last_target_is_the_highest_that_is_reached(calibrated):
    [policy] = calibrated[1].config.measured["prefill"].tables
    assert list(policy.targets) == sorted(policy.targets)
    model = make_recency_model()
    blasst.configure(model, prefill=blasst.Threshold(1.0, order=policy.order))
    with blasst.record() as r, torch.inference_mode():
        for index in range(2):
            model(tokens(LENGTHS[-1], PROMPT_KINDS[index], seed=index))
    assert 0 <= r.sparsity("prefill") - policy.targets[-1] < 0.01


def test_the_model_then_reaches_its_target(calibrated):
    model = calibrated[0]
    with blasst.record() as r, torch.inference_mode():
        for seed in range(5, 11):
            model(tokens(LENGTHS[-1], seed=seed))
    assert r.sparsity("prefill") == pytest.approx(TARGET, abs=0.03)
    [held_out] = calibrated[1].held_out
    assert held_out.achieved == pytest.approx(TARGET, abs=0.08), "one prompt, 105 tiles a head"


def test_where_the_chosen_order_is_too_short_for_the_target_another_stands_in(monkeypatch):
    # Threshold 1 skips 20 % at 512 tokens in sink_first order, 28 % in reverse.
    monkeypatch.setattr(search, "cost", lambda c: (c.order != "sink_first", c.kl))
    model = make_recency_model()
    found = calibrate(
        model,
        make_tokenizer(),
        lengths=LENGTHS,
        target_sparsity={"prefill": 0.25},
        prompts=2,
        held_out=[],
        schemes=("one_threshold", "equal_mass"),
    )
    assert {(c.order, c.chosen, c.below) for c in found.candidates if c.chosen or c.below} == {
        ("sink_first", True, 0),
        ("reverse", False, 1024),
    }
    [policy] = parse(model.config.sparse_attention_config).measured["prefill"].tables
    below = dict(zip(policy.targets, policy.below, strict=True))
    assert below[0.1] == 0, "both lengths reach it"
    assert below[0.25] == 1024
    assert policy.shorter.lengths == LENGTHS
    orders = {n: policy.schedule(0.25).of_call(n).order for n in (512, 1023, 1024, 2048)}
    assert list(orders.values()) == ["reverse", "reverse", "sink_first", "sink_first"]
    for length in LENGTHS:
        with blasst.record() as r, torch.inference_mode():
            for seed in range(5, 9):
                model(tokens(length, seed=seed))
        assert r.sparsity("prefill") == pytest.approx(0.25, abs=0.03), length
    assert found.saturated == []


def test_what_is_saved_runs_the_same_when_loaded(calibrated, tmp_path):
    model = calibrated[0]
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="blasst").eval()
    with torch.inference_mode():
        prompt = tokens(700)
        sparse = loaded(prompt).logits
        torch.testing.assert_close(sparse, model(prompt).logits, rtol=0, atol=0)
        del loaded.config.sparse_attention_config
        assert not torch.equal(sparse, loaded(prompt).logits), "the thresholds did something"


def test_what_is_written_carries_tile_shape_lengths_and_no_phase_that_was_not_asked_for(calibrated):
    entry = json.loads(json.dumps(calibrated[0].config.sparse_attention_config))
    config = parse(entry)
    assert config.measured["prefill"].tile_shape == (64, 64)
    assert config.measured["prefill"].tables[0].lengths == LENGTHS
    assert "decode" not in config.measured


def test_a_kept_calibration_reads_back(calibrated):
    found = calibrated[1]
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()


def test_a_model_that_reads_in_chunks_is_calibrated_so_and_reaches_its_target():
    model = make_recency_model()
    chunk = 256
    calibrate(
        model,
        make_tokenizer(),
        lengths=[1024],
        target_sparsity={"prefill": TARGET},
        prompts=2,
        held_out=[],
        schemes=["one_threshold"],
        chunk=chunk,
    )
    with blasst.record() as r, torch.inference_mode():
        for seed in range(5, 9):
            read(model, tokens(1024, seed=seed), chunk=chunk)
    assert r.sparsity("prefill") == pytest.approx(TARGET, abs=0.04)


def test_decode_is_calibrated_apart_from_prefill():
    model = make_recency_model()
    calibrate(
        model,
        make_tokenizer(),
        lengths=[512],
        target_sparsity={"decode": 0.3},
        prompts=1,
        held_out=[],
        orders=["reverse"],
        schemes=["equal_mass"],
    )
    config = parse(model.config.sparse_attention_config)
    assert set(config.measured) == {"decode"}
    rule = config.rule("LlamaAttention", 0, "decode", [512], 512)
    assert torch.equal(rule.threshold[:, 0::2], rule.threshold[:, 1::2]), "KV heads decide as one"
    assert config.rule("LlamaAttention", 0, "prefill", [512], 512).threshold is None


def test_an_unreachable_target_is_an_error_with_the_highest_reachable():
    with pytest.raises(UnreachableError, match=r"95% of prefill .* threshold 1 skips \d+\.\d%"):
        calibrate(
            make_recency_model(),
            make_tokenizer(),
            lengths=[256],
            target_sparsity={"prefill": 0.95},
            prompts=1,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [2048]}, "2048 tokens; the model's context is 1024"),
        ({"text": "too short", "lengths": [256]}, "the calibration text has"),
        ({"target_sparsity": 1.5}, "target sparsity is 1.5"),
        ({"target_sparsity": 0}, "dense needs no calibration"),
        ({"orders": ["random"]}, "orders are .'random'.; choose from"),
        ({"schemes": []}, "schemes are .."),
    ],
)
def test_bad_input_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_recency_model(), make_tokenizer(), prompts=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": [2048]}, "a held-out prompt is 2048 tokens; the model's context is 1024"),
        ({"held_out": [1000], "text": "word " * 150}, r"text has \d+ tokens; \d+ are needed"),
    ],
)
def test_what_is_held_out_is_checked_before_the_first_pass(options, message, monkeypatch):
    monkeypatch.setattr(run._Calibrating, "_read_densely", None)
    with pytest.raises(ValueError, match=message):
        calibrate(make_recency_model(), make_tokenizer(), lengths=[256], prompts=1, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [512.5]}, TypeError, r"lengths is \[512.5\]; it must be a whole number"),
        ({"lengths": "512"}, TypeError, "lengths is '512'; it must be a whole number"),
        ({"lengths": [0]}, ValueError, r"lengths is \[0\]; it must be at least 1"),
        ({"held_out": ["all"]}, TypeError, r"held_out is \['all'\]; it must be a whole number"),
        ({"prompts": 0}, ValueError, "prompts is 0; it must be at least 1"),
        ({"prompts": [1, 2]}, TypeError, r"prompts is \[1, 2\]; it must be a whole number"),
        ({"swept_prompts": "2"}, TypeError, "swept_prompts is '2'; it must be a whole number"),
        ({"batch": "2"}, TypeError, "batch is '2'; it must be a whole number"),
        ({"batch": [1]}, TypeError, r"batch is \[1\]; it must be a whole number"),
        ({"target_sparsity": "0.5"}, TypeError, "target sparsity is '0.5'; it must be a number"),
        ({"tokenizer": None}, TypeError, "tokenizer is None; prompts are made with the model's"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is a Linear; it must be a model of"),
    ],
)
def test_what_is_of_another_kind_is_an_error_that_names_it(options, error, message):
    given = {"model": make_recency_model(), "tokenizer": make_tokenizer(), "lengths": [256]}
    with pytest.raises(error, match=message):
        calibrate(**given | options)


def test_numbers_come_alone_or_in_arrays_and_a_file_to_resume_from_as_text(tmp_path):
    model, tokenizer = make_recency_model(), make_tokenizer()
    asked = {"prompts": 1, "held_out": [], "schemes": ["one_threshold"]}
    asked |= {"resume": str(tmp_path / "kept")}
    one = calibrate(model, tokenizer, lengths=512, target_sparsity=0.1, **asked)
    lengths, targets = np.array([512]), np.array([0.1])
    other = calibrate(model, tokenizer, lengths=lengths, target_sparsity=targets, **asked)
    assert one.config.to_dict() == other.config.to_dict()


def test_another_attention_is_an_error():
    model = make_recency_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa'"):
        calibrate(model, make_tokenizer(), lengths=[256])


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_a_prompt_has_the_length_and_holds_its_answer(kind):
    tokenizer = make_tokenizer()
    making = PromptMaker(tokenizer, reference_text(), "text")
    prompt = making.make(kind, 2000, seed=1)
    assert prompt.tokens.shape == (1, 2000)
    text = tokenizer.decode(prompt.tokens[0])
    assert prompt.is_answered_by(text)
    assert prompt.question in text
    assert not torch.equal(prompt.tokens, making.make(kind, 2000, seed=2).tokens)
    assert torch.equal(prompt.tokens, making.make(kind, 2000, seed=1).tokens)


def test_lines_that_have_fewer_tokens_together_than_apart_are_enough():
    class Merging:
        """Tokens of one byte, but a run of line ends is one token."""

        chat_template, bos_token = None, None

        def __call__(self, text, add_special_tokens=True):
            texts = [text] if isinstance(text, str) else text
            ids = [list(re.sub("\n+", "\n", t).encode()) for t in texts]
            return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    making = PromptMaker(Merging(), "a\n\n\n\n\nb" * 400, "text")
    assert making.make("needle", 500, seed=1).tokens.shape == (1, 500)


@pytest.mark.parametrize("kind", ["needle", "chain", "pairs", "words"])
def test_built_in_prompts_have_any_length(kind, monkeypatch):
    monkeypatch.setattr(maker, "reference_text", lambda: "the quick brown fox jumps\n" * 40)
    prompt = PromptMaker(make_tokenizer(), None).make(kind, 5000, seed=1)
    assert prompt.tokens.shape == (1, 5000)
    read = make_tokenizer().decode(prompt.tokens[0])
    assert prompt.is_answered_by(read)
    with pytest.raises(ValueError, match=r"my novel has \d+ tokens; \d+ are needed"):
        PromptMaker(make_tokenizer(), "short\n", "my novel").make("needle", 5000, seed=1)


def test_of_several_texts_those_are_taken_that_are_long_enough():
    texts = {"short": "a" * 99, "just": "b" * 100, "long": "c" * 500}
    assert [*long_enough(make_tokenizer(), texts, 100)] == ["just", "long"]
    with pytest.raises(ValueError, match="the longest text here has 500 tokens; 501 are needed"):
        long_enough(make_tokenizer(), texts, 501)


def test_a_text_too_short_is_an_error():
    with pytest.raises(ValueError, match="novel has 5 tokens; 100 are needed"):
        text_tokens(make_tokenizer(), "short", 100, "novel")
