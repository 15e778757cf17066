"""Prompts of the user's own documents, through to a calibration."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from blasst import calibration
from blasst.calibration import calibrate
from blasst.calibration.setup import lengths_of
from blasst.cli.app import main
from blasst.config import parse
from blasst.hf.reading import read
from blasst.prompts import DocumentMaker, fed_by, read_records
from recency_model import make_recency_model, make_tokenizer
from test_cli import fake_calibrate, saved_model

WORDS = "the quick brown fox jumps over the lazy dog "


def test_prompts_are_documents_one_after_the_other():
    tokenizer = make_tokenizer()
    documents = [WORDS * 3, {"text": WORDS * 2}, {"id": 7, "input_ids": [5] * 90}, torch.arange(9)]
    maker = DocumentMaker(tokenizer, documents, 10**6)
    whole = [tokenizer(WORDS * 3).input_ids, tokenizer(WORDS * 2).input_ids, [5] * 90, [*range(9)]]
    firsts = set()
    for seed in range(20):
        tokens = maker.make("needle", 200, seed).tokens
        assert tokens.shape == (1, 200)
        starts = [
            i
            for i in range(len(whole))
            if tokens[0].tolist() == list(itertools.chain(*whole[i:], *whole[:i]))[:200]
        ]
        assert len(starts) == 1
        firsts |= {*starts}
        assert torch.equal(tokens, maker.make("needle", 200, seed).tokens)
    assert len(firsts) > 1, "another seed, another document"


def test_no_more_is_read_than_is_needed():
    maker = DocumentMaker(make_tokenizer(), ({"text": WORDS} for _ in itertools.count()), 500)
    assert maker.make("words", 400, 1).tokens.shape == (1, 400)


def test_a_conversation_goes_through_the_chat_template():
    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, messages, tokenize):
            assert not tokenize
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

        def __call__(self, text, add_special_tokens=True):
            return SimpleNamespace(input_ids=list(text.encode()))

    messages = [{"role": "user", "content": "hi"}]
    for document in (messages, {"messages": messages}):
        maker = DocumentMaker(Chat(), [document], 10)
        assert bytes(maker.make("needle", 8, 0).tokens[0].tolist()) == b"<user>hi"


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "the prompts hold no document"),
        ([{"body": "x"}], ValueError, "prompt 0 has the keys body; it must have one of text"),
        ([WORDS, 3.5], TypeError, "prompt 1 is a float; it must be a text, tokens"),
        ([[{"role": "user", "content": "x"}]], ValueError, "the model has no chat template"),
        ([WORDS], ValueError, r"have \d+ tokens in all; a prompt of 256 needs more"),
    ],
)
def test_documents_that_are_none(documents, error, message):
    with pytest.raises(error, match=message):
        DocumentMaker(make_tokenizer(), documents, 1000).make("needle", 256, 0)


def test_a_calibration_on_documents():
    model = make_recency_model()
    calibrate(
        model,
        make_tokenizer(),
        documents=[{"text": f"{i} {WORDS * 40}"} for i in range(9)],
        lengths=[512],
        target_sparsity={"prefill": 0.15},
        prompts=2,
        held_out=[],
        schemes=["one_threshold"],
    )
    assert parse(model.config.sparse_attention_config).measured["prefill"].tables
    with pytest.raises(ValueError, match="text and documents are given; prompts are made of one"):
        calibrate(model, make_tokenizer(), documents=[WORDS], text=WORDS, lengths=[512])


def batches(count: int = 4):
    """Texts of two lengths, padded on the left."""
    tokenizer = make_tokenizer()
    for i in range(count):
        rows = [tokenizer(f"{i} {WORDS * n}").input_ids for n in (5, 3)]
        longest = len(rows[0])
        ids = [[0] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        yield rows, torch.tensor(ids), torch.tensor(mask)


def test_what_a_loop_feeds_is_read_without_its_padding():
    model, expected = make_recency_model(), []

    def forward(model):
        for rows, ids, mask in batches():
            model(input_ids=ids, attention_mask=mask)
            expected.extend(rows)

    before = list(model.base_model._forward_pre_hooks)
    assert fed_by(forward, model, 10**6) == expected
    assert list(model.base_model._forward_pre_hooks) == before


@torch.inference_mode()
def test_calls_with_a_cache_go_on_with_their_sequences():
    model = make_recency_model()
    [(rows, ids, mask)] = batches(1)

    def forward(model):
        # Of generate: the prompt, then token by token, the last of which is not read.
        fed = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        answers.extend(fed[:, ids.shape[1] : -1].tolist())
        cache = DynamicCache(config=model.config)
        for part in ids[:1].split(100, 1):
            read(model, part, cache)

    answers = []
    assert fed_by(forward, model, 10**6) == [
        *(row + answer for row, answer in zip(rows, answers, strict=True)),
        ids[0].tolist(),
    ]


def test_a_loop_without_an_end_is_ended():
    rounds = []

    def forward(model):
        for i in itertools.count():
            rounds.append(i)
            model(torch.full((1, 100), 5))

    assert sum(map(len, fed_by(forward, make_recency_model(), 500))) == 500
    assert len(rounds) == 5


def test_a_calibration_on_a_loop_is_that_on_its_documents():
    options = {
        "lengths": [512],
        "target_sparsity": {"prefill": 0.15},
        "prompts": 2,
        "held_out": [],
        "schemes": ["one_threshold"],
    }
    documents = [[*make_tokenizer()(f"{i} {WORDS * 20}").input_ids] for i in range(9)]

    def forward(model):
        for document in documents:
            model(torch.tensor([document]))

    models = [make_recency_model() for _ in range(2)]
    for model, source in zip(models, ({"forward": forward}, {"documents": documents}), strict=True):
        calibrate(model, make_tokenizer(), **source, **options)
    entries = [model.config.sparse_attention_config for model in models]
    assert entries[0] == entries[1]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model: None, "the forward loop does not run the model"),
        (
            lambda model: model(inputs_embeds=torch.zeros(1, 4, 64)),
            "runs the model without input_ids",
        ),
    ],
)
def test_loops_that_feed_no_tokens(forward, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_recency_model(), make_tokenizer(), forward=forward, lengths=[512])


def test_records_of_a_file(tmp_path, monkeypatch, capsys):
    seen = {}

    def calibrate(model, *arguments, **options) -> calibration.Calibration:
        seen.update(options)
        return fake_calibrate(model)

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    folder = saved_model(tmp_path / "model")
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"text": WORDS}) + "\n\n" + json.dumps([1, 2]) + "\n")
    assert main(["calibrate", str(folder), "--text", str(file)]) == 0
    assert (seen["documents"], seen["text"]) == ([{"text": WORDS}, [1, 2]], None)
    file.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2"):
        read_records(file)
    assert main(["calibrate", str(folder), "--text", str(file)]) == 1
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("context", "expected"),
    [(32768, [1024, 2048, 4096]), (2048, [512, 1024, 2048]), (512, [256, 512]), (200, None)],
)
def test_default_lengths_go_to_the_context(context, expected):
    model = make_recency_model(context)
    if expected is None:
        with pytest.raises(ValueError, match="the model's context is 200 tokens"):
            lengths_of(model, None)
    else:
        assert lengths_of(model, None) == expected
