"""Which tiles an attention call may visit: policies, under which any tile test runs.

A policy says, by layer, head and query tile, which key tiles are visited at all: what it leaves out
costs nothing, not even its scores. A test (the thresholds of `blasst.attention`) says which of the
visited tiles are kept. The two are independent: every policy goes with every test.

A model has a policy from `blasst.set_policy`, or from its configuration's `blasst_policy`, a
mapping with a "kind", which is saved with the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from blasst.heads import heads_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Call(NamedTuple):
    """An attention call, as a policy sees it."""

    layer: int
    phase: str
    """"prefill" or "decode"."""
    query: Tensor
    """[batch, query_length, heads, head_dim]: the last positions of each request."""
    key: Tensor
    """[batch, keys, kv_heads, head_dim]"""
    lengths: Tensor | None
    """[batch] end of the keys in use of each request; None: all."""


class Visit(NamedTuple):
    """What a call may visit, as `blasst.attention` takes it."""

    bands: Tensor | None = None
    blocks: Tensor | None = None
    longest: int | None = None
    """No request may have more keys; None: no limit."""


@runtime_checkable
class VisitPolicy(Protocol):
    """A policy for all the layers of a model."""

    chooses_blocks: ClassVar[bool]
    """Whether it looks at keys and queries, and so must see one sequence a request."""

    def check(self, model: "PreTrainedModel") -> None:
        """A ValueError if it is not for such a model."""

    def visit(self, call: Call) -> Visit:
        """What this call may visit."""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a configuration's `blasst_policy`."""


def head_bands(heads: int, length: int) -> Tensor:
    """[heads, 2] int64: first and last distance of each head.

    The bands are disjoint, differ in width by at most one, and cover the distances 0 to length - 1.

    Raises:
        ValueError: fewer distances than heads.
    """
    if heads < 1 or length < heads:
        raise ValueError(
            f"{heads} heads cannot have bands of {length} distances; bands need at least one head, "
            "and a length of at least as many distances as heads"
        )
    edges = torch.arange(heads + 1) * length // heads
    return torch.stack([edges[:-1], edges[1:] - 1], -1)


@dataclass(frozen=True)
class Bands:
    """Each head sees its own band of causal distances, the nearest for head 0 ("SPAttention").

    A model is trained with it from the start. A query nearer to the start than its head's band has
    no key there: that head gives it 0.
    """

    chooses_blocks: ClassVar[bool] = False
    length: int
    """Distances 0 to length - 1 are shared out: no request may have more keys."""

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length of bands is {self.length!r}; it must be a positive integer")

    def of(self, heads: int) -> Tensor:
        """[heads, 2] int64: first and last distance of each head."""
        return head_bands(heads, self.length)

    def check(self, model: "PreTrainedModel") -> None:
        """A ValueError if the model has more heads than there are distances."""
        self.of(max(heads_by_layer(model.config.get_text_config())))

    def visit(self, call: Call) -> Visit:
        """The same bands in every layer and phase."""
        return Visit(bands=self.of(call.query.shape[2]), longest=self.length)

    def to_dict(self) -> dict[str, Any]:
        """For `from_dict`."""
        return {"kind": "bands", "length": self.length}


POLICY_KINDS: dict[str, type] = {"bands": Bands}
_ELSEWHERE = {"dhsa": "blasst.methods.dhsa"}
"""Kinds that a module adds when it is imported."""
_made: dict[str, VisitPolicy] = {}
"""Policies of configurations: a layer asks at each call, and some remember the calls before."""


def from_dict(entry: Any) -> VisitPolicy:
    """The policy that a configuration's `blasst_policy` describes.

    Raises:
        ValueError: it describes none; the message says what was passed and what is accepted.
    """
    if isinstance(entry, Mapping) and entry.get("kind") in _ELSEWHERE:
        import_module(_ELSEWHERE[entry["kind"]])
    if not isinstance(entry, Mapping) or entry.get("kind") not in POLICY_KINDS:
        raise ValueError(
            f"blasst_policy is {entry!r}; it must be a mapping whose kind is one of "
            f"{', '.join(dict.fromkeys([*POLICY_KINDS, *_ELSEWHERE]))}"
        )
    known = _made.get(key := repr(sorted(entry.items())))
    if known is None:
        options = {name: value for name, value in entry.items() if name != "kind"}
        try:
            known = POLICY_KINDS[entry["kind"]](**options)
        except TypeError as error:
            raise ValueError(f"blasst_policy is {dict(entry)!r}: {error}") from None
        _made[key] = known
    return known
