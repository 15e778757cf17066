"""`set_target`, `reset`, `with`: what is set on a model, and how it goes away again."""

import copy
import logging
import math
import pickle
from dataclasses import replace

import pytest
import torch

import blasst
from blasst import Bands, Threshold
from blasst.config import Law, Measured, ThresholdTable, parse
from blasst.hf import thresholds
from blasst.hf.layers import attention_modules
from blasst.hf.operator import Kernels, calling
from blasst.hf.thresholds import Pass, options_of
from tiny_models import VOCABULARY, asked, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = 2.0, 6.0
CONFIG = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": A, "b": B},
                "decode": {"a": A, "b": B},
            },
            "target_sparsity": {"prefill": 0.5, "decode": 0.25},
        }
    }
}


@pytest.fixture
def model():
    return make_model("llama", sparse_attention_config=copy.deepcopy(CONFIG))


def threshold(model, phase, layer=0):
    """Of a request of 4096 keys, as a share of 1/4096 above the law's a."""
    module = attention_modules(model)[layer]
    found = asked(module, phase).get("threshold")
    return None if found is None else torch.as_tensor(found).item()


def law(target):
    return pytest.approx(A * math.exp(B * target) / 4096)


def test_a_target_is_of_a_phase_and_of_layers_and_the_configuration_keeps_its_own(model):
    blasst.set_target(model, prefill=0.75)
    blasst.set_target(model, decode=0.125, layers=[1])
    assert threshold(model, "prefill") == law(0.75)
    assert threshold(model, "decode") == law(0.25)
    assert threshold(model, "decode", layer=1) == law(0.125)
    blasst.set_target(model, prefill=0)
    assert threshold(model, "prefill") is None
    assert model.config.sparse_attention_config == CONFIG


def test_the_last_of_target_and_thresholds_holds(model):
    blasst.configure(model, prefill=Threshold(0.5), decode=Threshold(0.5))
    blasst.set_target(model, prefill=0.75)
    assert threshold(model, "prefill") == law(0.75)
    assert threshold(model, "decode") == 0.5
    blasst.configure(model, prefill=Threshold(0.25))
    assert threshold(model, "prefill") == 0.25


def test_after_a_with_statement_the_model_is_as_before(model):
    blasst.configure(model, decode=Threshold(0.5))
    with blasst.set_target(model, prefill=0.75, decode=0.75):
        assert threshold(model, "decode") == law(0.75)
        with blasst.configure(model, prefill=Threshold(0.25), layers=[0]):
            assert threshold(model, "prefill") == 0.25
            assert threshold(model, "prefill", layer=1) == law(0.75)
        assert threshold(model, "prefill") == law(0.75)
    assert threshold(model, "prefill") == law(0.5)
    assert threshold(model, "decode") == 0.5
    with pytest.raises(KeyError), blasst.set_policy(model, Bands(300)):
        assert attention_modules(model)[0].blasst_policy == Bands(300)
        raise KeyError
    assert not hasattr(attention_modules(model)[0], "blasst_policy")


def test_reset_leaves_what_the_configuration_says(model):
    blasst.configure(model, prefill=Threshold(0.5))
    blasst.set_target(model, decode=0.75)
    blasst.set_policy(model, Bands(300))
    blasst.reset(model)
    assert threshold(model, "prefill") == law(0.5)
    assert threshold(model, "decode") == law(0.25)
    assert not hasattr(attention_modules(model)[0], "blasst_policy")


@torch.no_grad()
def test_a_compiled_model_follows_another_target(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    for target in (0.9, 0.0, 0.75, 1.0):
        blasst.set_target(model, prefill=target)
        mask = torch.ones_like(ids)
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(got, model(ids, attention_mask=mask, use_cache=False).logits)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({"prefill": 1.5}, ValueError, "target sparsity of prefill is 1.5; it must be 0 to 1"),
        ({}, TypeError, "set_target sets prefill, decode or both; neither is given"),
        ({"decode": "0.5"}, TypeError, "target sparsity of decode is '0.5'; it must be a number"),
        ({"decode": 0.5}, ValueError, "sparse_attention_config has no decode"),
    ],
)
def test_targets_that_cannot_be_set(model, targets, error, message):
    group = model.config.sparse_attention_config["config_groups"]["group_0"]
    if error is ValueError:
        del group["threshold_scale_factor"]["decode"]
    with pytest.raises(error, match=message):
        blasst.set_target(model, **targets)
    assert not hasattr(attention_modules(model)[0], "blasst_targets")


def test_a_model_without_a_calibration_has_no_target():
    with pytest.raises(ValueError, match="has no sparse_attention_config: calibrate it"):
        blasst.set_target(make_model("llama"), prefill=0.5)


@torch.no_grad()
def test_uncalibrated_use_is_said_once(caplog):
    model = make_model("llama", name_or_path="a/model")
    ids = torch.randint(3, VOCABULARY, (1, 20))
    with caplog.at_level(logging.WARNING, "blasst"):
        for _ in range(2):
            model(ids)
    [record] = caplog.records
    assert "a/model has neither a sparse_attention_config nor thresholds set" in record.getMessage()
    caplog.clear()
    other = make_model("llama", name_or_path="another/model")
    blasst.configure(other, prefill=Threshold())
    other(ids)
    assert not caplog.records


def scores(model, phase, layer=0):
    module = attention_modules(model)[layer]
    return asked(module, phase).get("scores")


