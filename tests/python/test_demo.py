"""The demo from end to end, and the README's lines, on a small random model."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from blasst import calibration
from blasst.calibration.collector import Collector
from blasst.cli.app import main
from blasst.demo import run as demo
from blasst.errors import NotSupportedError
from blasst.hf import models
from blasst.progress import silent
from recency_model import make_loaded


def test_the_demo_calibrates_evaluates_and_reports_and_a_second_run_goes_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BLASST_CACHE", str(tmp_path / "cache"))
    schemes = ("one_threshold", "water_filling")
    size = demo.Size(
        (400, 800), (600,), (500,), prompts=1, schemes=schemes, texts=1, every=2, needles=1,
        targets=(0.1, 0.15), paper=(0.2,), repeats=2,
    )  # fmt: skip
    (tmp_path / "results.jsonl").write_text('{"fingerprint": "of an older calibration"}\n')
    monkeypatch.setitem(demo.SIZES, "smollm2", size)
    monkeypatch.setattr(demo, "EVALUATED", (0.0, 0.2))
    monkeypatch.setattr(models, "load", lambda name, loading, progress: make_loaded())
    assert main(["demo", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for title in (
        "Perplexity and agreement with dense",
        "Finding a fact in a long text",
        "Answers side by side",
        "What calibration chose from",
        "Sparsity at lengths that no fit has seen",
        "Report:",
    ):
        assert title in " ".join(shown.split())
    report = (tmp_path / "report.html").read_text()
    assert report.count("<svg") == 9
    for caption in ("Kept tiles by layer and head", "What skipping cost each token"):
        assert caption in report

    monkeypatch.setattr(calibration, "calibrate", None)
    assert main(["demo", "--out", str(tmp_path)]) == 0, "from what the first run kept"


def test_a_demo_that_is_stopped_while_it_calibrates_goes_on(tmp_path, monkeypatch):
    """Its finished passes are kept until the calibration is."""

    def stop(step: str, share: float, what: str) -> None:
        if step == "Candidates":
            raise KeyboardInterrupt

    monkeypatch.setenv("BLASST_CACHE", str(tmp_path / "cache"))
    loaded, out = make_loaded(), tmp_path / "out"
    out.mkdir()
    size = dataclasses.replace(
        demo.SIZES["smollm2"], lengths=(400, 800), held_out=(), targets=(0.1,)
    )
    with pytest.raises(KeyboardInterrupt):
        demo._calibration(loaded, size, out / "calibration.json", stop)
    [kept] = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setattr(Collector, "collecting", None)  # the dense passes are done
    found = demo._calibration(loaded, size, out / "calibration.json", silent)
    assert found.config.target_sparsity["prefill"] == 0.1
    assert not kept.exists()


def test_every_model_has_a_demo_on_a_gpu_within_its_context():
    contexts = {"smollm2": 8192, "gemma3": 32768}
    assert demo.ON_A_GPU.keys() == demo.SIZES.keys() == contexts.keys() == models.PACKAGED.keys()
    for name, size in demo.ON_A_GPU.items():
        assert demo.SIZES[name].lengths[-1] < size.lengths[-1] <= contexts[name]
        assert max(*size.held_out, *size.other_lengths) < size.lengths[-1]


@pytest.mark.parametrize(
    ("there", "has_kernels", "expected"),
    [(False, True, None), (True, True, "cuda"), (True, False, None)],
)
def test_the_demo_uses_a_gpu_that_blasst_has_kernels_for(
    there, has_kernels, expected, tmp_path, monkeypatch
):
    def tile_shape(q, k, v, *, phase):
        if not has_kernels:
            raise NotSupportedError("cuda-sm90 needs compute capability 9.0")

    def load(name, *, loading, progress):
        used.append(loading)
        raise ValueError("seen")

    used, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(shape))
    monkeypatch.setattr(demo, "tile_shape", tile_shape)
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models.Loading, "__post_init__", lambda self: None)  # finds no GPU here
    for loading in (None, models.Loading("cpu"), models.Loading(dtype="float32")):
        with pytest.raises(ValueError, match="seen"):
            demo.demo("smollm2", tmp_path, loading=loading)
    assert [loading.device for loading in used] == [expected, "cpu", expected]


def test_the_readmes_lines_make_a_model_sparse(tmp_path, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert 'device_map="cuda"' in lines
    loaded = make_loaded()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    here = lines.replace('device_map="cuda"', 'device_map="cpu"')
    exec(here, {"name": str(tmp_path), "long_text": "Once upon a time " * 40})
    assert re.match(r"skipped: prefill \d+%, decode \d+%\n", capsys.readouterr().out)
