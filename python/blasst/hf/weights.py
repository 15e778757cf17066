"""Weights as they are stored: quantised ones are tensors of another kind, or hold several."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantised(weights: Tensor) -> bool:
    """Whether this wraps other tensors, and computes what a layer needs and often nothing else.

    What is sharded does not count.
    """
    return not hasattr(weights, "device_mesh") and is_traceable_wrapper_subclass(weights)


def stored(weights: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight consists of: itself, or those that a quantised one wraps."""
    if not is_quantised(weights):
        yield weights.detach()
        return
    names, _ = weights.__tensor_flatten__()
    for name in names:
        yield from stored(getattr(weights, name))


def weights_size(model: nn.Module) -> int:
    """Bytes."""
    return sum(part.nbytes for weights in model.parameters() for part in stored(weights))


def quantisation_of(model: nn.Module) -> str | None:
    """What Transformers has quantised the weights by, like "torchao"; None: they are not."""
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
