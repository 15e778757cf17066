"""`sparse_attention_config`: reading, writing, thresholds by phase, layer, head and length."""

import copy
import json
import logging
import math
import sys
import threading
from dataclasses import replace

import pytest
import torch

from blasst import config
from blasst.config import Law, Measured, SparseAttention, ThresholdTable, parse, thresholds_for
from blasst.config.laws import Schedule

# As Model-Optimizer documents its export.
ECOSYSTEM = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 7.93, "b": 8.61},
                "decode": {"a": 0.12, "b": 9.85},
            },
            "target_sparsity": {"prefill": 0.5},
        }
    },
    "producer": {"name": "modelopt", "version": "0.47.0"},
}


def measured_config() -> SparseAttention:
    # [2 lengths, 2 targets, 2 layers, 3 heads]
    table = -torch.arange(1.0, 25.0).reshape(2, 2, 2, 3) / 10
    policy = ThresholdTable(
        "reverse", "equal_mass", Law(3.0, 2.0, 2.0), (1024, 4096), (0.4, 0.6), table
    )
    return SparseAttention(
        targets=("LlamaAttention",),
        laws={"prefill": Law(7.93, 8.61)},
        target_sparsity={"prefill": 0.5},
        measured={"prefill": Measured((64, 64), (policy,))},
    )


def as_read(parsed: SparseAttention) -> dict:
    """As it stands in a config.json, where everything can be edited."""
    return json.loads(json.dumps(parsed.to_dict()))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"phase": "prefil"}, ValueError, "phase is 'prefil'; it must be one of"),
        ({"layer": -1}, ValueError, "layer is -1; it must be 0 or more"),
        ({"layer": "0"}, TypeError, "layer is '0'; it must be a whole number"),
        ({"lengths": []}, ValueError, "lengths is empty; it must be the keys of each request"),
        ({"lengths": [4096, -5]}, ValueError, "a length is -5; it must be 0 or more"),
        ({"lengths": [math.nan]}, TypeError, "a length is nan; it must be a whole number"),
        ({"entry": None}, TypeError, "sparse_attention_config is None"),
        ({"entry": 3}, TypeError, "sparse_attention_config is 3"),
    ],
)
def test_what_no_call_can_be_is_named(changed, error, message):
    call = {"entry": ECOSYSTEM, "layer": 0, "phase": "prefill", "lengths": [4096]} | changed
    with pytest.raises(error, match=message):
        thresholds_for(attention_class="LlamaAttention", **call)


def test_ecosystem_law_divides_by_each_requests_length():
    rule = thresholds_for(ECOSYSTEM, "LlamaAttention", 3, "prefill", [8192, 65536])
    a = 7.93 * math.exp(8.61 * 0.5)
    assert rule.order == "forward"
    torch.testing.assert_close(rule.threshold, torch.tensor([[a / 8192], [a / 65536]]))


def test_threshold_never_exceeds_one():
    rule = thresholds_for(ECOSYSTEM, "LlamaAttention", 0, "prefill", [64])
    assert rule.threshold.tolist() == [[1.0]]


def test_phase_without_target_takes_the_ecosystems_default():
    assert parse(ECOSYSTEM).target_sparsity == {"prefill": 0.5, "decode": 0.5}


def test_target_zero_and_ignored_layers_are_dense():
    entry = copy.deepcopy(ECOSYSTEM)
    group = entry["config_groups"]["group_0"]
    group["ignore"] = ["model.layers.2.self_attn"]
    group["target_sparsity"]["decode"] = 0
    assert thresholds_for(entry, "LlamaAttention", 0, "decode", [4096]).threshold is None
    assert thresholds_for(entry, "LlamaAttention", 2, "prefill", [4096]).threshold is None
    assert thresholds_for(entry, "LlamaAttention", 1, "prefill", [4096]).threshold is not None


def test_a_target_changed_in_place_is_honoured():
    entry = copy.deepcopy(ECOSYSTEM)
    before = thresholds_for(entry, "LlamaAttention", 0, "prefill", [8192]).threshold
    entry["config_groups"]["group_0"]["target_sparsity"]["prefill"] = 0.3
    after = thresholds_for(entry, "LlamaAttention", 0, "prefill", [8192]).threshold
    assert after.item() == pytest.approx(before.item() * math.exp(-0.2 * 8.61))


