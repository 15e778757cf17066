"""How models are loaded: types, devices, and what cannot be."""

import inspect

import gguf
import pytest
import torch

from blasst.cli import commands
from blasst.cli.app import main
from blasst.errors import NotSupportedError
from blasst.hf.models import Loading, _reading_once, load
from blasst.hf.operator import Kernels
from recency_model import make_recency_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_recency_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_weights_have_the_type_that_is_asked_for(folder, dtype, expected):
    model = load(str(folder), loading=Loading(device="cpu", dtype=dtype)).model
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device is 'gpu'; it must be cpu, cuda, or cuda:N"),
        ({"device": "cuda:99"}, r"device is 'cuda:99'; torch finds \d+ GPUs here"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Loading(**options)


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "demo"])
def test_without_a_gpu_a_command_says_so_in_one_line(command, folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([command, str(folder), "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert said == "blasst: device is 'cuda'; torch finds 0 GPUs here\n"


def test_a_gpu_that_the_kernels_are_not_for_is_named_before_the_work(folder, monkeypatch, capsys):
    why = "cuda-sm80: device 0 has compute capability 7.5; the kernels are for 8.0 and later"

    def refused(*_, **__):
        raise NotSupportedError(why)

    monkeypatch.setattr(Kernels, "attention", staticmethod(refused))
    for command in ("calibrate", "evaluate"):
        assert main([command, str(folder)]) == 1
        assert capsys.readouterr().err == f"blasst: {str(folder)!r} cannot run with blasst: {why}\n"


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match="revision is 'main'; only hub models have one"):
        load(str(folder), loading=Loading(revision="main"))


def test_a_gguf_file_is_read_once_while_it_is_converted(monkeypatch):
    reads = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reads.append(path) or object())
    with _reading_once():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
    assert gguf.GGUFReader("a") is not gguf.GGUFReader("a"), "as before"
    assert reads == ["a"] * 3


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "finetune", "demo", "bsfa", "chunks"])
def test_commands_pass_the_options_on(command, monkeypatch, capsys):
    given = []

    def stop(name, *, loading, progress=None, to_train=False):
        given.append(loading)
        raise ValueError("seen")

    monkeypatch.setattr("blasst.hf.models.load", stop)
    options = ["--device", "cpu", "--dtype", "bfloat16", "--trust-remote-code"]
    assert main([command, "smollm2", *options]) == 1
    assert given == [Loading("cpu", "bfloat16", trust_remote_code=True)]
    names = inspect.signature(getattr(commands, command)).parameters
    assert "loading" not in names
    assert {"device", "dtype", "device_map", "revision", "trust_remote_code"} <= set(names)


def test_a_calibration_in_bfloat16(folder, tmp_path, capsys):
    arguments = ["calibrate", str(folder), "--dtype", "bfloat16", "--target-sparsity", "0.1"]
    arguments += [
        "--lengths",
        "1024",
        "--held-out",
        "--prompts",
        "1",
        "--out",
        str(tmp_path / "to"),
    ]
    assert main(arguments) == 0
    model = load(str(tmp_path / "to")).model
    assert model.dtype == torch.bfloat16
    assert model.config.sparse_attention_config is not None


def test_a_model_that_is_to_be_calibrated_is_not_said_to_be_uncalibrated(folder, tmp_path, capsys):
    given = "--target-sparsity 0.1 --lengths 512 --held-out --prompts 1 --schemes one_threshold"
    given += " --config-only"
    assert main(["calibrate", str(folder), *given.split(), "--out", str(tmp_path)]) == 0
    assert "neither a sparse_attention_config" not in capsys.readouterr().err
