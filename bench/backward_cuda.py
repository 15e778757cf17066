"""Backward on a GPU of compute capability 9.0, dense and sparse, beside torch's own.

    python bench/backward_cuda.py --rounds 3

Every line checks gradients first, against those of torch's flash attention, which is dense: what a
threshold drops of these inputs is far below the rounding. Rates are the five products of a dense
backward divided by the time of one call, in steady state; contenders take turns. The last columns
say what a forward costs that reports LSE and kept tiles for the backward, beside one that does not.
"""

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from prefill_cuda import THRESHOLD, Work, milliseconds, planted
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blasst import attention

WORKS = (
    Work(1, 8192, 32, 8),
    Work(1, 16384, 32, 8),
    Work(1, 65536, 16, 4),
    Work(1, 8192, 16, 16),
    Work(1, 16384, 32, 8, 64),
    Work(1, 16384, 16, 4, 256),
)
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def backward_of(out: Tensor, inputs: list[Tensor], dout: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def peer(backend: SDPBackend, inputs: list[Tensor], dout: Tensor) -> Callable[[], list[Tensor]]:
    """The backward of torch's attention, on [batch, heads, length, dim]."""
    q, k, v = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return backward_of(out, [q, k, v], dout.transpose(1, 2).contiguous())


def largest_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Of dq, dk and dv, relative."""
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))


def measure(work: Work, sparsity: float, rounds: int, turn: float) -> dict[str, object]:
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in planted(work, sparsity)]
    dout = torch.randn_like(inputs[0])
    dense = attention(*inputs, causal=True)
    sparse = attention(*inputs, causal=True, threshold=THRESHOLD, return_stats=True)
    runs = {
        "dense": backward_of(dense, inputs, dout),
        "sparse": backward_of(sparse.out, inputs, dout),
    }
    unavailable = {}
    for name, backend in PEERS.items():
        try:
            runs[name] = peer(backend, inputs, dout)
            runs[name]()
        except RuntimeError as error:
            runs.pop(name, None)
            unavailable[name] = str(error).partition("\n")[0]
    wanted = [t.transpose(1, 2).float() for t in runs["flash"]()]
    errors = {
        name: largest_error([t.float() for t in runs[name]()], wanted)
        for name in ("dense", "sparse")
    }
    plain = [t.detach() for t in inputs]
    forward = {
        "forward": lambda: attention(*plain, causal=True, threshold=THRESHOLD),
        "forward_reporting": lambda: attention(*inputs, causal=True, threshold=THRESHOLD),
    }
    times = milliseconds(runs, rounds, turn) | milliseconds(forward, rounds, turn)
    operations = 2.5 * work.operations
    skipped = sparse.stats.skipped.sum().item() / sparse.stats.visitable.sum().item()
    return {
        "work": work.name,
        "sparsity": round(skipped, 4),
        "milliseconds": times,
        "tflops": {name: operations / times[name] / 1e9 for name in runs},
        "errors": errors,
        "unavailable": unavailable,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=150, help="milliseconds of each")
    parser.add_argument("--works", type=int, nargs="+", default=list(range(len(WORKS))))
    parser.add_argument("--json", help="a file to write")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TFLOP/s (dense operations)")
    lines = []
    for index in options.works:
        for sparsity in options.sparsity:
            line = measure(WORKS[index], sparsity, options.rounds, options.turn)
            lines.append(line)
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in line["tflops"].items())
            ms = line["milliseconds"]
            print(
                f"{line['work']}, {line['sparsity']:.1%}: {rates}; sparse / dense "
                f"{ms['dense'] / ms['sparse']:.2f}x; errors {line['errors']['dense']:.1e}, "
                f"{line['errors']['sparse']:.1e}; forward {ms['forward']:.2f} ms, with reports "
                f"{ms['forward_reporting']:.2f}",
                flush=True,
            )
            for name, why in line["unavailable"].items():
                print(f"  {name}: {why}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
