"""Backward on a GPU of compute capability 9.0, dense and sparse, beside that of others.

    python bench/backward_cuda.py --rounds 3

Dense: torch's FlashAttention-2 and cuDNN, FlashAttention-4 (flash-attn-4), also its deterministic
mode, and FSA (flash-sparse-attn). Sparse: FSA, which decides anew in its backward, and cuDNN's
block-sparse attention (nvidia-cudnn-frontend) over the tiles that the forward kept, as blocks of
64 x 64 or 128 x 128; it has as many KV heads as heads, and its blocks have no causal mask inside.
Where values have fewer elements than keys, flash attention gets them padded with zeros.

Every line checks gradients first, against those of torch's flash attention, which is dense: what a
threshold drops of these inputs is far below the rounding. Rates are the five products of a dense
backward divided by the time of one call, in steady state; contenders take turns. The last columns
say what a forward costs that reports LSE and kept tiles for the backward, beside one that does not.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers import FSA_THRESHOLD, installed, reason
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
    Work(1, 16384, 32, 32, 192, value_dim=128),
    Work(1, 8192, 16, 16, causal=False),
)
OF_TORCH = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SPARSE = ("FSA", "BSA 64", "BSA 128")
"""Whose rates stand beside our sparse one; all others' beside our dense one."""

Backward = Callable[[], list[Tensor]]
"""dq, dk and dv: [batch, length, heads, dim], torch's and BSA's [batch, heads, length, dim]."""


def backward_of(out: Tensor, inputs: list[Tensor], dout: Tensor) -> Backward:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


class Peers:
    """The backward of others on the same inputs, q, k and v of [batch, length, heads, dim]."""

    def __init__(self, work: Work, inputs: list[Tensor], dout: Tensor, kept: Tensor):
        self.work, self.dout, self.kept = work, dout, kept
        self.inputs = [t.detach() for t in inputs]

    def by_heads(self) -> tuple[list[Tensor], Tensor]:
        """q, k and v, and dout, as [batch, heads, length, dim]."""
        *inputs, dout = (t.transpose(1, 2).contiguous() for t in (*self.inputs, self.dout))
        return inputs, dout

    def of_torch(self, backend: SDPBackend) -> Backward:
        inputs, dout = self.by_heads()
        inputs = [t.requires_grad_() for t in inputs]
        q, k, v = inputs
        if backend == SDPBackend.FLASH_ATTENTION:
            v = F.pad(v, (0, self.work.dim - self.work.values))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.work.causal, enable_gqa=True
            )
        return backward_of(out[..., : self.work.values], inputs, dout)

    def of_function(self, attend: Callable[..., Any], **options: Any) -> Backward:
        """`attend` gives the output and the LSE, which has no gradient here."""
        inputs = [t.clone().requires_grad_() for t in self.inputs]
        return backward_of(attend(*inputs, **options)[0], inputs, self.dout)

    def of_blocks(self, bsa: Any, size: int) -> Backward:
        """cuDNN's over kept tiles. It reads its own forward's output and LSE."""
        inputs, dout = self.by_heads()
        blocks = square_blocks(self.kept, self.work, size)
        options = {
            # The kept ones first, in order of the keys.
            "q2k_block_index": blocks.int().argsort(dim=-1, descending=True, stable=True).int(),
            "q2k_block_nums": blocks.sum(-1, dtype=torch.int32),
            "sparse_block_size": size,
        }
        out, lse = bsa.block_sparse_attention_forward(*inputs, **options)
        return lambda: list(bsa.block_sparse_attention_backward(dout, *inputs, out, lse, **options))

    def make(self, packages: dict[str, Any]) -> dict[str, Callable[[], Backward]]:
        """By name, what makes each."""
        causal = self.work.causal
        made: dict[str, Callable[[], Backward]] = {
            name: lambda backend=backend: self.of_torch(backend)
            for name, backend in OF_TORCH.items()
        }
        if fa4 := packages.get("FA4"):
            made["FA4"] = lambda: self.of_function(fa4, causal=causal)
            made["FA4 deterministic"] = lambda: self.of_function(
                fa4, causal=causal, deterministic=True
            )
        if fsa := packages.get("FSA"):
            made["FSA dense"] = lambda: self.of_function(fsa, is_causal=causal)
            made["FSA"] = lambda: self.of_function(
                fsa, is_causal=causal, softmax_threshold=FSA_THRESHOLD
            )
        if bsa := packages.get("BSA"):
            made["BSA 64"] = lambda: self.of_blocks(bsa, 64)
            made["BSA 128"] = lambda: self.of_blocks(bsa, 128)
        return made


