"""The error bound of rows: recorded, summed up and shown by an evaluation."""

import pytest
import torch

import blasst
from blasst.errors import NotSupportedError
from blasst.evaluation.bounds import LIMITS, RowBounds
from blasst.hf import DENSE, recording_with
from blasst.ops.attention import Result, TileCounts
from recency_model import make_loaded


def call(bounds: torch.Tensor) -> Result:
    """What a layer of one text reports, with these [heads, rows] bounds."""
    counts = torch.zeros(2, 1, len(bounds), dtype=torch.int64)
    return Result(None, None, TileCounts(*counts), bounds[None], None, None, None)


def test_shares_and_means_are_those_of_the_whole_text_though_chunks_differ_in_length():
    torch.manual_seed(0)
    layers = torch.rand(2, 4, 100) ** 4
    recording = RowBounds([0, 1])
    for first, last in ((0, 64), (64, 100)):
        for layer, bounds in enumerate(layers):
            recording.add("prefill", layer, call(bounds[:, first:last]), None)
    assert recording.below() == pytest.approx([(layers < x).double().mean().item() for x in LIMITS])
    assert torch.allclose(recording.by_token(), layers.mean((0, 1)))


def test_layers_of_no_interest_and_decode_are_left_out():
    recording = RowBounds([1])
    recording.add("prefill", 0, call(torch.ones(4, 10)), None)
    recording.add("prefill", 1, call(torch.zeros(4, 10)), None)
    recording.add("decode", 1, call(torch.ones(4, 1)), None)
    assert recording.below() == [1.0, 1.0, 1.0]
    assert recording.by_token().tolist() == [0.0] * 10


def test_the_largest_come_first_with_the_text_up_to_them():
    loaded = make_loaded()
    tokens = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids[0]
    bounds = torch.linspace(0, 0.5, len(tokens)).repeat(4, 1)
    bounds[:, 3] = 0.9
    recording = RowBounds([0])
    recording.add("prefill", 0, call(bounds), None)
    first, second, *_ = recording.summary(tokens, loaded.tokenizer)["worst"]
    assert (first["token"], first["text"], first["bound"]) == (3, "Once", pytest.approx(0.9))
    assert (second["token"], second["text"]) == (15, "pon a time"[1:])


def test_a_model_that_skips_more_has_fewer_rows_with_a_small_bound():
    loaded = make_loaded()
    tokens = torch.randint(1, 257, (1, 700), generator=torch.Generator().manual_seed(0))
    shares = []
    for threshold in (None, 1e-6, 1e-2):
        recording = RowBounds([0, 1])
        asked = blasst.Threshold(threshold) if threshold else DENSE
        blasst.configure(loaded.model, prefill=asked)
        with torch.no_grad(), recording_with(recording):
            loaded.model(tokens)
        shares.append(recording.below())
        assert recording.by_token().shape == (700,)
    dense, few, many = shares
    assert dense == [1.0, 1.0, 1.0]
    assert recording.sparsity("prefill") > 0
    assert many[0] < few[0]


def test_a_process_that_has_only_some_of_the_heads_is_refused():
    with pytest.raises(NotSupportedError, match="tensor-parallel"):
        RowBounds([0]).add("prefill", 0, call(torch.zeros(4, 10)), object())
