"""The processes that train one model together, as torchrun starts them, and the device of each."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blasst.hf.models import Loading

PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which calibrates alone."""


@dataclass(frozen=True)
class Processes:
    """All of them, seen from one."""

    count: int
    index: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier()

    def check_sharding(self) -> None:
        """A ValueError unless a model can be sharded: Accelerate would quietly copy it instead."""
        if self.count == 1 or self.device.type != "cuda":
            raise ValueError(
                f"fsdp is asked for with {self.count} process(es) on {self.device.type}; it shards "
                "a model among several, each with a GPU: torchrun --nproc-per-node N, --device cuda"
            )

    def first(self, work: Callable[[], object]) -> None:
        """The first process does something; none goes on before it is done."""
        if self.is_first:
            work()
        self.wait()

    def autocast(self, enabled: bool) -> AbstractContextManager[None]:
        """Products in bfloat16 where float32 weights are read."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, on the CPU; of a sharded one all processes must ask."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in model.state_dict().items()
    }


def processes_of(loading: Loading) -> tuple[Processes, Loading]:
    """The processes that this one is among, and how each loads the model that it trains.

    One runs on the CPU or on the first GPU, several on a GPU each, or all on the CPU. Weights are
    float32 unless another type is asked for.

    Raises:
        ValueError: a device that Transformers' Trainer would not take, a model that is spread over
            devices, fewer GPUs than processes.
    """
    if loading.device_map is not None:
        raise ValueError(
            f"device_map is {loading.device_map!r}; a model that is trained is on one device"
        )
    count = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = torch.device(loading.device or "cpu")
    if wanted.index:
        raise ValueError(
            f"device is {loading.device!r}; Transformers' Trainer takes the first GPU: pass "
            f"'cuda', with CUDA_VISIBLE_DEVICES={wanted.index} in the environment"
        )
    device, index = torch.device(wanted.type, 0) if wanted.type == "cuda" else wanted, 0
    if count > 1:
        index, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if wanted.type == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this machine has no GPU of its own; torch finds "
                    f"{torch.cuda.device_count()}"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo", timeout=PATIENCE)
    dtype = "float32" if loading.dtype == "auto" else loading.dtype
    return Processes(count, index, device), replace(loading, device=str(device), dtype=dtype)
