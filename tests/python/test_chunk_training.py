"""Boundary predictors: what is trained is what the library runs; resumable; errors."""

import math

import pytest
import torch

import blasst
from blasst import Dhsa
from blasst.cli.app import main
from blasst.hf import models
from blasst.methods import dhsa_training
from blasst.methods.dhsa import load_predictors
from blasst.methods.dhsa_training import BoundaryModel, PredictorPlan, labels_of, train, train_layer
from recency_model import make_loaded

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PredictorPlan(size=16, length=256, stretches=2, steps=30, window=4)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


def stretches_of_keys(tokens=2000, seed=0):
    """Keys that change their direction every 20 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 40, (200,), generator=generator)
    stretch = torch.arange(200).repeat_interleave(lengths)[:tokens]
    direction = torch.randn(200, 2, 16, generator=generator)
    noise = torch.randn(tokens, 2, 16, generator=generator)
    return direction[stretch] + 0.2 * noise, torch.diff(stretch, prepend=stretch[:1]) > 0


def test_labels_are_where_neighbours_are_least_alike():
    keys, begins = stretches_of_keys()
    labels = labels_of(keys, 2000 // begins.sum().item())
    assert (labels == begins).float().mean() > 0.99


def test_a_predictor_learns_the_boundaries():
    plan = PredictorPlan(size=30, steps=200, window=4)
    stretches = [stretches_of_keys(seed=seed)[0] for seed in range(4)]
    trained = train_layer(stretches, plan, seed=0)
    # Chance would be right once in thirty times.
    assert trained.precision > 0.5
    assert trained.recall > 0.5
    packed = trained.predictor
    found = [
        (torch.ops.blasst.chunks_scores(keys, "trained", packed.weights, list(packed.shape)) > 0)
        .float()
        .mean()
        for keys in stretches
    ]
    assert sum(found) / len(found) == pytest.approx(1 / 30, rel=0.2)


def test_the_library_computes_the_scores_that_were_trained():
    keys, _ = stretches_of_keys(tokens=200)
    torch.manual_seed(2)
    model = BoundaryModel(32, TINY)
    packed = model.packed()
    got = torch.ops.blasst.chunks_scores(keys, "trained", packed.weights, list(packed.shape))
    windows = keys.flatten(1).unfold(0, 8, 1).mT
    with torch.no_grad():
        wanted = model(windows[:, :4], windows[:, 4:])
    torch.testing.assert_close(got[4:197], wanted, atol=1e-5, rtol=1e-4)
    assert got[:4].isnan().all() and got[197:].isnan().all()


def test_a_trained_model_runs_and_a_training_goes_on(loaded, tmp_path):
    whole = tmp_path / "whole.safetensors"
    trained = train(loaded.model, loaded.tokenizer, whole, TINY)
    assert sorted(trained) == [0, 1]

    def stop(step, share, what):
        if what == "layer 1":
            raise KeyboardInterrupt

    parts = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(loaded.model, loaded.tokenizer, parts, TINY, progress=stop)
    assert not parts.exists()
    other = PredictorPlan(size=17, length=256, stretches=2)
    with pytest.raises(ValueError, match="holds layers of another training"):
        train(loaded.model, loaded.tokenizer, parts, other)
    train(loaded.model, loaded.tokenizer, parts, TINY)
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]

    policy = Dhsa(budget=128, chunker="trained", least=4, most=64, predictors=str(whole))
    blasst.set_policy(loaded.model, policy)
    tokens = torch.randint(5, 50, (1, 300), generator=torch.Generator().manual_seed(0))
    loaded.model.generate(tokens, max_new_tokens=20, do_sample=False)
    chunks = policy._states[1, 0]
    assert chunks.keys == 319
    assert len(chunks.starts) > 5
    blasst.set_policy(loaded.model, None)
    predictor = load_predictors(whole)[0]
    assert math.prod(predictor.shape[::2]) == 32 * 32


def test_bad_input(loaded, tmp_path):
    with pytest.raises(ValueError, match="size is 1; it must be at least 2"):
        PredictorPlan(size=1)
    with pytest.raises(ValueError, match="the training text has"):
        train(loaded.model, loaded.tokenizer, tmp_path / "a", TINY, text="too short")
    wide = tmp_path / "wide.safetensors"
    train(loaded.model, loaded.tokenizer, wide, TINY)
    from tiny_models import make_model

    policy = Dhsa(0.5, chunker="trained", predictors=str(wide))
    other = make_model("llama", num_key_value_heads=4)
    with pytest.raises(
        ValueError, match="boundary predictors of a model with type llama, layers 2"
    ):
        blasst.set_policy(other, policy)
    wider = make_model("llama", head_dim=32)  # all else is as in the trained one
    blasst.set_policy(wider, policy)
    with pytest.raises(ValueError, match="the boundary predictor is for keys of 32 elements"):
        wider(torch.ones(1, 100, dtype=torch.long))
    loaded.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no boundary predictors"):
        load_predictors(tmp_path / "model/model.safetensors")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, loading: make_loaded())
    monkeypatch.setattr(dhsa_training, "PredictorPlan", lambda **_: TINY)
    path = tmp_path / "chunks.safetensors"
    assert main(["chunks", "tiny", "--out", str(path)]) == 0
    assert "precision" in capsys.readouterr().out
    assert sorted(load_predictors(path)) == [0, 1]
