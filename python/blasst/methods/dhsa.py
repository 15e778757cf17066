"""Dynamic hierarchical sparse attention: each query tile reads the chunks of keys most like it.

`Dhsa` is a policy: it cuts each layer's keys into chunks as they arrive, and chooses among them
before anything is scored, in prefill for every query tile of a head and in decode for every step.
What the cut and the choice are is in `include/blasst/chunks.hpp`; both run in the library.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blasst.files import open_tensors
from blasst.hf.models import described, shape_of
from blasst.ops.library import call as operator
from blasst.policies import POLICY_KINDS, Call, Visit

CHUNKERS = ("fixed", "shift", "trained")
VERSION = 1


@dataclass(frozen=True)
class Predictor:
    """A trained boundary predictor of one layer."""

    weights: Tensor
    """float32, flat: projection, left, right, weight1, bias1, weight2, bias2, in that order."""
    shape: tuple[int, int, int, int]
    """Elements of a token's keys (all KV heads), window, features, hidden."""


def load_predictors(path: Path) -> dict[int, Predictor]:
    """Predictors by layer, as `blasst.chunk_training.train` writes them.

    Raises:
        ValueError: another file, or one that cannot be read.
    """
    shape = tuple(read_about(path)["shape"])
    with open_tensors(path) as file:
        return {int(n): Predictor(file.get_tensor(n), shape) for n in file.keys()}  # noqa: SIM118


def read_about(path: Path) -> dict[str, Any]:
    """What a file of predictors says of itself.

    Raises:
        ValueError: as `load_predictors`.
    """
    with open_tensors(path) as file:
        about = json.loads((file.metadata() or {}).get("blasst_chunks", "null"))
    if about is None or about["version"] != VERSION:
        raise ValueError(f"{path} holds no boundary predictors of version {VERSION}")
    return about


