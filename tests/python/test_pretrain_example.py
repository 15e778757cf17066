"""Training from scratch, dense and with bands: the same steps, resumable, errors."""

import json
from types import SimpleNamespace

import pytest
import torch

import pretrain as example
from blasst import files
from pretrain import PretrainingPlan, Run, pretrain

TINY = {"length": 40, "every": 2, "hidden": 64, "heads": 4, "layers": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, for models this small, and a text to match."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["one", "two", "three", "four", "five", "six"]
    text = " ".join(words[i * i % 6] + words[i % 5] for i in range(6000))
    monkeypatch.setattr(example, "corpus", lambda seed: text)
    yield
    torch.set_num_threads(threads)


def test_the_model_has_about_ten_million_parameters():
    counts = [
        sum(p.numel() for p in example.make_model(PretrainingPlan(), method).parameters())
        for method in example.METHODS
    ]
    assert counts[0] == counts[1]
    assert 8e6 < counts[0] < 12e6


def test_both_methods_train_and_are_plotted(tmp_path):
    runs = pretrain(PretrainingPlan(steps=6, **TINY), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["method"] for r in results] == ["dense", "bands"]
    for run, result in zip(runs, results, strict=True):
        assert [step for step, _ in run.held_out] == [0, 2, 4, 6]
        assert result["loss"] < run.held_out[0][1]
        assert result["tokens_per_second"] > 0
    assert runs[0].losses[0] != runs[1].losses[0]
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = pretrain(PretrainingPlan(steps=6, **TINY), tmp_path / "whole")

    def stop(step, share, what):
        if what.startswith("step 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainingPlan(steps=6, **TINY), tmp_path / "parts", stop)
    stopped = json.loads((tmp_path / "parts/results.json").read_text())
    assert [result["step"] for result in stopped] == [2, 2]
    assert (tmp_path / "parts/losses.png").exists()
    parts = pretrain(PretrainingPlan(steps=6, **TINY), tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert a.losses == b.losses
        assert a.held_out == b.held_out
        weights = zip(a.model.parameters(), b.model.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in weights)


def test_a_batch_is_several_sequences(tmp_path):
    (run, _) = pretrain(PretrainingPlan(steps=2, batch=3, **TINY), tmp_path)
    seen = []
    run.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run.train_step()
    assert seen[0].shape == (3, 40)
    assert run.tokens_per_second == pytest.approx(3 * 3 * 40 / run.seconds)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    pretrain(PretrainingPlan(steps=2, **TINY), tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint of another run"):
        pretrain(PretrainingPlan(steps=2, **{**TINY, "length": 48}), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "hidden is 64 for 3 heads; each needs a multiple of 8 from 16"),
        ({"length": 3}, "4 heads cannot have bands of 3 distances"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainingPlan(steps=2, **{**TINY, **options})


def test_too_little_text(tmp_path):
    with pytest.raises(ValueError, match="sequences of 40 need at least 49 held out"):
        Run(PretrainingPlan(steps=2, **TINY), "dense", torch.zeros(500, dtype=torch.long), tmp_path)


def test_a_disk_that_is_nearly_full_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    with pytest.raises(ValueError, match="is on a disk with 20 MB free"):
        pretrain(PretrainingPlan(steps=2, **TINY), tmp_path)


def test_the_command(tmp_path, capsys, monkeypatch):
    tiny = PretrainingPlan(steps=2, **TINY)
    monkeypatch.setattr(example, "PretrainingPlan", lambda **_: tiny)
    example.main(steps=2, out=tmp_path)
    assert "Loss curves:" in capsys.readouterr().out
