"""The demo: a small model is calibrated, then reads long texts densely and sparsely."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from blasst import calibration, prompts
from blasst.calibration import Calibration
from blasst.errors import NotSupportedError
from blasst.evaluation import Options, evaluate, parts_of, report
from blasst.evaluation.options import TARGETS as EVALUATED
from blasst.evaluation.report import Written
from blasst.files import check_folder, write_json
from blasst.hf import models
from blasst.measure.results import fingerprint
from blasst.ops.attention import tile_shape
from blasst.progress import Progress, silent

TARGETS = (0.5, 0.75)
"""Of calibration on a GPU; texts are read at more."""


@dataclass(frozen=True)
class Size:
    """How much the demo does with a model."""

    lengths: tuple[int, ...]
    """Of calibration; the evaluation is at the longest."""
    held_out: tuple[int, ...]
    other_lengths: tuple[int, ...]
    """Of evaluation: where only sparsity is measured."""
    prompts: int
    schemes: tuple[str, ...]
    """To choose from; `calibrate` tries all. One threshold for all heads takes least time."""
    texts: int
    every: int
    """Positions of a text at which predictions are compared; a large vocabulary takes time."""
    needles: int
    targets: tuple[float, ...]
    """Of calibration, and of prompts that are timed or answered."""
    paper: tuple[float, ...]
    """At which texts are read under the paper's scheme too."""
    repeats: int
    """Of what is timed."""


SIZES = {
    "smollm2": Size(
        lengths=(1024, 2048, 4096),
        held_out=(1536,),
        other_lengths=(1024, 2048),
        prompts=1,
        schemes=("one_threshold",),
        texts=1,
        every=4,
        needles=2,
        targets=(0.75,),
        paper=(0.75,),
        repeats=2,
    ),
    "gemma3": Size(
        lengths=(4096, 8192),
        held_out=(6144,),
        other_lengths=(2048, 4096),
        prompts=1,
        schemes=("one_threshold",),
        texts=1,
        every=8,
        needles=2,
        targets=(0.75,),
        paper=(0.75,),
        repeats=2,
    ),
}
"""On the CPU: fifty passes of the longest, of which two cores take eight seconds for SmolLM2's."""

ON_A_GPU = {
    "smollm2": replace(
        SIZES["smollm2"],
        lengths=(2048, 4096, 8192),
        held_out=(6144,),
        other_lengths=(1024, 2048, 4096),
        prompts=2,
        schemes=("water_filling",),
        texts=5,
        every=1,
        targets=TARGETS,
        paper=EVALUATED[1:],
        repeats=3,
    ),
    "gemma3": replace(
        SIZES["gemma3"],
        lengths=(8192, 16384),
        held_out=(12288,),
        other_lengths=(4096, 8192),
        prompts=2,
        schemes=("water_filling",),
        texts=4,
        targets=TARGETS,
        paper=EVALUATED[1:],
        repeats=3,
    ),
}
"""The same, at lengths where attention takes most of the time."""


def demo(
    name: str, out: Path, progress: Progress = silent, loading: models.Loading | None = None
) -> Written:
    """Calibrate, evaluate and report one of the packaged models.

    Args:
        name: of the model.
        out: folder; what it holds of an earlier run is continued.
        progress: told what is being done: see `blasst.progress`.
        loading: how the model is loaded; default: onto a GPU that blasst has kernels for, else the
            CPU.

    Returns:
        The report's path, and its tables.

    Raises:
        ValueError: there is no demo of this model, or no room for its results.
    """
    if name not in SIZES:
        raise ValueError(f"no demo of {name!r}; there is one of {', '.join(SIZES)}")
    check_folder(out)
    loading = loading or models.Loading()
    if loading.device is None and loading.device_map is None:
        loading = replace(loading, device=usable_gpu())
    loaded = models.load(name, loading=loading, progress=progress)
    size = (ON_A_GPU if loaded.model.device.type == "cuda" else SIZES)[name]
    texts = prompts.long_enough(loaded.tokenizer, prompts.evaluation_texts(), size.lengths[-1])
    found = _calibration(loaded, size, out / "calibration.json", progress)
    options = Options(
        targets=sorted({*EVALUATED, *size.targets}),
        length=size.lengths[-1],
        texts=dict(list(texts.items())[: size.texts]),
        every=size.every,
        needles=size.needles,
        needle_lengths=parts_of(size.lengths[-1], 2),
        timed_lengths=parts_of(size.lengths[-1], 3),
        repeats=size.repeats,
        prompt_targets=size.targets,
        other_lengths=size.other_lengths,
        paper_targets=size.paper,
    )
    results = evaluate(loaded, options, out=out, progress=progress)
    return report.publish(loaded, options, results, out, found)


def usable_gpu() -> str | None:
    """A GPU, where there is one that blasst has kernels for."""
    if not torch.cuda.is_available():
        return None
    any_tensor = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        tile_shape(any_tensor, any_tensor, any_tensor, phase="prefill")
    except NotSupportedError:
        return None
    return "cuda"


def _calibration(loaded: models.Loaded, size: Size, kept: Path, progress: Progress) -> Calibration:
    """The calibration of an earlier run if there is one of this model and size, else a new one."""
    asked = {
        "lengths": size.lengths,
        "target_sparsity": size.targets,
        "prompts": size.prompts,
        "schemes": size.schemes,
        "held_out": size.held_out,
    }
    made_by = fingerprint(loaded.model, *asked.values())
    if kept.exists():
        whole = json.loads(kept.read_text())
        if whole["made_by"] == made_by:
            progress("Calibration", 1.0, f"of an earlier run: {kept}")
            found = Calibration.from_dict(whole["calibration"])
            loaded.model.config.sparse_attention_config = found.config.to_dict()
            return found
    resume = models.kept_file("calibrations", kept.resolve(), asked)
    found = calibration.calibrate(
        loaded.model, loaded.tokenizer, **asked, resume=resume, progress=progress
    )
    # Results of an older calibration say nothing about this one.
    (kept.parent / "results.jsonl").unlink(missing_ok=True)
    write_json(kept, {"made_by": made_by, "calibration": found.to_dict()})
    return found
