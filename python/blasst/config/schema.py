"""The shape of a `sparse_attention_config` in a model's config.json.

The keys are the ecosystem's (Model-Optimizer writes them, serving engines read them), so that
configurations travel both ways. What they cannot express goes under one key of our own, "blasst",
which other readers ignore:

    {"config_groups": {"group_0": {
        "algorithm": "skip_softmax",
        "targets": ["LlamaAttention"],                     # classes of the attention layers
        "ignore": ["model.layers.0.self_attn"],            # modules that stay dense
        "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)",
                                   "prefill": {"a": .., "b": ..}, "decode": {"a": .., "b": ..}},
        "target_sparsity": {"prefill": 0.5, "decode": 0.5}}},
     "producer": {"name": .., "version": ..},
     "blasst": {"version": 2,
        "prefill": {"tile_shape": [64, 64], "scores": "int8",    # optional, else "exact"
          "law": {"a": .., "b": ..},                       # the ecosystem's, on these tiles
          "policies": [{
            "order": "sink_first",
            "heads": "equal_mass",                         # how thresholds were shared out
            "law": {"formula": "a * exp(b * target_sparsity) / length ** power",
                    "a": .., "b": .., "power": ..},
            "lengths": [1024, 2048], "target_sparsity": [0.3, 0.5],
            "ln_threshold": [lengths][targets][layers][heads],  # or [1][1]: one for all; layers
                                                           # may differ in their number of heads
            "shorter": {"below": [2048, 4096], "policy": {..}}}],    # optional
          "others": [{"tile_shape": [64, 128], "policies": [..]}]},  # the phase on other tiles
        "decode": ..}}

A model that is saved has the phases in a file beside its config.json, and in it only

     "blasst": {"version": 2, "tables": {"file": "blasst_thresholds.safetensors", "sha256": ..}}

Without our key a phase follows the ecosystem's law: threshold = a * exp(b * target) / length, one
for all heads, tiles visited forward, fitted on tiles of 128 x 128 (or of `tile_shape`, by `law` if
it has one, where `policies` is empty). With policies: the measured table, interpolated in target
and in ln length, and beyond its lengths continued with a power half-way between the law's and 1.
Where the keys are few, an order may not reach a target that another one does: `shorter` holds that
one, and by target the number of keys below which it stands in. `targets` and `ignore` name classes
or modules: see `SparseAttention`.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

ENTRY = "sparse_attention_config"
FORMULA = "a * exp(b * target_sparsity)"
LENGTH_FORMULA = f"{FORMULA} / length ** power"
ALGORITHM = "skip_softmax"
VERSION = 2
"""Version 1 had one tile shape a phase, and its tables in config.json."""
ECOSYSTEM_TARGET = 0.5
"""What readers of the ecosystem take where a file says no target."""
Order = Literal["sink_first", "reverse", "forward"]
Scores = Literal["exact", "int8"]
HeadScheme = Literal[
    "one_threshold", "equal_sparsity", "equal_mass", "water_filling", "least_error"
]


def _ascend(values: list) -> list:
    if any(left >= right for left, right in pairwise(values)):
        raise ValueError(f"is {values}; it must ascend")
    return values


def _of_lists(value: Any) -> Any:
    return [_of_lists(part) for part in value] if isinstance(value, list | tuple) else value


Fraction = Annotated[float, Field(ge=0, le=1)]
Lengths = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_ascend)]
Targets = Annotated[list[Fraction], Field(min_length=1), AfterValidator(_ascend)]


class _Entry(BaseModel):
    """Known keys only, of the types that they have: no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("algorithm", ALGORITHM) != ALGORITHM:
            return value  # another algorithm has other keys: it is the error
        if unknown := sorted(set(value) - set(cls.model_fields)):
            raise ValueError(
                f"unknown key {', '.join(map(repr, unknown))}; known keys: "
                f"{', '.join(sorted(cls.model_fields))}"
            )
        return value


class LawEntry(_Entry):
    """Of the ecosystem: for a length of 1."""

    a: Annotated[float, Field(ge=0)]
    b: float


class LengthLawEntry(LawEntry):
    """Of ours, with the power of the length."""

    formula: Literal["a * exp(b * target_sparsity) / length ** power"]
    power: float


class ScaleFactorEntry(_Entry):
    """`threshold_scale_factor`."""

    formula: Literal["a * exp(b * target_sparsity)"]
    prefill: LawEntry | None = None
    decode: LawEntry | None = None


class TargetSparsityEntry(_Entry):
    """`target_sparsity`, by phase."""

    prefill: Fraction = ECOSYSTEM_TARGET
    decode: Fraction = ECOSYSTEM_TARGET


class GroupEntry(_Entry):
    """The one group of `config_groups`."""

    algorithm: Literal["skip_softmax"]
    targets: list[str]
    threshold_scale_factor: ScaleFactorEntry
    ignore: list[str] = []
    target_sparsity: TargetSparsityEntry = TargetSparsityEntry()

    @field_validator("target_sparsity", mode="before")
    @classmethod
    def _one_for_both_phases(cls, value: Any) -> Any:
        if value is None:
            return {}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"prefill": value, "decode": value} if is_number else value


