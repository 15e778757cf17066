"""The demo: a small model is calibrated, then reads long texts densely and sparsely."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blasst import calibration, files, prompts
from blasst.cli.console import console, show, shown_progress
from blasst.evaluation import report, runner
from blasst.hf import models

TARGETS = (0.5, 0.75)


@dataclass(frozen=True)
class Plan:
    """What the demo does with a model, chosen to take minutes on two cores."""

    lengths: tuple[int, ...]
    """Of calibration; the evaluation is at the longest."""
    held_out: tuple[int, ...]
    other_lengths: tuple[int, ...]
    """Of evaluation: where only sparsity is measured."""
    prompts: int
    schemes: tuple[str, ...]
    """To choose from; `calibrate` tries all."""
    texts: int
    every: int
    """Positions of a text at which predictions are compared; a large vocabulary takes time."""
    needles: int


PLANS = {
    "smollm2": Plan(
        lengths=(1024, 2048, 4096),
        held_out=(3072,),
        other_lengths=(1024, 1536, 2048),
        prompts=1,
        schemes=("water_filling",),
        texts=5,
        every=4,
        needles=2,
    ),
    "gemma3": Plan(
        lengths=(4096, 8192),
        held_out=(6144,),
        other_lengths=(2048, 4096),
        prompts=1,
        schemes=("water_filling",),
        texts=2,
        every=8,
        needles=2,
    ),
}


def demo(name: str, out: Path) -> Path:
    """Calibrate, evaluate and report one of the packaged models; the report's path."""
    if name not in PLANS:
        raise ValueError(f"no demo of {name!r}; there is one of {', '.join(PLANS)}")
    plan = PLANS[name]
    length = plan.lengths[-1]
    files.check_folder(out)
    with shown_progress() as progress:
        loaded = models.load(name, progress=progress)
    found = _calibration(loaded, plan, out / "calibration.json")
    texts = dict(list(prompts.evaluation_texts().items())[: plan.texts])
    with shown_progress() as progress:
        results = runner.evaluate(
            loaded,
            targets=(0.0, *TARGETS),
            length=length,
            texts=texts,
            needles=plan.needles,
            compare_paper=True,
            other_lengths=plan.other_lengths,
            every=plan.every,
            out=out,
            progress=progress,
        )
    return publish(loaded, length, list(texts), results, out, found, plan.every)


def publish(
    loaded: models.Loaded,
    length: int,
    texts: Sequence[str],
    results: runner.Results,
    out: Path,
    found: calibration.Calibration | None = None,
    every: int = 1,
) -> Path:
    """Write the report of a model at so many tokens, and show its tables; the report's path.

    Args:
        loaded: the model.
        length: tokens of every prompt and text.
        texts: their names.
        results: what was measured.
        out: folder.
        found: the calibration, if the report shall show it.
        every: positions of a text at which it was compared with dense.
    """
    compared = f", compared at every {every} positions" if every > 1 else ""
    about = f"Texts: {', '.join(texts)}{compared}." if texts else ""
    about = about_run(about, loaded.model.dtype)
    path = report.write(f"{loaded.title} at {length} tokens", about, results, found, out)
    for table in report.tables(results, found):
        show(table)
    console.print(f"Report: {path.resolve()}")
    return path


def _calibration(loaded: models.Loaded, plan: Plan, kept: Path) -> calibration.Calibration:
    """The calibration of an earlier run if there is one of this model and plan, else a new one."""
    made_by = runner.fingerprint(loaded.model, plan, TARGETS)
    if kept.exists():
        whole = json.loads(kept.read_text())
        if whole["made_by"] == made_by:
            console.print(f"Calibration of an earlier run: {kept}")
            found = calibration.Calibration.from_dict(whole["calibration"])
            loaded.model.config.sparse_attention_config = found.config.to_dict()
            return found
    with shown_progress() as progress:
        found = calibration.calibrate(
            loaded.model,
            loaded.tokenizer,
            lengths=plan.lengths,
            target_sparsity=TARGETS,
            prompts=plan.prompts,
            schemes=plan.schemes,
            held_out=plan.held_out,
            progress=progress,
        )
    # Results of an older calibration say nothing about this one.
    (kept.parent / "results.jsonl").unlink(missing_ok=True)
    models.write_json(kept, {"made_by": made_by, "calibration": found.to_dict()})
    return found


def about_run(more: str, dtype: torch.dtype = torch.float32) -> str:
    """One sentence on the machine, for the report."""
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{kind} on {torch.get_num_threads()} CPU threads, torch {torch.__version__}. {more} "
        "Sparsity: tiles skipped, of those that the causal mask leaves."
    )