def test_names_match_modules_and_not_numbers():
    entry = copy.deepcopy(ECOSYSTEM)
    entry["config_groups"]["group_0"]["ignore"] = ["model.visual.blocks.0.attn"]
    for layer in (0, 1):
        rule = thresholds_for(entry, "LlamaAttention", layer, "prefill", [4096])
        assert rule.threshold is not None
    name = "model.visual.blocks.0.attn"
    rule = thresholds_for(entry, "LlamaAttention", 0, "prefill", [4096], name=name)
    assert rule.threshold is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_type_and_device_change_no_threshold(dtype):
    entries = [ECOSYSTEM, measured_config().to_dict()]
    rules = []
    for _ in range(2):
        rules += [thresholds_for(copy.deepcopy(e), "LlamaAttention", 1, "prefill", [65536, 999])
                  for e in entries]  # fmt: skip
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for before, after in zip(rules[:2], rules[2:], strict=True):
        assert torch.equal(before.threshold, after.threshold)


def test_threads_never_see_each_others_thresholds():
    lengths = (20000, 40000)
    found = {}
    expected = {
        n: thresholds_for(ECOSYSTEM, "LlamaAttention", 0, "prefill", [n]).threshold for n in lengths
    }

    def look(n: int) -> None:
        found[n] = all(
            torch.equal(
                thresholds_for(ECOSYSTEM, "LlamaAttention", 0, "prefill", [n]).threshold,
                expected[n],
            )
            for _ in range(1500)
        )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=look, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == dict.fromkeys(lengths, True)


@pytest.mark.parametrize("edit", ["threshold", "lengths", "order"])
def test_a_table_edited_in_place_is_honoured(edit):
    entry = as_read(measured_config().with_targets(prefill=0.6))
    policy = entry["blasst"]["prefill"]["policies"][0]
    before = thresholds_for(entry, "LlamaAttention", 1, "prefill", [4096])
    if edit == "threshold":
        policy["ln_threshold"][1][1][1][2] = -7.0
    elif edit == "lengths":
        policy["lengths"][1] = 2048
    else:
        policy["order"] = "forward"
    after = thresholds_for(entry, "LlamaAttention", 1, "prefill", [4096])
    if edit == "threshold":
        assert after.threshold[0, 2].log().item() == pytest.approx(-7)
    assert after.order == ("forward" if edit == "order" else "reverse")
    assert torch.equal(before.threshold, after.threshold) == (edit == "order")


def test_layers_may_differ_in_their_number_of_heads():
    entry = as_read(measured_config())
    table = entry["blasst"]["prefill"]["policies"][0]["ln_threshold"]
    for by_target in table:
        for layers in by_target:
            layers[0].pop()
    parsed = parse(entry)
    assert as_read(parsed) == entry
    for layer, heads in ((0, 2), (1, 3)):
        rule = thresholds_for(entry, "LlamaAttention", layer, "prefill", [1024, 2000])
        assert rule.threshold.shape == (2, heads)
        schedule = parsed.schedule("LlamaAttention", layer, "prefill")
        assert schedule.ln_threshold.shape == (2, 1, heads)
    table[0][0][0].pop()
    with pytest.raises(ValueError, match="the same number of heads, at least one, everywhere"):
        parse(entry)


def test_class_outside_targets_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="targets LlamaAttention; layer 0 is a GemmaAttention"):
        thresholds_for(ECOSYSTEM, "GemmaAttention", 0, "prefill", [4096])


def test_measured_table_is_used_at_its_points_and_interpolated_between_them():
    parsed = measured_config()
    table = parsed.measured["prefill"].tables[0].ln_threshold

    def ln(target: float, length: int) -> torch.Tensor:
        entry = parsed.with_targets(prefill=target).to_dict()
        rule = thresholds_for(entry, "LlamaAttention", 1, "prefill", [length])
        assert rule.order == "reverse"
        return rule.threshold[0].log()

    torch.testing.assert_close(ln(0.6, 4096), table[1, 1, 1])
    torch.testing.assert_close(ln(0.5, 1024), table[0, :, 1].mean(0))
    torch.testing.assert_close(ln(0.4, 2048), table[:, 0, 1].mean(0))


def with_shorter() -> SparseAttention:
    """0.4 is reached in reverse order from 2048 keys on, 0.6 from 4096."""
    parsed = measured_config()
    [policy] = parsed.measured["prefill"].tables
    other = replace(policy, order="sink_first", ln_threshold=policy.ln_threshold / 2)
    policy = replace(policy, below=(2048, 4096), shorter=other)
    return replace(parsed, measured={"prefill": Measured((64, 64), (policy,))})


