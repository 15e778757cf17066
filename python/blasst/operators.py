"""Loads `torch.ops.blasst` and tells torch.compile, export and autograd what it needs to know."""

from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_ops.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing; run `make build` (source tree) or `pip install .`")
torch.ops.load_library(_LIBRARY)

GAP_BINS = 514


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    order: str,
    test: str,
    thresholds: Tensor | None,
    lse: bool,
    dropped_mass_bound: bool,
    tiles: bool,
    gaps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    rows = q.shape[0] * q.shape[1] if cu_seqlens_q is None else q.shape[0]

    def output(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        output(lse, (heads, rows), torch.float32),
        output(dropped_mass_bound, (heads, rows), torch.float32),
        output(tiles, (2, batch, heads), torch.int64),
        output(gaps, (heads, GAP_BINS), torch.int64),
    )


def _no_backward(*_: object) -> None:
    raise NotImplementedError(
        "blasst.attention has no backward pass: run it under torch.inference_mode(), or train with "
        "another attention"
    )


for _name in ("prefill", "decode"):
    torch.library.register_fake(f"blasst::{_name}", _fake)
    torch.library.register_autograd(f"blasst::{_name}", _no_backward)
