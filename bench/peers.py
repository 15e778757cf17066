"""Attention of others, which a GPU's benches measure beside their own where it is installed."""

import importlib
import textwrap
from typing import Any

PEERS = {  # name: package of PyPI, module, what is called of it
    "FA3": ("fa3-fwd", "fa3_fwd_interface", "flash_attn_func"),
    "FA4": ("flash-attn-4", "flash_attn.cute", "flash_attn_func"),
    "FSA": ("flash-sparse-attn", "flash_sparse_attn.ops.cute.interface", "flash_attn_func"),
    "BSA": ("nvidia-cudnn-frontend", "cudnn", "BSA"),
}
FSA_THRESHOLD = 1.0
"""FSA drops a tile whose weights are all below this number divided by the visible keys, each weight
relative to the softmax denominator so far (in its backward: to all of it). On planted inputs those
are the tiles that THRESHOLD drops."""


def installed(*names: str) -> dict[str, Any]:
    """Those of PEERS that can be imported; a line is printed for each that cannot."""
    found = {}
    for name in names:
        package, module, attribute = PEERS[name]
        try:
            found[name] = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a peer dies of, the others are measured
            print(f"{name}: not installed ({package}: {reason(error)})", flush=True)
    return found


def reason(error: Exception) -> str:
    """Its first line, in short."""
    line = str(error).strip().partition("\n")[0]
    return textwrap.shorten(line, 160, placeholder=" ...") or type(error).__name__
