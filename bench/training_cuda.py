"""Training a Llama-shaped model with random weights on one GPU: tokens a second, sdpa and blasst.

    python bench/training_cuda.py --shape 1b --lengths 32768 65536

Weights are float32, products bfloat16, layers are checkpointed. Random weights have nothing to
skip, so sparsity is planted as in models_cuda.py. A line is a length and a share of skipped tiles:
seconds a step (forward, backward, AdamW) of one sample, the median of warm repeats with the lowest
and highest, tokens a second, attention's share of the step, from its calls alone, and what
attention alone predicts, with the share of the predicted gain over dense that is there.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from models_cuda import LIMIT, SHAPES, SPARSITIES, Planted, make_model, seconds
from torch import Tensor
from transformers import PreTrainedModel

import blasst
from blasst import Threshold
from blasst.hf.operator import calling
from blasst.versions import checkpoint_layers

PIECE = 4096
"""Tokens whose logits are computed at once."""


class Trained(Planted):
    """That, with a gradient of the model's keys, all of it computed and then 0."""

    def keys(self, k: Tensor) -> Tensor:
        """In place of the model's."""
        return super().keys(k).to(k.dtype) + 0 * k


def step_of(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """A training step. The loss is of pieces of the sequence, whose logits would not fit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            kept = hidden.detach().requires_grad_()
            for part, labels in zip(
                kept[:, :-1].split(PIECE, 1), ids[:, 1:].split(PIECE, 1), strict=True
            ):
                logits = model.lm_head(part).float()
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
                (loss / (ids.shape[1] - 1)).backward()
        hidden.backward(kept.grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def attention_alone(
    model: PreTrainedModel, length: int, attend: Callable[..., Tensor], repeats: int
) -> float:
    """Seconds of a step's attention: two forwards of each layer, as it is checkpointed, and a
    backward."""
    config = model.config
    shape = (1, length, config.num_attention_heads, config.head_dim)
    kv_shape = (1, length, config.num_key_value_heads, config.head_dim)
    q, k, v = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for s in (shape, kv_shape, kv_shape)
    )
    dout = torch.randn_like(q)

    def layer() -> None:
        with torch.no_grad():
            attend(q, k, v)
        torch.autograd.grad(attend(q, k, v), [q, k, v], dout)

    return statistics.median(seconds(layer, repeats)) * config.num_hidden_layers


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's, of tensors as blasst takes them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def measure(model: PreTrainedModel, length: int, repeats: int) -> list[dict]:
    """Lines of one length."""
    ids = torch.randint(model.config.vocab_size, (1, length), device="cuda")
    step, lines, dense = step_of(model, ids), [], None

    def add(what: str, skipped: float, alone: float) -> None:
        nonlocal dense
        times = seconds(step, repeats)
        found = statistics.median(times)
        line = {"length": length, "what": what, "skipped": skipped, "median": found}
        line |= {"lowest": times[0], "highest": times[-1], "attention": alone}
        if what == "blasst, dense":
            dense = line
        if what == "blasst":
            line["predicted"] = dense["median"] - dense["attention"] + alone
            line["reached"] = (dense["median"] - found) / (dense["median"] - line["predicted"])
        lines.append(line)
        print(shown(line), flush=True)

    model.set_attn_implementation("sdpa")
    add("torch sdpa", 0.0, attention_alone(model, length, sdpa, repeats))
    model.set_attn_implementation("blasst")
    for sparsity in (0.0, *SPARSITIES):
        operator = Trained(sparsity, length, model)
        limit = LIMIT if sparsity else None
        blasst.configure(model, prefill=Threshold(limit))
        with calling(operator):
            with blasst.record() as recording:
                step()
            alone = attention_alone(
                model,
                length,
                lambda q, k, v, attend=operator.attention, limit=limit: attend(
                    q, k, v, causal=True, threshold=limit, phase="prefill"
                ),
                repeats,
            )
            add("blasst" if sparsity else "blasst, dense", recording.sparsity("prefill"), alone)
    return lines


def shown(line: dict) -> str:
    """For a terminal."""
    text = (
        f"{line['length']:7d}  {line['what']:14s} {line['skipped']:6.1%}  {line['median']:7.3f} s "
        f"({line['lowest']:.3f} to {line['highest']:.3f})  "
        f"{line['length'] / line['median']:8.0f} tokens/s  "
        f"attention {line['attention'] / line['median']:.0%}"
    )
    if "predicted" in line:
        text += f"  predicted {line['predicted']:.3f} s, {line['reached']:.0%} of the gain"
    return text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--shape", choices=SHAPES, default="1b")
    options.add_argument("--layers", type=int)
    options.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    model = make_model(given.shape, given.layers, max(given.lengths)).float().train()
    checkpoint_layers(model, wanted=True)
    lines = [line for length in given.lengths for line in measure(model, length, given.repeats)]
    if given.out is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        given.out.write_text(json.dumps({**about, "lines": lines}))


if __name__ == "__main__":
    main()
