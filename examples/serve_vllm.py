"""A server of vLLM with blasst, asked once densely and once by its calibration.

    python examples/serve_vllm.py MODEL TEXT

MODEL is a folder or a hub name, calibrated (`blasst calibrate MODEL --out FOLDER`) or not, TEXT a
file of several thousand tokens. Needs `pip install 'blasst[vllm]'`. The same by hand:

    vllm serve MODEL --attention-backend CUSTOM \
        --logits-processors blasst.integrations.vllm:Requests \
        --additional-config '{"blasst": {"prefill": {"threshold": 0.003}}}'
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server(model: str, threshold: float | None, port: int, more: list[str]) -> Iterator[str]:
    """Its address, until the end of the block."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--attention-backend", "CUSTOM"]
    command += ["--logits-processors", "blasst.integrations.vllm:Requests"]
    options: dict = {"statistics": True}
    if threshold is not None:
        options |= {phase: {"threshold": threshold} for phase in ("prefill", "decode")}
    command += ["--additional-config", json.dumps({"blasst": options}), *more]
    with subprocess.Popen(command) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            while not answers(address):
                if process.poll() is not None:
                    raise SystemExit("the server ended; what it said stands above")
                time.sleep(1)
            yield address
        finally:
            process.send_signal(signal.SIGINT)


def answers(address: str) -> bool:
    """Whether the server is ready."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def complete(address: str, prompt: str, new_tokens: int, **thresholds: float) -> str:
    """What the model writes next."""
    body = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body | {"vllm_xargs": thresholds}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["text"]


def main() -> None:
    """Prints both continuations of the text and how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--threshold", type=float, help="instead of the model's calibration")
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--port", type=int, default=8000)
    arguments, more = parser.parse_known_args()
    prompt = arguments.text.read_text()
    dense = {"blasst_prefill_threshold": 0.0, "blasst_decode_threshold": 0.0}
    with server(arguments.model, arguments.threshold, arguments.port, more) as address:
        for name, thresholds in (("dense", dense), ("sparse", {})):
            start = time.perf_counter()
            text = complete(address, prompt, arguments.new_tokens, **thresholds)
            print(f"{name}, {time.perf_counter() - start:.1f} s: {text}")


if __name__ == "__main__":
    main()
