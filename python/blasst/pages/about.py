"""On what something was measured."""

import torch
from torch import nn


def about_run(more: str, model: nn.Module | None = None) -> str:
    """One sentence on the machine, for a report.

    Args:
        more: sentences that follow.
        model: of the measurement, for its type and device; None: float32 on the CPU.
    """
    weight = torch.empty(0) if model is None else next(model.parameters())
    kind = str(weight.dtype).removeprefix("torch.")
    if weight.device.type == "cuda":
        where = torch.cuda.get_device_name(weight.device)
    else:
        where = f"{torch.get_num_threads()} CPU threads"
    return (
        f"{kind} on {where}, torch {torch.__version__}. {more} "
        "Sparsity: tiles skipped, of those that the causal mask leaves."
    )
