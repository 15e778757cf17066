"""The commands. What is slow to import waits until the arguments are known to be good."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from blasst.cli.loading import with_loading
from blasst.cli.options import (
    Batch,
    Chunk,
    ConfigOnly,
    Distill,
    EvaluatedScores,
    EvaluatedTargets,
    Every,
    FinalTarget,
    Folder,
    HeldOut,
    Length,
    Lengths,
    Model,
    NeedleLengths,
    OtherLengths,
    Prompts,
    PromptSource,
    PromptText,
    Schemes,
    StartTarget,
    Targets,
    Tasks,
    Texts,
    Tile,
    TimedLengths,
    TrainingText,
)
from blasst.cli.parsing import COUNT, POSITIVE, RATE, Choice, several
from blasst.config import HEAD_SCHEMES, SCORES
from blasst.percent import percent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blasst.evaluation import Options
    from blasst.evaluation.report import Written
    from blasst.hf.models import Loading
    from blasst.methods.registry import Method


@with_loading
def calibrate(
    model: Model,
    loading: "Loading",
    target_sparsity: Targets = None,
    lengths: Lengths = None,
    held_out: HeldOut = None,
    prompts: Prompts = 4,
    schemes: Schemes = None,
    chunk: Chunk = 8192,
    scores: Annotated[
        str,
        Option(parser=Choice(SCORES), metavar="KIND", help=f"of prefill: {', '.join(SCORES)}"),
    ] = "exact",
    tile_shape: Tile = None,
    batch: Batch = 1,
    text: PromptSource = None,
    config_only: ConfigOnly = False,
    out: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="where to write the model (default: MODEL if that is a folder, else NAME-blasst)",
        ),
    ] = None,
) -> None:
    """Find a model's thresholds and write them."""
    from blasst import calibration
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.hf import models
    from blasst.prompts import read_records, read_text

    is_records = text is not None and text.suffix == ".jsonl"
    prose = None if text is None or is_records else read_text(text)
    with shown_progress() as progress:
        loaded = models.load(model, loading=loading, progress=progress)
        out = out or Path(model if Path(model).is_dir() else f"{loaded.title}-blasst")
        models.check_room(loaded.model, out, config_only=config_only)
        asked = {
            "lengths": several(lengths),
            "target_sparsity": several(target_sparsity) or [0.5],
            "held_out": several(held_out),
            "prompts": prompts,
            "schemes": several(schemes) or HEAD_SCHEMES,
            "chunk": chunk,
            "scores": scores,
            "tile_shape": tile_shape,
            "batch": batch,
            "text": prose,
            "documents": read_records(text) if is_records else None,
        }
        resume = models.kept_file("calibrations", out.resolve(), loading, asked)
        found = calibration.calibrate(
            loaded.model, loaded.tokenizer, **asked, resume=resume, progress=progress
        )
    for table in report.calibration_tables(found):
        show(table)
    for phase, length, target, highest in found.saturated:
        console.print(
            f"note: at {length} tokens threshold 1 skips {highest:.1%} in {phase}, "
            f"below the target of {percent(target)}"
        )
    models.save_config(loaded.model, loaded.tokenizer, out, config_only=config_only)
    console.print(f"Calibrated model: {out.resolve()}")


