"""What an evaluation measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blasst.config import SCORES
from blasst.hf.reading import CHUNK, check_chunk
from blasst.ops.arguments import check_choice, check_whole_number, is_number, whole_numbers

TARGETS = (0.0, 0.25, 0.5, 0.65, 0.75, 0.85)
"""Enough for a curve."""
SHORTEST = 256
"""Prompts of fewer tokens have no room for their question."""


@dataclass(frozen=True)
class Options:
    """What is measured, and how much of it."""

    targets: Sequence[float]
    """Shares of the tiles to skip, of prefill and of decode; 0: dense."""
    length: int
    """Tokens of every prompt and text."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """For perplexity and agreement with dense, by name."""
    chunk: int | None = CHUNK
    """Tokens of a prompt or text that are read at once, a multiple of 128; None: all."""
    every: int = 1
    """Compare texts with dense at every so many positions."""
    needles: int = 0
    """Prompts with a fact to find, of each length: at as many depths."""
    needle_lengths: Sequence[int] = ()
    """Of these prompts, the answer included; (): `length`."""
    timed_lengths: Sequence[int] = ()
    """Of prompts whose prefill is timed, with torch's attention too."""
    repeats: int = 3
    """Of each of these."""
    prompt_targets: Sequence[float] | None = None
    """Those of `targets` at which these two kinds of prompts are read; None: all."""
    other_lengths: Sequence[int] = ()
    """Where only sparsity is measured."""
    length_prompts: int = 1
    """Prompts at each of these, of one kind after the other."""
    tasks: Sequence[str] = ()
    """Names of lm-eval tasks."""
    limit: int = 10
    """Documents of each task."""
    with_calibrated: bool = True
    """Measure the calibrated thresholds alone, beside other methods."""
    scores: Sequence[str] | None = None
    """How prefill computes scores under the calibrated thresholds: "exact", "int8" or both; None:
    as the model's configuration says. With "int8" a dense pass with int8 scores is measured too.
    Dense itself is exact."""
    paper_targets: Sequence[float] = ()
    """At which texts are measured under the paper's scheme too."""

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_chunk(self.chunk)
        if self.scores is not None and not self.scores:
            raise ValueError(f"scores is empty; choose from {', '.join(SCORES)}")
        for scores in self.scores or ():
            check_choice("scores", scores, SCORES)
        for target in self.targets:
            if not is_number(target):
                raise TypeError(f"target sparsity is {target!r}; it must be a number, 0 to 1")
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
        for name in ("length", "every", "length_prompts", "limit", "repeats"):
            check_whole_number(name, getattr(self, name))
        check_whole_number("needles", self.needles, least=0)
        for name in ("needle_lengths", "timed_lengths", "other_lengths"):
            whole_numbers(name, getattr(self, name))


def shorter_lengths(length: int) -> list[int]:
    """Up to four, from a quarter of the evaluated length on: where sparsity is measured too."""
    shorter = (length * eighths // 8 for eighths in (2, 3, 4, 6))
    return [n for n in shorter if n >= SHORTEST]


def parts_of(length: int, count: int) -> list[int]:
    """The evaluated length, half of it, a quarter and so on: the longest last."""
    shorter = [length >> halved for halved in range(count - 1, 0, -1)]
    return [*(n for n in shorter if n >= SHORTEST), length]
