"""Calibration: from a few long prompts to thresholds, by phase, length, layer and head.

A skipped tile never raises the running maximum, so one dense pass tells the sparsity of every
threshold at once: it fills, for each head, a histogram of gaps. In the same pass each attention
call is repeated at a few thresholds on the same inputs, which tells what dropping costs a head:
the softmax mass, and the error of the layer's output relative to the residual stream it joins.

From these curves come candidates: a visit order and a way to share a target sparsity out among
heads. The one that changes the model's predictions least, measured, is written down.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst import hf
from blasst.attention import attention, tile_shape
from blasst.calibration.curves import (
    GAP_BINS,
    HeadCurves,
    UnfittableError,
    UnreachableError,
    fit_law,
    ln_threshold_at,
    promised_sparsity,
    share_below,
    share_out,
    sparsity_at,
)
from blasst.config import (
    HEAD_SCHEMES,
    HIGHEST_LN_THRESHOLD,
    LOWEST_LN_THRESHOLD,
    ORDERS,
    PHASES,
    Law,
    Measured,
    Policy,
    SparseAttention,
    parse,
)
from blasst.hf import record
from blasst.hf.models import attention_layers, check_length, context_length, unwindowed_layers
from blasst.hf.reading import read
from blasst.measure.agreement import Agreement, DenseRun
from blasst.policies import Call
from blasst.progress import Progress, silent
from blasst.prompts import KINDS, PromptMaker, reference_text

TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
CHOSEN_FROM = ("sink_first", "reverse")
"""Orders that can win; forward is measured for the ecosystem's law alone."""
SWEEP = (0.3, 0.55, 0.75, 0.9, 1.0)
"""Shares of each head's highest sparsity at which its costs are measured in prefill."""
DECODE_SWEEP = (-7.0, -5.0, -3.5, -2.0, -1.0, 0.0)
"""ln thresholds of the same in decode, where one step has too few tiles for shares."""
DECODE_STEPS = 16
DEFAULT_LENGTHS = (1024, 2048, 4096)
SCORED = 1024
"""Candidates are compared at so many positions of the validation prompt."""
KL_GROWTH = 9.4
"""KL divergence grows about tenfold from 50 % to 75 % sparsity: per unit of sparsity, in logs."""
OWN_ATTENTION = "blasst_calibration"


@dataclass
class Measurement:
    """Sums over the prompts of one length, by layer and head; one phase, one order."""

    gaps: np.ndarray
    """[layers, heads, 514] visited tiles by gap."""
    swept: np.ndarray
    """[points, layers, heads] tiles skipped at each point of the sweep."""
    visitable: np.ndarray
    """[layers, heads] visitable tiles, in the passes that swept."""
    mass: np.ndarray
    """[points, layers, heads] dropped softmax mass, summed over rows."""
    error: np.ndarray
    """[points, layers, heads] squared change of the layer's output over the squared residual."""
    group: int
    """Neighbouring heads that decide together: in decode, those of a KV head."""
    rows: int = 0
    """Query rows in the passes that swept."""

    @classmethod
    def empty(cls, layers: int, heads: int, points: int, group: int) -> "Measurement":
        """Nothing measured yet."""
        swept = np.zeros((points, layers, heads))
        gaps = np.zeros((layers, heads, GAP_BINS))
        return cls(gaps, swept, np.zeros((layers, heads)), swept.copy(), swept.copy(), group)

    def curves(self, layers: Sequence[int]) -> HeadCurves:
        """The heads of these layers, in one row."""

        def rows(values: np.ndarray) -> np.ndarray:
            grouped = values[:, layers].reshape(len(values), -1, self.group)
            mean = np.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
            picked = mean.reshape(len(values), -1).T
            return np.concatenate([np.zeros((len(picked), 1)), picked], -1)

        visitable = self.visitable[layers].reshape(-1)
        sparsity = rows(self.swept) / np.maximum(visitable, 1)[:, None]
        return HeadCurves(
            visitable / visitable.sum(),
            np.maximum.accumulate(sparsity, -1),
            rows(self.mass) / max(self.rows, 1),
            rows(self.error),
        )


@dataclass(frozen=True)
class Candidate:
    """An order and a way to share thresholds, tried on the whole model."""

    phase: str
    target: float
    order: str
    heads: str
    sparsity: float
    """Reached on the validation prompt."""
    kl: float
    """Mean KL divergence of the next token's distribution from dense, nats."""
    top1: float
    """Share of positions with the same likeliest next token as dense."""
    perplexity_ratio: float
    """Perplexity over dense perplexity."""
    chosen: bool = False
    below: int = 0
    """Stands in for the chosen one where the keys are fewer: its order reaches the target there."""


