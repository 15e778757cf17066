"""What a model loses and gains at several target sparsities, next to dense."""

from blasst.evaluation.options import Options, parts_of, shorter_lengths
from blasst.evaluation.runner import evaluate

__all__ = ["Options", "evaluate", "parts_of", "shorter_lengths"]
