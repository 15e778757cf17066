"""The vLLM backend's parts that need no vLLM; engines are in tests/vllm."""

from collections import Counter

import pytest
import torch

from blasst.config import PHASES, parse
from blasst.errors import NotSupportedError
from blasst.integrations import vllm
from blasst.integrations.vllm import statistics as module
from blasst.integrations.vllm.limits import check_layer, most_positions
from blasst.integrations.vllm.options import (
    REQUESTS,
    Options,
    options_of,
    passes_requests_on,
    thresholds_of_request,
)
from blasst.integrations.vllm.statistics import Statistics, summary
from blasst.integrations.vllm.thresholds import (
    Layer,
    PhaseThresholds,
    Share,
    thresholds_of,
)

CPU = torch.device("cpu")
LAYERS = [Layer(f"model.layers.{i}.self_attn.attn", heads=4, head_dim=64) for i in range(3)]
ENTRY = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "ignore": ["model.layers.1.self_attn"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 100.0, "b": 0.0},
                "decode": {"a": 50.0, "b": 0.0},
            },
            "target_sparsity": {"prefill": 0.5, "decode": 0},
        }
    }
}


def decided(found, lengths, own=None, by_request=False):
    phase = PhaseThresholds(
        found.source, found.rows, max_requests=8, by_request=by_request, device=CPU
    )
    lengths = torch.tensor(lengths, dtype=torch.int32)
    longest = int(lengths.max())
    return phase.decide(lengths, longest, longest, own)


def found_in(phase, options, calibration=None, share=None, layers=LAYERS):
    share = share or Share()
    return thresholds_of(
        phase, layers, options, calibration, share, device=CPU, dtype=torch.float32
    )


@pytest.mark.parametrize("found", ["0.25.1", "0.34.0", "0.34.0rc1", "1.0"])
def test_other_versions_are_refused(monkeypatch, found):
    monkeypatch.setattr(vllm, "version", lambda name: found)
    sentence = vllm.refusal()
    assert sentence == f"vllm {found} is installed; blasst serves vllm 0.26 to before 0.34"


@pytest.mark.parametrize("found", ["0.26.0", "0.26.0rc2", "0.33.1", "0.32.0+cpu"])
def test_known_versions(monkeypatch, found):
    monkeypatch.setattr(vllm, "version", lambda name: found)
    assert not vllm.refusal()


def test_options():
    given = {"prefill": {"threshold": [0.1, 0.2]}, "decode": {"target_sparsity": 0.5}}
    options = options_of({"blasst": {**given, "statistics": True}, "another": 1})
    assert options.thresholds["prefill"].threshold == (0.1, 0.2)
    assert options.target_sparsity == {"decode": 0.5}
    assert options.statistics
    assert options_of({}) == options_of(None) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefil": {}}, "blasst has 'prefil'; known keys: prefill, decode, statistics"),
        ({"prefill": {"treshold": 1}}, "blasst.prefill has 'treshold'"),
        ({"prefill": {"threshold": 1.5}}, r"blasst.prefill: threshold is 1.5; it must be a number"),
        (
            {"prefill": {"threshold": [[0.1], [0.2]]}},
            r"\[\[0.1\], \[0.2\]\]; it must be a number or",
        ),
        ({"prefill": {"threshold": 0.1, "target_sparsity": 0.5}}, "and threshold; a target takes"),
        ({"decode": {"target_sparsity": 2}}, "target sparsity of decode is 2"),
        ({"statistics": "yes"}, "blasst.statistics is 'yes'; it must be true or false"),
        ({"prefill": 0.1}, "blasst.prefill is 0.1; it must be an object"),
        (0.1, "blasst is 0.1; it must be an object"),
    ],
)
def test_options_that_are_wrong(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        options_of({"blasst": given})


def test_thresholds_of_a_request():
    assert thresholds_of_request(None) == thresholds_of_request({"another": 1}) == {}
    assert thresholds_of_request({"blasst_decode_threshold": 1, "x": "y"}) == {"decode": 1}
    for wrong in (-0.1, 1.1, "0.5", True, None, float("nan"), [0.5]):
        with pytest.raises(ValueError, match="it must be a number from 0"):
            thresholds_of_request({"blasst_prefill_threshold": wrong})
    with pytest.raises(ValueError, match="'blasst_threshold'; of blasst it may have"):
        thresholds_of_request({"blasst_threshold": 0.5})


def test_engines_that_hear_of_their_requests():
    assert passes_requests_on(["a:B", REQUESTS])
    assert not any(passes_requests_on(processors) for processors in (None, [], ["a:B"], [int]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 20}, "head size 20; it must be a multiple of 8"),
        ({"head_size": 80, "on_cpu": False}, "head size 80; it must be 64, 96, 128 or 256"),
        ({"head_size": 584}, "head size 584; it must be a multiple of 8 from 16 to 576"),
        ({"attn_type": "encoder_only"}, "a layer of encoder_only attention"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a cache of fp8_e5m2; --kv-cache-dtype must be one of"),
        ({"kv_cache_dtype": "fp8", "on_cpu": False}, "a cache of fp8 with head size 64; on a GPU"),
        ({"others": {"chunk_lookback": 4}}, "a layer with chunk_lookback"),
    ],
)
def test_layers_that_are_refused(changes, message):
    layer = {
        "on_cpu": True,
        "head_size": 64,
        "attn_type": "decoder",
        "alibi_slopes": None,
        "kv_cache_dtype": "auto",
        "others": {"chunk_lookback": -1, "use_alibi_sqrt": False},
    }
    check_layer(**layer)
    check_layer(**{**layer, "kv_cache_dtype": "fp8"})
    with pytest.raises(NotSupportedError, match=message):
        check_layer(**layer | changes)


