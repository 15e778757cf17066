"""The native `blasst` command, as built by `make build`."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from gpu import ON_SM90, hopper

COMMAND = Path(__file__).parents[2] / "build/release/tools/blasst/blasst"
BENCH_FIELDS = {
    *("phase", "backend", "dtype", "length", "heads", "kv_heads", "head_dim", "threads"),
    *("sparsity", "dense_ms", "sparse_ms", "speedup", "dense_gflops", "effective_gflops"),
    *("relative_error", "peak_rss_mb"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMMAND), *arguments], capture_output=True, text=True, check=False)


def test_info_names_version_backends_instruction_sets_and_threads():
    result = run("info")
    assert result.returncode == 0
    for word in ("blasst 0.", "backends", "cpu", "instruction sets", "in use", "threads"):
        assert word in result.stdout


def test_verify_agrees_on_every_instruction_set():
    result = run("verify", "--cases", "8", "--seed", "1000")
    assert result.returncode == 0, result.stderr
    listed = [line.split()[0] for line in run("info").stdout.splitlines() if line.startswith("  ")]
    for line in result.stdout.splitlines():
        assert "8 problems agree" in line
        assert line.split()[0] in listed


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_bench_json_has_one_object_a_line_with_the_promised_fields(phase):
    result = run(
        *("bench", phase, "--json", "--length", "256", "1024", "--heads", "4", "--kv-heads", "2"),
        *("--head-dim", "64", "--sparsity", "0.5", "--repeat", "1"),
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["length"] for row in rows] == [256, 1024]
    for row in rows:
        wanted = BENCH_FIELDS | ({"gb_per_s"} if phase == "decode" else set())
        assert wanted <= row.keys()
        assert row["phase"] == phase
        assert 0 < row["sparsity"] < 0.7, "achieved, of the planted half"
        assert row["relative_error"] < 1e-2
    assert "length 1024" in result.stderr, "progress"


def on_gpu() -> bool:
    return re.search(r"cuda-sm\d+ +sm\d+ +usable \(", run("info").stdout) is not None


@pytest.mark.parametrize("arguments", [("verify",), ("bench", "prefill"), ("bench", "decode")])
def test_cuda_without_a_gpu_is_an_error(arguments):
    if on_gpu():
        pytest.skip("there is a GPU")
    result = run(*arguments, "--backend", "cuda")
    assert result.returncode == 2
    assert "cuda" in result.stderr.lower()
    assert not result.stdout


def test_what_keeps_cuda_from_use_is_said_of_each_backend_or_of_the_named_one(monkeypatch):
    built = re.findall(r"cuda-sm\d+", run("info").stdout)
    if not built or on_gpu():
        pytest.skip("needs a build with CUDA and no GPU")
    monkeypatch.delenv("BLASST_CUDA_BACKEND", raising=False)
    for command in (("verify",), ("bench", "decode")):
        all_of_them = run(*command, "--backend", "cuda").stderr
        for name in built:
            assert f"{name} is not usable here: " in all_of_them
        for name in built:
            monkeypatch.setenv("BLASST_CUDA_BACKEND", name)
            named = run(*command, "--backend", "cuda").stderr
            assert f"{name} is not usable here: " in named
            assert re.findall(r"cuda-sm\d+", named) == [name]
        monkeypatch.delenv("BLASST_CUDA_BACKEND")


@pytest.mark.parametrize("phase", ["prefill", "decode", pytest.param("backward", marks=hopper)])
def test_verify_and_bench_on_a_gpu(phase):
    if not on_gpu():
        pytest.skip("needs a GPU of compute capability 8.0 or later")
    result = run("verify", "--backend", "cuda", "--cases", "8", "--seed", "1000")
    assert result.returncode == 0, result.stderr
    assert "8 problems agree" in result.stdout
    result = run("bench", phase, "--backend", "cuda", "--json", "--length", "2048")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert BENCH_FIELDS | ({"gb_per_s"} if phase == "decode" else set()) <= row.keys()
    assert 0.6 < row["sparsity"] < 0.9


def test_info_says_which_backend_takes_calls_on_a_gpu_and_why():
    if not on_gpu():
        pytest.skip("needs a GPU of compute capability 8.0 or later")
    [line] = [line for line in run("info").stdout.splitlines() if "calls on the GPU go to" in line]
    assert f"go to {'cuda-sm90' if ON_SM90 else 'cuda-sm80'}" in line
    named = os.environ.get("BLASST_CUDA_BACKEND")
    why = "BLASST_CUDA_BACKEND names it" if named else "the first that runs here"
    assert line.endswith(f"({why})")


@pytest.mark.parametrize("cache", ["bf16", "int8-keys", "int8", "fp8"])
@pytest.mark.parametrize(
    ("phase", "scores"), [("prefill", "exact"), ("prefill", "int8"), ("decode", "exact")]
)
def test_bench_takes_scores_and_caches(phase, scores, cache):
    result = run(
        *("bench", phase, "--scores", scores, "--cache", cache),
        *("--length", "300", "--heads", "2", "--kv-heads", "1", "--repeat", "1", "--json"),
    )
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert (row["scores"], row["cache"]) == (scores, cache)
    assert row["dtype"] == ("bfloat16" if cache == "bf16" or phase == "decode" else "float32")


@pytest.mark.parametrize("scores", ["exact", "int8"])
def test_verify_takes_scores(scores):
    result = run("verify", "--scores", scores, "--cases", "5", "--seed", "1000")
    assert result.returncode == 0, result.stderr
    assert "5 problems agree" in result.stdout


def test_bench_does_what_every_option_says():
    wanted = {"backend": "cpu", "dtype": "float16", "order": "reverse", "batch": 2, "length": 300}
    wanted |= {"heads": 6, "kv_heads": 3, "head_dim": 40, "threads": 1}
    options = [x for k, v in wanted.items() for x in ("--" + k.replace("_", "-"), str(v))]
    for phase in ("prefill", "decode"):
        result = run("bench", phase, *options, "--sparsity", "0", "--repeat", "1", "--json")
        assert result.returncode == 0, result.stderr
        row = json.loads(result.stdout)
        assert {key: row[key] for key in wanted} == wanted
        assert row["sparsity"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "prefill", "--dtype", "int8"), ["int8", "bfloat16", "float32"]),
        (("bench", "prefill", "--head-dim", "20"), ["head_dim is 20", "multiple of 8"]),
        (("bench", "prefill", "--sparsity", "1.5"), ["--sparsity", "'1.5'", "from 0 to 1"]),
        (("bench", "prefill", "--sparsity", "nan"), ["'nan'", "from 0 to 1"]),
        (("bench", "prefill", "--length", "0"), ["--length", "'0'", "from 1 to 2147483647"]),
        (("bench", "prefill", "--length", "9" * 20), ["9" * 20, "from 1 to 2147483647"]),
        (("bench", "prefill", "--length", "1k"), ["'1k'", "from 1 to 2147483647"]),
        (("bench", "decode", "--threads", "-1"), ["'-1'", "from 0 to 4096"]),
        (("bench", "decode", "--backend", "tpu"), ["tpu", "cpu, cuda"]),
        (("bench", "decode", "--order", "up"), ["up", "forward, reverse, sink_first"]),
        (("bench", "decode", "--scores", "int8"), ["scores is int8", "decode has exact scores"]),
        (("bench", "decode", "--cache", "int4"), ["int4", "bf16, dtype, fp8, int8, int8-keys"]),
        (("verify", "--scores", "int4"), ["int4", "exact, int8, mixed"]),
        (("verify", "--seed", "-1"), ["'-1'", "from 0 to 18446744073709551615"]),
        (("verify", "--backend", "cuda", "--isa", "avx2"), ["--isa avx2", "cuda"]),
        (("bench", "decode", "--heads", "3", "--kv-heads", "2"), ["heads is 3", "kv_heads is 2"]),
        (("verify", "--isa", "mmx"), ["mmx", "this machine and build have"]),
        (("frobnicate",), ["subcommand"]),
        ((), ["subcommand"]),
    ],
)
def test_wrong_usage_is_one_message_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.returncode == 2
    for word in words:
        assert word in result.stderr + result.stdout
    assert len(result.stderr + result.stdout) < 400


def test_an_unknown_cuda_backend_in_the_environment_is_the_only_output(monkeypatch):
    info = run("info").stdout
    monkeypatch.setenv("BLASST_CUDA_BACKEND", "cuda-sm70")
    commands = [("info",)]
    if "cuda-sm" in info:
        commands.append(("verify", "--backend", "cuda"))
    for command in commands:
        result = run(*command)
        assert result.returncode == 2
        why = "BLASST_CUDA_BACKEND is 'cuda-sm70'; it must be cuda-sm90 or cuda-sm80"
        assert why in result.stderr
        assert not result.stdout


def test_an_unknown_instruction_set_in_the_environment_is_the_only_output(monkeypatch):
    monkeypatch.setenv("BLASST_CPU_ISA", "mmx")
    for command in ("info", "verify"):
        result = run(command)
        assert result.returncode == 2
        assert "mmx" in result.stderr
        assert not result.stdout
