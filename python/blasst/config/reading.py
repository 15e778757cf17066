"""Reading a `sparse_attention_config`, and thresholds from it at each attention call."""

import math
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blasst.config.laws import Law, Measured, ThresholdTable, on_host
from blasst.config.schema import (
    MainTableEntry,
    MeasuredEntry,
    TableEntry,
    validated,
)
from blasst.config.sparse_attention import PHASES, Rule, SparseAttention, check_phase
from blasst.config.tables import Find, in_no_folder, read_tables


def parse(entry: Any, find: Find = in_no_folder) -> SparseAttention:
    """Read a `sparse_attention_config`.

    Args:
        entry: what stands in the model's configuration.
        find: where a file is that lies beside its config.json.

    Raises:
        TypeError: it is no object at all.
        ValueError: an unknown key or formula, a value out of range, or an algorithm that blasst
            does not do; the message names it and says what is accepted. Or its file of tables is
            missing, or another's.
    """
    read = validated(entry)
    if read.blasst is not None and read.blasst.tables is not None:
        place = read.blasst.tables
        own = {"version": read.blasst.version} | read_tables(place.file, place.sha256, find)
        read = validated({**entry, "blasst": own})
    group = read.group
    laws = {phase: getattr(group.threshold_scale_factor, phase) for phase in PHASES}
    laws = {phase: Law(law.a, law.b) for phase, law in laws.items() if law is not None}
    own = {phase: read.blasst and getattr(read.blasst, phase) for phase in PHASES}
    measured = {phase: _measured(part) for phase, part in own.items() if part is not None}
    return SparseAttention(
        targets=tuple(group.targets),
        laws=laws,
        target_sparsity={
            phase: getattr(group.target_sparsity, phase)
            for phase in PHASES
            if phase in laws or phase in measured
        },
        ignore=tuple(group.ignore),
        measured=measured,
        producer=(read.producer.name, read.producer.version),
    )


def _measured(entry: MeasuredEntry) -> Measured:
    rows, keys = entry.tile_shape
    return Measured(
        (rows, keys),
        tuple(_main_table(one) for one in entry.policies),
        entry.scores,
        entry.law and Law(entry.law.a, entry.law.b),
        tuple(_measured(other) for other in entry.others),
    )


def _main_table(entry: MainTableEntry) -> ThresholdTable:
    table = _own_table(entry)
    if entry.shorter is None:
        return table
    below, shorter = tuple(entry.shorter.below), _own_table(entry.shorter.policy)
    return replace(table, below=below, shorter=shorter)


def _own_table(entry: TableEntry) -> ThresholdTable:
    law = Law(entry.law.a, entry.law.b, entry.law.power)
    lengths, targets = tuple(entry.lengths), tuple(entry.target_sparsity)
    return ThresholdTable(
        entry.order, entry.heads, law, lengths, targets, _table(entry.ln_threshold)
    )


def _table(rows: list[list[list[list[float]]]]) -> Tensor:
    """[lengths, targets, layers, heads]; NaN in layers that have fewer heads than others."""
    most = max(len(row) for row in rows[0][0])
    padded = [
        [[[*row, *[math.nan] * (most - len(row))] for row in layers] for layers in by_target]
        for by_target in rows
    ]
    return on_host(padded, torch.float32)


