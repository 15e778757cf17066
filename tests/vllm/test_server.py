"""An OpenAI-compatible server, started once, asked over HTTP, and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

SECONDS = 900
"""After which the server is given up; it takes twenty on an idle machine."""


@pytest.fixture
def server(calibrated, tmp_path):
    """Its address; engine and front end are processes of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "metrics").mkdir()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", calibrated]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.2", "--attention-backend", "CUSTOM"]
    command += ["--logits-processors", "blasst.integrations.vllm:Requests"]
    command += ["--additional-config", '{"blasst": {"statistics": true}}']
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
    }
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(address, process)
            yield address
        except BaseException:
            print((tmp_path / "log").read_text()[-8000:])
            raise
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            finally:
                process.kill()


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no answer in {SECONDS} seconds")


def ask(address: str, **arguments) -> tuple[int, str]:
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **arguments}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_server(server):
    prompt = " ".join(f"w{3 + 7 * i % 500}" for i in range(900))
    status, answer = ask(server, prompt=prompt)
    assert status == 200
    calibrated = json.loads(answer)["choices"][0]["text"]
    thresholds = {"blasst_prefill_threshold": 0.0, "blasst_decode_threshold": 0.0}
    status, answer = ask(server, prompt=prompt, vllm_xargs=thresholds)
    assert status == 200
    status, answer = ask(server, prompt=prompt, vllm_xargs={"blasst_decode_threshold": 2})
    assert status == 400
    assert "blasst_decode_threshold is 2; it must be a number from 0 (dense) to 1" in answer
    status, answer = ask(server, prompt=prompt)
    assert (status, json.loads(answer)["choices"][0]["text"]) == (200, calibrated)
    with urllib.request.urlopen(f"{server}/metrics", timeout=SECONDS) as answer:
        metrics = answer.read().decode()
    label = 'layer="model.layers.1.self_attn.attn",phase="prefill"'
    [skipped] = [line for line in metrics.splitlines() if f"tiles_skipped_total{{{label}" in line]
    assert float(skipped.split()[-1]) > 0
