"""What is compared: schemes, each at some target sparsities."""

from dataclasses import dataclass
from enum import StrEnum

from blasst.percent import percent


class Scheme(StrEnum):
    """Schemes that need no method of their own; the others go by the name of their method."""

    SDPA = "torch sdpa"
    """Torch's attention, for its time alone."""
    DENSE = "dense"
    CALIBRATED = "calibrated"
    INT8 = "int8 scores"
    """The calibrated thresholds with scores in int8; at target 0 these alone."""
    PAPER = "forward, one threshold"
    """The paper's scheme, and the only one that the ecosystem's keys can express."""


@dataclass(frozen=True)
class Setting:
    """One column of the comparison."""

    scheme: str
    target: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.scheme}, {percent(self.target)}" if self.target else self.scheme

    @property
    def is_dense(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.scheme == Scheme.DENSE

    @property
    def key(self) -> tuple[str, float]:
        """Its part of a result's key."""
        return str(self.scheme), self.target


DENSELY = Setting(Scheme.DENSE, 0.0)
SDPA = Setting(Scheme.SDPA, 0.0)
