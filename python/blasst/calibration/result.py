"""What a calibration found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from blasst.config import SparseAttention, parse


@dataclass(frozen=True)
class Candidate:
    """An order and a way to share thresholds, tried on the whole model."""

    phase: str
    target: float
    order: str
    heads: str
    sparsity: float
    """Reached on the validation prompt."""
    kl: float
    """Mean KL divergence of the next token's distribution from dense, nats."""
    top1: float
    """Share of positions with the same likeliest next token as dense."""
    perplexity_ratio: float
    """Perplexity over dense perplexity."""
    chosen: bool = False
    below: int = 0
    """Stands in for the chosen one where the keys are fewer: its order reaches the target there."""


@dataclass(frozen=True)
class HeldOut:
    """Sparsity at a length that no fit has seen."""

    phase: str
    length: int
    target: float
    achieved: float
    law: float | None
    """What the ecosystem's law (forward order, one threshold) reaches there, if there is one."""


@dataclass
class Calibration:
    """What `calibrate` found."""

    config: SparseAttention
    candidates: list[Candidate] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    saturated: list[tuple[str, int, float, float]] = field(default_factory=list)
    """Phase, length, target and the highest sparsity there, where threshold 1 stays below it."""
    ecosystem: SparseAttention | None = None
    """The same model under the paper's scheme alone: forward order, one threshold, power 1."""

    def to_dict(self) -> dict[str, Any]:
        """For a file; `from_dict` reads it."""
        return {
            "config": self.config.to_dict(),
            "ecosystem": self.ecosystem.to_dict() if self.ecosystem else None,
            "candidates": [asdict(c) for c in self.candidates],
            "held_out": [asdict(h) for h in self.held_out],
            "saturated": self.saturated,
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Calibration":
        """What `to_dict` wrote."""
        return cls(
            parse(kept["config"]),
            [Candidate(**c) for c in kept["candidates"]],
            [HeldOut(**h) for h in kept["held_out"]],
            [tuple(s) for s in kept["saturated"]],
            parse(kept["ecosystem"]) if kept["ecosystem"] else None,
        )