@pytest.mark.parametrize(
    ("target", "keys", "order"),
    [
        (0.4, 2047, "sink_first"),
        (0.4, 2048, "reverse"),
        (0.5, 2048, "sink_first"),
        (0.6, 4095, "sink_first"),
        (0.6, 4096, "reverse"),
        (0.7, 4095, "sink_first"),
    ],
)
def test_below_the_first_length_that_reaches_the_target_another_order_stands_in(
    target, keys, order
):
    entry = json.loads(json.dumps(with_shorter().with_targets(prefill=target).to_dict()))
    rule = thresholds_for(entry, "LlamaAttention", 1, "prefill", [keys])
    assert rule.order == order
    alone = measured_config().with_targets(prefill=target).to_dict()
    expected = thresholds_for(alone, "LlamaAttention", 1, "prefill", [keys]).threshold.log()
    share = 0.5 if order == "sink_first" else 1
    torch.testing.assert_close(rule.threshold.log(), expected * share)


def test_a_call_has_one_order_that_of_the_keys_it_has_room_for():
    entry = with_shorter().with_targets(prefill=0.6).to_dict()
    alone = measured_config().with_targets(prefill=0.6).to_dict()
    for lengths, keys in (([1500, 4096], None), ([1500], 4096)):
        rule = thresholds_for(entry, "LlamaAttention", 0, "prefill", lengths, keys)
        expected = thresholds_for(alone, "LlamaAttention", 0, "prefill", lengths)
        assert rule.order == "reverse"
        torch.testing.assert_close(rule.threshold, expected.threshold)


def test_beyond_the_table_thresholds_fall_with_a_power_between_the_laws_and_one(caplog):
    entry = measured_config().with_targets(prefill=0.4).to_dict()
    with caplog.at_level(logging.WARNING, "blasst"):
        edge, beyond, _ = thresholds_for(
            entry, "LlamaAttention", 0, "prefill", [4096, 8192, 16384]
        ).threshold
        parse(entry).tell("prefill", (64, 64), lambda: [4096, 8192, 16384])
    torch.testing.assert_close(beyond, edge / 2**1.5)  # the law's power is 2
    assert "16384 keys are 4.00x the longest calibrated length" in caplog.text
    assert len(caplog.records) == 1, "the longest, once"


def test_other_tiles_at_run_time_are_said_once_with_both_shapes(caplog):
    with caplog.at_level(logging.WARNING, "blasst"):
        for parsed in (measured_config(), parse(ECOSYSTEM)):
            for _ in range(2):
                parsed.tell("prefill", (64, 64), lambda: [])
                parsed.tell("decode", (3, 64), lambda: [])
    decode, prefill, again = [record.getMessage() for record in caplog.records]
    assert "tiles of 128 x 128, the kernel's are 64 x 64; expect more" in prefill
    assert "tiles of 128 keys, the kernel's are 64 keys; expect more" in decode
    assert decode == again, "neither has decode of its own"


def test_what_a_run_differs_by_is_said_once_at_whatever_target(caplog):
    config = measured_config()
    with caplog.at_level(logging.WARNING, "blasst"):
        for target in (0.5, 0.95, 0.6, 0.95):
            at = config.at_targets({"prefill": target})
            at.tell("prefill", (64, 128), lambda: [10**6])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "tiles of 64 x 64" in said[0]
    assert "1000000 keys" in said[1]
    assert "target sparsity 0.95 is outside the calibrated" in said[2]


@pytest.mark.parametrize("lengths", [(64,), (1024, 4096), (512, 1024, 8192)])
def test_a_length_that_the_host_knows_has_the_thresholds_of_one_on_the_device(lengths):
    generator = torch.Generator().manual_seed(3)
    ln = -9 * torch.rand(len(lengths), 3, 4, generator=generator)
    schedule = Schedule("reverse", lengths, torch.tensor(lengths).double().log(), ln, 0.8)
    keys = [0, 1, 63, 64, 65, 511, 512, 1024, 3000, 4096, 8192, 100_000]
    found = torch.cat([schedule.at(n) for n in keys])
    torch.testing.assert_close(found, schedule.at(torch.tensor(keys)), rtol=1e-6, atol=0)