class ProducerEntry(BaseModel):
    """What wrote the entry."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    name: str = "unknown"
    version: str = "unknown"


class TableEntry(_Entry):
    """Thresholds measured for one order."""

    order: Order
    heads: HeadScheme
    law: LengthLawEntry
    lengths: Lengths
    target_sparsity: Targets
    ln_threshold: Annotated[list[list[list[list[float]]]], BeforeValidator(_of_lists)]
    """[lengths][targets][layers][heads]"""

    @model_validator(mode="after")
    def _table_has_its_shape(self) -> "TableEntry":
        _check_table(self.ln_threshold, len(self.lengths), len(self.target_sparsity))
        return self


class ShorterEntry(_Entry):
    """What stands in where the keys are few."""

    below: list[Annotated[int, Field(ge=0)]]
    policy: TableEntry


class MainTableEntry(TableEntry):
    """One that another may stand in for."""

    shorter: ShorterEntry | None = None

    @model_validator(mode="after")
    def _shorter_is_for_the_same_targets(self) -> "MainTableEntry":
        if self.shorter is None:
            return self
        count = len(self.target_sparsity)
        if len(self.shorter.below) != count:
            raise ValueError(
                f"shorter.below is {self.shorter.below}; it must be {count} numbers of keys, one a "
                "target (0: nowhere)"
            )
        if self.shorter.policy.target_sparsity != self.target_sparsity:
            raise ValueError(
                f"shorter.policy.target_sparsity is {self.shorter.policy.target_sparsity}; it must "
                f"be that of the policy it stands in for, {self.target_sparsity}"
            )
        return self


class MeasuredEntry(_Entry):
    """What a calibration of ours found for one phase."""

    tile_shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    scores: Scores = "exact"
    policies: list[MainTableEntry]
    law: LawEntry | None = None
    others: list["MeasuredEntry"] = []


class FileEntry(_Entry):
    """Where the phases are that are not in config.json."""

    file: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class OwnEntry(_Entry):
    """What the ecosystem's keys cannot express."""

    version: Literal[1, 2]
    tables: FileEntry | None = None
    prefill: MeasuredEntry | None = None
    decode: MeasuredEntry | None = None

    @model_validator(mode="after")
    def _is_in_one_place(self) -> "OwnEntry":
        if self.tables and (self.prefill or self.decode):
            raise ValueError("has phases, and tables that hold them: one of the two is accepted")
        return self


class ConfigEntry(_Entry):
    """A whole `sparse_attention_config`."""

    config_groups: dict[str, GroupEntry]
    producer: ProducerEntry = ProducerEntry()
    blasst: OwnEntry | None = None

    @field_validator("config_groups", mode="before")
    @classmethod
    def _is_one_group(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"{len(value)} groups; blasst reads one")
        return value

    @model_validator(mode="after")
    def _has_something_to_go_by(self) -> "ConfigEntry":
        for phase in ("prefill", "decode"):
            measured = self.blasst and getattr(self.blasst, phase)
            law = getattr(self.group.threshold_scale_factor, phase)
            every = [measured, *measured.others] if measured else []
            if law is None and any(not (one.policies or one.law) for one in every):
                raise ValueError(
                    f"blasst.{phase}.policies is empty and threshold_scale_factor has no {phase}: "
                    "there is nothing to go by"
                )
        return self

    @property
    def group(self) -> GroupEntry:
        """The only one."""
        return next(iter(self.config_groups.values()))


HIGHEST_LN_THRESHOLD = 8.0
"""A table may go above threshold 1 at a length where 1 is too little, for interpolation; what is
used never does."""


def _check_table(table: list[list[list[list[float]]]], lengths: int, targets: int) -> None:
    """A ValueError unless it is [lengths][targets][layers][heads], each layer with its heads."""
    heads = [[[len(row) for row in layers] for layers in by_target] for by_target in table]
    if len(table) != lengths or any(len(by_target) != targets for by_target in table):
        shape = [len(table), *sorted({len(by_target) for by_target in table})]
        raise ValueError(
            f"ln_threshold is {' x '.join(map(str, shape))} layers x heads; it must be {lengths} "
            f"lengths x {targets} targets x layers x heads"
        )
    first = heads[0][0]
    if not all(first) or any(own != first for by_target in heads for own in by_target):
        raise ValueError(
            "ln_threshold must have the same layers, each with the same number of heads, at least "
            "one, everywhere"
        )
    highest = max(x for by_target in table for layers in by_target for row in layers for x in row)
    if highest > HIGHEST_LN_THRESHOLD:
        raise ValueError(f"ln_threshold has a value above {HIGHEST_LN_THRESHOLD:g}: {highest}")


def validated(entry: Any) -> ConfigEntry:
    """The entry, if it has this shape.

    Raises:
        TypeError: it is no object at all.
        ValueError: an unknown key, a missing one, or a value that is not accepted; the message
            names the key and says what was there and what is accepted.
    """
    if not isinstance(entry, dict):
        raise TypeError(f"{ENTRY} is {entry!r}; it must be an object")
    try:
        return ConfigEntry.model_validate(entry)
    except ValidationError as error:
        # Another algorithm has other keys: say so, and not what else is wrong with them.
        found = sorted(error.errors(), key=lambda e: e["loc"][-1:] != ("algorithm",))
        raise ValueError(_explained(found[0])) from None


def _explained(error: dict[str, Any]) -> str:
    """One of pydantic's errors in the words of this package."""
    *around, last = error["loc"] or ("",)
    where = ENTRY + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in around)
    place = f"{where}[{last}]" if isinstance(last, int) else f"{where}.{last}".rstrip(".")
    match error["type"]:
        case "missing":
            return f"{where} lacks {last!r}"
        case "value_error":
            return f"{place}: {error['ctx']['error']}"
        case "too_long" | "too_short":
            return f"{place} holds {error['ctx']['actual_length']} entries; {_wanted(error)}"
        case _:
            return f"{place} is {error['input']!r}; {_wanted(error)}"


def _wanted(error: dict[str, Any]) -> str:
    """What pydantic says of a value, after "it"."""
    said = error["msg"]
    for theirs in ("Input should", "List should", "Dictionary should"):
        said = said.replace(theirs, "it must")
    return said
