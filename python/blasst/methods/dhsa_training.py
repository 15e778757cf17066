"""Training the boundary predictors of `dhsa` from a frozen model's keys, layer by layer.

A boundary is where a key is unlike the one before it: the lowest cosines between neighbours, one in
`size` of them. The predictor sees a window of keys on either side, so what it learns is the change
of a stretch, not of one key. A layer takes seconds; what is done is kept, so a training that was
stopped goes on at the next layer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.files import replace_file
from blasst.hf import set_policy
from blasst.hf.models import (
    attention_layers,
    check_length,
    identity,
    unwindowed_layers,
)
from blasst.hf.reading import read
from blasst.methods.dhsa import VERSION, Predictor, load_predictors, read_about
from blasst.policies import Call, Visit
from blasst.progress import Progress, silent
from blasst.prompts import reference_text, text_tokens

BATCH = 512
HELD_OUT = 0.1
"""Share of the positions, at the end, that is not trained on."""


@dataclass(frozen=True)
class PredictorPlan:
    """How predictors are trained."""

    size: int = 32
    """Keys a chunk, on average."""
    length: int = 2048
    """Tokens of a stretch of text that is read at once."""
    stretches: int = 8
    steps: int = 200
    window: int = 8
    features: int = 32
    hidden: int = 64

    def __post_init__(self) -> None:
        least = {"size": 2, "length": 128, "stretches": 1, "steps": 1, "window": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")


@dataclass(frozen=True)
class Trained:
    """A layer's predictor, and how it does on positions that it was not trained on."""

    predictor: Predictor
    precision: float
    """Of the boundaries that it finds, the share that are some."""
    recall: float
    """Of the boundaries, the share that it finds."""


