"""How far a sparse model is from the dense one, position by position."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

PIECE = 128
"""Positions scored at once: their logits are PIECE times the vocabulary, which should be small
enough for malloc to use the same memory again."""
KEPT_BYTES = 1 << 30
"""Dense predictions up to this size are kept between comparisons, larger ones computed again."""
FLOAT = 4
"""Bytes of a float32."""
PIECES_AT_ONCE = 6
"""Of predictions: logits, the same in float32 and as probabilities, of both runs."""


def prediction_bytes(vocabulary: int, positions: int) -> int:
    """What comparing so many positions takes, besides the hidden states of both runs."""
    at_once = PIECES_AT_ONCE * PIECE * vocabulary * FLOAT
    return _kept_bytes(vocabulary, positions) + at_once


def _kept_bytes(vocabulary: int, positions: int) -> int:
    """Of the dense predictions at so many positions; 0: they are computed again each time."""
    size = positions * vocabulary * FLOAT
    return size if size <= KEPT_BYTES else 0


@dataclass(frozen=True)
class Agreement:
    """Of two runs of a model over the same tokens."""

    kl: float
    """Mean KL divergence of the next token's distribution from dense, nats."""
    top1: float
    """Share of positions with the same likeliest next token."""
    perplexity: float
    dense_perplexity: float
    cost: Tensor = field(compare=False)
    """[positions]: by how much the next token is less likely than after dense, nats."""


class DenseRun:
    """What a model predicts when it attends densely: other runs are compared with it."""

    def __init__(
        self, model: PreTrainedModel, hidden: Tensor, tokens: Tensor, *, every: int = 1
    ) -> None:
        """Take a dense run.

        Args:
            model: for its output layer.
            hidden: [length, hidden] last hidden states.
            tokens: [length] what was read.
            every: compare at every so many positions.
        """
        self._model, self._hidden = model, hidden
        tokens = tokens.to(hidden.device)
        positions = torch.arange(0, len(tokens) - 1, every)
        self._pieces = [(piece, tokens[piece + 1][:, None]) for piece in positions.split(PIECE)]
        self._count = len(positions)
        kept = _kept_bytes(model.config.get_text_config().vocab_size, self._count)
        self._kept = list(self._predictions(hidden)) if kept else None

    def _predictions(self, hidden: Tensor) -> Iterator[Tensor]:
        for piece, _ in self._pieces:
            yield log_probabilities(self._model, hidden[piece])

    def compare(self, hidden: Tensor) -> Agreement:
        """Compare the [length, hidden] last hidden states of another run over the same tokens."""
        dense = self._predictions(self._hidden) if self._kept is None else self._kept
        divergence = same = 0.0
        losses, dense_losses = [], []
        for expected, found, (_, tokens) in zip(
            dense, self._predictions(hidden), self._pieces, strict=True
        ):
            targets = tokens.to(expected.device)  # another than hidden's, if the model has several
            same += (expected.argmax(-1) == found.argmax(-1)).sum().item()
            dense_losses.append(-expected.gather(1, targets)[:, 0])
            losses.append(-found.gather(1, targets)[:, 0])
            divergence -= torch.linalg.vecdot(expected.exp(), found.sub_(expected)).sum().item()
        loss, dense_loss = torch.cat(losses), torch.cat(dense_losses)
        return Agreement(
            divergence / self._count,
            same / self._count,
            math.exp(loss.double().mean()),
            math.exp(dense_loss.double().mean()),
            (loss - dense_loss).cpu(),
        )


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[positions, hidden] -> [positions, vocabulary] float32."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, -1)