def thresholds_for(
    entry: Mapping[str, Any],
    attention_class: str,
    layer: int,
    phase: str,
    lengths: Sequence[int],
    keys: int | None = None,
    name: str | None = None,
) -> Rule:
    """Thresholds and visit order of one attention call.

    Args:
        entry: the model's `sparse_attention_config`.
        attention_class: class name of the attention layer.
        layer: its index.
        phase: "prefill" or "decode".
        lengths: keys of each request.
        keys: how many the call has room for a request; default: those of the longest.
        name: of the module, which `targets` and `ignore` may list; default:
            "model.layers.LAYER.self_attn".

    Returns:
        `Rule.threshold` [requests, heads or 1] float32 on the CPU, None for dense; `Rule.order` and
        `Rule.scores`.

    Raises:
        TypeError: a layer or a length that is no whole number, or an entry that is no object.
        ValueError: the entry cannot be honoured, another phase, no lengths, or one below 0; the
            message says why.
    """
    check_phase(phase)
    for what, number in (("layer", layer), *(("a length", length) for length in lengths)):
        if not isinstance(number, Integral):
            raise TypeError(f"{what} is {number!r}; it must be a whole number")
        if number < 0:
            raise ValueError(f"{what} is {number}; it must be 0 or more")
    if not lengths:
        raise ValueError("lengths is empty; it must be the keys of each request")
    keys = max(lengths) if keys is None else keys
    return parsed(entry, layer).result.rule(attention_class, layer, phase, lengths, keys, name)


class _Watch:
    """Notices edits of an entry that one layer can see, in a few microseconds.

    Attention asks in every pass, so the entry is compared with a copy of it, which Python does in
    one step; of tables of lists only that layer's thresholds are.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry
        self.tables: list[tuple[dict, list[list]]] = []
        """Those that can be edited; of tuples, which `to_dict` gives, none can."""
        self._copy = self._copied(entry)

    def _copied(self, node: Any) -> Any:
        """What equals this for as long as it is not edited; shares tables and tuples with it."""
        if isinstance(node, tuple):
            return node
        if isinstance(node, list):
            return [self._copied(value) for value in node]
        if not isinstance(node, dict):
            return deepcopy(node)
        copy = {key: self._copied(v) for key, v in node.items() if not _is_table(key, v)}
        for key, table in node.items():
            if _is_table(key, table):
                layers = range(len(table[0][0]))
                self.tables.append((node, [deepcopy(_rows(table, layer)) for layer in layers]))
                copy[key] = table
        return copy

    def is_unchanged(self, layer: int) -> bool:
        """Whether the entry says the same to this layer as when it was read."""
        if self._entry != self._copy:
            return False
        try:
            return all(self._has_rows(node, rows, layer) for node, rows in self.tables)
        except (IndexError, KeyError, TypeError):  # something went, or became something else
            return False

    @staticmethod
    def _has_rows(node: dict, rows: list[list], layer: int) -> bool:
        table, place = node["ln_threshold"], min(layer, len(rows) - 1)
        return len(table[0][0]) == len(rows) and _rows(table, place) == rows[place]


def _is_table(key: Any, value: Any) -> bool:
    """Whether this is a table of thresholds that can be edited."""
    return key == "ln_threshold" and isinstance(value, list)


def _rows(table: list, layer: int) -> list:
    """One layer's thresholds, of every length and target."""
    return [layers[layer] for by_target in table for layers in by_target]


class Read(NamedTuple):
    """An entry, and what was made of it."""

    entry: dict[str, Any]
    watch: _Watch
    result: SparseAttention

    @property
    def is_same_for_all(self) -> bool:
        """Whether an edit is seen whichever layer asks."""
        return not self.watch.tables


_READ_AT_MOST = 8
_reading = threading.Lock()
_read: tuple[Read, ...] = ()
"""Replaced, never changed, so that any thread may look through it."""


def parsed(entry: Any, layer: int, find: Find = in_no_folder) -> Read:
    """`parse`, once for each entry and again after an edit that this layer can see."""
    global _read  # noqa: PLW0603
    for known in _read:
        if known.entry is entry and known.watch.is_unchanged(layer):
            return known
    try:
        watch = _Watch(entry)  # before it is parsed, to notice what is edited meanwhile
    except (LookupError, TypeError):
        parse(entry, find)  # which says what is wrong
        raise
    found = Read(entry, watch, parse(entry, find))
    with _reading:
        others = [known for known in _read if known.entry is not entry]
        _read = (*others[1 - _READ_AT_MOST :], found)
    return found