class Chunks:
    """The chunks of one request's keys in one layer, in tensors with room to grow."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.keys = 0
        """Keys that the chunks cover, from the first."""
        self._count = 0
        self._starts = torch.empty(0, dtype=torch.int32)
        self._sums = torch.empty(0, kv_heads, head_dim)
        self._sample = torch.empty(0, kv_heads, head_dim)
        """Some of the keys, to know the request by: a cache may hold another one by now."""

    @property
    def starts(self) -> Tensor:
        """[chunks] int32 first key of each."""
        return self._starts[: self._count]

    @property
    def sums(self) -> Tensor:
        """[chunks, kv_heads, head_dim] float32 sum of the keys of each."""
        return self._sums[: self._count]

    @torch.inference_mode()  # in-place changes stay possible in every mode
    def extend(
        self, key: Tensor, rule: Mapping[str, Any], predictor: Predictor | None = None
    ) -> None:
        """Take up new keys; all of them, if those that are covered have changed.

        Args:
            key: [keys, kv_heads, head_dim] all of the request's; those that are covered, first.
            rule: chunker, least, most, threshold: see `Dhsa`.
            predictor: of the trained chunker.

        Raises:
            ValueError: fewer keys than are covered, a predictor for other keys.
        """
        weights, shape = (None, []) if predictor is None else (predictor.weights, predictor.shape)
        kept, starts, sums, self._sample = operator(
            "chunks_next",
            key=key,
            starts=self.starts,
            sums=self.sums,
            keys=self.keys,
            sample=self._sample,
            chunker=rule["chunker"],
            least=rule["least"],
            most=rule["most"],
            threshold=rule["threshold"],
            predictor=weights,
            predictor_shape=list(shape),
        )
        count = self._count = kept + len(starts)
        if count > len(self._starts):
            self._starts, self._sums = _grown(self._starts, count), _grown(self._sums, count)
        self._starts[kept:count] = starts
        self._sums[kept:count] = sums
        self.keys = len(key)


def _grown(tensor: Tensor, rows: int) -> Tensor:
    """A copy with room for half as many rows again."""
    room = tensor.new_empty(rows + rows // 2, *tensor.shape[1:])
    room[: len(tensor)] = tensor
    return room


@dataclass
class Dhsa:
    """The policy.

    The model stays frozen. Batches must have no padding; a request that is shorter than the budget
    is read whole. On the CPU, and not in compiled passes.
    """

    chooses_blocks: ClassVar[bool] = True
    budget: float
    """Keys that a query tile may read: a number, or (below or equal to 1.0, a float) the share of
    those its last row sees. Key tile 0 and the tile's own are always read, and count."""
    chunker: str = "fixed"
    """"fixed": every `most` keys; "shift": where a key's cosine to the one before is below
    `threshold`; "trained": where the predictor's score is above it."""
    least: int = 1
    """Fewest keys of a chunk, the last aside."""
    most: int = 64
    """Most keys of a chunk; a trained chunk that is still growing may have a window more."""
    threshold: float = 0.0
    predictors: str | None = None
    """File of the trained chunker's predictors."""
    _predictors: dict[int, Predictor] = field(default_factory=dict, init=False, repr=False)
    _states: dict[tuple[int, int], Chunks] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        whole = type(self.budget) is int
        share = type(self.budget) is float
        if not ((whole and self.budget >= 1) or (share and 0 < self.budget <= 1)):
            raise ValueError(
                f"budget is {self.budget!r}; it must be a whole number of keys from 1 on, or a "
                "share above 0.0 and at most 1.0"
            )
        if self.chunker not in CHUNKERS:
            raise ValueError(f"chunker is {self.chunker!r}; it must be one of {CHUNKERS}")
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"chunks have {self.least} to {self.most} keys; at least 1, and no more least than "
                "most"
            )
        if math.isnan(self.threshold):
            raise ValueError("threshold is nan; it must be a number")
        if (self.predictors is None) == (self.chunker == "trained"):
            raise ValueError(
                f"chunker is {self.chunker!r} and predictors is {self.predictors!r}; 'trained' "
                "needs a file of predictors, the others take none"
            )
        if self.predictors is not None:
            self._predictors = load_predictors(Path(self.predictors))

    def to_dict(self) -> dict[str, Any]:
        """For `policies.from_dict`."""
        names = ("budget", "chunker", "least", "most", "threshold", "predictors")
        return {"kind": "dhsa"} | {name: getattr(self, name) for name in names}

    def check(self, model: PreTrainedModel) -> None:
        """A ValueError if the predictors were trained for a model of another shape."""
        if self.predictors is None:
            return
        trained, this = read_about(Path(self.predictors))["model"], shape_of(model)
        if any(trained[name] != value for name, value in this.items()):
            raise ValueError(
                f"{self.predictors} holds boundary predictors of a model with "
                f"{described(trained)}; this one has {described(this)}"
            )

    @torch.no_grad()
    def visit(self, call: Call) -> Visit:
        """The chosen tiles; takes up the keys that are new since the last call of the layer."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("the dhsa policy does not run in a compiled pass")
        if call.query.device.type != "cpu":
            raise NotImplementedError(f"the dhsa policy runs on: cpu; q is on {call.query.device}")
        blocks = [self._of_request(call, request) for request in range(call.query.shape[0])]
        if len(blocks) == 1:
            return Visit(blocks=blocks[0])
        most = max(b.shape[-1] for b in blocks)
        blocks = [torch.nn.functional.pad(b, (0, most - b.shape[-1])) for b in blocks]
        return Visit(blocks=torch.cat(blocks, 1))

    def _of_request(self, call: Call, request: int) -> Tensor:
        """[heads, query tiles, key tiles], decode [kv_heads, 1, key tiles] uint8."""
        key, query = call.key[request], call.query[request]
        if call.lengths is not None:
            key = key[: int(call.lengths[request])]
        chunks = self._extended((call.layer, request), key, query.shape[0])
        whole = isinstance(self.budget, int)
        return operator(
            "chunks_select",
            query=query,
            starts=chunks.starts,
            sums=chunks.sums,
            keys=chunks.keys,
            decode=call.phase == "decode",
            budget_keys=min(self.budget, chunks.keys) if whole else 0,
            budget_share=0.0 if whole else self.budget,
        )

    def _extended(self, place: tuple[int, int], key: Tensor, new: int) -> Chunks:
        """The chunks of all the keys: those of the last call go on if it was the same request's."""
        chunks = self._states.get(place)
        if chunks is None or chunks.keys != len(key) - new:
            chunks = self._states[place] = Chunks(*key.shape[1:])
        chunks.extend(key, self.rule(), self._predictor(place[0]))
        return chunks

    def rule(self) -> Mapping[str, Any]:
        """How `Chunks.extend` cuts."""
        return {
            "chunker": self.chunker,
            "least": self.least,
            "most": self.most,
            "threshold": float(self.threshold),
        }

    def _predictor(self, layer: int) -> Predictor | None:
        if self.chunker != "trained":
            return None
        if layer not in self._predictors:
            raise ValueError(
                f"{self.predictors} has no boundary predictor for layer {layer}; it has some for "
                f"{sorted(self._predictors)}"
            )
        return self._predictors[layer]


POLICY_KINDS["dhsa"] = Dhsa