@dataclass(frozen=True)
class HeldOut:
    """Sparsity at a length that no fit has seen."""

    phase: str
    length: int
    target: float
    achieved: float
    law: float | None
    """What the ecosystem's law (forward order, one threshold) reaches there, if there is one."""


@dataclass
class Calibration:
    """What `calibrate` found."""

    config: SparseAttention
    candidates: list[Candidate] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    saturated: list[tuple[str, int, float, float]] = field(default_factory=list)
    """Phase, length, target and the highest sparsity there, where threshold 1 stays below it."""
    ecosystem: SparseAttention | None = None
    """The same model under the paper's scheme alone: forward order, one threshold, power 1."""

    def to_dict(self) -> dict[str, Any]:
        """For a file; `from_dict` reads it."""
        return {
            "config": self.config.to_dict(),
            "ecosystem": self.ecosystem.to_dict() if self.ecosystem else None,
            "candidates": [asdict(c) for c in self.candidates],
            "held_out": [asdict(h) for h in self.held_out],
            "saturated": self.saturated,
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Calibration":
        """What `to_dict` wrote."""
        return cls(
            parse(kept["config"]),
            [Candidate(**c) for c in kept["candidates"]],
            [HeldOut(**h) for h in kept["held_out"]],
            [tuple(s) for s in kept["saturated"]],
            parse(kept["ecosystem"]) if kept["ecosystem"] else None,
        )


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] | None = None,
    target_sparsity: float | Mapping[str, float] | Sequence[float] = 0.5,
    text: str | None = None,
    prompts: int = 4,
    swept_prompts: int = 1,
    held_out: Sequence[int] | None = None,
    orders: Sequence[str] = CHOSEN_FROM,
    schemes: Sequence[str] = HEAD_SCHEMES,
    progress: Progress | None = None,
) -> Calibration:
    """Find thresholds for a model and write them into its `config.sparse_attention_config`.

    `model.save_pretrained` then keeps them, and a model that is loaded with
    `attn_implementation="blasst"` runs with them.

    Args:
        model: loaded with `attn_implementation="blasst"`.
        tokenizer: its tokenizer.
        lengths: prompt lengths in tokens; default: 1024, 2048 and 4096, within the context.
        target_sparsity: share of the tiles to skip: a number, a number by phase, or several: the
            first becomes the configuration's target, and the order and scheme are chosen for each.
        text: prose to make prompts from; default: `prompts.reference_text()`.
        prompts: prompts of each length.
        swept_prompts: of these, the first so many measure what dropping costs.
        held_out: lengths at which achieved sparsity is checked; default: half-way between the two
            longest, and twice the longest if the context has room.
        orders: visit orders to choose from.
        schemes: ways to share thresholds among heads to choose from.
        progress: told what is being done: see `blasst.progress`.

    Raises:
        UnreachableError: a target that no threshold up to 1 reaches at the longest length; the
            message gives the highest reachable.
        ValueError: a length beyond the model's context, a text too short, or a model that runs
            another attention.
    """
    job = _Job(model, tokenizer, lengths, target_sparsity, text, orders, schemes, progress)
    return job.run(prompts, swept_prompts, held_out)


