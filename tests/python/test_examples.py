"""Every example runs, on a small random model."""

import runpy
import sys
from pathlib import Path

import pytest

from recency_model import make_loaded

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path):
    loaded = make_loaded()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("A long text about nothing in particular. " * 100)
    return tmp_path


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_generate(folder, monkeypatch, capsys):
    options = ["--new-tokens", 3, "--threshold", 1]
    run("generate.py", monkeypatch, folder / "model", folder / "text", *options)
    assert "skipped: prefill " in capsys.readouterr().out


def test_calibrate(folder, monkeypatch, capsys):
    options = ["--target-sparsity", 0.1, "--lengths", 400, 800]
    run("calibrate.py", monkeypatch, folder / "model", folder / "sparse", *options)
    assert "calibrated for 10%" in capsys.readouterr().out
    assert "sparse_attention_config" in (folder / "sparse" / "config.json").read_text()


def test_finetune(folder, monkeypatch, capsys):
    options = ["--steps", 2, "--length", 256]
    paths = [folder / "model", folder / "text", folder / "trained"]
    run("finetune.py", monkeypatch, *paths, *options)
    assert "step 1: loss " in capsys.readouterr().out
    assert (folder / "trained" / "model.safetensors").exists()
