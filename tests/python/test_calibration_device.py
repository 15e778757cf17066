"""Calibration for other tiles, in batches, resumed, and what it does not put into memory."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import blasst
from blasst.calibration import calibrate, run, setup
from blasst.calibration.collector import output_gram
from blasst.calibration.emulation import Emulation
from blasst.calibration.measurement import LAW
from blasst.calibration.setup import DECODE_STEPS, Setup
from blasst.config import parse
from blasst.hf.models import attention_layers
from blasst.hf.operator import KERNELS, calling
from blasst.hf.reading import put_back, read
from blasst.ops.library import Plan, TileShape, plan
from blasst.prompts import PromptMaker, reference_text
from recency_model import make_recency_model, make_tokenizer
from test_calibration import tokens
from tiny_models import VOCABULARY, make_model

OPTIONS = {
    "lengths": [512],
    "target_sparsity": {"prefill": 0.2, "decode": 0.3},
    "prompts": 2,
    "held_out": [],
    "orders": ["reverse"],
    "schemes": ["one_threshold", "least_error"],
}


LONG = 1024


def reached(model, operator=KERNELS) -> float:
    with blasst.record() as recording, calling(operator), torch.inference_mode():
        for seed in (5, 6):
            model(tokens(LONG, seed=seed))
    return recording.sparsity("prefill")


@pytest.fixture(scope="module")
def for_two_shapes():
    model = make_recency_model(LONG)
    options = OPTIONS | {"lengths": [LONG], "prompts": 1, "schemes": ["one_threshold"]}
    options["target_sparsity"] = {"prefill": 0.12, "decode": 0.2}
    calibrate(model, make_tokenizer(), **options)
    own = parse(model.config.sparse_attention_config)
    calibrate(model, make_tokenizer(), **options, tile_shape=(64, 128))
    return model, own


def test_one_configuration_holds_several_shapes_and_each_reaches_its_target(for_two_shapes, caplog):
    model, own = for_two_shapes
    both = parse(model.config.sparse_attention_config)
    found = both.measured["prefill"]
    assert [m.tile_shape for m in (found, *found.others)] == [(64, 128), (64, 64)]
    [decode] = both.measured["decode"].others
    assert (both.measured["decode"].tile_shape, decode.tile_shape) == ((2, 128), (2, 64))
    assert found.others == (own.measured["prefill"],)
    assert torch.equal(
        found.others[0].tables[0].ln_threshold, own.measured["prefill"].tables[0].ln_threshold
    )
    assert reached(model) == pytest.approx(0.12, abs=0.03)
    other = Emulation({"prefill": (64, 128), "decode": (2, 128)})
    assert reached(model, other) == pytest.approx(0.12, abs=0.03)
    assert not [r for r in caplog.records if "tiles of" in r.getMessage()]


def test_the_ecosystems_law_is_fitted_on_its_own_tiles():
    """Whatever the kernel's: readers run forward on 128 x 128, in decode on 128 keys."""
    model = make_recency_model()
    maker = PromptMaker(make_tokenizer(), reference_text(), "text")
    targets = {"prefill": [0.2], "decode": [0.2]}
    asked = Setup(model, maker, [512], targets, ["reverse"], ["one_threshold"])
    calibrating = run._Calibrating(asked, None, "")
    with torch.inference_mode():
        calibrating._read_densely(2, 1)
    measured, heads, layers = calibrating._measured, 4, 2
    assert measured.pooled("prefill", "forward", 512).sum() == 2 * (8 * 9 // 2) * heads * layers
    assert measured.pooled("prefill", LAW, 512).sum() == 2 * (4 * 5 // 2) * heads * layers
    assert measured.pooled("decode", LAW, 512).sum() == 2 * DECODE_STEPS * 5 * heads * layers
    law = calibrating._tables.ecosystem_law("decode")
    assert law == calibrating._tables.law("decode", LAW, fit_power=False)
    assert law != calibrating._tables.ecosystem_law("decode", "forward")
    assert calibrating._tables.ecosystem_law("prefill") is None, "it skips nothing at 512 tokens"


def test_prompts_in_batches_count_as_one_by_one():
    models = [make_recency_model() for _ in range(2)]
    options = OPTIONS | {"prompts": 4, "swept_prompts": 4, "schemes": ["one_threshold"]}
    for model, batch in zip(models, (1, 4), strict=True):
        calibrate(model, make_tokenizer(), **options, batch=batch)
    one, four = (parse(m.config.sparse_attention_config) for m in models)
    for phase in ("prefill", "decode"):
        tables = [config.measured[phase].tables[0].ln_threshold for config in (one, four)]
        assert (tables[0] - tables[1]).abs().max() < 0.15, phase
    assert one.laws["decode"].b == pytest.approx(four.laws["decode"].b, rel=1e-2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_calibration_that_was_killed_goes_on_where_it_was(after, tmp_path, monkeypatch):
    expected = make_recency_model()
    calibrate(expected, make_tokenizer(), **OPTIONS)
    kept = tmp_path / "calibration.safetensors"
    model, steps = make_recency_model(), []
    write = run.Kept._write

    def dying(self) -> None:
        write(self)
        steps.append(0)
        if len(steps) == after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.Kept, "_write", dying)
        calibrate(model, make_tokenizer(), **OPTIONS, resume=kept)
    with pytest.raises(ValueError, match="calibration of another model, or with other options"):
        calibrate(model, make_tokenizer(), **(OPTIONS | {"prompts": 1}), resume=kept)
    read_anew = []
    monkeypatch.setattr(run.Kept, "_write", lambda self: (write(self), read_anew.append(0)))
    calibrate(model, make_tokenizer(), **OPTIONS, resume=kept)
    assert len(read_anew) + after == 7, "two passes, four candidates, one sparse pass"
    entries = [m.config.sparse_attention_config for m in (model, expected)]
    assert entries[0] == entries[1]
    assert not kept.exists()


def test_of_a_projection_only_what_it_does_is_asked():
    """Its weights may be packed: whatever is no Linear may have none."""
    model = make_model("llama")
    plain = attention_layers(model)[0].o_proj

    class Packed(nn.Module):
        in_features, weight = plain.in_features, torch.zeros(3, dtype=torch.uint8)

        def forward(self, x):
            return plain(x) + 1.0  # a bias is no part of it

    like = torch.zeros(1, 1, 4, 16)
    by_head = plain.weight.unflatten(1, (4, 16)).transpose(0, 1)
    torch.testing.assert_close(
        output_gram(Packed(), 4, like), by_head.mT @ by_head, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "gemma3_sliding_and_global"])
@torch.inference_mode()
def test_a_cache_is_put_back_without_a_copy(name):
    model = make_model(name)
    ids = torch.randint(3, VOCABULARY, (1, 120), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :100], cache)
    before = copy.deepcopy(cache)
    expected = read(model, ids[:, 100:], copy.deepcopy(cache))
    for _ in range(2):
        with put_back(cache):
            assert torch.equal(read(model, ids[:, 100:], cache), expected)
    assert cache.get_seq_length() == 100
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)
        assert torch.equal(layer.values, old.values)


