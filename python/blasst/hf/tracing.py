"""Passes whose numbers are not known while they are described: traced, or captured in a graph."""

import torch


def is_deferred(device: torch.device) -> bool:
    """Whether what is called now runs later: under torch.compile, or in a CUDA graph's capture.

    Tensors must not be read then, nor copied from the host.
    """
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
