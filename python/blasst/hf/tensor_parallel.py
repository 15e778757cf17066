"""Models whose heads are split over processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blasst.errors import NotSupportedError
from blasst.hf.layers import heads_of


@dataclass(frozen=True)
class Share:
    """The heads of a layer that this process holds."""

    first: int
    end: int
    total: int
    """Heads of the whole model."""
    group: "torch.distributed.ProcessGroup"
    """The processes that hold the others."""

    def of_thresholds(self, values: Any) -> Any:
        """This process's part of thresholds that `Threshold` takes for the whole model."""
        if values is None:
            return None
        values = torch.as_tensor(values, dtype=torch.float32)
        heads = 1 if values.dim() == 3 else -1  # [.., .., places], or [heads] and [.., heads]
        if values.dim() == 0 or values.shape[heads] == 1:
            return values
        if values.shape[heads] != self.total:
            raise ValueError(
                f"thresholds are {list(values.shape)}; the dimension of heads must be 1 or the "
                f"model's {self.total} heads (not only those of this process)"
            )
        return values.narrow(heads, self.first, self.end - self.first)

    def spread(self, own: Tensor, dim: int) -> Tensor:
        """This process's heads among zeros for the others, along `dim`."""
        shape = list(own.shape)
        shape[dim] = self.total
        whole = own.new_zeros(shape)
        whole.narrow(dim, self.first, self.end - self.first).copy_(own)
        return whole


def share_of(module: nn.Module, heads: int) -> Share | None:
    """Which of the layer's heads the `heads` are that this process has; None: all of them."""
    total = heads_of(module)
    if total in (heads, None) or not is_sharded(module):
        return None
    projection = getattr(getattr(module, "q_proj", None), "weight", None)
    mesh = getattr(projection, "device_mesh", None)
    name = type(module).__name__
    if mesh is None:
        raise NotSupportedError(
            f"{name} is split over processes and has no q_proj that is; blasst cannot tell which "
            "heads this process holds"
        )
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if heads * mesh.size() != total:
        raise NotSupportedError(
            f"{name} has {heads} of {total} heads on one of {mesh.size()} processes; blasst needs "
            "the same number on each"
        )
    first = heads * mesh.get_local_rank()
    return Share(first, first + heads, total, mesh.get_group())


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of this module are split over processes."""
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
