"""Keys in 8 bits that are made once, for every call over them."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from blasst.ops.arguments import check_tensors


class QuantizedKeys(NamedTuple):
    """What `quantize_keys` returns: about scale * (k @ H) = (keys - mean) rotated."""

    k: Tensor
    """Like the keys, int8."""
    scale: Tensor
    """[batch, kv_heads] float32, the k_scale of a call."""
    mean: Tensor
    """[batch, kv_heads, head_dim] float32: what was taken off every key before it was rotated."""


def quantize_keys(
    k: Tensor, *, mean: Tensor | None = None, scale: Tensor | None = None
) -> QuantizedKeys:
    """Keys as int8, for a cache that prefill and decode read as it is.

    A mean is taken off the keys of each request and KV head, they are rotated (`rotate`) and
    rounded in units of `scale`. Scores in int8 take these bytes as they are. Queries must be
    rotated, too:

    >>> keys = blasst.quantize_keys(k)
    >>> out = blasst.attention(blasst.rotate(q), keys.k, v, k_scale=keys.scale)

    The mean adds q.mean to all scores of a row, which neither softmax nor relative thresholds see.
    Where a score's level counts (LSE, sinks, soft cap, absolute thresholds) pass a mean of zeros.

    Args:
        k: [batch, keys, kv_heads, head_dim], float32, float16 or bfloat16.
        mean: of the keys before these in the same cache; default: that of k.
        scale: of the keys before these: larger ones are cut off at 127 units. Default: the largest
            element becomes 127.

    Raises:
        TypeError: k, mean or scale is no floating-point tensor.
        ValueError: shapes that do not fit each other, or tensors on different devices. On the CPU
            also numbers that are not finite, or a scale that is not positive: a GPU is not waited
            for.
    """
    check_tensors({"k": k}, {"mean": mean, "scale": scale})
    for name, t in (("k", k), ("mean", mean), ("scale", scale)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name} is {t.dtype}; it must be of a floating-point type")
    if k.dim() != 4 or not k.numel():
        raise ValueError(f"k is {list(k.shape)}; it must be [batch, keys, kv_heads, head_dim]")
    of_head = (k.shape[0], k.shape[2])
    for name, t, shape in (("mean", mean, (*of_head, k.shape[3])), ("scale", scale, of_head)):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} is {list(t.shape)}; for this k it must be {list(shape)}")
    check_finite("k", k)
    if mean is not None:
        check_finite("mean", mean)
    if scale is not None:
        _check("scale", scale, (scale > 0) & scale.isfinite(), "positive and finite")
    mean = (k.double().mean(1) if mean is None else mean).float()
    turned = rotate(k.float() - mean[:, None])
    if scale is None:
        scale = unit_of(turned.abs().amax((1, 3)), torch.int8)
    rounded = in_units(turned, scale[:, None, :, None], torch.int8)
    return QuantizedKeys(rounded, scale.float(), mean)


def check_finite(name: str, t: Tensor) -> None:
    """An error if a number is NaN or infinite, which 8 bits cannot say; on the CPU alone."""
    _check(name, t, t.isfinite(), "finite")


def _check(name: str, t: Tensor, good: Tensor, meaning: str) -> None:
    """An error that names the first number that is not good."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or good.all():
        return
    at = (~good).nonzero()[0].tolist()
    raise ValueError(f"{name}{at} is {t[tuple(at)].item()}; it must be {meaning}")


def rotate(x: Tensor) -> Tensor:
    """The last dimension times an orthonormal Hadamard matrix, computed in float32.

    Of the largest power of two that divides the dimension, in blocks. It is its own inverse and
    leaves dot products as they are; a few large channels are spread over all, so that rounding all
    in one unit costs less. Scores in int8 rotate what is not int8 once more, by Sylvester's matrix:
    the signs of this one are such that it then stays spread.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: it has no elements in the last dimension.
    """
    check_tensors({"x": x}, {})
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; it must be of a floating-point type")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must have an element at least")
    size = x.shape[-1] & -x.shape[-1]
    blocks = x.float().unflatten(-1, (-1, size))
    hadamard = _hadamard if torch.compiler.is_compiling() else _kept_hadamard
    return (blocks @ hadamard(size, x.device) * size**-0.5).flatten(-2).to(x.dtype)


_TWO = ((1, 1), (1, -1))
_FOUR = ((1, 1, 1, -1), (1, -1, 1, 1), (1, 1, -1, 1), (-1, 1, 1, 1))
"""Sylvester's with the signs of the last row and column turned: a product of the two has entries of
one magnitude, where Sylvester's with itself is the identity."""


def _hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] of 1 and -1, symmetric."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, device=device)
        while len(matrix) < size:
            signs = _FOUR if 4 * len(matrix) <= size else _TWO
            matrix = torch.cat([torch.cat([sign * matrix for sign in row], 1) for row in signs])
        return matrix


_kept_hadamard = cache(_hadamard)


LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Magnitude that numbers are scaled to, by type."""


def unit_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 unit in which this magnitude is the type's largest; 1 of zeros."""
    unit = largest.float() / LARGEST[dtype]
    return torch.where(unit == 0, 1.0, unit)


def in_units(x: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiples of a unit as that type, to the nearest, cut off at its largest magnitude."""
    number = (x.float() / unit).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (number.round() if dtype == torch.int8 else number).to(dtype)