class _Job:
    """One calibration, step by step."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lengths: Sequence[int] | None,
        target_sparsity: float | Mapping[str, float] | Sequence[float],
        text: str | None,
        orders: Sequence[str],
        schemes: Sequence[str],
        progress: Progress | None,
    ) -> None:
        used = model.config._attn_implementation
        if used != hf.NAME:
            raise ValueError(
                f"the model's attn_implementation is {used!r}; load it with {hf.NAME!r}"
            )
        if hf.is_sharded(model):
            raise ValueError(
                "the model is split over processes; calibrate it in one process: the thresholds "
                "that its configuration then holds are those of all heads"
            )
        self.model = model
        longest = context_length(model)
        self.lengths = sorted(set(lengths or [n for n in DEFAULT_LENGTHS if n <= longest]))
        if not self.lengths:
            raise ValueError(
                f"the model's context is {longest} tokens, less than every default length; "
                "give lengths"
            )
        for length in self.lengths:
            check_length(model, length, "a calibration prompt")
        self.targets = _targets(target_sparsity)
        for name, given, known in (
            ("order", orders, ORDERS),
            ("scheme", schemes, HEAD_SCHEMES),
        ):
            if not given or set(given) - set(known):
                raise ValueError(f"{name}s are {list(given)}; choose from {', '.join(known)}")
        self.orders, self.schemes = list(orders), list(schemes)
        self.maker = PromptMaker(
            tokenizer, reference_text() if text is None else text, "the calibration text"
        )
        self.modules = attention_layers(model)
        # A layer with a sliding window has few tiles to skip and another length: it stays dense.
        self.layers = unwindowed_layers(model)
        for i in self.layers if "least_error" in schemes else ():
            if not hasattr(self.modules[i], "o_proj"):
                raise ValueError(
                    f"least_error needs the output projection, and {type(self.modules[i]).__name__}"
                    f" has no o_proj; choose from {', '.join(HEAD_SCHEMES[:-1])}"
                )
        self.progress = progress or silent
        self.measured: dict[tuple[str, str, int], Measurement] = {}
        self.first: dict[tuple[str, int], np.ndarray] = {}
        # [layers, heads, 514] gaps of prefill of the first prompt alone, by order and length.
        self.drift: dict[tuple[str, int], dict[float, float]] = {}
        # By order and length: how far the sparsity of a sparse pass is from what dense gaps say.
        self.shapes: dict[str, tuple[int, int]] = {}
        self.candidates: list[Candidate] = []

    def run(self, prompts: int, swept_prompts: int, held_out: Sequence[int] | None) -> Calibration:
        if held_out is None:
            held_out = self._default_held_out()
        # Made first: a text that is too short is found before hours of work.
        fresh = {length: self._held_out_prompts(length, prompts) for length in held_out}
        validation = self.maker.make("needle", self.lengths[-1], seed=10**6).tokens
        self._measure(prompts, swept_prompts)
        for phase, targets in self.targets.items():
            for target in targets:
                self._check_reachable(phase, target)
        self.candidates = self._choose(validation)
        winners = [c for c in self.candidates if c.chosen]
        self._measure_drift(winners)
        result = Calibration(self._config(winners), ecosystem=self._ecosystem())
        below = {self._stand_in(w): self._below(w, w.target) for w in winners}
        result.candidates = [replace(c, below=below.get(c, 0)) for c in self.candidates]
        result.saturated = self._saturated(winners)
        self.model.config.sparse_attention_config = result.config.to_dict()
        result.held_out = self._held_out(result, fresh)
        self.model.config.sparse_attention_config = result.config.to_dict()
        return result

    # Measuring

    def _measure(self, prompts: int, swept_prompts: int) -> None:
        work = [(n, i) for n in self.lengths for i in range(prompts)]
        total, done = sum(n for n, _ in work), 0
        for length, index in work:
            what = f"{index + 1} of {prompts} at {length} tokens"
            self.progress("Dense passes", done / total, what)
            tokens = self.maker.make(KINDS[index % len(KINDS)], length, seed=index).tokens
            with self._collecting(length, sweep=index < swept_prompts):
                cache = DynamicCache(config=self.model.config)
                hidden = read(self.model, tokens, cache)
                if "decode" in self.targets:
                    self._decode(hidden, cache)
            if index == 0:
                for order in self.orders if "prefill" in self.targets else ():
                    self.first[order, length] = self.measured["prefill", order, length].gaps.copy()
            done += length
        self.progress("Dense passes", 1.0, "")

    def _decode(self, hidden: Tensor, cache: DynamicCache) -> None:
        head = self.model.get_output_embeddings()
        for _ in range(DECODE_STEPS):
            token = head(hidden[:, -1:]).argmax(-1)
            hidden = read(self.model, token, cache)

    @contextmanager
    def _collecting(self, length: int, sweep: bool) -> Iterator[None]:
        """The model runs dense, and every attention call is measured."""
        residuals: dict[int, float] = {}
        hooks = []
        for layer, module in self.modules.items():
            parent = _parent(self.model, module)

            def note(_: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                residuals[layer] = hidden.double().square().sum().item()

            hooks.append(parent.register_forward_pre_hook(note, with_kwargs=True))

        def forward(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            layer = module.layer_idx
            phase = "decode" if query.shape[2] == 1 else "prefill"
            if layer not in self.layers or phase not in self.targets:
                return hf.attention_forward(module, query, key, value, attention_mask, **kwargs)
            inputs = [t.transpose(1, 2) for t in (query, key, value)]
            options = {
                "causal": True,
                "scale": kwargs.get("scaling"),
                "softcap": kwargs.get("softcap"),
                "sinks": kwargs.get("s_aux"),
                "phase": phase,
            }
            call = Call(layer, phase, inputs[0], inputs[1], None)
            visit = hf.visit_of(module, call, None, causal=True)
            options |= {"bands": visit.bands, "blocks": visit.blocks}
            self.shapes[phase] = tuple(tile_shape(*inputs, phase=phase)[:2])
            needs_error = "least_error" in self.schemes
            counted = inputs if needs_error else [*inputs[:2], _few_values(inputs[2])]
            out = None
            # The ecosystem's law is for the forward order, at one threshold: no sweep.
            for order in dict.fromkeys([*self.orders, "forward"]):
                # Of decode, every other step: neighbours say much the same.
                costs = sweep and order in self.orders and (phase == "prefill" or key.shape[2] % 2)
                result = attention(
                    *(inputs if out is None else counted),
                    **options,
                    order=order,
                    return_gaps=True,
                    return_lse=costs,
                )
                out = result.out if out is None else out
                into = self._into(phase, order, length, query.shape[1], key.shape[1])
                into.gaps[layer] += result.gaps.numpy()
                if costs:
                    projection = _output_gram(module, query.shape[1]) if needs_error else None
                    into.rows += query.shape[2] if layer == self.layers[0] else 0
                    self._sweep(
                        into,
                        layer,
                        counted,
                        options | {"order": order},
                        result,
                        projection,
                        residuals[layer],
                    )
            return out, None

        AttentionInterface.register(OWN_ATTENTION, forward)
        AttentionMaskInterface.register(OWN_ATTENTION, hf.key_ranges)
        before = self.model.config._attn_implementation
        entry = self.model.config.__dict__.pop("sparse_attention_config", None)
        self.model.set_attn_implementation(OWN_ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
            if entry is not None:
                self.model.config.sparse_attention_config = entry
            for hook in hooks:
                hook.remove()

    def _into(self, phase: str, order: str, length: int, heads: int, kv_heads: int) -> Measurement:
        points, group = (
            (len(SWEEP), 1) if phase == "prefill" else (len(DECODE_SWEEP), heads // kv_heads)
        )
        return self.measured.setdefault(
            (phase, order, length), Measurement.empty(len(self.modules), heads, points, group)
        )

    def _sweep(
        self,
        into: Measurement,
        layer: int,
        inputs: list[Tensor],
        options: dict[str, Any],
        dense: Any,
        projection: Tensor | None,
        residual: float,
    ) -> None:
        """Repeat one attention call at several thresholds and add up what each costs."""
        gaps = dense.gaps.numpy()
        heads = len(gaps)
        for point in range(into.swept.shape[0]):
            if options["phase"] == "prefill":
                share = SWEEP[point] * share_below(gaps)[:, -1]
                ln = [ln_threshold_at(g, s) for g, s in zip(gaps, share, strict=True)]
            else:
                ln = [DECODE_SWEEP[point]] * heads
            sparse = attention(
                *inputs,
                **options,
                threshold=torch.tensor(ln).exp().clamp(max=1),
                return_lse=True,
                return_stats=True,
            )
            into.swept[point, layer] += sparse.stats.skipped.sum(0).numpy()
            # The denominator over the kept tiles, of the whole: what is missing was dropped.
            kept = (sparse.lse - dense.lse).double().exp().clamp(max=1)
            into.mass[point, layer] += (1 - kept).sum((0, 2)).numpy()
            if projection is None:
                continue
            change = (sparse.out - dense.out).flatten(0, 1).transpose(0, 1)
            gram = change.transpose(1, 2) @ change
            error = (gram * projection).sum((1, 2)).double() / max(residual, 1e-30)
            into.error[point, layer] += error.numpy()
        into.visitable[layer] += sparse.stats.visitable.sum(0).numpy()

    # Choosing

    def _check_reachable(self, phase: str, target: float) -> None:
        """An error unless some order reaches the target at the longest length."""
        reached = {order: self._highest(phase, order, self.lengths[-1]) for order in self.orders}
        best = max(reached, key=reached.get)
        if target > reached[best]:
            raise UnreachableError(
                f"target sparsity {target:.0%} of {phase} cannot be reached at "
                f"{self.lengths[-1]} tokens: threshold 1 skips {reached[best]:.1%} of the tiles "
                f"in {best} order, and that is the most"
            )

    def _highest(self, phase: str, order: str, length: int) -> float:
        return float(share_below(self._pooled(phase, order, length))[-1])

    def _pooled(self, phase: str, order: str, length: int) -> np.ndarray:
        """[514] visited tiles by gap, of all heads."""
        return self.measured[phase, order, length].gaps[self.layers].sum((0, 1))

    def _targets_of(self, phase: str, order: str) -> list[float]:
        """Targets of the grid and those asked for, up to what this order reaches at the longest.

        The last is that, in whole percents.
        """
        highest = self._highest(phase, order, self.lengths[-1])
        grid = (*TARGETS, *self.targets[phase], math.floor(100 * highest) / 100)
        return sorted({t for t in grid if t <= highest})

    def _policy(
        self,
        phase: str,
        order: str,
        scheme: str,
        targets: Sequence[float],
        longest: int | None = None,
    ) -> Policy:
        """The measured table of one order and scheme, at the lengths up to `longest`."""
        lengths = [n for n in self.lengths if longest is None or n <= longest]
        pooled = np.array(
            [
                [
                    ln_threshold_at(
                        self._pooled(phase, order, n), self._nominal(phase, order, n, t)
                    )
                    for t in targets
                ]
                for n in lengths
            ]
        )
        # The power of the length is the one threshold's: a head's own is too noisy to extrapolate.
        law = self._law(phase, order, fit_power=True)
        if scheme == "one_threshold":
            table = pooled[:, :, None, None]
        else:
            table = np.stack(
                [
                    np.stack([self._by_head(phase, order, scheme, n, t) for t in targets])
                    for n in lengths
                ]
            )
        self._continue_beyond_one(phase, order, targets, law.power, table)
        table = torch.tensor(table, dtype=torch.float32)
        table = table.clamp(LOWEST_LN_THRESHOLD, HIGHEST_LN_THRESHOLD)
        return Policy(order, scheme, law, tuple(lengths), tuple(targets), table)

    def _with_stand_in(self, winner: Candidate, targets: Sequence[float]) -> Policy:
        """The winner's table, and its stand-in's for lengths at which it does not reach a target.

        Thresholds of two orders cannot be interpolated with each other, so the stand-in serves
        all lengths below the first from which the winner reaches the target.
        """
        policy = self._policy(winner.phase, winner.order, winner.heads, targets)
        below = tuple(self._below(winner, target) for target in targets)
        other = self._stand_in(winner)
        if other is None or not any(below):
            return policy
        shorter = self._policy(winner.phase, other.order, other.heads, targets, max(below))
        return replace(policy, below=below, shorter=shorter)

    def _stand_in(self, winner: Candidate) -> Candidate | None:
        """The best of the order that reaches furthest at short lengths; None: the winner's."""

        def reach(order: str) -> tuple[float, bool]:
            far = sum(self._highest(winner.phase, order, n) for n in self.lengths[:-1])
            return far, order == winner.order

        furthest = max(self.orders, key=reach)
        same = [
            c
            for c in self.candidates
            if (c.phase, c.target, c.order) == (winner.phase, winner.target, furthest)
        ]
        return None if furthest == winner.order else min(same, key=_cost, default=None)

    def _below(self, winner: Candidate, target: float) -> int:
        """The first length from which on the winner's order reaches a target; 0: it always does."""
        reach = {n: self._highest(winner.phase, winner.order, n) for n in self.lengths}
        short = [n for n in self.lengths if reach[n] < target]
        return next(n for n in self.lengths if n > short[-1]) if short else 0

    def _used(self, winner: Candidate, length: int) -> Candidate:
        """The winner, or its stand-in if it is too short for the winner."""
        is_short = length < self._below(winner, winner.target)
        return (is_short and self._stand_in(winner)) or winner

    def _continue_beyond_one(
        self, phase: str, order: str, targets: Sequence[float], power: float, table: np.ndarray
    ) -> None:
        """Where threshold 1 stays below a target, write what the law says, above 1.

        It is used as 1 there, but between this length and the next the interpolation is right.
        """
        for i in reversed(range(len(table) - 1)):
            length, longer = self.lengths[i : i + 2]
            for j, target in enumerate(targets):
                if self._highest(phase, order, length) < target:
                    step = power * math.log(longer / length)
                    table[i, j] = np.maximum(table[i + 1, j] + step, 0)

    def _by_head(
        self, phase: str, order: str, scheme: str, length: int, target: float
    ) -> np.ndarray:
        """[layers, heads] ln thresholds; layers that stay dense: the lowest."""
        measurement = self.measured[phase, order, length]
        gaps = measurement.gaps[self.layers]
        curves = measurement.curves(self.layers)
        ln = np.full(measurement.gaps.shape[:2], LOWEST_LN_THRESHOLD)
        target = self._nominal(phase, order, length, target)
        if target > curves.highest:
            ln[self.layers] = 0.0
            return ln
        shares = share_out(scheme, curves, target).reshape(gaps.shape[:2])
        ln[self.layers] = [
            [ln_threshold_at(head, share) for head, share in zip(*layer, strict=True)]
            for layer in zip(gaps, shares, strict=True)
        ]
        return ln

    def _ecosystem_law(self, phase: str) -> Law | None:
        """None where forward order skips too little to fit one."""
        try:
            return self._law(phase, "forward", fit_power=False)
        except UnfittableError:
            return None

    def _law(self, phase: str, order: str, *, fit_power: bool) -> Law:
        targets = np.array(TARGETS)
        ln = np.zeros((len(self.lengths), len(targets)))
        for row, length in enumerate(self.lengths):
            pooled = self._pooled(phase, order, length)
            highest = self._highest(phase, order, length)
            for column, target in enumerate(targets):
                # 0 marks what threshold 1 does not reach; the fit leaves it out.
                ln[row, column] = ln_threshold_at(pooled, target) if target < highest else 0.0
        return fit_law(targets, np.array(self.lengths), ln, fit_power=fit_power)

    def _choose(self, validation: Tensor) -> list[Candidate]:
        """Try every candidate on the whole model and mark the best of each phase and target."""
        tries = [
            (phase, target, order, scheme)
            for phase, targets in self.targets.items()
            for target in targets
            for order in self.orders
            for scheme in self.schemes
            if target <= self._highest(phase, order, self.lengths[-1])
        ]
        judge = _Judge(self.model, validation, self.layers)
        tried = []
        for i, (phase, target, order, scheme) in enumerate(tries):
            what = f"{order}, {scheme} at {target:.0%} of {phase}"
            self.progress("Candidates", i / len(tries), what)
            policy = self._policy(phase, order, scheme, [target])
            config = self._with({phase: [policy]}, {phase: target})
            sparsity, found = judge.try_out(phase, config)
            ratio = found.perplexity / found.dense_perplexity
            tried.append(
                Candidate(phase, target, order, scheme, sparsity, found.kl, found.top1, ratio)
            )
        self.progress("Candidates", 1.0, "")
        best = {}
        for candidate in tried:
            key = (candidate.phase, candidate.target)
            if key not in best or _cost(candidate) < _cost(best[key]):
                best[key] = candidate
        return [replace(c, chosen=c is best[c.phase, c.target]) for c in tried]

    def _measure_drift(self, winners: Iterable[Candidate]) -> None:
        """Compare sparse passes of the winners with what the dense gaps promise.

        What a layer drops changes what the layers above it see, and with it their gaps.
        """
        steps = [
            (length, tried)
            for length in self.lengths
            for winner in winners
            for tried in self._measured_at(winner, length)
            if winner.phase == "prefill"
            and winner.target <= self._highest("prefill", tried.order, length)
        ]
        for i, (length, tried) in enumerate(steps):
            what = f"{tried.order}, {tried.target:.0%} at {length} tokens"
            self.progress("Sparse passes", i / len(steps), what)
            policy = self._policy("prefill", tried.order, tried.heads, [tried.target])
            ln = policy.at(tried.target, length).log().numpy()
            gaps = self.first[tried.order, length]
            promised = promised_sparsity(gaps[self.layers], _rows(ln, gaps)[self.layers])
            config = self._with({"prefill": [policy]}, {"prefill": tried.target})
            self.model.config.sparse_attention_config = config.to_dict()
            with record() as recording:
                tokens = self.maker.make(KINDS[0], length, seed=0).tokens
                read(self.model, tokens)
            del self.model.config.sparse_attention_config
            reached = recording.sparsity("prefill", self.layers)
            self.drift.setdefault((tried.order, length), {})[tried.target] = reached - promised
        self.progress("Sparse passes", 1.0, "")

    def _measured_at(self, winner: Candidate, length: int) -> list[Candidate]:
        """The winner or its stand-in; where one gives way to the other, both."""
        first = self._below(winner, winner.target)
        other = self._stand_in(winner)
        found = [winner] if length >= first else []
        return found + ([other] if other is not None and length <= first else [])

    def _nominal(self, phase: str, order: str, length: int, target: float) -> float:
        """The target to read from dense gaps so that a sparse pass reaches `target`."""
        drift = self.drift.get((order, length)) if phase == "prefill" else None
        if not drift:
            return target
        points = sorted({0.0: 0.0, **drift}.items())
        return max(0.0, target - float(np.interp(target, *zip(*points, strict=True))))

    # Writing

    def _config(self, winners: Iterable[Candidate]) -> SparseAttention:
        """The configuration with these winners."""
        by_phase = {p: [w for w in winners if w.phase == p] for p in self.targets}
        policies = {p: self._policies(p, some) for p, some in by_phase.items()}
        return self._with(policies, {phase: targets[0] for phase, targets in self.targets.items()})

    def _ecosystem(self) -> SparseAttention | None:
        """The ecosystem's law alone, of the phases that have one."""
        targets = {p: some[0] for p, some in self.targets.items() if self._ecosystem_law(p)}
        return self._with({p: [] for p in targets}, targets) if targets else None

    def _policies(self, phase: str, winners: list[Candidate]) -> list[Policy]:
        """Each target of the grid goes with the winner at the nearest target asked for."""
        groups: list[tuple[Candidate, list[float]]] = []
        grid = {t for w in winners for t in self._targets_of(phase, w.order)}
        for target in sorted(grid):
            winner = min(winners, key=lambda w: (abs(w.target - target), w.target))
            if target > self._highest(phase, winner.order, self.lengths[-1]):
                continue
            last, targets = groups[-1] if groups else (None, [])
            if last and (last.order, last.heads) == (winner.order, winner.heads):
                # The higher winner's stand-in: the higher a target, the more it needs one.
                groups[-1] = winner, [*targets, target]
            else:
                groups.append((winner, [target]))
        return [self._with_stand_in(winner, targets) for winner, targets in groups]

    def _with(
        self, policies: Mapping[str, list[Policy]], targets: Mapping[str, float]
    ) -> SparseAttention:
        ignore = [
            name
            for name, module in self.model.named_modules()
            if module in self.modules.values() and module.layer_idx not in self.layers
        ]
        return SparseAttention(
            targets=tuple(sorted({type(m).__name__ for m in self.modules.values()})),
            laws={p: law for p in self.targets if (law := self._ecosystem_law(p))},
            target_sparsity=dict(targets),
            ignore=tuple(ignore),
            measured={p: Measured(self.shapes[p], tuple(some)) for p, some in policies.items()},
        )

    def _saturated(self, winners: Iterable[Candidate]) -> list[tuple[str, int, float, float]]:
        return [
            (w.phase, length, w.target, highest)
            for w in winners
            for length in self.lengths
            if (highest := self._highest(w.phase, self._used(w, length).order, length)) < w.target
        ]

    # Checking

    def _default_held_out(self) -> list[int]:
        between = [sum(self.lengths[-2:]) // 2] if len(self.lengths) > 1 else []
        double = 2 * self.lengths[-1]
        return between + ([double] if double <= context_length(self.model) else [])

    def _held_out_prompts(self, length: int, prompts: int) -> list[Tensor]:
        """New ones, of the kinds that are calibrated on."""
        check_length(self.model, length, "a held-out prompt")
        return [self.maker.make(kind, length, seed=10**7).tokens for kind in KINDS[:prompts]]

    def _held_out(
        self, result: Calibration, fresh: Mapping[int, Sequence[Tensor]]
    ) -> list[HeldOut]:
        """Sparsity on new prompts of other lengths."""
        found = []
        targets = sorted({t for some in self.targets.values() for t in some})
        steps, done = sum(map(len, fresh.values())) * (1 + len(targets)), 0
        for length, some_tokens in fresh.items():
            reached: dict[tuple[str, float], list[float]] = {}
            for tokens in some_tokens:
                self.progress("Held-out lengths", done / steps, f"{length} tokens, dense")
                with self._collecting(length, sweep=False):
                    self._read(tokens)
                done += 1
                for target in targets:
                    what = f"{length} tokens at {target:.0%}"
                    self.progress("Held-out lengths", done / steps, what)
                    phases = [p for p, some in self.targets.items() if target in some]
                    config = result.config.with_targets(
                        **{p: target if p in phases else 0.0 for p in self.targets}
                    )
                    self.model.config.sparse_attention_config = config.to_dict()
                    with record() as recording:
                        self._read(tokens)
                    for phase in phases:
                        sparsity = recording.sparsity(phase, self.layers)
                        reached.setdefault((phase, target), []).append(sparsity)
                    done += 1
            for (phase, target), values in sorted(reached.items(), reverse=True):
                law = result.config.laws.get(phase)
                pooled = self._pooled(phase, "forward", length)
                at = sparsity_at(pooled, law.ln_threshold(target, length)) if law else None
                found.append(HeldOut(phase, length, target, float(np.mean(values)), at))
        self.progress("Held-out lengths", 1.0, "")
        return found

    def _read(self, tokens: Tensor) -> None:
        """Prefill, and some steps of decode if that is calibrated."""
        cache = DynamicCache(config=self.model.config)
        hidden = read(self.model, tokens, cache)
        if "decode" in self.targets:
            self._decode(hidden, cache)


class _Judge:
    """Runs candidates on one prompt and compares their predictions with dense ones."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, layers: Sequence[int]) -> None:
        self._model, self._tokens, self._layers = model, tokens, layers
        model.config.__dict__.pop("sparse_attention_config", None)
        cache = DynamicCache(config=model.config)
        hidden = self._prefill(cache)
        every = max(1, len(hidden) // SCORED)
        self._dense = DenseRun(model, hidden, tokens[0], every=every)
        self._cache, self._last = cache, hidden[-1:]

    def _prefill(self, cache: DynamicCache | None = None) -> Tensor:
        return read(self._model, self._tokens, cache)[0]

    def try_out(self, phase: str, config: SparseAttention) -> tuple[float, Agreement]:
        """Sparsity and agreement with dense of one configuration."""
        model = self._model
        if phase == "prefill":
            model.config.sparse_attention_config = config.to_dict()
            with record() as recording:
                hidden = self._prefill()
            del model.config.sparse_attention_config
            return recording.sparsity(phase, self._layers), self._dense.compare(hidden)
        dense, sequence = self._dense_decode
        model.config.sparse_attention_config = config.to_dict()
        with record() as recording:
            hidden = self._steps(sequence)
        del model.config.sparse_attention_config
        return recording.sparsity(phase, self._layers), dense.compare(hidden)

    @cached_property
    def _dense_decode(self) -> tuple[DenseRun, Tensor]:
        """A dense, greedy decode, and the tokens [steps] that it read."""
        head = self._model.get_output_embeddings()
        cache = deepcopy(self._cache)
        tokens, hidden = [head(self._last).argmax(-1)], []
        for _ in range(DECODE_STEPS):
            hidden.append(self._step(tokens[-1], cache))
            tokens.append(head(hidden[-1]).argmax(-1))
        sequence = torch.cat(tokens[:-1])
        return DenseRun(self._model, torch.cat(hidden), sequence), sequence

    def _steps(self, tokens: Tensor) -> Tensor:
        cache = deepcopy(self._cache)
        return torch.cat([self._step(token[None], cache) for token in tokens])

    def _step(self, token: Tensor, cache: DynamicCache) -> Tensor:
        return read(self._model, token[None], cache)[0]


def _targets(given: float | Mapping[str, float] | Sequence[float]) -> dict[str, list[float]]:
    """Targets by phase, without those that are 0: dense needs no threshold."""
    if isinstance(given, Mapping):
        by_phase = {phase: [float(target)] for phase, target in given.items()}
    else:
        several = given if isinstance(given, Sequence) else [given]
        by_phase = {phase: [float(target) for target in several] for phase in PHASES}
    for phase, targets in by_phase.items():
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")
        for target in targets:
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
    positive = {p: list(dict.fromkeys(t for t in some if t)) for p, some in by_phase.items()}
    if not any(positive.values()):
        raise ValueError("every target sparsity is 0: dense needs no calibration")
    return {phase: targets for phase, targets in positive.items() if targets}


def _cost(candidate: Candidate) -> float:
    """KL divergence, as it would be at the target itself."""
    return candidate.kl * math.exp(KL_GROWTH * (candidate.target - candidate.sparsity))


def _rows(ln: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """[layers, heads] of a table that may be [1, 1]."""
    return np.broadcast_to(ln, gaps.shape[:2])


def _parent(model: PreTrainedModel, module: nn.Module) -> nn.Module:
    """The layer that an attention module is part of: what it reads is the residual stream."""
    name = next(name for name, other in model.named_modules() if other is module)
    return model.get_submodule(name.rpartition(".")[0])


def _few_values(value: Tensor) -> Tensor:
    """The fewest elements of each value that the backend takes, where outputs do not matter."""
    return value[..., :16] if value.device.type == "cpu" else value


def _output_gram(module: nn.Module, heads: int) -> Tensor:
    """[heads, value_dim, value_dim]: W^T W of each head's part of the output projection W.

    The squared change of the layer's output is then a trace, and no product with W.
    """
    weight = module.o_proj.weight.float()
    by_head = weight.unflatten(1, (heads, -1)).transpose(0, 1)
    return by_head.transpose(1, 2) @ by_head
