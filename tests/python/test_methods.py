"""Evaluation of several sparse methods side by side."""

import pytest
import torch

from blasst.cli.app import main
from blasst.evaluation import Options, evaluate, report
from blasst.evaluation.settings import Scheme
from blasst.evaluation.summary import rows as rows_of
from blasst.hf import record
from blasst.hf.models import attention_layers, unwindowed_layers
from blasst.methods import bsfa
from blasst.methods.registry import make_methods, saved_tiles
from recency_model import make_loaded
from test_evaluation import LENGTH, TEXTS, configured
from tiny_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory):
    path = tmp_path_factory.mktemp("bsfa") / "thresholds.safetensors"
    loaded = make_loaded()
    bsfa.calibrate(
        loaded.model, loaded.tokenizer, length=LENGTH, keeps=(1, 2, 4, 8), prompts=2
    ).save(path)
    return path


def test_all_methods_in_one_evaluation(tmp_path, thresholds):
    loaded = configured()
    before = dict(loaded.model.config.sparse_attention_config)
    results = evaluate(
        loaded,
        Options(
            *((0, 0.5), LENGTH, TEXTS),
            needles=1,
            other_lengths=(600,),
            timed_lengths=(LENGTH,),
            repeats=1,
        ),
        methods=make_methods(["blasst", "bsfa", "dhsa", "dhsa+blasst"], thresholds),
        out=tmp_path,
    )
    rows = {row.setting.scheme: row for row in rows_of(results)}
    assert list(rows) == [Scheme.DENSE, Scheme.CALIBRATED, "bsfa", "dhsa", "dhsa+blasst"]
    assert rows[Scheme.DENSE].sparsity[0] == 0
    for name in ("bsfa", "dhsa", "dhsa+blasst"):
        assert 0.2 < rows[name].sparsity[0] < 0.8, name
        assert rows[name].kl[0] > 0
    assert len({row.kl[0] for row in rows.values()}) == 5
    # The model is as it was, and dense again without its configuration.
    assert loaded.model.config.sparse_attention_config == before
    del loaded.model.config.sparse_attention_config
    ids = torch.arange(5, 305)[None] % 50
    assert torch.equal(loaded.model(ids).logits, make_loaded().model(ids).logits)
    path = report.write("all", "", results, None, tmp_path)
    assert "Perplexity against prefill time" in path.read_text()


def test_methods_without_a_calibration(tmp_path):
    results = evaluate(
        make_loaded(),
        Options((0.5,), LENGTH, TEXTS, with_calibrated=False),
        methods=make_methods(["dhsa"]),
        out=tmp_path,
    )
    assert [row.setting.scheme for row in rows_of(results)] == [Scheme.DENSE, "dhsa"]
    with pytest.raises(ValueError, match="calibrate it first"):
        evaluate(
            make_loaded(),
            Options((0.5,), LENGTH, TEXTS, with_calibrated=False),
            methods=make_methods(["dhsa+blasst"]),
            out=tmp_path / "other",
        )


def test_tiles_that_are_not_visited_count_as_saved():
    class Recorded:
        def tiles(self, phase):
            return torch.tensor([[[4, 6], [1, 0]], [[10, 10], [0, 10]]])

        def layers(self, phase):
            return [0, 1]

    # Four tiles: ten causal ones in each of two heads and two layers; 3 + 6 + 10 + 0 computed.
    assert saved_tiles(Recorded(), make_loaded().model, 256) == pytest.approx(1 - 19 / 40)


def test_layers_with_a_sliding_window_stay_as_they_are_and_do_not_count():
    model = make_model("gemma3_sliding_and_global", max_position_embeddings=2048)
    sliding, whole = attention_layers(model).values()
    assert unwindowed_layers(model) == [1]
    tokens = torch.randint(5, 97, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), record() as dense:
        model(tokens)
    method = make_methods(["dhsa"])["dhsa"]
    with method.applied(model, None, 0.5, 1024), torch.inference_mode(), record() as chunks:
        assert getattr(sliding, "blasst_policy", None) is None
        assert whole.blasst_policy.budget == 0.5
        model(tokens)
    assert getattr(whole, "blasst_policy", None) is None
    assert torch.equal(chunks.tiles("prefill")[0], dense.tiles("prefill")[0])
    assert saved_tiles(dense, model, 1024) == 0
    # One layer of 4 heads, 16 query tiles; each reads half of the key tiles that it sees, up.
    assert saved_tiles(chunks, model, 1024) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "spam"], "no method spam; choose from blasst, bsfa, dhsa, dhsa+blasst"),
        (["--method", "bsfa"], "the method bsfa needs a file of thresholds"),
        (["--predictors", "x"], "a file of predictors is for the method dhsa"),
    ],
)
def test_bad_commands(arguments, message, capsys):
    assert main(["evaluate", "tiny", *arguments]) == 1
    assert message in capsys.readouterr().err
