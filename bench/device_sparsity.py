"""Sparsity of a calibrated model on a GPU, beside the same tiles worked out on the CPU.

    python bench/device_sparsity.py FOLDER --lengths 2048 8192 --target-sparsity 0.5 0.75

A model that `blasst calibrate` wrote reads a text and decodes its last tokens, twice: on the GPU in
bfloat16, by the kernel, and on the CPU in float32 (or `--dtype bfloat16`), in torch's own
operations on the kernel's tile shape, with decode's splits. A line is a target and a phase: the
share of tiles skipped on each, the largest difference of a layer, in points, and the seconds of
both. Nearly all of them are the CPU's: at 2,048 tokens of 135M weights a core takes about half a
minute a target, at 8,192 sixteen times as long.

    python -m blasst calibrate gemma3 --device cuda --target-sparsity 0.5 0.75 --out FOLDER

makes such a folder, of smollm2 or gemma3.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import blasst
from blasst.calibration.setup import operator_for
from blasst.hf.layers import PHASES
from blasst.hf.models import Loading, load, sparse_layers
from blasst.hf.operator import KERNELS, Operator, calling
from blasst.hf.recording import Recording
from blasst.hf.saving import calibration_in
from blasst.prompts.maker import evaluation_texts
from blasst.versions import cache_name

STEPS = 16


def read(model: PreTrainedModel, ids: Tensor, operator: Operator) -> Recording:
    """A prefill of all but the last tokens, which are decoded."""
    cache = DynamicCache(config=model.config)
    name, ids = cache_name(type(model)), ids.to(model.device)
    with calling(operator), blasst.record() as recording:
        model(ids[:, :-STEPS], **{name: cache})
        for i in range(ids.shape[1] - STEPS, ids.shape[1]):
            model(ids[:, i : i + 1], **{name: cache})
    return recording


def difference(phase: str, layers: Sequence[int], gpu: Recording, cpu: Recording) -> str:
    """Of what two runs skipped in these layers, in words."""
    there, here = (100 * run.sparsity(phase, layers) for run in (gpu, cpu))
    by_layer = [[100 * run.sparsity(phase, [i]) for i in layers] for run in (gpu, cpu)]
    most = max(abs(a - b) for a, b in zip(*by_layer, strict=True))
    return (
        f"GPU {there:.2f} %, CPU {here:.2f} %, {there - here:+.2f} points; of a layer at most "
        f"{most:.2f}"
    )


@torch.inference_mode()
def main() -> None:
    """Prints the lines."""
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--lengths", type=int, nargs="+", default=[2048])
    options.add_argument("--target-sparsity", type=float, nargs="+", default=[0.5, 0.75])
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = options.parse_args()
    gpu = load(str(given.folder), loading=Loading(device="cuda"))
    on_cpu = load(str(given.folder), loading=Loading(dtype=given.dtype)).model
    emulated = operator_for("cuda", on_cpu)
    layers = sparse_layers(on_cpu, calibration_in(on_cpu))
    name, text = next(iter(evaluation_texts().items()))
    whole = gpu.tokenizer(text, return_tensors="pt").input_ids
    print(emulated)
    for length, target in product(given.lengths, given.target_sparsity):
        ids = whole[:, :length]
        print(f"{ids.shape[1]} tokens of {name}, target {target:.0%}:")
        runs, taken = [], []
        for model, operator in ((gpu.model, KERNELS), (on_cpu, emulated)):
            with blasst.set_target(model, prefill=target, decode=target):
                began = perf_counter()
                runs.append(read(model, ids, operator))
                taken.append(perf_counter() - began)
        for phase in PHASES:
            found = difference(phase, layers, *runs)
            print(f"  {phase}: {found} ({taken[0]:.0f} s and {taken[1]:.0f} s)")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
