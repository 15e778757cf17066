"""Queries, keys and values of a few layers of a real model, for bench/prefill_cuda.py.

Runs the model on the CPU over the language reference that Python carries, and saves what its
attention is given: {layer: (q [1, length, heads, dim], k, v [1, length, kv_heads, dim])}, bfloat16.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from blasst import prompts
from blasst.hf import models


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "model", nargs="?", default="smollm2", help="as `python -m blasst` takes it"
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="*", default=[5, 15, 25])
    parser.add_argument("--out", type=Path, default=Path("build/qkv.pt"))
    arguments = parser.parse_args()
    recorded: dict[int, tuple[Tensor, ...]] = {}

    def record(module, query, key, value, *args, **options):
        if module.layer_idx in arguments.layers:
            recorded[module.layer_idx] = tuple(
                t.transpose(1, 2).bfloat16().contiguous() for t in (query, key, value)
            )
        return sdpa_attention_forward(module, query, key, value, *args, **options)

    AttentionInterface.register("record", record)
    AttentionMaskInterface.register("record", masking_utils.sdpa_mask)
    loaded = models.load(arguments.model, attention="record")
    ids = loaded.tokenizer(prompts.reference_text(), return_tensors="pt").input_ids[
        :, : arguments.length
    ]
    if ids.shape[1] < arguments.length:
        parser.error(f"--length is {arguments.length}; the text has {ids.shape[1]} tokens")
    with torch.inference_mode():
        loaded.model(ids, logits_to_keep=1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    part = arguments.out.with_suffix(".part")
    torch.save(recorded, part)
    part.replace(arguments.out)
    print(f"{arguments.out}: layers {sorted(recorded)}, {arguments.out.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