@with_loading
def evaluate(
    model: Model,
    loading: "Loading",
    method: Annotated[
        list[str] | None,
        Option(
            metavar="NAME ...",
            help="blasst (default: the calibrated thresholds), bsfa, dhsa, dhsa+blasst",
        ),
    ] = None,
    bsfa_thresholds: Annotated[
        Path | None, Option(metavar="FILE", help="of `bsfa`, for the method bsfa")
    ] = None,
    predictors: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="of `chunks`, for the methods dhsa and dhsa+blasst (default: chunks of 64 keys)",
        ),
    ] = None,
    target_sparsity: EvaluatedTargets = None,
    scores: EvaluatedScores = None,
    tasks: Tasks = None,
    limit: Annotated[int, Option(parser=POSITIVE, metavar="N", help="documents a task")] = 10,
    text: Texts = None,
    length: Length = 4096,
    chunk: Chunk = 8192,
    every: Every = 1,
    other_lengths: OtherLengths = None,
    length_prompts: Annotated[int, Option(parser=POSITIVE, metavar="N", help="of each")] = 1,
    needles: Annotated[
        int, Option(parser=COUNT, metavar="N", help="facts to find, at so many depths")
    ] = 3,
    needle_lengths: NeedleLengths = None,
    timed_lengths: TimedLengths = None,
    repeats: Annotated[int, Option(parser=POSITIVE, metavar="N", help="of what is timed")] = 3,
    out: Folder = Path("blasst-evaluation"),
) -> None:
    """Compare a calibrated model with dense."""
    from blasst.evaluation import Options, lm_eval, parts_of, shorter_lengths
    from blasst.evaluation.options import TARGETS
    from blasst.files import check_folder
    from blasst.methods.registry import BLASST, make_methods
    from blasst.prompts import read_text

    names = several(method) or [BLASST]
    check_folder(out)
    lm_eval.check_tasks(several(tasks) or [])
    methods = make_methods(names, bsfa_thresholds, predictors)
    paths, others = several(text), several(other_lengths)
    asked, timed = several(needle_lengths), several(timed_lengths)
    texts = {} if paths is None else {p: read_text(Path(p)) for p in paths}
    options = Options(
        targets=several(target_sparsity) or TARGETS,
        length=length,
        texts=texts,
        chunk=chunk,
        every=every,
        needles=needles,
        needle_lengths=parts_of(length, 2) if asked is None else asked,
        timed_lengths=parts_of(length, 3) if timed is None else timed,
        repeats=repeats,
        other_lengths=shorter_lengths(length) if others is None else others,
        length_prompts=length_prompts,
        tasks=several(tasks) or [],
        limit=limit,
        scores=several(scores) or None,
        with_calibrated=BLASST in names,
    )
    _evaluate(model, loading, options, methods, out, built_in_texts=paths is None)


def _evaluate(
    model: str,
    loading: "Loading",
    options: "Options",
    methods: "Mapping[str, Method]",
    out: Path,
    *,
    built_in_texts: bool,
) -> None:
    from blasst.cli.console import console, shown_progress
    from blasst.evaluation import evaluate, report
    from blasst.hf import models
    from blasst.prompts import evaluation_texts, long_enough

    with shown_progress() as progress:
        loaded = models.load(model, loading=loading, progress=progress)
        if built_in_texts:
            ours = evaluation_texts()
            options = replace(options, texts=long_enough(loaded.tokenizer, ours, options.length))
            if short := ours.keys() - options.texts.keys():
                console.print(f"note: too short for {options.length} tokens: {', '.join(short)}")
        results = evaluate(loaded, options, methods=methods, out=out, progress=progress)
    _show(report.publish(loaded, options, results, out))


@with_loading
def finetune(
    model: Model,
    loading: "Loading",
    target_sparsity: FinalTarget = 0.75,
    start_sparsity: StartTarget = 0.4,
    ramp: Annotated[
        int, Option(parser=POSITIVE, metavar="N", help="steps from one to the other")
    ] = 8,
    steps: Annotated[int, Option(parser=POSITIVE, metavar="N", help="of training")] = 30,
    length: Annotated[int, Option(parser=POSITIVE, metavar="N", help="tokens of a sample")] = 2048,
    batch: Annotated[int, Option(parser=POSITIVE, metavar="N", help="samples a step")] = 1,
    accumulate: Annotated[
        int, Option(parser=POSITIVE, metavar="N", help="passes that a step's samples are read in")
    ] = 1,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="keep a layer's inputs alone: less memory, slower")
    ] = False,
    fsdp: Annotated[
        bool, Option("--fsdp", help="shard weights and optimizer among the GPUs of torchrun")
    ] = False,
    learning_rate: Annotated[float, Option(parser=RATE, metavar="N", help="at its highest")] = 1e-4,
    save_every: Annotated[
        int, Option(parser=POSITIVE, metavar="N", help="steps between checkpoints")
    ] = 5,
    distill: Distill = False,
    bf16: Annotated[
        bool,
        Option("--bf16", help="compute in bfloat16, on a GPU always (weights stay float32)"),
    ] = False,
    text: TrainingText = None,
    out: Folder = Path("blasst-finetuning"),
) -> None:
    """Train with sparsity, and compare with training without."""
    from blasst.cli.console import console, show, shown_progress
    from blasst.pages import about_run
    from blasst.prompts import read_text
    from blasst.training import report
    from blasst.training.finetune import fine_tune
    from blasst.training.plan import TrainingPlan

    plan = TrainingPlan(
        target=target_sparsity,
        start=start_sparsity,
        ramp=ramp,
        steps=steps,
        length=length,
        batch=batch,
        accumulate=accumulate,
        checkpointing=checkpointing,
        fsdp=fsdp,
        learning_rate=learning_rate,
        distill=distill,
        bf16=bf16,
        save_every=save_every,
    )
    prose = None if text is None else read_text(text)
    with shown_progress() as progress:
        cases = fine_tune(model, plan, text=prose, out=out, progress=progress, loading=loading)
    if not cases:  # another process shows them
        return
    show(report.table(cases, plan))
    title = f"{model}: {plan.steps} steps dense and sparse"
    path = report.write(title, about_run(report.about(plan)), cases, plan, out)
    console.print(f"Report: {path.resolve()}")


