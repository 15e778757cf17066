"""Sparse methods that an evaluation can compare, each set for a share of tiles to save."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from blasst.config import SparseAttention
from blasst.hf import Recording, set_policy
from blasst.hf.models import attention_layers, unwindowed_layers
from blasst.methods.bsfa import AbsoluteThresholds
from blasst.methods.dhsa import Dhsa, load_predictors
from blasst.ops.library import KEYS

BLASST = "blasst"
NAMES = (BLASST, "bsfa", "dhsa", "dhsa+blasst")


class Method(Protocol):
    """A method beside the calibrated thresholds of the model's configuration."""

    made_by: str
    """What results depend on beside the model."""
    needs_calibration: bool
    """Whether `config` must be there."""

    def applied(
        self, model: PreTrainedModel, config: SparseAttention | None, target: float, length: int
    ) -> AbstractContextManager[None]:
        """The model runs so inside.

        Args:
            model: without a `sparse_attention_config`.
            config: what it was calibrated to.
            target: share of the causal tiles to save.
            length: tokens of a prompt.
        """


@dataclass(frozen=True)
class BsfaMethod:
    """Absolute thresholds; decode is dense."""

    thresholds: AbsoluteThresholds
    made_by: str
    needs_calibration: bool = False

    @contextmanager
    def applied(
        self, model: PreTrainedModel, config: SparseAttention | None, target: float, length: int
    ) -> Iterator[None]:
        """The number of tiles to keep whose sparsity is nearest to the target."""
        try:
            self.thresholds.apply(model, self.thresholds.keep_for(target, length))
            yield
        finally:
            for module in attention_layers(model).values():
                module.__dict__.pop("blasst_thresholds", None)


@dataclass(frozen=True)
class DhsaMethod:
    """Chunks chosen before scoring; where they are needed, the calibrated thresholds among them."""

    predictors: str | None
    needs_calibration: bool
    made_by: str

    @contextmanager
    def applied(
        self, model: PreTrainedModel, config: SparseAttention | None, target: float, length: int
    ) -> Iterator[None]:
        """A budget of the rest; with a test, each leaves the same share."""
        left = 1 - target
        if self.needs_calibration:
            left = math.sqrt(left)
            phases = dict.fromkeys(config.target_sparsity, 1 - left)
            model.config.sparse_attention_config = config.with_targets(**phases).to_dict()
        # A budget of nothing is still the tiles that are always read.
        budget = max(left, 1e-6)
        if self.predictors is None:
            policy = Dhsa(budget)
        else:
            policy = Dhsa(budget, "trained", least=16, predictors=self.predictors)
        layers = unwindowed_layers(model)
        try:
            set_policy(model, policy, layers)
            yield
        finally:
            set_policy(model, None, layers)
            model.config.__dict__.pop("sparse_attention_config", None)


def make_methods(
    names: list[str], thresholds: Path | None = None, predictors: Path | None = None
) -> dict[str, Method]:
    """The methods of these names, beside "blasst".

    Args:
        names: of NAMES.
        thresholds: file that `python -m blasst bsfa` wrote, for "bsfa".
        predictors: file that `python -m blasst chunks` wrote, for "dhsa"; None: chunks of 64 keys.

    Raises:
        ValueError: an unknown name, or a file that is missing or of no use.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"no method {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if ("bsfa" in names) != (thresholds is not None):
        raise ValueError(
            "the method bsfa needs a file of thresholds (python -m blasst bsfa), and no other does"
        )
    if predictors is not None and not any(name.startswith("dhsa") for name in names):
        raise ValueError("a file of predictors is for the method dhsa, which is not asked for")
    if predictors is not None:
        load_predictors(predictors)  # what is wrong with it is said before the work
    methods: dict[str, Method] = {}
    for name in dict.fromkeys(names):
        if name == "bsfa":
            methods[name] = BsfaMethod(AbsoluteThresholds.load(thresholds), _digest(thresholds))
        elif name != BLASST:
            made_by = "fixed" if predictors is None else _digest(predictors)
            kept = None if predictors is None else str(predictors)
            methods[name] = DhsaMethod(kept, name == "dhsa+blasst", made_by)
    return methods


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def saved_tiles(recording: Recording, model: PreTrainedModel, length: int) -> float:
    """Share of the causal tiles of a prefill that were not computed: never visited, or dropped.

    Layers with a sliding window, which no method changes, do not count.
    """
    layers = unwindowed_layers(model)
    tiles = -(-length // KEYS)
    causal, computed = 0, 0
    counts = recording.tiles("prefill")
    for layer, (visitable, skipped) in zip(recording.layers("prefill"), counts, strict=True):
        if layer in layers:
            causal += len(visitable) * tiles * (tiles + 1) // 2
            computed += (visitable - skipped).sum().item()
    return 1 - computed / max(1, causal)


def made_by(methods: Mapping[str, Method]) -> dict[str, str]:
    """What results of these methods depend on."""
    return {name: method.made_by for name, method in methods.items()}