def test_of_several_tile_shapes_a_run_takes_its_own_without_a_word(caplog):
    [first] = measured_config().measured["prefill"].tables
    law = Law(5.0, 6.0)
    others = (
        Measured((64, 128), (replace(first, ln_threshold=first.ln_threshold * 2),)),
        Measured((128, 128), (), law=law),
    )
    measured = Measured((64, 64), (first,), others=others)
    config = parse(as_read(replace(measured_config(), measured={"prefill": measured})))
    lengths = torch.tensor([4096])

    def ln(tile: tuple[int, int] | None) -> torch.Tensor:
        return config.rules("prefill", lengths, 4096, tile).of_layer(1).log()

    with caplog.at_level(logging.WARNING, "blasst"):
        for tile in ((64, 64), (64, 128), (128, 128)):
            config.tell("prefill", tile, lengths.tolist)
    assert not caplog.records
    torch.testing.assert_close(ln((64, 128)), 2 * ln((64, 64)))
    assert torch.equal(ln(None), ln((64, 64)))
    assert torch.equal(ln((64, 144)), ln((64, 128))), "the nearest in size"
    assert ln((128, 128)).item() == pytest.approx(law.ln_threshold(0.5, 4096))


def test_the_law_alone_keeps_the_tiles_that_it_was_fitted_on(caplog):
    law = parse(json.loads(json.dumps(measured_config().under_the_law().to_dict())))
    assert law.on("prefill").tile_shape == (64, 64)
    rule = law.rule("LlamaAttention", 0, "prefill", [8192], 8192)
    expected = thresholds_for(ECOSYSTEM, "LlamaAttention", 0, "prefill", [8192])
    assert rule.order == "forward"
    torch.testing.assert_close(rule.threshold, expected.threshold)
    with caplog.at_level(logging.WARNING, "blasst"):
        law.tell("prefill", (64, 64), lambda: [8192])
    assert not caplog.records


def test_neither_table_nor_law_is_an_error():
    entry = as_read(measured_config())
    entry["blasst"]["prefill"]["policies"] = []
    del entry["config_groups"]["group_0"]["threshold_scale_factor"]["prefill"]
    with pytest.raises(ValueError, match=r"prefill.policies is empty .* has no prefill"):
        parse(entry)


def test_above_threshold_one_a_table_serves_interpolation_only():
    entry = as_read(measured_config())
    table = entry["blasst"]["prefill"]["policies"][0]["ln_threshold"]
    table[0] = [[[2.0] * 3] * 2] * 2
    table[1] = [[[-4.0] * 3] * 2] * 2
    rule = thresholds_for(entry, "LlamaAttention", 0, "prefill", [1024, 2048])
    torch.testing.assert_close(rule.threshold, torch.tensor([[1.0], [math.exp(-1)]]).expand(2, 3))


@pytest.mark.parametrize("make", [measured_config, with_shorter])
def test_round_trip_through_json(make):
    parsed = make()
    again = parse(json.loads(json.dumps(parsed.to_dict())))
    assert again == parsed
    torch.testing.assert_close(
        again.measured["prefill"].tables[0].ln_threshold,
        parsed.measured["prefill"].tables[0].ln_threshold,
    )
    assert again.to_dict() == parsed.to_dict()


