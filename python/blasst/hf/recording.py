"""`record`: the sparsity that models reach, by phase, layer and head."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from blasst.hf.layers import PHASES
from blasst.hf.tensor_parallel import Share
from blasst.ops.attention import Result
from blasst.ops.library import GAP_BINS


class Recording:
    """What `record` collected while it was active, by phase, layer and head.

    The layers are those of the language model; what other parts of a model do, an image encoder
    say, is in `towers`. Of a tensor-parallel model: of all its heads, on every process, once the
    block has ended there.
    """

    wants_maxima = False
    """Whether results shall have their tile maxima."""
    wants_bounds = False
    """Whether results shall have their error bounds."""
    wants_tile_mask = False
    """Whether results shall have their tile masks."""

    def __init__(self, gaps: bool = False) -> None:
        self.wants_gaps = gaps
        self.towers: dict[str, Recording] = {}
        """By model type ("clip_vision_model"): the parts besides the language model that ran."""
        self._counts: dict[tuple[str, int], Tensor] = {}
        self._gaps: dict[tuple[str, int], Tensor] = {}
        self._partial: dict[tuple[str, int], Share] = {}

    def of(self, tower: str) -> "Recording":
        """The recording of this tower; "": of the language model, which is this one."""
        if not tower:
            return self
        return self.towers.setdefault(tower, Recording(self.wants_gaps))

    def add(self, phase: str, layer: int, result: Result, share: Share | None) -> None:
        """Count one attention call."""
        key = (phase, layer)
        counts = torch.stack([result.stats.visitable.sum(0), result.stats.skipped.sum(0)])
        gaps = result.gaps
        if share is not None:
            self._partial[key] = share
            counts = share.spread(counts, 1)
            gaps = None if gaps is None else share.spread(gaps, 0)
        self._counts[key] = _sum(self._counts.get(key), counts, 1)
        if self.wants_gaps:
            self._gaps[key] = _sum(self._gaps.get(key), gaps, 0)

    def gather(self) -> None:
        """Add up what the processes counted, each its own heads; all of them must call it."""
        for key in sorted(self._partial):
            group = self._partial[key].group
            for counted in (self._counts, self._gaps):
                if key in counted:
                    torch.distributed.all_reduce(counted[key], group=group)
        self._partial.clear()
        for tower in sorted(self.towers):
            self.towers[tower].gather()

    def gaps(self, phase: str) -> Tensor:
        """[layers, heads, 514] int64: visited tiles by gap, see `Result.gaps`."""
        if not self.wants_gaps:
            raise ValueError("this recording has no gaps; use record(gaps=True)")
        return _stack([self._gaps[phase, layer] for layer in self.layers(phase)], 0, (1, GAP_BINS))

    def layers(self, phase: str) -> list[int]:
        """Layers that ran in this phase."""
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it must be one of {PHASES}")
        if self._partial:
            raise ValueError(
                "the recording of a tensor-parallel model can be read after the block of "
                "blasst.record has ended, which is when its processes add up their heads"
            )
        return sorted(layer for p, layer in self._counts if p == phase)

    def heads(self, phase: str) -> list[int]:
        """How many heads each of these layers has."""
        return [self._counts[phase, layer].shape[1] for layer in self.layers(phase)]

    def tiles(self, phase: str) -> Tensor:
        """[layers, 2, heads] int64: visitable tiles and skipped tiles.

        0 for the heads that a layer has fewer than others.
        """
        return _stack([self._counts[phase, layer] for layer in self.layers(phase)], 1, (2, 1))

    def by_head(self, phase: str) -> Tensor:
        """[layers, heads] float64: skipped tiles over visitable tiles.

        NaN for the heads that a layer has fewer than others.
        """
        counts = self.tiles(phase).double()
        shares = counts[:, 1] / counts[:, 0].clamp(min=1)
        for row, heads in zip(shares, self.heads(phase), strict=True):
            row[heads:] = torch.nan
        return shares

    def by_layer(self, phase: str) -> Tensor:
        """[layers] float64: skipped tiles over visitable tiles, over all heads."""
        counts = self.tiles(phase).double().sum(-1)
        return counts[:, 1] / counts[:, 0].clamp(min=1)

    def sparsity(self, phase: str, layers: Iterable[int] | None = None) -> float:
        """Skipped tiles over visitable tiles, over all heads of these layers (default: all)."""
        wanted = set(self.layers(phase) if layers is None else layers)
        picked = [layer in wanted for layer in self.layers(phase)]
        visitable, skipped = self.tiles(phase)[picked].sum((0, 2)).tolist()
        return skipped / max(1, visitable)


def _sum(known: Tensor | None, new: Tensor, heads: int) -> Tensor:
    """Both together: modules of one layer may differ in their heads, along dimension `heads`."""
    if known is None:
        return new
    most = max(known.shape[heads], new.shape[heads])
    return _padded(known, heads, most) + _padded(new, heads, most)


def _stack(of_layers: list[Tensor], heads: int, empty: tuple[int, ...]) -> Tensor:
    """[layers, ...] with zeros for the heads that a layer lacks; of no layers: [0, *empty]."""
    if not of_layers:
        return torch.zeros(0, *empty, dtype=torch.int64, device="cpu")
    most = max(t.shape[heads] for t in of_layers)
    device = of_layers[0].device  # layers may be spread over several
    return torch.stack([_padded(t.to(device), heads, most) for t in of_layers])


def _padded(counts: Tensor, dim: int, size: int) -> Tensor:
    if counts.shape[dim] == size:
        return counts
    shape = list(counts.shape)
    shape[dim] = size - counts.shape[dim]
    return torch.cat([counts, counts.new_zeros(shape)], dim)


active: list[Recording] = []
"""Those whose block is running."""


def is_second_pass() -> bool:
    """Whether a layer computes again in a backward pass (gradient checkpointing), once counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def record(*, gaps: bool = False) -> Iterator[Recording]:
    """Count visitable and skipped tiles of every attention call of `blasst` models inside.

    Of a tensor-parallel model every process must record: at the end they add up their heads.

    Args:
        gaps: count the visited tiles by gap as well: what calibration reads thresholds from.

    >>> with blasst.record() as r:
    ...     model.generate(**inputs)
    >>> r.sparsity("prefill"), r.by_layer("prefill"), r.by_head("decode")
    """
    with recording_with(Recording(gaps)) as recording:
        yield recording


@contextmanager
def recording_with(recording: Recording) -> Iterator[Recording]:
    """Every attention call of `blasst` models inside is added to this recording."""
    active.append(recording)
    try:
        yield recording
    finally:
        active.remove(recording)
    recording.gather()