def test_scores_are_set_by_thresholds_and_by_the_configuration(model):
    assert scores(model, "prefill") == "exact"
    read = parse(CONFIG).with_scores(prefill="int8")
    model.config.sparse_attention_config = read.to_dict()
    assert (scores(model, "prefill"), scores(model, "decode")) == ("int8", "exact")
    with blasst.set_target(model, prefill=0):
        assert scores(model, "prefill") == "int8"
    with blasst.configure(model, prefill=Threshold(0.1), layers=[1]):
        assert (scores(model, "prefill"), scores(model, "prefill", 1)) == ("int8", "exact")
    blasst.configure(model, prefill=Threshold(0.1, scores="int8"))
    model.config.sparse_attention_config = CONFIG
    assert scores(model, "prefill") == "int8"
    for wrong, error in (("int4", ValueError), (8, TypeError)):
        with pytest.raises(error, match=r"scores is .*; it must be one of exact, int8"):
            Threshold(scores=wrong)


def test_a_number_becomes_one_tensor_for_all_layers_and_passes(model):
    blasst.configure(model, prefill=Threshold(0.01))
    given = []

    class Noted(Kernels):
        @staticmethod
        def attention(*tensors, **options):
            given.append(options["threshold"])
            return Kernels.attention(*tensors, **options)

    tokens = torch.arange(1, 9)[None]
    with calling(Noted()), torch.no_grad():
        model(tokens)
        model(tokens)
    layers = model.config.num_hidden_layers
    assert layers > 1 and len(given) == 2 * layers
    assert all(t.shape == (1, 1, 1) and math.isclose(t.item(), 0.01, rel_tol=1e-6) for t in given)
    assert len({id(t) for t in given}) == 1


def test_what_layers_remember_of_a_pass_follows_every_change(model):
    modules = attention_modules(model)

    def answers(keys: int, phase: str = "prefill") -> list[float]:
        """Of the layers of a pass whose requests are all so long."""
        query, noted = torch.zeros(1, keys, 4, 16), {}
        call = Pass(phase, query, 16, 4, keys, lambda: keys, lambda: [keys], noted)
        return [options_of(module, call)["threshold"].item() for module in modules]

    def one(target: float, keys: int) -> list:
        return [pytest.approx(A * math.exp(B * target) / keys)] * len(modules)

    for keys in (4096, 4096, 2048, 4096):
        assert answers(keys) == one(0.5, keys)
    assert answers(4096, "decode") == one(0.25, 4096)
    blasst.set_target(model, prefill=0.75)
    assert answers(4096) == answers(4096) == one(0.75, 4096)
    blasst.set_target(model, prefill=0.25, layers=[1])
    assert answers(4096) == answers(4096) == [*one(0.75, 4096)[:1], *one(0.25, 4096)[1:]]
    blasst.reset(model)
    assert answers(4096) == one(0.5, 4096)
    entry = model.config.sparse_attention_config
    entry["config_groups"]["group_0"]["target_sparsity"]["prefill"] = 0.375  # in place
    assert answers(4096) == answers(4096) == one(0.375, 4096)
    model.config.sparse_attention_config = copy.deepcopy(CONFIG)  # another
    assert answers(4096) == answers(4096) == one(0.5, 4096)
    assert len(thresholds._kept_values) <= thresholds.KEPT
    for keys in range(100, 100 + 2 * thresholds.KEPT):
        answers(keys)
    assert len(thresholds._kept_values) <= thresholds.KEPT
    assert answers(4096) == one(0.5, 4096)


def test_a_pass_on_other_tiles_or_in_another_mode_has_thresholds_of_its_own(model):
    def on(keys: int, threshold: float, *others: Measured) -> Measured:
        ln = torch.full((1, 1, 1, 1), math.log(threshold))
        table = ThresholdTable("reverse", "one_threshold", Law(A, B, 1.0), (8,), (0.5,), ln)
        return Measured((64, keys), (table,), others=others)

    measured = {"prefill": on(64, 0.25, on(128, 0.5))}
    config = replace(parse(CONFIG), measured=measured)
    model.config.sparse_attention_config = config.to_dict()
    module = attention_modules(model)[0]

    def answer(keys: int) -> torch.Tensor:
        """Of a pass over 8 keys, on tiles of so many."""
        lengths = lambda: 8, lambda: [8]
        query = torch.zeros(1, 8, 4, 16)
        call = Pass("prefill", query, 16, 4, 8, *lengths, {}, lambda *_: (64, keys))
        return options_of(module, call)["threshold"]

    for keys in (64, 64, 128, 128, 64):
        assert answer(keys).item() == pytest.approx(0.25 if keys == 64 else 0.5, rel=1e-3)
    with torch.inference_mode():
        assert answer(64).is_inference()
    assert not answer(64).is_inference()


def test_a_layer_that_gets_a_configuration_of_its_own_follows_it(model):
    first, second = attention_modules(model)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        model(tokens)
        second.config = copy.deepcopy(model.config)
        second.config.sparse_attention_config["config_groups"]["group_0"]["ignore"] = ["*.1.*"]
        given = []

        class Noted(Kernels):
            @staticmethod
            def attention(*tensors, **options):
                given.append(options.get("threshold"))
                return Kernels.attention(*tensors, **options)

        with calling(Noted()):
            model(tokens)
    assert first.config is not second.config
    assert given[0] is not None and given[1] is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_copies_and_pickles_of_a_model_forget_what_it_was_answered(model, mode):
    tokens = torch.arange(1, 9)[None]
    with mode():
        expected = model(tokens).logits
    assert all(module.blasst_last is not None for module in attention_modules(model))
    content = pickle.dumps(model)
    assert b"_Last" not in content
    for other in (copy.deepcopy(model), pickle.loads(content)):
        assert all(module.blasst_last is None for module in attention_modules(other))
        assert torch.equal(other(tokens).logits, expected)
