"""What an evaluation measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blasst.config import SCORES
from blasst.hf.reading import CHUNK, check_chunk
from blasst.ops.arguments import check_choice


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
    """Prompts with a fact to find."""
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
    scores: Sequence[str] = ("exact",)
    """How prefill computes scores under the calibrated thresholds: "exact", "int8" or both. With
    "int8" a dense pass with int8 scores is measured too. Dense itself is exact."""
    compare_paper: bool = False
    """Measure texts under the paper's scheme too."""

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_chunk(self.chunk)
        if not self.scores:
            raise ValueError(f"scores is empty; choose from {', '.join(SCORES)}")
        for scores in self.scores:
            check_choice("scores", scores, SCORES)
        for target in self.targets:
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
        for name, lowest in (("length", 1), ("every", 1), ("length_prompts", 1), ("limit", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")


def shorter_lengths(length: int) -> list[int]:
    """Up to four, from a quarter of the evaluated length on: where sparsity is measured besides it.

    Prompts of fewer than 256 tokens have no room for their question.
    """
    shorter = (length * eighths // 8 for eighths in (2, 3, 4, 6))
    return [n for n in shorter if n >= 256]
