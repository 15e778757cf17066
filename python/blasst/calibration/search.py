"""Trying candidates on the whole model, and the one that changes its predictions least."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from blasst.calibration.kept import Kept
from blasst.calibration.measurement import Measurements
from blasst.calibration.result import Candidate
from blasst.calibration.setup import DECODE_STEPS, Setup
from blasst.config import SparseAttention
from blasst.hf import Recording, record
from blasst.hf.operator import KERNELS, Operator, calling
from blasst.hf.reading import put_back, read
from blasst.measure.agreement import Agreement, DenseRun
from blasst.percent import percent

SCORED = 1024
"""Candidates are compared at so many positions of the validation prompt."""
KL_GROWTH = 9.4
"""KL divergence grows about tenfold from 50 % to 75 % sparsity: per unit of sparsity, in logs."""


def choose(
    setup: Setup,
    measurements: Measurements,
    validation: Tensor,
    configured: Callable[[str, float, str, str], SparseAttention],
    kept: Kept,
) -> list[Candidate]:
    """Try every candidate on the whole model and mark the best of each phase and target.

    Args:
        setup: what is calibrated.
        measurements: of its dense passes.
        validation: [1, length] tokens of the prompt on which candidates are compared.
        configured: the configuration of a phase, target, order and scheme.
        kept: those that were tried before.
    """
    tries = [
        (phase, target, order, scheme)
        for phase, targets in setup.targets.items()
        for target in targets
        for order in setup.orders
        for scheme in setup.schemes
        if target <= measurements.highest(phase, order, setup.longest)
    ]
    judge, tried = None, []
    for i, (phase, target, order, scheme) in enumerate(tries):
        what = f"{order}, {scheme} at {percent(target)} of {phase}"
        setup.progress("Candidates", i / len(tries), what)
        candidate = kept.candidate(phase, target, order, scheme)
        if candidate is None:
            judge = judge or Judge(setup, validation)
            sparsity, found = judge.try_out(phase, configured(phase, target, order, scheme))
            ratio = found.perplexity / found.dense_perplexity
            candidate = kept.add_candidate(
                Candidate(phase, target, order, scheme, sparsity, found.kl, found.top1, ratio)
            )
        tried.append(candidate)
    setup.progress("Candidates", 1.0, "")
    best: dict[tuple[str, float], Candidate] = {}
    for candidate in tried:
        key = (candidate.phase, candidate.target)
        if key not in best or cost(candidate) < cost(best[key]):
            best[key] = candidate
    return [replace(c, chosen=c is best[c.phase, c.target]) for c in tried]


def cost(candidate: Candidate) -> float:
    """KL divergence, as it would be at the target itself."""
    return candidate.kl * math.exp(KL_GROWTH * (candidate.target - candidate.sparsity))


@contextmanager
def running(
    model: PreTrainedModel, config: SparseAttention, operator: Operator = KERNELS
) -> Iterator[Recording]:
    """The model runs with this configuration inside, recorded, and afterwards with none.

    Args:
        model: what runs.
        config: its thresholds.
        operator: what its attention layers call.
    """
    model.config.sparse_attention_config = config.to_dict()
    try:
        with calling(operator), record() as recording:
            yield recording
    finally:
        del model.config.sparse_attention_config


def compared_every(length: int) -> int:
    """How far apart the positions are at which candidates are compared."""
    return max(1, length // SCORED)


class Judge:
    """Runs candidates on one prompt and compares their predictions with dense ones."""

    def __init__(self, setup: Setup, tokens: Tensor) -> None:
        """Take the model as it is.

        Args:
            setup: whose model forgets any configuration of its sparsity.
            tokens: [1, length] of the prompt.
        """
        model = setup.model
        self._model, self._layers, self._chunk = model, setup.layers, setup.chunk
        self._operator = setup.operator
        self._tokens = tokens.to(model.device)
        model.config.__dict__.pop("sparse_attention_config", None)
        self._cache = DynamicCache(config=model.config)

    def try_out(self, phase: str, config: SparseAttention) -> tuple[float, Agreement]:
        """Sparsity and agreement with dense of one configuration."""
        if phase == "prefill":
            dense = self._dense
            with running(self._model, config, self._operator) as recording:
                hidden = read(self._model, self._tokens, chunk=self._chunk)[0]
        else:
            dense, sequence = self._dense_decode
            with running(self._model, config, self._operator) as recording:
                hidden = self._steps(sequence)
        return recording.sparsity(phase, self._layers), dense.compare(hidden)

    @cached_property
    def _dense(self) -> DenseRun:
        """Of the prompt."""
        hidden = read(self._model, self._tokens, chunk=self._chunk)[0]
        every = compared_every(len(hidden))
        return DenseRun(self._model, hidden, self._tokens[0], every=every)

    @cached_property
    def _dense_decode(self) -> tuple[DenseRun, Tensor]:
        """A dense, greedy decode, and the tokens [steps] that it read.

        The prompt's cache is kept from here on: candidates of prefill, each of which fills one of
        its own, come first.
        """
        head = self._model.get_output_embeddings()
        last = read(self._model, self._tokens, self._cache, self._chunk)[0, -1:]
        tokens, hidden = [head(last).argmax(-1)], []
        with put_back(self._cache):
            for _ in range(DECODE_STEPS):
                hidden.append(self._step(tokens[-1]))
                tokens.append(head(hidden[-1]).argmax(-1))
        sequence = torch.cat(tokens[:-1])
        return DenseRun(self._model, torch.cat(hidden), sequence), sequence

    def _steps(self, tokens: Tensor) -> Tensor:
        with put_back(self._cache):
            return torch.cat([self._step(token[None]) for token in tokens])

    def _step(self, token: Tensor) -> Tensor:
        return read(self._model, token[None], self._cache)[0]
