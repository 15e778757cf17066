"""Block sparse flash attention: absolute thresholds by layer, head and place of the query tile.

A key tile is kept if its largest score reaches a threshold that was calibrated for "keep the k best
tiles besides the diagonal's": the midpoint between the k-th and the (k + 1)-th largest tile maximum
of a prompt, averaged over prompts. Where a query tile has no more than k such tiles it keeps all.
Tiles are visited from the diagonal back ("reverse"), and the first keys of a row are never dropped,
so the diagonal's tiles are always kept.

One dense pass a prompt gives all k at once, for the kernel reports the largest score of every tile.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.files import open_tensors, replace_file
from blasst.heads import query_size, value_size
from blasst.hf import DENSE, Recording, Threshold, configure, recording_with
from blasst.hf.models import (
    check_length,
    context_length,
    described,
    identity,
    unwindowed_layers,
)
from blasst.hf.reading import CHUNK, check_chunk, read
from blasst.ops.arguments import check_whole_number, is_integer
from blasst.ops.attention import Result
from blasst.ops.library import KEYS, QUERY_ROWS, prefill_tile
from blasst.progress import Progress, silent
from blasst.prompts import PromptMaker, kind_at

KEEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
DEFAULT_LENGTH = 4096
PROMPTS = 16
VERSION = 1
COEFFICIENTS = 3
LEAST_POINTS = 2 * COEFFICIENTS
"""Places that a fit needs; a head with fewer keeps its table."""


def thresholds_of(maxima: Tensor, keeps: Sequence[int]) -> Tensor:
    """The thresholds that one prompt asks for.

    Args:
        maxima: [..., query tiles, key tiles] largest score of each tile, -inf where none is
            visited. The diagonal's is the last visited tile of each query tile.
        keeps: numbers of tiles to keep besides the diagonal's, ascending.

    Returns:
        [keeps, ..., query tiles] float64, -inf where there are no more than k tiles.
    """
    visited = maxima > -math.inf
    last = visited.shape[-1] - 1 - visited.flip(-1).int().argmax(-1, keepdim=True)
    others = maxima.double().scatter(-1, last, -math.inf)
    best = others.sort(-1, descending=True).values
    best = torch.nn.functional.pad(best, (0, max(0, keeps[-1] + 1 - best.shape[-1])),
                                   value=-math.inf)  # fmt: skip
    return torch.stack([(best[..., k - 1] + best[..., k]) / 2 for k in keeps])


def basis(places: Tensor) -> Tensor:
    """[places] -> [places, 3]: what a threshold is fitted with.

    The best of n scores grows with ln n, at a rate that itself changes as the tail gets thin.
    """
    ln = torch.log(places.double() + 1)
    return torch.stack([torch.ones_like(ln), ln, ln.square()], -1)


@dataclass(frozen=True)
class AbsoluteThresholds:
    """Thresholds of a model, and what is known of how good they are."""

    model: dict[str, Any]
    """What they belong to: see `models.identity`."""
    layers: tuple[int, ...]
    """Layers that have some; the others (sliding windows) stay dense."""
    keeps: tuple[int, ...]
    table: Tensor
    """[keeps, layers, heads, places] float32 scores; -inf: every tile is kept."""
    spread: Tensor
    """The same shape: standard deviation between prompts; NaN where fewer than two prompts are so
    long."""
    prompts: int
    tile_shape: tuple[int, int] = (QUERY_ROWS, KEYS)
    """Query rows and keys of the tiles that they are for: those of the device of calibration."""

    @property
    def fit(self) -> Tensor:
        """[keeps, layers, heads, 3] float64: coefficients of `basis` over the finite places.

        NaN for a head with too few of them.
        """
        result = torch.full((*self.table.shape[:3], COEFFICIENTS), math.nan, dtype=torch.float64)
        for index, (used, points) in self._fittable():
            result[index] = torch.linalg.lstsq(points, used[:, None]).solution[:, 0]
        return result

    def _fittable(self) -> Iterator[tuple[tuple[int, int, int], tuple[Tensor, Tensor]]]:
        """Index of each head that a fit can be made for, its finite thresholds, their basis."""
        columns = basis(torch.arange(self.table.shape[-1]))
        for keep in range(len(self.keeps)):
            # Which places have more than k tiles depends on the mask: not on head or prompt.
            for layer in range(len(self.layers)):
                for head in range(self.table.shape[2]):
                    row = self.table[keep, layer, head].double()
                    finite = row.isfinite()
                    if finite.sum() >= LEAST_POINTS:
                        yield (keep, layer, head), (row[finite], columns[finite])

    def fitted(self) -> Tensor:
        """The table from its fit, -inf where the table is; heads without a fit as they are."""
        values = torch.einsum("klhc,pc->klhp", self.fit, basis(torch.arange(self.table.shape[-1])))
        use = self.table.isfinite() & values.isfinite()
        return torch.where(use, values.float(), self.table)

    def fit_error(self) -> Tensor:
        """[keeps, layers, heads]: root mean square over the places, in scores; NaN: no fit."""
        error = torch.full(self.table.shape[:3], math.nan)
        difference = (self.fitted() - self.table).double()
        for index, _ in self._fittable():
            error[index] = difference[index][self.table[index].isfinite()].square().mean().sqrt()
        return error

    def mean_spread(self) -> Tensor:
        """[keeps, layers, heads]: root mean square over the places of the spread; NaN: none."""
        known = self.spread.isfinite()
        total = torch.where(known, self.spread, 0.0).double().square().sum(-1)
        return (total / known.sum(-1)).sqrt().float()

    def sparsity(self, keep: int, length: int) -> float:
        """Share of the causal tiles of so many tokens that is dropped if each keeps k exactly."""
        rows, keys = self.tile_shape
        ends = (min(end, length) for end in range(rows, length + rows, rows))
        visible = [-(-end // keys) for end in ends]
        kept = sum(min(tiles, keep + 1) for tiles in visible)
        return 1 - kept / sum(visible)

    def keep_for(self, sparsity: float, length: int) -> int:
        """The k whose sparsity at this length is nearest."""
        return min(self.keeps, key=lambda k: abs(self.sparsity(k, length) - sparsity))

    def apply(self, model: PreTrainedModel, keep: int, *, fitted: bool = False) -> None:
        """Set a model's prefill thresholds: keep about k tiles besides the diagonal's.

        Args:
            model: loaded with `attn_implementation="blasst"`; its decode becomes dense.
            keep: one of `keeps`.
            fitted: from the fit, not from the table.

        Raises:
            ValueError: a k that was not calibrated, another model, or a device whose tiles are
                others.
        """
        if keep not in self.keeps:
            raise ValueError(f"keep is {keep}; it must be one of {', '.join(map(str, self.keeps))}")
        other = identity(model)
        if other != self.model:
            raise ValueError(
                f"these thresholds are of a model with {described(self.model)}; this one has "
                f"{described(other)}"
            )
        if (tile := _tile_of(model)) != self.tile_shape:
            raise ValueError(
                f"these thresholds are for tiles of {self.tile_shape[0]} x {self.tile_shape[1]}; "
                f"on {model.device.type} this model decides on {tile[0]} x {tile[1]}: calibrate "
                "there"
            )
        table = (self.fitted() if fitted else self.table)[self.keeps.index(keep)]
        configure(model, prefill=DENSE, decode=DENSE)
        for layer, thresholds in zip(self.layers, table, strict=True):
            rule = Threshold(absolute_threshold=thresholds[None], order="reverse")
            configure(model, prefill=rule, layers=[layer])

    def save(self, path: Path) -> None:
        """Into a safetensors file, whole or not at all."""
        about = {
            "version": VERSION,
            "model": self.model,
            "layers": self.layers,
            "keeps": self.keeps,
            "prompts": self.prompts,
            "tile_shape": self.tile_shape,
        }
        tensors = {
            "table": self.table.contiguous(),
            "spread": self.spread.contiguous(),
            "fit": self.fit.float().contiguous(),
            "fit_error": self.fit_error().contiguous(),
        }
        replace_file(path, save(tensors, metadata={"blasst_bsfa": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "AbsoluteThresholds":
        """What `save` wrote.

        Raises:
            ValueError: another file, or one that cannot be read.
        """
        with open_tensors(path) as file:
            about = json.loads((file.metadata() or {}).get("blasst_bsfa", "null"))
            if about is None or about["version"] != VERSION:
                raise ValueError(f"{path} holds no absolute thresholds of version {VERSION}")
            table, spread = file.get_tensor("table"), file.get_tensor("spread")
        return cls(
            about["model"],
            tuple(about["layers"]),
            tuple(about["keeps"]),
            table,
            spread,
            about["prompts"],
            tuple(about["tile_shape"]),
        )


def _tile_of(model: PreTrainedModel) -> tuple[int, int]:
    """The tile on which the model's prefill decides where it is now."""
    text = model.config.get_text_config()
    return prefill_tile(model.device, query_size(text), value_size(text))


