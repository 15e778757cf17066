"""How wrong a sparse pass over a text may be: the error bound of its rows."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.hf import Recording
from blasst.hf.tensor_parallel import Share
from blasst.ops.attention import Result

LIMITS = (0.01, 0.05, 0.2)
"""Bounds on the dropped mass below which rows are counted."""
WORST = 5
"""Tokens of a text that are named."""
BEFORE = 8
"""Tokens shown before each of these."""


class RowBounds(Recording):
    """Bounds on the mass dropped in every row of one prefill, whole or in chunks."""

    wants_bounds = True

    def __init__(self, layers: Collection[int]) -> None:
        """Record these layers; the others skip nothing."""
        super().__init__()
        self._layers = layers
        self._below: dict[int, Tensor] = {}
        self._by_token: dict[int, list[Tensor]] = {}

    def add(self, phase: str, layer: int, result: Result, share: Share | None) -> None:
        """Count one attention call; of a layer's calls, those of earlier tokens come first."""
        if share is not None:
            raise NotSupportedError(
                "error bounds of a tensor-parallel model are not supported: a process has those "
                "of its own heads only"
            )
        super().add(phase, layer, result, share)
        if phase != "prefill" or layer not in self._layers:
            return
        [bounds] = result.dropped_mass_bound  # [heads, rows], of one text
        below = bounds < bounds.new_tensor(LIMITS)[:, None, None]
        self._below[layer] = self._below.get(layer, 0) + below.float().mean(1).sum(1)
        self._by_token.setdefault(layer, []).append(bounds.mean(0))

    def by_token(self) -> Tensor:
        """[length] float32: mean over layers and heads."""
        layers = [torch.cat(parts).cpu() for parts in self._by_token.values()]
        return torch.stack(layers).mean(0)

    def below(self) -> list[float]:
        """Share of the rows of all layers and heads whose bound is below each of LIMITS."""
        length = len(self.by_token())
        layers = [counted.cpu() / length for counted in self._below.values()]
        return torch.stack(layers).mean(0).tolist()

    def summary(self, tokens: Tensor, tokenizer: Any) -> dict[str, Any]:
        """The shares, and the tokens with the largest bounds, with the text before them.

        Args:
            tokens: [length] what was read.
            tokenizer: which shows them.
        """
        bounds = self.by_token()
        largest, positions = bounds.topk(min(WORST, len(bounds)))
        return {
            "below": dict(zip(map(str, LIMITS), self.below(), strict=True)),
            "worst": [
                {
                    "token": position,
                    "text": tokenizer.decode(tokens[max(0, position - BEFORE) : position + 1]),
                    "bound": bound,
                }
                for position, bound in zip(positions.tolist(), largest.tolist(), strict=True)
            ],
        }
