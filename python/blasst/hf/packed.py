"""Packed sequences: several that share the rows of a batch, one after the other.

They show in `cu_seq_lens_q`, or in `position_ids` that start anew. Transformers' own masks look at
position_ids only without a cache and a mask; here a sequence never sees another one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.hf import positions
from blasst.hf.masks import PACKED_COMPILED, KeyRanges, noted, ranges_when_compiled, require

BEHIND_OTHERS = (
    "position_ids say that a sequence starts behind other tokens in the cache; packed sequences "
    "must be passed whole, in one pass, and cannot be continued"
)


class Sequences(NamedTuple):
    """Where the sequences lie among the rows, and among the keys, of a batch laid end to end."""

    ends_q: Tensor
    """[sequences + 1] int32: first row of each."""
    ends_k: Tensor
    """[sequences + 1] int32: first key of each."""
    lengths_q: list[int] | None
    """Rows of each; None while a pass is being compiled."""
    lengths_k: list[int] | None
    rows: Tensor | None = None
    """The rows that belong to a sequence at all; None: all."""
    keys: Tensor | None = None
    """The same of the keys."""

    def of_rows(self, query: Tensor) -> Tensor:
        """[rows, heads, head_dim] of [batch, query_length, heads, head_dim]."""
        flat = query.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def of_keys(self, key: Tensor) -> Tensor:
        """[keys, heads, head_dim] of [batch, keys, heads, head_dim]."""
        flat = key.flatten(0, 1)
        return flat if self.keys is None else flat[self.keys]

    def spread(self, out: Tensor, batch: int, queries: int) -> Tensor:
        """[batch, queries, heads, value_dim] of [rows, heads, value_dim]; 0 outside sequences."""
        if self.rows is not None:
            whole = out.new_zeros(batch * queries, *out.shape[1:])
            out = whole.index_copy(0, self.rows, out)
        return out.unflatten(0, (batch, queries))


def find(
    mask: Tensor | None, causal: bool, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Sequences | None:
    """The packed sequences of an attention call; None: each request is one.

    Args:
        mask: what `key_ranges` returned, or None.
        causal: whether the call is.
        query: [batch, heads, query_length, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids` are looked at; position_ids that
            a layer is not told, its mask knows.

    Raises:
        ValueError: lengths that are not those of query and key.
        NotSupportedError: sequences behind others in a cache.
    """
    ends = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if any(given is not None for given in ends):
        return _given(*ends, query, key)
    rows = query.shape[2]
    position_ids = _positions(mask, query.shape[0], rows, kwargs)
    if mask is not None and not isinstance(mask, KeyRanges):
        seen = noted(mask)
        # A trace keeps nothing, and torch 2.11 knows no id of a tensor there.
        if torch.compiler.is_compiling() or id(position_ids) not in seen:
            _refuse_compiled(ranges_when_compiled(mask, rows, causal), position_ids, rows)
            if not torch.compiler.is_compiling():
                seen[id(position_ids)] = position_ids
        return None
    if position_ids is None:
        return None
    if mask is None:
        mask = KeyRanges.plain(query.shape[0], rows, key.shape[2], causal, query.device)
    token = id(position_ids)
    if token not in mask.packed:
        found = _from_positions(mask, position_ids, rows, key.shape[2])
        mask.packed[token] = (position_ids, found)
    return mask.packed[token][1]


def _positions(mask: Tensor | None, batch: int, rows: int, kwargs: dict[str, Any]) -> Tensor | None:
    """position_ids [1 or batch, rows] that the layer is told, or else those its mask knows."""
    told = kwargs.get("position_ids")
    if positions.of_text(told, batch, rows):
        return told
    known = None if torch.compiler.is_compiling() else getattr(mask, "positions", None)
    return known if positions.of_text(known, batch, rows) else None


def _refuse_compiled(ranges: Tensor, position_ids: Tensor | None, rows: int) -> None:
    """Checks in the graph of a compiled pass that each request is one sequence."""
    if position_ids is None:
        require((ranges[:, 2] >= 0).all(), PACKED_COMPILED)
        return
    ranges = torch.cat([ranges[:, :2], ranges[:, 2:3].abs(), ranges[:, 3:]], 1)
    requests = ranges.shape[0]
    position_ids = position_ids.expand(requests, -1)
    used = positions.used(ranges, rows)
    require(positions.starts(position_ids, used).sum() <= requests, PACKED_COMPILED)
    require(~positions.begin_later(ranges, position_ids, used).any(), BEHIND_OTHERS)


def _given(ends_q: Tensor | None, ends_k: Tensor | None, query: Tensor, key: Tensor) -> Sequences:
    """What the caller says, looked at once a pass."""
    known = getattr(ends_q, "blasst_sequences", None)
    if known is not None and known[0] is ends_k and known[1] == (query.shape[2], key.shape[2]):
        return known[2]
    for name, ends, length in (
        ("cu_seq_lens_q", ends_q, query.shape[2]),
        ("cu_seq_lens_k", ends_k, key.shape[2]),
    ):
        if not isinstance(ends, Tensor):
            raise TypeError(f"{name} is a {type(ends).__name__}; cu_seq_lens_q and cu_seq_lens_k "
                            "are needed both, tensors [sequences + 1]")  # fmt: skip
        if ends.dim() != 1 or query.shape[0] != 1:
            raise ValueError(
                f"{name} is {list(ends.shape)} for a batch of {query.shape[0]}; it must be "
                "[sequences + 1], for one request that holds them all"
            )
        require(
            ends[-1] == length,
            f"{name} must end at the {length} tokens of the batch",
        )
    both = ends_q.to(torch.int32), ends_k.to(torch.int32)
    if torch.compiler.is_compiling():
        return Sequences(*both, None, None)
    found = Sequences(*both, *(ends.diff().tolist() for ends in both))
    ends_q.blasst_sequences = ends_k, (query.shape[2], key.shape[2]), found
    return found


def _from_positions(
    mask: KeyRanges, position_ids: Tensor, rows: int, keys: int
) -> Sequences | None:
    """What position_ids say."""
    ranges = mask.ranges
    position_ids = position_ids.expand(len(ranges), -1)
    used = positions.used(ranges, rows)
    later = positions.begin_later(ranges, position_ids, used)
    if rows == 1:  # one sequence; a decode step does not wait for the device
        require(~later.any(), BEHIND_OTHERS, NotSupportedError, may_wait=False)
        return None
    starts = positions.starts(position_ids, used)
    several = starts.sum() > used.any(-1).sum()
    cached = positions.cached(ranges).any()
    later, several, cached = torch.stack([later.any(), several, cached]).tolist()
    if later or (several and cached):
        raise NotSupportedError(BEHIND_OTHERS)
    if not several or (not mask.causal and rows != keys):  # the latter: cross-attention
        return None
    row = used.flatten().nonzero()[:, 0]
    starting = starts.flatten()[row].nonzero()[:, 0]
    ends = torch.cat([starting, starting.new_tensor([len(row)])]).to(torch.int32)
    lengths = ends.diff().tolist()
    if len(row) == used.numel() and rows == keys:
        return Sequences(ends, ends, lengths, lengths)
    request = row // rows
    key = row + request * (keys - rows) + positions.offset(ranges)[request]
    return Sequences(ends, ends, lengths, lengths, row, key)
