"""Taking the time of what a model does."""

from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class Times(NamedTuple):
    """Of one answer, in seconds."""

    prefill: float
    decode: float
    """A token."""


class Clock(BaseStreamer):
    """Takes the time of the prompt and of each token; for `generate`, one request."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._at: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt before it is read, and then with each token."""
        self._at.append(now(self._device))

    def end(self) -> None:
        """Called after the last token."""

    @property
    def times(self) -> Times:
        """Once the answer is there."""
        began, prefilled, *later = self._at
        return Times(prefilled - began, (later[-1] - prefilled) / len(later) if later else 0.0)
