"""Calibration: from a few long prompts to thresholds, by phase, length, layer and head.

A skipped tile never raises the running maximum, so one dense pass tells the sparsity of every
threshold at once: it fills, for each head, a histogram of gaps. In the same pass each attention
call is repeated at a few thresholds on the same inputs, which tells what dropping costs a head:
the softmax mass, and the error of the layer's output relative to the residual stream it joins.

From these curves come candidates: a visit order and a way to share a target sparsity out among
heads. The one that changes the model's predictions least, measured, is written down.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.calibration.collector import Collector
from blasst.calibration.curves import UnreachableError, promised_sparsity, sparsity_at
from blasst.calibration.kept import Kept
from blasst.calibration.measurement import LAW, Measurements
from blasst.calibration.memory import Reading, check_memory
from blasst.calibration.result import Calibration, HeldOut
from blasst.calibration.search import choose, compared_every, running
from blasst.calibration.setup import (
    Setup,
    TileShapes,
    check_attention,
    lengths_of,
    operator_for,
    targets_by_phase,
)
from blasst.calibration.tables import Tables
from blasst.calibration.winners import Winners
from blasst.config import HEAD_SCHEMES, Measured, SparseAttention, ThresholdTable
from blasst.heads import heads_by_layer
from blasst.hf import dense_on_purpose
from blasst.hf.models import check_length, context_length
from blasst.hf.reading import CHUNK, read
from blasst.hf.saving import calibration_in
from blasst.measure.results import fingerprint
from blasst.ops.arguments import check_whole_number, whole_numbers
from blasst.percent import percent
from blasst.progress import Progress, silent
from blasst.prompts import (
    PROMPT_KINDS,
    DocumentMaker,
    ForwardLoop,
    PromptMaker,
    fed_by,
    kind_at,
)

CHOSEN_FROM = ("sink_first", "reverse")
"""Orders that can win; forward is measured for the ecosystem's law alone."""
VALIDATION_SEED, HELD_OUT_SEED = 10**6, 10**7


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] | None = None,
    target_sparsity: float | Mapping[str, float] | Sequence[float] = 0.5,
    text: str | None = None,
    documents: Iterable[Any] | None = None,
    forward: ForwardLoop | None = None,
    prompts: int = 4,
    swept_prompts: int = 1,
    held_out: Sequence[int] | None = None,
    orders: Sequence[str] = CHOSEN_FROM,
    schemes: Sequence[str] = HEAD_SCHEMES,
    chunk: int | None = CHUNK,
    scores: str = "exact",
    tile_shape: TileShapes | None = None,
    batch: int = 1,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find thresholds for a model and write them into its `config.sparse_attention_config`.

    `model.save_pretrained` then keeps them, and a model that is loaded with
    `attn_implementation="blasst"` runs with them.

    Args:
        model: loaded with `attn_implementation="blasst"`.
        tokenizer: its tokenizer.
        lengths: prompt lengths in tokens; default: a quarter, half and all of the context, on the
            CPU of 4,096 tokens of it.
        target_sparsity: share of the tiles to skip: a number, a number by phase, or several: the
            first becomes the configuration's target, and the order and scheme are chosen for each.
        text: prose to make prompts from; default: `prompts.reference_text()`.
        documents: what prompts are made of instead, one document after the other: texts, tokens,
            conversations, or records with one of these: a list, a datasets object, or any iterable
            (see `prompts.DocumentMaker`).
        forward: your own loop, which runs the model it is called with on its own inputs: prompts
            are made of the tokens that it feeds, instead. It is called once, before anything is
            measured, and ended when it has fed enough.
        prompts: prompts of each length.
        swept_prompts: of these, the first so many measure what dropping costs, where a scheme asks.
        held_out: lengths at which achieved sparsity is checked; default: half-way between the two
            longest, and twice the longest if the context has room.
        orders: visit orders to choose from.
        schemes: ways to share thresholds among heads to choose from.
        chunk: tokens of a prompt that are read at once, a multiple of 128; None: all.
        scores: how prefill computes scores, "exact" or "int8": measured so, and written into the
            configuration. Thresholds mean the same with both.
        tile_shape: of the tiles that the thresholds are for: a device ("cuda"), for those of its
            kernels, or query rows and keys, or those by phase (decode: rows of no effect; as a
            `TileShape`, with its splits); default: those of this device's kernels, which measure
            much faster. What the configuration holds for tiles of other sizes stays beside it, and
            a run takes what is for its own.
        batch: prompts that are read at once.
        resume: file in which finished passes are kept until the end: a calibration that was stopped
            goes on from there.
        progress: told what is being done: see `blasst.progress`.

    Raises:
        NotSupportedError: tiles of a device whose kernels do not take the model.
        TypeError: what is no whole number, no number, or no model.
        UnreachableError: a target that no threshold up to 1 reaches at the longest length; the
            message gives the highest reachable.
        ValueError: a length beyond the model's context, a text too short, a model that runs
            another attention or is split over devices, too little memory, or a file to resume from
            that is another calibration's.
    """
    check_attention(model)
    found = lengths_of(model, lengths)
    check_whole_number("prompts", prompts)
    check_whole_number("swept_prompts", swept_prompts)
    prompts, swept_prompts = int(prompts), int(swept_prompts)
    if held_out is None:
        held_out = default_held_out(found, context_length(model))
    held_out = whole_numbers("held_out", held_out)
    most = max([*found, *held_out]) * (prompts + 2)
    resume = None if resume is None else Path(resume)
    setup = Setup(
        model,
        _maker(model, tokenizer, most, text=text, documents=documents, forward=forward),
        found,
        targets_by_phase(target_sparsity),
        list(orders),
        list(schemes),
        progress or silent,
        chunk,
        scores,
        operator_for(tile_shape, model),
        batch,
    )
    _check_memory(setup, held_out)
    asked = [found, setup.targets, prompts, swept_prompts, orders, schemes]
    asked += [
        chunk,
        scores,
        tile_shape,
        batch,
        setup.maker.make(PROMPT_KINDS[0], found[0], 0).tokens.tolist(),
    ]
    made_by = fingerprint(model, *asked) if resume else ""
    with dense_on_purpose():
        return _Calibrating(setup, resume, made_by).run(prompts, swept_prompts, held_out)


def _check_memory(setup: Setup, held_out: Sequence[int]) -> None:
    """An error if the longest prompts do not fit."""
    length = setup.longest
    compared = length // compared_every(length)
    readings = [Reading(length, setup.batch), Reading(length, compared=compared)]
    readings += [Reading(n, what="a held-out prompt") for n in held_out]
    check_memory(setup.model, setup.layers, readings, setup.chunk)


def _maker(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    *,
    text: str | None,
    documents: Iterable[Any] | None,
    forward: ForwardLoop | None,
) -> PromptMaker | DocumentMaker:
    """Of at most so many tokens of whichever is given."""
    sources = {"text": text, "documents": documents, "forward": forward}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; prompts are made of one of them")
    if forward is not None:
        documents = fed_by(forward, model, most)
    if documents is not None:
        return DocumentMaker(tokenizer, documents, most)
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is {tokenizer!r}; prompts are made with the model's")
    return PromptMaker(tokenizer, text, "the calibration text")


class _Calibrating:
    """One calibration, step by step."""

    def __init__(self, setup: Setup, resume: Path | None, made_by: str) -> None:
        self._setup = setup
        most_heads = max(heads_by_layer(setup.model.config.get_text_config()))
        self._measured = Measurements(len(setup.modules), most_heads, setup.layers)
        self._kept = Kept(resume, made_by, self._measured)
        self._before = calibration_in(setup.model)
        self._collector = Collector(setup, self._measured)
        self._tables = Tables(self._measured, setup.layers, setup.lengths)

    def run(self, prompts: int, swept_prompts: int, held_out: Sequence[int]) -> Calibration:
        setup = self._setup
        self._first = min(setup.batch, prompts)
        # Made first: a text that is too short is found before hours of work.
        fresh = {length: self._held_out_prompts(length, prompts) for length in held_out}
        validation = setup.maker.make("needle", setup.longest, seed=VALIDATION_SEED).tokens
        self._read_densely(prompts, swept_prompts)
        for phase, targets in setup.targets.items():
            for target in targets:
                self._check_reachable(phase, target)
        candidates = choose(setup, self._measured, validation, self._configured, self._kept)
        winners = Winners(setup, self._measured, self._tables, candidates)
        self._measure_drift(winners)
        found = self._config({phase: winners.tables(phase) for phase in setup.targets})
        result = Calibration(
            found.beside(self._before),
            winners.marked(),
            saturated=winners.saturated(),
            ecosystem=self._ecosystem(),
        )
        result.held_out = self._held_out(result, fresh)
        setup.model.config.sparse_attention_config = result.config.to_dict()
        self._kept.remove()
        return result

    def _read_densely(self, prompts: int, swept_prompts: int) -> None:
        setup = self._setup
        work = [(n, i) for n in setup.lengths for i in range(0, prompts, setup.batch)]
        total, done = sum(n for n, _ in work), 0
        for length, first in work:
            what = f"{first + 1} of {prompts} at {length} tokens"
            setup.progress("Dense passes", done / total, what)
            done += length
            if self._kept.has("dense", length, first):
                continue
            tokens = self._prompts(length, range(first, min(first + setup.batch, prompts)))
            sweep = setup.needs_costs and first < swept_prompts
            with self._collector.collecting(length, sweep=sweep):
                setup.read(tokens)
            if first == 0:
                for order in setup.orders if "prefill" in setup.targets else ():
                    self._measured.keep_first(order, length)
            self._kept.add("dense", length, first)
        setup.progress("Dense passes", 1.0, "")

    def _prompts(self, length: int, indices: Iterable[int]) -> Tensor:
        """[prompts, length] tokens."""
        make = self._setup.maker.make
        return torch.cat([make(kind_at(i), length, seed=i).tokens for i in indices])

    def _check_reachable(self, phase: str, target: float) -> None:
        """An error unless some order reaches the target at the longest length."""
        longest = self._setup.longest
        reached = {o: self._measured.highest(phase, o, longest) for o in self._setup.orders}
        best = max(reached, key=reached.get)
        if target > reached[best]:
            raise UnreachableError(
                f"target sparsity {percent(target)} of {phase} cannot be reached at {longest} "
                f"tokens: threshold 1 skips {reached[best]:.1%} of the tiles in {best} order, and "
                "that is the most"
            )

    def _measure_drift(self, winners: Winners) -> None:
        """Compare sparse passes of the winners with what the dense gaps promise.

        What a layer drops changes what the layers above it see, and with it their gaps.
        """
        setup = self._setup
        steps = [
            (length, tried)
            for length in setup.lengths
            for winner in winners.chosen
            for tried in winners.measured_at(winner, length)
            if winner.phase == "prefill"
            and winner.target <= self._measured.highest("prefill", tried.order, length)
        ]
        for i, (length, tried) in enumerate(steps):
            what = f"{tried.order}, {percent(tried.target)} at {length} tokens"
            setup.progress("Sparse passes", i / len(steps), what)
            step = "drift", length, tried.order, tried.heads, tried.target
            if self._kept.has(*step):
                continue
            table = self._tables.table("prefill", tried.order, tried.heads, [tried.target])
            gaps = self._measured.first(tried.order, length)
            ln = np.broadcast_to(table.at(tried.target, length).log().numpy(), gaps.shape[:2])
            promised = promised_sparsity(gaps[setup.layers], ln[setup.layers])
            config = self._config({"prefill": [table]}, {"prefill": tried.target})
            with running(setup.model, config, setup.operator) as recording:
                tokens = self._prompts(length, range(self._first))
                read(setup.model, tokens, chunk=setup.chunk)
            reached = recording.sparsity("prefill", setup.layers)
            self._measured.note_drift(tried.order, length, tried.target, reached - promised)
            self._kept.add(*step)
        setup.progress("Sparse passes", 1.0, "")

    def _configured(self, phase: str, target: float, order: str, scheme: str) -> SparseAttention:
        """One candidate's configuration, for its target alone."""
        table = self._tables.table(phase, order, scheme, [target])
        return self._config({phase: [table]}, {phase: target})

    def _config(
        self, tables: Mapping[str, list[ThresholdTable]], targets: Mapping[str, float] | None = None
    ) -> SparseAttention:
        """The configuration with these tables; at the first targets, unless others are given."""
        setup = self._setup
        if targets is None:
            targets = {phase: some[0] for phase, some in setup.targets.items()}
        ignore = [
            name
            for name, module in setup.model.named_modules()
            if module in setup.modules.values() and module.layer_idx not in setup.layers
        ]
        laws = {phase: self._tables.ecosystem_law(phase) for phase in setup.targets}
        shapes = self._measured.tile_shapes
        return SparseAttention(
            targets=tuple(sorted({type(m).__name__ for m in setup.modules.values()})),
            laws={phase: law for phase, law in laws.items() if law},
            target_sparsity=dict(targets),
            ignore=tuple(ignore),
            measured={
                p: Measured(
                    shapes[p],
                    tuple(some),
                    setup.scores_of(p),
                    self._tables.ecosystem_law(p, "forward"),
                )
                for p, some in tables.items()
            },
        )

    def _ecosystem(self) -> SparseAttention | None:
        """The paper's scheme alone, on the tiles that were measured, of the phases that have it."""
        phases = [p for p in self._setup.targets if self._tables.ecosystem_law(p, "forward")]
        targets = {phase: self._setup.targets[phase][0] for phase in phases}
        return self._config({phase: [] for phase in phases}, targets) if phases else None

    def _held_out_prompts(self, length: int, prompts: int) -> list[Tensor]:
        """New ones, of the kinds that are calibrated on."""
        check_length(self._setup.model, length, "a held-out prompt")
        make = self._setup.maker.make
        return [make(kind, length, seed=HELD_OUT_SEED).tokens for kind in PROMPT_KINDS[:prompts]]

    def _held_out(
        self, result: Calibration, fresh: Mapping[int, Sequence[Tensor]]
    ) -> list[HeldOut]:
        """Sparsity on new prompts of other lengths."""
        found, done = [], 0
        setup, steps = self._setup, sum(map(len, fresh.values()))
        for length, prompts in fresh.items():
            reached: dict[tuple[str, float], list[float]] = {}
            for tokens in prompts:
                setup.progress("Held-out lengths", done / steps, f"{length} tokens")
                with self._collector.collecting(length, sweep=False):
                    setup.read(tokens)
                for key, sparsity in self._sparsities(result.config, tokens):
                    reached.setdefault(key, []).append(sparsity)
                done += 1
            for (phase, target), values in sorted(reached.items(), reverse=True):
                law, at = result.config.laws.get(phase), None
                if law is not None:
                    pooled = self._measured.pooled(phase, LAW, length)
                    at = sparsity_at(pooled, law.ln_threshold(target, length))
                found.append(HeldOut(phase, length, target, float(np.mean(values)), at))
        setup.progress("Held-out lengths", 1.0, "")
        return found

    def _sparsities(
        self, config: SparseAttention, tokens: Tensor
    ) -> list[tuple[tuple[str, float], float]]:
        """Phase and target, and the sparsity that this prompt reaches, of every one."""
        setup, found = self._setup, []
        for target in sorted({t for some in setup.targets.values() for t in some}):
            phases = [p for p, some in setup.targets.items() if target in some]
            targets = {p: target if p in phases else 0.0 for p in setup.targets}
            sparse = config.with_targets(**targets)
            with running(setup.model, sparse, setup.operator) as recording:
                setup.read(tokens)
            found += [((p, target), recording.sparsity(p, setup.layers)) for p in phases]
        return found


def default_held_out(lengths: Sequence[int], context: int) -> list[int]:
    """Half-way between the two longest, and twice the longest where the context has room."""
    between = [sum(lengths[-2:]) // 2] if len(lengths) > 1 else []
    double = 2 * lengths[-1]
    return between + ([double] if double <= context else [])
