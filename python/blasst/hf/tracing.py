"""Passes whose numbers are not known while they are described: traced, or captured in a graph."""

import ctypes

import torch
from packaging.version import Version
from torch import nn

TRACES_CELLS = Version(torch.__version__) >= Version("2.12")
"""Whether torch can trace what is asked of a mask's functions; else each is taken as constant."""


def is_deferred(device: torch.device) -> bool:
    """Whether what is called now runs later: under torch.compile, or in a CUDA graph's capture.

    Tensors must not be read then, nor copied from the host.
    """
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_at_hand(device: torch.device) -> bool:
    """Whether reading a tensor there waits for no other device."""
    return device.type == "cpu"


def module_of(identity: int) -> nn.Module:
    """The live module that has this `id`.

    What a traced pass takes as constant it asks functions outside of the trace, which every torch
    can hand a number, but only later ones a module. The trace holds for this module alone, and
    keeps it alive: torch guards the `id`.
    """
    return ctypes.cast(identity, ctypes.py_object).value
