"""Which dimension of q, k and v holds the tokens, and which the heads."""

import torch
from torch import Tensor

LAYOUTS = ("[batch, tokens, heads, head_dim]", "[batch, heads, tokens, head_dim]")
_MANY_HEADS = 128  # hardly a model has more
_MOST_HEADS = 1024  # none has


def check_layout(q: Tensor, k: Tensor, *, tokens: int, causal: bool) -> None:
    """An error if dimensions 1 and 2 of q and k are surely the wrong way round.

    Args:
        q: of 4 dimensions, or it is not looked at.
        k: likewise.
        tokens: the dimension that holds the tokens, 1 or 2; the other one of these holds the heads.
        causal: the mask is causal, aligned bottom-right.
    """
    if q.dim() != 4 or k.dim() != 4 or torch.compiler.is_compiling():
        return
    heads = 3 - tokens
    as_given = q.shape[tokens], k.shape[tokens], q.shape[heads], k.shape[heads]
    turned = q.shape[heads], k.shape[heads], q.shape[tokens], k.shape[tokens]
    if _sensible(*as_given, causal) or not _sensible(*turned, causal):
        return
    meant, passed = LAYOUTS[tokens - 1], LAYOUTS[heads - 1]
    raise ValueError(
        f"q is {list(q.shape)} and k is {list(k.shape)}; they must be {meant}. These look like "
        f"{passed}: transpose dimensions 1 and 2"
    )


def _sensible(queries: int, keys: int, heads: int, kv_heads: int, causal: bool) -> bool:
    """Whether somebody may have meant this: also when it is unusual, but not when it cannot be."""
    if kv_heads == 0 or heads % kv_heads != 0:
        return False
    if heads > max(_MOST_HEADS, queries):
        return False
    # The first of more causal queries than keys see nothing: with that many heads, a mix-up.
    return not (causal and queries > keys and heads > max(_MANY_HEADS, queries))