def test_positions_of_a_decode_step():
    assert most_positions(64, on_cpu=True) == 16
    assert [most_positions(group, on_cpu=False) for group in (1, 4, 8, 64, 128)] == [
        16,
        16,
        8,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("phase", "head_dim", "message"),
    [("decode", 128, "in decode, which has none"), ("prefill", 96, "scores is int8")],
)
def test_scores_in_int8_that_the_device_does_not_have(phase, head_dim, message):
    options = options_of({"blasst": {phase: {"threshold": 0.1, "scores": "int8"}}})
    rest = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    with pytest.raises(NotSupportedError, match=message):
        thresholds_of(phase, [Layer(LAYERS[0].name, 4, head_dim)], options, None, Share(), **rest)
    if phase == "prefill":
        layers = [Layer(LAYERS[0].name, 4, 128)]
        found = thresholds_of(phase, layers, options, None, Share(), **rest)
        assert found.scores == {LAYERS[0].name: "int8"}


def test_a_list_by_head_is_shared_out():
    options = options_of({"blasst": {"prefill": {"threshold": [0.0, 0.1, 0.2, 0.3] * 2}}})
    found = found_in("prefill", options, share=Share(rank=1, size=2))
    rule = decided(found, [100, 200]).of_layer(LAYERS[2].name, 4)
    assert rule["test"] == "relative"
    assert rule["thresholds"].shape == (1, 4, 1)
    assert rule["thresholds"].flatten().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"thresholds for 8 heads; .*layers\.0.* has 4: give one"):
        found_in("prefill", options)


def test_a_scale_factor_is_divided_by_each_length():
    options = options_of({"blasst": {"decode": {"threshold_scale_factor": 50}}})
    rule = decided(found_in("decode", options), [100, 25]).of_layer(LAYERS[0].name, 4)
    assert rule["thresholds"][:, 0, 0].tolist() == [0.5, 1.0]


def test_scores_in_int8():
    options = options_of({"blasst": {p: {"threshold": 0.1, "scores": "int8"} for p in PHASES}})
    assert set(found_in("prefill", options).scores.values()) == {"int8"}
    with pytest.raises(NotSupportedError, match="int8 are asked for in decode"):
        found_in("decode", options)


def test_a_calibration_and_what_it_leaves_out():
    calibration = parse(ENTRY)
    found = found_in("prefill", Options(), calibration)
    decision = decided(found, [200, 400])
    assert decision.order == "forward"
    for layer in (LAYERS[0], LAYERS[2]):
        thresholds = decision.of_layer(layer.name, 4)["thresholds"]
        torch.testing.assert_close(thresholds[..., 0], torch.tensor([[0.5] * 4, [0.25] * 4]))
    assert decision.of_layer(LAYERS[1].name, 4)["test"] == "none"
    dense = decided(found_in("decode", Options(), calibration), [200])
    assert dense.of_layer(LAYERS[0].name, 4)["test"] == "none"


def test_a_request_asks_for_its_own():
    own = torch.tensor([float("nan"), 0.75])
    calibration = parse(ENTRY)
    decision = decided(found_in("prefill", Options(), calibration), [200, 400], own, True)
    thresholds = decision.of_layer(LAYERS[0].name, 4)["thresholds"]
    assert thresholds[:, 0, 0].tolist() == pytest.approx([0.5, 0.75])
    assert decision.of_layer(LAYERS[1].name, 4)["test"] == "none"  # stays what `ignore` says
    decode = decided(found_in("decode", Options(), calibration), [200, 400], own, True)
    assert decode.of_layer(LAYERS[0].name, 1)["thresholds"].flatten().tolist() == [0.0, 0.75]
    absolute = options_of({"blasst": {"prefill": {"absolute_threshold": -3.0}}})
    found = found_in("prefill", absolute)
    assert decided(found, [9]).of_layer(LAYERS[0].name, 4)["test"] == "absolute"
    with pytest.raises(ValueError, match="absolute_threshold and --logits-processors"):
        decided(found, [9], own, True)


def test_thresholds_stay_where_they_are():
    """A captured graph reads them there."""
    found = found_in("prefill", Options(), parse(ENTRY))
    phase = PhaseThresholds(found.source, found.rows, max_requests=8, by_request=True, device=CPU)
    places = {
        phase.decide(torch.tensor([length] * 3), length, length, None).thresholds.data_ptr()
        for length in (10, 5000)
    }
    assert len(places) == 1


def test_statistics_in_words():
    counts = torch.tensor([[100, 10], [100, 90]])
    assert summary(counts, ["a", "b"]) == "50.0% of 200 tiles skipped, from 10.0% (a) to 90.0% (b)"


def test_statistics_add_up(caplog, monkeypatch):
    counted = Counter()

    class Counting:
        def __init__(self, name):
            self.name = name

        def labels(self, phase, layer):
            self.key = self.name, phase, layer
            return self

        def inc(self, number):
            counted[self.key] += number

    monkeypatch.setattr(module, "_counters", lambda: (Counting("visitable"), Counting("skipped")))
    caplog.set_level("INFO")
    statistics = Statistics(["a", "b"], CPU, interval=0.0)
    tiles = torch.tensor([[[6, 4], [5, 5]], [[1, 0], [2, 2]]])
    statistics.add("prefill", "b", tiles)
    statistics.add("prefill", "b", tiles)
    statistics.tell()
    statistics.tell()
    assert caplog.text.count("blasst: prefill: 25.0% of 40 tiles skipped") == 1
    assert +counted == {("visitable", "prefill", "b"): 40, ("skipped", "prefill", "b"): 10}
