"""Training with the sparsity of inference: callbacks for the Trainer, and fine-tuning."""

from blasst.training.callbacks import FiniteGradients, SparsitySchedule

__all__ = ["FiniteGradients", "SparsitySchedule"]