def square_blocks(kept: Tensor, work: Work, size: int) -> Tensor:
    """[batch, heads, rows / size, keys / size] bool: the blocks that touch a kept tile.

    kept: [batch, heads, query tiles, key tiles] of rows x keys that divide size or are divided.
    """
    for dim in (2, 3):
        tile = work.length // kept.shape[dim]
        if tile > size:
            kept = kept.repeat_interleave(tile // size, dim)
        elif tile < size:
            kept = kept.unflatten(dim, (-1, size // tile)).any(dim + 1)
    return kept.tril() if work.causal else kept


def largest_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Of dq, dk and dv, relative."""
    errors = []
    for g, w in zip(got, wanted, strict=True):
        same = g if g.shape == w.shape else g.transpose(1, 2)
        errors.append(((same.float() - w.float()).norm() / w.float().norm()).item())
    return max(errors)


def measure(
    work: Work, sparsity: float, rounds: int, turn: float, packages: dict[str, Any]
) -> dict[str, object]:
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in planted(work, sparsity)]
    causal = work.causal
    dense = attention(*inputs, causal=causal)
    dout = torch.randn_like(dense)
    sparse = attention(
        *inputs, causal=causal, threshold=THRESHOLD, return_stats=True, return_tile_mask=True
    )
    runs = {
        "dense": backward_of(dense, inputs, dout),
        "sparse": backward_of(sparse.out, inputs, dout),
    }
    unavailable = {}
    for name, make in Peers(work, inputs, dout, sparse.tile_mask).make(packages).items():
        try:
            runs[name] = make()
            runs[name]()
        except Exception as error:  # whatever a peer dies of, the others are measured
            runs.pop(name, None)
            unavailable[name] = reason(error)
    wanted = runs["flash"]()
    errors = {
        name: largest_error(run(), wanted)
        for name, run in runs.items()
        if name != "flash" and not (causal and name.startswith("BSA"))
    }
    plain = [t.detach() for t in inputs]
    forward = {
        "forward": lambda: attention(*plain, causal=causal, threshold=THRESHOLD),
        "forward_reporting": lambda: attention(*inputs, causal=causal, threshold=THRESHOLD),
    }
    times = milliseconds(runs, rounds, turn) | milliseconds(forward, rounds, turn)
    # Three products of queries' and keys' elements, two of values', where a forward has one each.
    products = (3 * work.dim + 2 * work.values) / (work.dim + work.values)
    operations = products * work.operations
    skipped = sparse.stats.skipped.sum().item() / sparse.stats.visitable.sum().item()
    return {
        "work": work.name,
        "sparsity": round(skipped, 4),
        "milliseconds": times,
        "tflops": {name: operations / times[name] / 1e9 for name in runs},
        "errors": errors,
        "unavailable": unavailable,
    }


def show(line: dict[str, Any]) -> None:
    """Rates, ours over each peer's, and errors."""
    rate, ms = line["tflops"], line["milliseconds"]
    print(
        f"{line['work']}, {line['sparsity']:.1%}: dense {rate['dense']:.0f}, sparse "
        f"{rate['sparse']:.0f} ({rate['sparse'] / rate['dense']:.2f}x); forward "
        f"{ms['forward']:.2f} ms, with reports {ms['forward_reporting']:.2f}"
    )
    for ours, beside in (
        ("dense", [name for name in rate if name not in ("dense", "sparse", *SPARSE)]),
        ("sparse", [name for name in rate if name in SPARSE]),
    ):
        if beside:
            print(
                f"  {ours} beside "
                + ", ".join(f"{n} {rate[n]:.0f} ({rate[ours] / rate[n]:.2f}x)" for n in beside)
            )
    print("  errors " + ", ".join(f"{name} {e:.1e}" for name, e in line["errors"].items()))
    for name, why in line["unavailable"].items():
        print(f"  {name}: {why}")
    print(end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=150, help="milliseconds of each")
    numbered = "; ".join(f"{number}: {work.name}" for number, work in enumerate(WORKS))
    parser.add_argument(
        "--works", type=int, nargs="+", default=list(range(len(WORKS))), help=numbered
    )
    parser.add_argument("--json", help="a file to write")
    options = parser.parse_args()
    packages = installed("FA4", "FSA", "BSA")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TFLOP/s (dense operations)")
    lines = []
    for index in options.works:
        for sparsity in options.sparsity:
            lines.append(measure(WORKS[index], sparsity, options.rounds, options.turn, packages))
            show(lines[-1])
    if options.json:
        with open(options.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()
