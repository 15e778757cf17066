"""What a fine-tuning run trains and measures."""

from dataclasses import dataclass
from enum import StrEnum


class Way(StrEnum):
    """How a model was trained, or is measured."""

    UNTRAINED = "untrained"
    DENSE = "dense"
    SPARSE = "sparse"


TRAINED = (Way.DENSE, Way.SPARSE)


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained and measured."""

    target: float = 0.75
    """Target sparsity at the end of the ramp, and of the measurement."""
    start: float = 0.4
    """Target sparsity of the first step."""
    ramp: int = 8
    """Steps from `start` to `target`."""
    steps: int = 30
    length: int = 2048
    """Tokens of a sample."""
    batch: int = 1
    """Samples a step, of all processes."""
    accumulate: int = 1
    """Passes, one after the other, that a step's samples are read in."""
    checkpointing: bool = False
    """Gradient checkpointing: keep what goes into a layer alone, and read it again backward."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer among processes with a GPU each."""
    learning_rate: float = 1e-4
    """At its highest; it falls to 0 along a cosine."""
    distill: bool = False
    """Sparse training learns what the untrained model predicts densely, in place of the samples'
    own tokens. Trained densely so, a model stays as it is: it is its own dense-trained model."""
    bf16: bool = False
    """Compute in bfloat16, on a GPU always; weights, optimizer and, measuring, the last layer stay
    float32."""
    save_every: int = 5
    """Steps between checkpoints."""
    windows: int = 1
    """Pieces of each held-out text that are measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target sparsity is {self.target}; it must be above 0, at most 1")
        if not 0 <= self.start <= self.target:
            raise ValueError(
                f"start sparsity is {self.start}; it must be 0 to the target, {self.target}"
            )
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning rate is {self.learning_rate}; it must be between 0 and 1")
        for name in ("ramp", "steps", "length", "batch", "save_every", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self.samples_a_pass(1)

    def samples_a_pass(self, processes: int) -> int:
        """Samples that a process reads at once.

        Raises:
            ValueError: a step's samples cannot be shared out evenly.
        """
        parts = processes * self.accumulate
        if self.accumulate < 1 or self.batch % parts:
            shared = f"{processes} processes of " if processes > 1 else ""
            raise ValueError(
                f"batch is {self.batch} for {shared}{self.accumulate} passes; it must be a "
                f"multiple of {max(parts, 1)}"
            )
        return self.batch // parts


@dataclass(frozen=True)
class Case:
    """One of the four: trained one way, measured one way."""

    trained: str
    measured: str
    sparsity: float
    """Reached, over all held-out windows."""
    perplexity: float
    """Over all held-out windows."""
    by_text: dict[str, float]
    """Perplexity of each text."""