GROUP = ("config_groups", "group_0")
POLICY = ("blasst", "prefill", "policies", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extra",), 1, "unknown key 'extra'; known keys: blasst, config_groups, producer"),
        ((*GROUP, "speed"), 2, "group_0: unknown key 'speed'"),
        ((*GROUP, "algorithm"), "vsa", "group_0.algorithm is 'vsa'; it must be 'skip_softmax'"),
        (("config_groups", "group_1"), {}, "config_groups: 2 groups; blasst reads one"),
        (
            (*GROUP, "threshold_scale_factor", "formula"),
            "a + b",
            "formula is 'a [+] b'; it must be 'a [*] exp",
        ),
        (
            (*GROUP, "threshold_scale_factor", "prefill", "a"),
            -1,
            "a is -1; it must be greater than or equal to 0",
        ),
        (
            (*GROUP, "threshold_scale_factor", "prefill", "b"),
            "x",
            "b is 'x'; it must be a valid number",
        ),
        ((*GROUP, "threshold_scale_factor", "train"), {}, "unknown key 'train'"),
        (
            (*GROUP, "target_sparsity", "prefill"),
            1.5,
            "prefill is 1.5; it must be less than or equal to 1",
        ),
        ((*GROUP, "ignore"), "lm_head", "ignore is 'lm_head'; it must be a valid list"),
        (("blasst", "version"), 9, "version is 9; it must be 1 or 2"),
        ((*POLICY, "order"), "random", "order is 'random'; it must be 'sink_first', 'reverse'"),
        ((*POLICY, "lengths"), [4096, 1024], "it must ascend"),
        (
            (*POLICY, "ln_threshold"),
            [[[[0.5]]]],
            "is 1 x 1 layers x heads; it must be 2 lengths x 2",
        ),
        ((*POLICY, "law", "formula"), "?", "law.formula is '[?]'"),
        (POLICY[:3], {}, "policies is {}; it must be a valid list"),
        ((*POLICY, "longer"), {}, "unknown key 'longer'; known keys: .*shorter"),
        ((*POLICY, "shorter", "below"), [2048], "it must be 2 numbers of keys, one a target"),
        ((*POLICY, "shorter", "below"), [1.5, 2], "below.0. is 1.5; it must be a valid integer"),
        ((*POLICY, "shorter", "from"), 1, "shorter: unknown key 'from'"),
        ((*POLICY, "shorter", "policy", "shorter"), {}, "policy: unknown key 'shorter'"),
        ((*POLICY, "shorter", "policy", "target_sparsity"), [0.1, 0.6], "it must be that of"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(path, value, message):
    entry = as_read(with_shorter())
    place = entry
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        parse(entry)


@pytest.mark.parametrize("table", [[], [[]], [1, 2], [[1]], [{}], [[[[-1.0]]], [[]]]])
def test_a_call_says_of_a_table_that_is_none_what_reading_says(table):
    entry = as_read(measured_config())
    entry["blasst"]["prefill"]["policies"][0]["ln_threshold"] = table
    with pytest.raises(ValueError, match="ln_threshold") as said:
        parse(entry)
    with pytest.raises(ValueError, match="ln_threshold") as found:
        thresholds_for(entry, "LlamaAttention", 0, "prefill", [1024])
    assert str(found.value) == str(said.value)


@pytest.mark.parametrize(
    ("value", "message"), [(8.5, "a value above 8: 8.5"), (math.nan, "is nan; it must be a finite")]
)
def test_a_table_far_above_one_or_with_nan_is_an_error(value, message):
    entry = as_read(measured_config())
    entry["blasst"]["prefill"]["policies"][0]["ln_threshold"][1][0][0][2] = value
    with pytest.raises(ValueError, match=message):
        parse(entry)


@pytest.mark.parametrize("missing", ["targets", "threshold_scale_factor", "algorithm"])
def test_a_missing_key_is_an_error_that_names_it(missing):
    entry = copy.deepcopy(ECOSYSTEM)
    del entry["config_groups"]["group_0"][missing]
    with pytest.raises(ValueError, match=f"lacks '{missing}'"):
        parse(entry)


def test_no_object_is_an_error():
    with pytest.raises(TypeError, match=r"is \[\]; it must be an object"):
        config.parse([])


def test_scores_travel_by_phase_and_are_written_where_they_are_not_exact():
    exact = measured_config()
    int8 = exact.with_scores(prefill="int8")
    assert "scores" not in exact.to_dict()["blasst"]["prefill"], "what older readers know"
    assert int8.to_dict()["blasst"]["prefill"]["scores"] == "int8"
    assert parse(int8.to_dict()).measured["prefill"].scores == "int8"
    assert parse(int8.with_scores(prefill="exact").to_dict()) == parse(exact.to_dict())
    for target in (0.5, 0.0):  # dense passes too
        entry = int8.with_targets(prefill=target).to_dict()
        rule = thresholds_for(entry, "LlamaAttention", 0, "prefill", [2048])
        assert (rule.scores, rule.threshold is None) == ("int8", target == 0)
    ignoring = replace(int8, ignore=("model.layers.1.self_attn",)).to_dict()
    assert thresholds_for(ignoring, "LlamaAttention", 1, "prefill", [2048]).scores == "exact"
    assert thresholds_for(exact.to_dict(), "LlamaAttention", 0, "prefill", [9]).scores == "exact"


def test_the_ecosystems_law_can_have_int8_scores():
    law = parse(ECOSYSTEM)
    entry = law.with_scores(prefill="int8").to_dict()
    before = thresholds_for(ECOSYSTEM, "LlamaAttention", 0, "prefill", [8192])
    assert thresholds_for(entry, "LlamaAttention", 0, "prefill", [8192]) == before._replace(
        scores="int8"
    )
    assert thresholds_for(entry, "LlamaAttention", 0, "decode", [8192]).scores == "exact"
    with pytest.raises(ValueError, match="has no decode"):
        measured_config().with_scores(decode="int8")


def test_unknown_scores_are_named():
    entry = measured_config().to_dict()
    entry["blasst"]["prefill"]["scores"] = "int4"
    with pytest.raises(
        ValueError, match=r"prefill\.scores is 'int4'; it must be 'exact' or 'int8'"
    ):
        parse(entry)