GPU = {"prefill": (64, 128, 0, 0), "decode": (2, 64, 8, 132)}


def plan_of(phase, device, dtype, **sizes):
    """A GPU's, wherever this build has none."""
    if device.type == "cpu":
        return plan(phase, device, dtype, **sizes)
    assert (dtype, sizes["heads"], sizes["kv_heads"]) == (torch.bfloat16, 4, 2)
    rows, keys, split, most = GPU[phase]
    return Plan(rows, keys, split, 2, 1, 1, 1, 0, most)


@pytest.mark.parametrize(
    ("asked", "emulated"),
    [
        (None, {}),
        ("cpu", {}),
        ((64, 64), {}),
        ({"decode": (1, 64, 64)}, {}),
        ("cuda", GPU),
        ({"decode": (1, 64, 8)}, {"decode": (1, 64, 8)}),
        ({"prefill": (64, 64), "decode": (1, 64, 64, 2)}, {"decode": (1, 64, 64, 2)}),
        ((64, 128), {"prefill": (64, 128), "decode": (64, 128)}),
    ],
)
def test_what_the_kernels_here_do_not_have_is_emulated(asked, emulated, monkeypatch):
    monkeypatch.setattr(setup, "plan", plan_of)
    found = setup.operator_for(asked, make_recency_model())
    assert found == (Emulation(emulated) if emulated else KERNELS)


def test_tiles_that_differ_from_layer_to_layer_are_no_devices(monkeypatch):
    shapes = [TileShape(2, 64, 8, 132), TileShape(4, 64, 8, 132), TileShape(1, 64, 8, 264)]
    monkeypatch.setattr(setup, "shapes_on", lambda *_: {*shapes[:2]})
    assert setup._shape_on("cuda", "decode", make_recency_model()) == shapes[0], "rows aside"
    monkeypatch.setattr(setup, "shapes_on", lambda *_: {*shapes})
    message = "'cuda', where prefill decides on tiles that differ .*: .1, 64, 8, 264., .2, 64,"
    with pytest.raises(ValueError, match=message):
        setup.operator_for("cuda", make_recency_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_shape": {"prefill": (64, 128, 8)}}, "is .64, 128, 8.; only decode has splits"),
        ({"tile_shape": "mps"}, "tile_shape is 'mps'; it must be one of cpu, cuda"),
        ({"tile_shape": {"decode": (64, 64, -8)}}, "with the tiles of a split and the most splits"),
        ({"tile_shape": (64,)}, "tile_shape is .64,.; it must be .query rows, keys."),
        ({"tile_shape": {"train": (64, 64)}}, "tile_shape is for 'train'"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_recency_model(), make_tokenizer(), lengths=[256], **options)


def test_a_model_that_is_split_over_devices_is_refused():
    model = make_recency_model()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="the model is split over cpu, meta; calibrate it on one"):
        calibrate(model, make_tokenizer(), lengths=[256])
