"""How far a sparse model is from the dense one, position by position."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

PIECE = 512
"""Positions scored at once: their logits are PIECE times the vocabulary."""


@dataclass(frozen=True)
class Agreement:
    """Of two runs of a model over the same tokens."""

    kl: float
    """Mean KL divergence of the next token's distribution from dense, nats."""
    top1: float
    """Share of positions with the same likeliest next token."""
    perplexity: float
    dense_perplexity: float


def agreement(
    model: PreTrainedModel, dense: Tensor, sparse: Tensor, tokens: Tensor, *, every: int = 1
) -> Agreement:
    """Compare two runs.

    Args:
        model: for its output layer.
        dense: [length, hidden] last hidden states of the dense run.
        sparse: the same of the other run.
        tokens: [length] what both read.
        every: score every so many positions.
    """
    divergence = same = loss = dense_loss = 0.0
    positions = torch.arange(0, len(tokens) - 1, every)
    for piece in positions.split(PIECE):
        expected = log_probabilities(model, dense[piece])
        found = log_probabilities(model, sparse[piece])
        divergence += (expected.exp() * (expected - found)).sum().item()
        same += (expected.argmax(-1) == found.argmax(-1)).sum().item()
        targets = tokens[piece + 1][:, None]
        dense_loss -= expected.gather(1, targets).sum().item()
        loss -= found.gather(1, targets).sum().item()
    n = len(positions)
    return Agreement(divergence / n, same / n, math.exp(loss / n), math.exp(dense_loss / n))


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[positions, hidden] -> [positions, vocabulary] float32."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, -1)