@with_loading
def demo(
    loading: "Loading",
    model: Annotated[
        str, Argument(metavar="[MODEL]", help="smollm2 (default) or gemma3")
    ] = "smollm2",
    out: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="of the report (default: blasst-demo/MODEL)"),
    ] = None,
) -> None:
    """Calibrate and evaluate a small model."""
    from blasst import demo as room
    from blasst.cli.console import shown_progress

    with shown_progress() as progress:
        written = room.demo(model, out or Path("blasst-demo") / model, progress, loading)
    _show(written)


@with_loading
def bsfa(
    model: Model,
    loading: "Loading",
    keep: Annotated[
        list[int] | None,
        Option(
            parser=POSITIVE,
            metavar="K ...",
            help="tiles that a query tile keeps besides its diagonal's (default: 1 to 128)",
        ),
    ] = None,
    length: Annotated[
        int | None, Option(parser=POSITIVE, metavar="TOKENS", help="(default: 4096)")
    ] = None,
    prompts: Prompts = 16,
    chunk: Chunk = 8192,
    text: PromptText = None,
    out: Annotated[
        Path | None,
        Option(metavar="FILE", help="where to write them (default: NAME-bsfa.safetensors)"),
    ] = None,
) -> None:
    """Find a model's absolute thresholds."""
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.files import check_file
    from blasst.hf import models
    from blasst.methods import bsfa as method
    from blasst.prompts import read_text

    prose = None if text is None else read_text(text)
    loaded = models.load(model, loading=loading)
    out = out or Path(f"{loaded.title}-bsfa.safetensors")
    check_file(out, method.AbsoluteThresholds.load)
    with shown_progress() as progress:
        found = method.calibrate(
            loaded.model,
            loaded.tokenizer,
            length=length,
            keeps=several(keep) or method.KEEPS,
            prompts=prompts,
            text=prose,
            chunk=chunk,
            progress=progress,
        )
    found.save(out)
    show(report.threshold_table(found))
    console.print(f"Absolute thresholds: {out.resolve()}")


@with_loading
def chunks(
    model: Model,
    loading: "Loading",
    size: Annotated[int, Option(parser=POSITIVE, metavar="KEYS", help="a chunk has")] = 32,
    length: Length = 2048,
    text: Annotated[
        Path | None,
        Option(metavar="FILE", help="prose to train on (default: Python's reference)"),
    ] = None,
    out: Annotated[
        Path | None,
        Option(metavar="FILE", help="where to write them (default: NAME-chunks.safetensors)"),
    ] = None,
) -> None:
    """Train the predictors of chunk boundaries."""
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.files import check_file
    from blasst.hf import models
    from blasst.methods import dhsa, dhsa_training
    from blasst.prompts import read_text

    plan = dhsa_training.PredictorPlan(size=size, length=length)
    prose = None if text is None else read_text(text)
    loaded = models.load(model, loading=loading)
    out = out or Path(f"{loaded.title}-chunks.safetensors")
    check_file(out, dhsa.load_predictors)
    with shown_progress() as progress:
        trained = dhsa_training.train(loaded.model, loaded.tokenizer, out, plan, prose, progress)
    show(report.predictor_table(trained.values()))
    console.print(f"Boundary predictors: {out.resolve()}")


def _show(written: "Written") -> None:
    from blasst.cli.console import console, show

    for table in written.tables:
        show(table)
    console.print(f"Report: {written.path.resolve()}")