class BoundaryModel(nn.Module):
    """The predictor, as `include/blasst/chunks.hpp` defines it."""

    def __init__(self, inputs: int, plan: PredictorPlan) -> None:
        super().__init__()
        self.shape = (inputs, plan.window, plan.features, plan.hidden)
        self.projection = nn.Parameter(torch.randn(inputs, plan.features) / inputs**0.5)
        # Most of the weight at the cut, where keys decide: a plain mean hides them.
        near = torch.full((plan.window,), 0.1 / plan.window)
        near[0] += 0.9
        self.right = nn.Parameter(near)
        self.left = nn.Parameter(near.flip(0))
        self.hidden = nn.Linear(4 * plan.features + 1, plan.hidden)
        self.last = nn.Linear(plan.hidden, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """[batch, window, inputs] keys on either side -> [batch] scores; above 0: a boundary."""
        left = (before @ self.projection).mT @ self.left
        right = (after @ self.projection).mT @ self.right
        cosine = functional.cosine_similarity(left, right, dim=-1)[:, None]
        x = torch.cat([left, right, left - right, left * right, cosine], -1)
        return self.last(self.hidden(x).relu())[:, 0]

    def packed(self) -> Predictor:
        """For the library."""
        parts = [self.projection, self.left, self.right, self.hidden.weight.T, self.hidden.bias]
        parts += [self.last.weight, self.last.bias]
        flat = torch.cat([part.detach().float().flatten() for part in parts])
        return Predictor(flat, self.shape)


class _Keys:
    """A policy that leaves attention as it is and keeps each layer's keys."""

    chooses_blocks: ClassVar[bool] = True

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def check(self, model: PreTrainedModel) -> None:
        pass

    def visit(self, call: Call) -> Visit:
        self.found.setdefault(call.layer, []).append(call.key[0].clone())
        return Visit()

    def to_dict(self) -> Mapping[str, str]:
        return {"kind": "keys"}


def labels_of(keys: Tensor, size: int) -> Tensor:
    """[tokens, kv_heads, head_dim] -> [tokens] bool: where a chunk should begin."""
    similarity = torch.ones(len(keys))
    similarity[1:] = functional.cosine_similarity(keys[:-1], keys[1:], dim=-1).mean(-1)
    return similarity <= torch.quantile(similarity[1:], 1 / size)


def train_layer(stretches: list[Tensor], plan: PredictorPlan, seed: int) -> Trained:
    """One layer's predictor.

    Args:
        stretches: [tokens, kv_heads, head_dim] each, float32 keys of a stretch of text.
        plan: how.
        seed: of the weights and the batches.
    """
    window = plan.window
    keys = torch.cat(stretches).flatten(1)
    numbers = torch.arange(len(keys)).split([len(k) for k in stretches])
    firsts = torch.cat([n[: len(n) - 2 * window + 1] for n in numbers])
    labels = torch.cat([labels_of(k, plan.size)[window : len(k) - window + 1] for k in stretches])
    cut = int(len(labels) * (1 - HELD_OUT))
    torch.manual_seed(seed)
    model = BoundaryModel(keys.shape[-1], plan)
    # Keys differ in size from layer to layer; the first weights absorb it.
    with torch.no_grad():
        model.projection /= keys.square().mean().sqrt().clamp(min=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def scores_of(at: Tensor) -> Tensor:
        windows = keys[firsts[at, None] + torch.arange(2 * window)]
        return model(windows[:, :window], windows[:, window:])

    positive = labels[:cut].nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / plan.steps)
        # A quarter of a batch are boundaries: rare as they are, they would hardly be seen.
        some = torch.randint(cut, (BATCH * 3 // 4,), generator=generator)
        rare = positive[torch.randint(len(positive), (BATCH // 4,), generator=generator)]
        at = torch.cat([some, rare])
        loss = functional.binary_cross_entropy_with_logits(scores_of(at), labels[at].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = torch.cat([scores_of(at) for at in torch.arange(len(labels)).split(BATCH)])
        # So many boundaries there were in the batches; now as many as there are in the text.
        excess = torch.quantile(scores[:cut], 1 - 1 / plan.size)
        model.last.bias -= excess
    found, wanted = scores[cut:] > excess, labels[cut:]
    right = (found & wanted).sum().item()
    return Trained(
        model.packed(), right / max(1, found.sum().item()), right / max(1, wanted.sum().item())
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    plan: PredictorPlan | None = None,
    text: str | None = None,
    progress: Progress = silent,
) -> dict[int, Trained]:
    """Train every layer's predictor and write them to `out`, whole or not at all.

    Layers with a sliding window get none.

    Args:
        model: loaded with `attn_implementation="blasst"`; stays as it is.
        tokenizer: its tokenizer.
        out: a safetensors file for `Dhsa(predictors=...)`. Layers that are done are kept in a file
            beside it, from which the same call goes on after an interruption.
        plan: default: `PredictorPlan()`.
        text: prose; default: `prompts.reference_text()`.
        progress: told what is being done.

    Raises:
        ValueError: a text too short, a model that runs another attention, or layers kept of another
            training.
    """
    plan = plan or PredictorPlan()
    text = reference_text() if text is None else text
    check_length(model, plan.length, "a stretch of text")
    about = {
        "version": VERSION,
        "model": identity(model),
        "plan": vars(plan),
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    partial = out.with_name(f"{out.name}.partial")
    kept = _read(partial, about) if partial.exists() else {}
    keys = _keys_of(model, tokenizer, plan, text, progress)
    layers = sorted(keys)
    for i, layer in enumerate(layers):
        progress("Boundary predictors", i / len(layers), f"layer {layer}")
        if layer not in kept:
            kept[layer] = train_layer([k.float() for k in keys.pop(layer)], plan, seed=layer)
            _write(partial, about, kept)
    _write(out, about, kept)
    partial.unlink()
    progress("Boundary predictors", 1.0, "")
    return kept


@torch.inference_mode()
def _keys_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PredictorPlan,
    text: str,
    progress: Progress,
) -> dict[int, list[Tensor]]:
    """Keys of each layer, a list of [tokens, kv_heads, head_dim]."""
    keys = _Keys()
    modules = attention_layers(model)
    before = {n: getattr(modules[n], "blasst_policy", None) for n in unwindowed_layers(model)}
    set_policy(model, keys, before)
    try:
        for i in range(plan.stretches):
            progress("Keys", i / plan.stretches, f"stretch {i + 1} of {plan.stretches}")
            tokens = text_tokens(tokenizer, text, plan.length, "the training text", i * plan.length)
            read(model, tokens)
    finally:
        for layer, policy in before.items():
            set_policy(model, policy, [layer])
    progress("Keys", 1.0, "")
    return keys.found


def _write(path: Path, about: dict, trained: Mapping[int, Trained]) -> None:
    shape = next(iter(trained.values())).predictor.shape
    scores = {str(layer): (t.precision, t.recall) for layer, t in trained.items()}
    metadata = {"blasst_chunks": json.dumps({**about, "shape": shape, "scores": scores})}
    tensors = {str(layer): t.predictor.weights for layer, t in trained.items()}
    replace_file(path, save(tensors, metadata=metadata))


def _read(path: Path, about: dict) -> dict[int, Trained]:
    kept = read_about(path)
    if any(kept[name] != value for name, value in about.items()):
        raise ValueError(
            f"{path} holds layers of another training (model, text or options); remove it, or "
            "choose another file"
        )
    return {n: Trained(p, *kept["scores"][str(n)]) for n, p in load_predictors(path).items()}