class _Prompts(Recording):
    """Sums of the thresholds that prompts ask for, as the passes run."""

    wants_maxima = True

    def __init__(self, layers: Sequence[int], keeps: Sequence[int], query_rows: int) -> None:
        super().__init__()
        self._layers, self._keeps, self._query_rows = layers, keeps, query_rows
        self._read: dict[int, int] = {}
        self._sums: dict[int, list[Tensor]] = {}

    def begin(self) -> None:
        """Another prompt, which may be read in chunks."""
        self._read.clear()

    def add(self, phase: str, layer: int, result: Result, share: object | None) -> None:
        if share is not None:
            raise ValueError("calibrate absolute thresholds in one process: a tensor-parallel "
                             "model has only its own heads here")  # fmt: skip
        if layer not in self._layers:
            return
        found = thresholds_of(result.tile_maxima[0], self._keeps)
        new = torch.stack([found, found.square(), torch.ones_like(found)])
        new[1] = torch.where(found.isfinite(), new[1], 0.0)
        first = self._read.get(layer, 0)
        self._read[layer] = first + result.out.shape[1]
        new = torch.nn.functional.pad(new, (first // self._query_rows, 0))
        known = self._sums.get(layer)
        if known is not None:  # prompts may differ in length
            longest = max(new.shape[-1], known.shape[-1])
            new, known = (
                torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in (new, known)
            )
            new = new + known
        self._sums[layer] = new

    def table(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [keeps, layers, heads, places] float32."""
        total, squares, count = torch.stack([self._sums[i] for i in self._layers], 2)
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        spread = torch.where(mean.isfinite() & (count > 1), variance.clamp(min=0).sqrt(), math.nan)
        return mean.float().cpu(), spread.float().cpu()


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    keeps: Sequence[int] = KEEPS,
    prompts: int = PROMPTS,
    text: str | None = None,
    chunk: int | None = CHUNK,
    progress: Progress = silent,
) -> AbsoluteThresholds:
    """Thresholds of a model, from one dense pass a prompt; under the model's policy, if it has one.

    Args:
        model: loaded with `attn_implementation="blasst"`, on the device that it will run on. What
            was set on it stays set.
        tokenizer: its tokenizer.
        length: tokens a prompt; default: 4,096, or the model's context if that is shorter.
        keeps: numbers of tiles to keep besides the diagonal's.
        prompts: how many.
        text: prose to make prompts from; default: `prompts.reference_text()`.
        chunk: tokens of a prompt that are read at once, a multiple of 128; None: all.
        progress: told what is being done.

    Raises:
        ValueError: a k that no query tile of this length can drop anything for, a length beyond the
            context, a text too short, or a model that runs another attention.
    """
    if length is None:
        length = min(DEFAULT_LENGTH, context_length(model))
    check_whole_number("length", length)
    check_whole_number("prompts", prompts)
    check_length(model, length, "a calibration prompt")
    if not all(map(is_integer, keeps)):
        raise TypeError(f"keeps is {keeps!r}; it must be whole numbers")
    keeps = tuple(sorted(set(keeps)))
    tile_shape = _tile_of(model)
    most = -(-length // tile_shape[1]) - 2
    if text is None:
        keeps = tuple(k for k in keeps if k <= most) if keeps == KEEPS else keeps
    if not keeps or keeps[0] < 1 or keeps[-1] > most:
        raise ValueError(
            f"tiles to keep are {list(keeps)}; each must be 1 to {most}, less than the last of "
            f"{length} tokens has besides its diagonal's"
        )
    if chunk is not None:
        check_chunk(chunk)
    maker = PromptMaker(tokenizer, text, "the calibration text")
    layers = unwindowed_layers(model)
    if not layers:
        raise ValueError("every layer has a sliding window; there is nothing to calibrate")
    sums = _Prompts(layers, keeps, tile_shape[0])
    with _dense(model), recording_with(sums):
        for i in range(prompts):
            progress("Absolute thresholds", i / prompts, f"prompt {i + 1} of {prompts}")
            tokens = maker.make(kind_at(i), length, seed=i).tokens
            sums.begin()
            read(model, tokens, chunk=chunk)
    progress("Absolute thresholds", 1.0, "")
    return AbsoluteThresholds(
        identity(model), tuple(layers), keeps, *sums.table(), prompts, tile_shape
    )


@contextmanager
def _dense(model: PreTrainedModel) -> Iterator[None]:
    """The model drops nothing, and afterwards what it did before."""
    modules = [m for m in model.modules() if hasattr(m, "blasst_thresholds")]
    before = [m.blasst_thresholds for m in modules]
    entry = model.config.__dict__.pop("sparse_attention_config", None)
    configure(model, prefill=DENSE, decode=DENSE)
    try:
        yield
    finally:
        for module in model.modules():
            module.__dict__.pop("blasst_thresholds", None)
        for module, thresholds in zip(modules, before, strict=True):
            module.blasst_thresholds = thresholds
        if entry is not None:
            model.config.sparse_attention_config = entry
