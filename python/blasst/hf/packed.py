"""Packed sequences: several that share the rows of a batch, one after the other.

They show in `cu_seq_lens_q`, or in `position_ids` that start anew. Transformers' own masks look at
position_ids only without a cache and a mask; here a sequence never sees another one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blasst.errors import NotSupportedError
from blasst.hf import positions
from blasst.hf.layers import place_of
from blasst.hf.masks import (
    BEHIND_OTHERS,
    PACKED_COMPILED,
    KeyRanges,
    noted,
    ranges_when_compiled,
    require,
)

UNCLEAR = (
    "position_ids start anew within a pass: packed sequences, which these layers cannot be told "
    "apart by them; pass cu_seq_lens_q and cu_seq_lens_k, or each sequence as a request of its own"
)
ELSEWHERE = (
    "position_ids start anew within a pass: packed sequences, which {} would mix outside of "
    "attention, in recurrent or convolutional parts; pass each sequence as a request of its own"
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
    module: nn.Module,
    mask: Tensor | None,
    causal: bool,
    query: Tensor,
    key: Tensor,
    kwargs: dict[str, Any],
) -> Sequences | None:
    """The packed sequences of an attention call; None: each request is one.

    Args:
        module: the attention layer.
        mask: what `key_ranges` returned, or None.
        causal: whether the call is.
        query: [batch, heads, query_length, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids` are looked at; position_ids that
            a layer is not told, its mask knows, or the model around it.

    Raises:
        ValueError: lengths that are not those of query and key.
        NotSupportedError: sequences behind others in a cache, or that cannot be told apart.
    """
    ends = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if any(given is not None for given in ends):
        found = _given(*ends, query, key)
        _note_in_cache(mask, found)
        return found
    (batch, _, rows, _), keys = query.shape, key.shape[2]
    position_ids = _positions(mask, batch, rows, kwargs)
    of_model = None if position_ids is not None else positions.given(module.config)
    if rows == 1 or not positions.of_rows(of_model, batch, rows):
        of_model = None
    if mask is not None and not isinstance(mask, KeyRanges):
        seen = noted(mask)
        # A trace keeps nothing, and torch 2.11 knows no id of a tensor there.
        if torch.compiler.is_compiling() or id(position_ids) not in seen:
            ranges = ranges_when_compiled(mask, rows, causal)
            _refuse_compiled(ranges, position_ids, rows)
            if not torch.compiler.is_compiling():
                seen[id(position_ids)] = position_ids
            _refuse_unclear(ranges, of_model, rows)
        return None
    if position_ids is None and of_model is None:
        return None
    if mask is None:
        mask = KeyRanges.plain(batch, rows, keys, causal, query.device)
    found = _of_pass(mask, position_ids, of_model, rows, keys)
    if found is not None and not place_of(module).is_only_mixer:
        raise NotSupportedError(ELSEWHERE.format(type(module.config).__name__))
    _note_in_cache(mask, found)
    return found


def _note_in_cache(mask: Tensor | None, found: Sequences | None) -> None:
    """Lets masks of later passes know what the cache holds."""
    cache = getattr(mask, "cache", None)
    if cache is not None and found is not None and len(found.lengths_q or ()) > 1:
        cache.blasst_holds_several = True


def _of_pass(
    mask: KeyRanges, position_ids: Tensor | None, of_model: Tensor | None, rows: int, keys: int
) -> Sequences | None:
    """What `find` returns, found once a pass."""
    asked = of_model if position_ids is None else position_ids
    if id(asked) not in mask.packed:
        _refuse_unclear(mask.ranges, of_model, rows)
        found = None if position_ids is None else _from_positions(mask, position_ids, rows, keys)
        mask.packed[id(asked)] = asked, found
    return mask.packed[id(asked)][1]


def _refuse_unclear(ranges: Tensor, of_model: Tensor | None, rows: int) -> None:
    """What only the model was given must say that each request is one sequence."""
    if of_model is not None:
        several = positions.several_unclear(of_model.to(ranges.device), _whole(ranges), rows)
        require(~several, UNCLEAR, NotSupportedError)


def _whole(ranges: Tensor) -> Tensor:
    """Key ranges without the mark of packed sequences."""
    return torch.cat([ranges[:, :2], ranges[:, 2:3].abs(), ranges[:, 3:]], 1)


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
    ranges = _whole(ranges)
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
    if not several:
        return None
    if not mask.causal and rows != keys:  # cross-attention
        raise NotSupportedError(UNCLEAR)
    row = used.flatten().nonzero()[:, 0]
    starting = starts.flatten()[row].nonzero()[:, 0]
    ends = torch.cat([starting, starting.new_tensor([len(row)])]).to(torch.int32)
    lengths = ends.diff().tolist()
    if len(row) == used.numel() and rows == keys:
        return Sequences(ends, ends, lengths, lengths)
    request = row // rows
    key = row + request * (keys - rows) + positions.offset(ranges)[request]
    return Sequences(ends, ends, lengths, lengths, row, key)
