"""One key among very many, over caches in 8 bits: for the CPU's tests and the GPU's."""

import functools
import math

import torch

from blasst import attention

FP8, INT8 = torch.float8_e4m3fn, torch.int8
KEYS = 131_072
PLACES = [0, 50_000, KEYS - 1]


def check_needle(pair, dim, at, *, close, dtype=torch.float32, device="cpu"):
    """Decode over 128K keys, of which the one at `at` weighs as much as all others together.

    Args:
        pair: types of k and v; None: of q.
        dim: of a head.
        at: index of the needle.
        close: relative error of the output, against double precision.
        dtype: of q.
        device: to run on.
    """
    generator = torch.Generator().manual_seed(7)
    k, v = torch.randn(2, 1, KEYS, 1, dim, generator=generator)
    q = torch.randn(dim, generator=generator).to(dtype)
    one = q.float()
    k[0, at, 0] = one * (math.log(KEYS) + 0.5) * dim**0.5 / one.square().sum()
    small, numbers, given = [], [], {}
    for name, kind, t in zip(("k_scale", "v_scale"), pair, (k, v), strict=True):
        if kind is None:
            small.append(t.to(dtype))
            numbers.append(t.to(dtype).double())
            continue
        given[name] = scale = (t.abs().max() / (448 if kind == FP8 else 127)).item()
        units = t / scale
        small.append((units.round().clamp(-127, 127) if kind == INT8 else units).to(kind))
        numbers.append(small[-1].double() * scale)
    k, v = (t[0, :, 0] for t in numbers)
    wanted = (k @ q.double() * dim**-0.5).softmax(0) @ v
    run = functools.partial(
        *(attention, q.to(device).expand(1, 1, 8, dim), *(t.to(device) for t in small)),
        **{"phase": "decode", "causal": True, "return_stats": True, **given},
    )
    out = run().out[0, 0].double().cpu()
    assert ((out - wanted).norm(dim=-1) / wanted.norm() < close).all()
    share = v[at] / v[at].square().sum()
    assert 0.4 < wanted @ share < 0.7
    sparse = run(threshold=1.0)
    assert sparse.stats.sparsity > 0.3
    assert (sparse.out[0, 0].double().cpu() @ share > 0.6).all()
