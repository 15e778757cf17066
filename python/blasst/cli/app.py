"""Command line: `python -m blasst`."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blasst.cli import interrupt
from blasst.config import HEAD_SCHEMES

# What is slow to import waits until the arguments are known to be good.


@dataclass(frozen=True)
class _Number:
    """What an option that takes a number makes of it; an error says what is allowed."""

    kind: type[int] | type[float]
    allowed: str
    is_allowed: Callable[[float], bool]

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan  # in no range
        if not self.is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.allowed}")
        return value


_POSITIVE = _Number(int, "a whole number of 1 or more", lambda n: n >= 1)
_COUNT = _Number(int, "a whole number of 0 or more", lambda n: n >= 0)
_FRACTION = _Number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
_RATE = _Number(float, "a number between 0 and 1", lambda x: 0 < x < 1)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = _parser().parse_args(arguments)
    from safetensors import SafetensorError

    from blasst.cli.console import console, log_to_console

    try:
        interrupt.raise_again()
        with log_to_console():
            options.run(options)
    except KeyboardInterrupt:
        more = "; the same command goes on from there" if options.resumes else ""
        console.print(f"\nblasst: stopped{more}")
        return interrupt.INTERRUPTED
    except (ValueError, OSError, SafetensorError) as error:
        print(f"blasst: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blasst",
        description="Long-context attention made sparse by softmax thresholding.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_finetune(commands)
    _add_demo(commands)
    _add_bsfa(commands)
    _add_chunks(commands)
    return parser


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("calibrate", help="find a model's thresholds and write them")
    command.set_defaults(run=_calibrate, resumes=False)
    _add_model(command)
    _add_targets(
        command, [0.5], "shares of the tiles to skip; the first becomes the configuration's"
    )
    command.add_argument(
        "--lengths", type=_POSITIVE, nargs="+", metavar="TOKENS", help="default: 1024 2048 4096"
    )
    command.add_argument(
        "--held-out",
        type=_POSITIVE,
        nargs="*",
        metavar="TOKENS",
        help="lengths to check (default: half-way between the two longest, and twice the longest)",
    )
    command.add_argument(
        "--prompts", type=_POSITIVE, default=4, metavar="N", help="of each length (default: 4)"
    )
    command.add_argument(
        "--schemes",
        nargs="+",
        default=HEAD_SCHEMES,
        choices=HEAD_SCHEMES,
        metavar="SCHEME",
        help=f"ways to share thresholds out among heads: {', '.join(HEAD_SCHEMES)} (default: all)",
    )
    _add_prompt_text(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write the model (default: MODEL if that is a folder, else NAME-blasst)",
    )


def _add_prompt_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="make the prompts from this text"
    )


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("evaluate", help="compare a calibrated model with dense")
    command.set_defaults(run=_evaluate, resumes=True)
    _add_model(command)
    command.add_argument(
        "--method",
        nargs="+",
        default=["blasst"],
        metavar="NAME",
        help="blasst (default: the calibrated thresholds), bsfa, dhsa, dhsa+blasst",
    )
    command.add_argument(
        "--bsfa-thresholds", type=Path, metavar="FILE", help="of `bsfa`, for the method bsfa"
    )
    command.add_argument(
        "--predictors",
        type=Path,
        metavar="FILE",
        help="of `chunks`, for the methods dhsa and dhsa+blasst (default: chunks of 64 keys)",
    )
    _add_targets(command, [0.0, 0.5, 0.75], "shares of the tiles to skip; 0: dense")
    command.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        metavar="TASK",
        help="of lm-eval: those of RULER that need no download (default: none)",
    )
    command.add_argument(
        "--limit", type=_POSITIVE, default=10, metavar="N", help="documents a task (default: 10)"
    )
    command.add_argument(
        "--text",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="texts for perplexity (default: five that come with Python and its packages)",
    )
    command.add_argument(
        "--length",
        type=_POSITIVE,
        default=4096,
        metavar="TOKENS",
        help="of prompts and texts (default: 4096)",
    )
    command.add_argument(
        "--every",
        type=_POSITIVE,
        default=1,
        metavar="N",
        help="compare texts with dense at every N-th position (default: 1)",
    )
    command.add_argument(
        "--other-lengths",
        type=_POSITIVE,
        nargs="*",
        metavar="TOKENS",
        help="where only sparsity is measured (default: four shorter ones)",
    )
    command.add_argument(
        "--length-prompts", type=_POSITIVE, default=1, metavar="N", help="of each (default: 1)"
    )
    command.add_argument(
        "--needles", type=_COUNT, default=3, metavar="N", help="facts to find (default: 3)"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("blasst-evaluation"),
        metavar="FOLDER",
        help="of results (default: blasst-evaluation)",
    )


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "finetune", help="train with sparsity, compare with training without"
    )
    command.set_defaults(run=_finetune, resumes=True)
    _add_model(command)
    for option, kind, default, what in (
        ("--target-sparsity", _FRACTION, 0.75, "share of the tiles to skip at the end"),
        ("--start-sparsity", _FRACTION, 0.4, "share at the first step"),
        ("--ramp", _POSITIVE, 8, "steps from one to the other"),
        ("--steps", _POSITIVE, 30, "of training"),
        ("--length", _POSITIVE, 2048, "tokens of a sample"),
        ("--batch", _POSITIVE, 1, "samples a step"),
        ("--learning-rate", _RATE, 1e-4, "at its highest"),
        ("--save-every", _POSITIVE, 5, "steps between checkpoints"),
    ):
        letter = "S" if kind is _FRACTION else "N"
        command.add_argument(
            option, type=kind, default=default, metavar=letter, help=f"{what} (default: {default})"
        )
    command.add_argument(
        "--distill",
        action="store_true",
        help="learn the untrained model's predictions, not the texts' tokens; nothing is trained "
        "densely",
    )
    command.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (weights stay float32)"
    )
    command.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="train on this text, without its last fifth, which is held out",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("blasst-finetuning"),
        metavar="FOLDER",
        help="of all results",
    )


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("demo", help="calibrate and evaluate a small model")
    command.set_defaults(run=_demo, resumes=True)
    command.add_argument("model", nargs="?", default="smollm2", help="smollm2 (default) or gemma3")
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the report (default: blasst-demo/MODEL)"
    )


def _add_bsfa(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("bsfa", help="find a model's absolute thresholds")
    command.set_defaults(run=_bsfa, resumes=False)
    _add_model(command)
    command.add_argument(
        "--keep",
        type=_POSITIVE,
        nargs="+",
        metavar="K",
        help="tiles that a query tile keeps besides its diagonal's (default: 1 to 128)",
    )
    command.add_argument("--length", type=_POSITIVE, metavar="TOKENS", help="default: 4096")
    command.add_argument(
        "--prompts", type=_POSITIVE, default=16, metavar="N", help="how many (default: 16)"
    )
    _add_prompt_text(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write them (default: NAME-bsfa.safetensors)",
    )


def _add_chunks(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("chunks", help="train the predictors of chunk boundaries")
    command.set_defaults(run=_chunks, resumes=True)
    _add_model(command)
    command.add_argument(
        "--size", type=_POSITIVE, default=32, metavar="KEYS", help="a chunk has (default: 32)"
    )
    command.add_argument(
        "--length", type=_POSITIVE, default=2048, metavar="TOKENS", help="default: 2048"
    )
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="prose to train on (default: Python's reference)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write them (default: NAME-chunks.safetensors)",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="smollm2, gemma3, a folder or a hub name")


def _add_targets(command: argparse.ArgumentParser, default: list[float], description: str) -> None:
    command.add_argument(
        "--target-sparsity",
        type=_FRACTION,
        nargs="+",
        default=default,
        metavar="S",
        help=f"{description} (default: {' '.join(f'{s:g}' for s in default)})",
    )


def _calibrate(options: argparse.Namespace) -> None:
    from blasst import calibration, prompts
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.hf import models

    text = None if options.text is None else prompts.read_text(options.text)
    with shown_progress() as progress:
        loaded = models.load(options.model, progress=progress)
        is_folder = Path(options.model).is_dir()
        out = options.out or Path(options.model if is_folder else f"{loaded.title}-blasst")
        models.check_room(loaded.model, out)
        found = calibration.calibrate(
            loaded.model,
            loaded.tokenizer,
            lengths=options.lengths,
            target_sparsity=options.target_sparsity,
            held_out=options.held_out,
            prompts=options.prompts,
            schemes=options.schemes,
            text=text,
            progress=progress,
        )
    for table in report.calibration_tables(found):
        show(table)
    for phase, length, target, highest in found.saturated:
        console.print(
            f"note: at {length} tokens threshold 1 skips {highest:.1%} in {phase}, "
            f"below the target of {target:.0%}"
        )
    models.save_config(loaded.model, loaded.folder, out)
    console.print(f"Calibrated model: {out.resolve()}")


def _evaluate(options: argparse.Namespace) -> None:
    from blasst import evaluation, files, prompts
    from blasst.cli.console import shown_progress
    from blasst.evaluation import lm_eval, report
    from blasst.hf import models
    from blasst.methods.registry import BLASST, make_methods

    files.check_folder(options.out)
    lm_eval.check_tasks(options.tasks)
    methods = make_methods(options.method, options.bsfa_thresholds, options.predictors)
    if options.text is not None:
        texts = {str(path): prompts.read_text(path) for path in options.text}
    else:
        texts = prompts.evaluation_texts()
    other_lengths = options.other_lengths
    if other_lengths is None:
        other_lengths = evaluation.shorter_lengths(options.length)
    measured = evaluation.Options(
        targets=options.target_sparsity,
        length=options.length,
        texts=texts,
        every=options.every,
        needles=options.needles,
        other_lengths=other_lengths,
        length_prompts=options.length_prompts,
        tasks=options.tasks,
        limit=options.limit,
        with_calibrated=BLASST in options.method,
    )
    with shown_progress() as progress:
        loaded = models.load(options.model, progress=progress)
        results = evaluation.evaluate(
            loaded, measured, methods=methods, out=options.out, progress=progress
        )
    _show_report(report.publish(loaded, measured, results, options.out))


def _show_report(written: Any) -> None:
    from blasst.cli.console import console, show

    for table in written.tables:
        show(table)
    console.print(f"Report: {written.path.resolve()}")


def _bsfa(options: argparse.Namespace) -> None:
    from blasst import files, prompts
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.hf import models
    from blasst.methods import bsfa

    text = None if options.text is None else prompts.read_text(options.text)
    loaded = models.load(options.model)
    out = options.out or Path(f"{loaded.title}-bsfa.safetensors")
    files.check_file(out, bsfa.AbsoluteThresholds.load)
    with shown_progress() as progress:
        found = bsfa.calibrate(
            loaded.model,
            loaded.tokenizer,
            length=options.length,
            keeps=options.keep or bsfa.KEEPS,
            prompts=options.prompts,
            text=text,
            progress=progress,
        )
    found.save(out)
    show(report.threshold_table(found))
    console.print(f"Absolute thresholds: {out.resolve()}")


def _chunks(options: argparse.Namespace) -> None:
    from blasst import files, prompts
    from blasst.cli.console import console, show, shown_progress
    from blasst.evaluation import report
    from blasst.hf import models
    from blasst.methods import dhsa, dhsa_training

    plan = dhsa_training.Plan(size=options.size, length=options.length)
    text = None if options.text is None else prompts.read_text(options.text)
    loaded = models.load(options.model)
    out = options.out or Path(f"{loaded.title}-chunks.safetensors")
    files.check_file(out, dhsa.load_predictors)
    with shown_progress() as progress:
        trained = dhsa_training.train(
            loaded.model, loaded.tokenizer, out, plan, text, progress
        ).values()
    show(report.predictor_table(trained))
    console.print(f"Boundary predictors: {out.resolve()}")


def _finetune(options: argparse.Namespace) -> None:
    from blasst import prompts
    from blasst.cli.console import console, show, shown_progress
    from blasst.pages import about_run
    from blasst.training import finetune
    from blasst.training import report as finetuning_report

    plan = finetune.Plan(
        target=options.target_sparsity,
        start=options.start_sparsity,
        ramp=options.ramp,
        steps=options.steps,
        length=options.length,
        batch=options.batch,
        learning_rate=options.learning_rate,
        distill=options.distill,
        bf16=options.bf16,
        save_every=options.save_every,
    )
    text = None if options.text is None else prompts.read_text(options.text)
    with shown_progress() as progress:
        cases = finetune.fine_tune(
            options.model, plan, text=text, out=options.out, progress=progress
        )
    show(finetuning_report.table(cases, plan))
    title = f"{options.model}: {plan.steps} steps dense and sparse"
    path = finetuning_report.write(
        title, about_run(finetuning_report.about(plan)), cases, plan, options.out
    )
    console.print(f"Report: {path.resolve()}")


def _demo(options: argparse.Namespace) -> None:
    from blasst.cli.console import shown_progress
    from blasst.demo import demo

    with shown_progress() as progress:
        written = demo(options.model, options.out or Path("blasst-demo") / options.model, progress)
    _show_report(written)
