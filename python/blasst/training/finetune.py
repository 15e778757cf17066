"""Fine-tuning with the sparsity that inference will use, and without, for comparison.

Two models are trained on the same data, one dense, one under a rising target sparsity. Then each is
calibrated anew and measured dense and sparse, at the same reached sparsity. What is finished is
kept, so that a run which was stopped goes on where it stopped: checkpoints while training, one line
for each measurement.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.calibration import calibrate
from blasst.config import SparseAttention, parse
from blasst.files import ROOM, check_folder
from blasst.hf import models, record
from blasst.hf.reading import read
from blasst.measure.agreement import PIECE, log_probabilities
from blasst.measure.results import Results, fingerprint
from blasst.progress import Progress, silent
from blasst.prompts import KINDS, PromptMaker, evaluation_texts, text_tokens, training_text
from blasst.training.callbacks import PHASE, FiniteGradients, SparsitySchedule

UNTRAINED, DENSE, SPARSE = "untrained", "dense", "sparse"
WAYS = (DENSE, SPARSE)
ORDERS = ("sink_first", "reverse")
SCHEMES = ("one_threshold", "water_filling")
"""What the calibrations before and after training choose from."""
CALIBRATION_PROMPTS = 2
HELD_OUT_SHARE = 0.2
"""Of a given text, its end: for the measurement."""
ANSWER_ROOM = 32
"""Tokens of a retrieval prompt's sample that are left for its answer."""
CLOSE = 0.002
"""How near the sparsity of a measurement has to come to the target."""
TRIES = 8
TORCH_SAVE = "inline_container.cc"
"""In the message of torch.save's RuntimeError where a file cannot be written."""
PEAK = 7
"""Times the weights on the disk: the dense model, and two checkpoints with what Adam keeps."""


@dataclass(frozen=True)
class Plan:
    """What is trained and measured."""

    target: float = 0.75
    """Target sparsity at the end of the ramp, and of the measurement."""
    start: float = 0.4
    """Target sparsity of the first step."""
    ramp: int = 8
    """Steps from `start` to `target`."""
    steps: int = 30
    length: int = 2048
    """Tokens of a sample."""
    batch: int = 1
    """Samples a step."""
    learning_rate: float = 1e-4
    """At its highest; it falls to 0 along a cosine."""
    distill: bool = False
    """Sparse training learns what the untrained model predicts densely, in place of the samples'
    own tokens. Trained densely so, a model stays as it is: it is its own dense-trained model."""
    bf16: bool = False
    """Compute in bfloat16; weights, optimizer and, measuring, the last layer stay float32."""
    save_every: int = 5
    """Steps between checkpoints."""
    windows: int = 1
    """Pieces of each held-out text that are measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target sparsity is {self.target}; it must be above 0, at most 1")
        if not 0 <= self.start <= self.target:
            raise ValueError(
                f"start sparsity is {self.start}; it must be 0 to the target, {self.target}"
            )
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning rate is {self.learning_rate}; it must be between 0 and 1")


@dataclass(frozen=True)
class Case:
    """One of the four: trained one way, measured one way."""

    trained: str
    measured: str
    sparsity: float
    """Reached, over all held-out windows."""
    perplexity: float
    """Over all held-out windows."""
    by_text: dict[str, float]
    """Perplexity of each text."""


def fine_tune(
    name: str,
    plan: Plan,
    *,
    text: str | None = None,
    out: Path,
    progress: Progress | None = None,
) -> list[Case]:
    """Train both ways and measure the four cases.

    Into `out` go results.jsonl and, of each way, dense/ and sparse/: log.jsonl, the checkpoint
    while it trains, then model/, which `save_pretrained` wrote, calibrated.

    Args:
        name: of the model, as `models.load` takes it.
        plan: what is done.
        text: prose to train on, whose end is held out; default: `training_text()`, and
            `evaluation_texts()` are held out.
        out: folder; what it holds of an earlier run is continued.
        progress: told what is being done: see `blasst.progress`.

    Raises:
        ValueError: a folder of another run, a length beyond the model's context, a text too short,
            a target that cannot be reached, gradients that are not finite, a process of several,
            too little room on the disk.
        OSError: the disk is full nevertheless.
    """
    return _Run(name, plan, text, out, progress or silent).run()


class _Run:
    """One run, step by step."""

    def __init__(
        self, name: str, plan: Plan, text: str | None, out: Path, progress: Progress
    ) -> None:
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise ValueError(
                f"started as one of {processes} processes; fine_tune runs in one (for more, use "
                "Transformers' Trainer with blasst.training.SparsitySchedule)"
            )
        self.name, self.plan, self.out, self.progress = name, plan, out, progress
        loaded = models.load(name)
        is_new = not (out / "results.jsonl").exists()
        check_folder(out, ROOM + is_new * PEAK * models.weights_size(loaded.model))
        models.check_length(loaded.model, plan.length, "a sample")
        self.tokenizer, self.folder = loaded.tokenizer, loaded.folder
        self.prose, held_out = split_text(text)
        self.windows = held_out_windows(self.tokenizer, held_out, plan)
        mark = hashlib.sha256(self.prose.encode()).hexdigest()
        made_of = fingerprint(loaded.model, asdict(plan), mark)
        self.results = Results(out / "results.jsonl", made_of)
        self._calibration(UNTRAINED, loaded.model)

    def run(self) -> list[Case]:
        for way in WAYS:
            if not (self.out / way / "model").exists():
                self._train(way)
        return [case for way in WAYS for case in self._measure(way)]

    def _calibration(self, way: str, model: PreTrainedModel) -> SparseAttention:
        """Thresholds for a model: the one that training starts from, or one it has made."""
        if self.results.get("calibration", way) is None:
            model.config.__dict__.pop("sparse_attention_config", None)
            found = calibrate(
                model,
                self.tokenizer,
                lengths=[self.plan.length],
                target_sparsity={PHASE: self.plan.target},
                text=self.prose,
                prompts=CALIBRATION_PROMPTS,
                held_out=[],
                orders=ORDERS,
                schemes=SCHEMES,
                progress=lambda step, share, what: self.progress(f"{step}, {way}", share, what),
            )
            self.results.put(found.config.to_dict(), "calibration", way)
        return parse(self.results.get("calibration", way))

    def _train(self, way: str) -> None:
        model = models.load(self.name).model
        model.config.sparse_attention_config = self.results.get("calibration", UNTRAINED)
        plan, folder = self.plan, self.out / way / "model"
        if plan.distill and way == DENSE:
            models.save_config(model, self.folder, folder)
            return
        sparse = way == SPARSE
        schedule = SparsitySchedule(
            plan.start if sparse else 0.0, plan.target if sparse else 0.0, plan.ramp
        )
        teacher = None
        if plan.distill:
            # With another attention, so that the schedule records the student's alone.
            teacher = models.load(self.name, attention="sdpa").model
        samples = training_samples(self.tokenizer, self.prose, plan)
        train(
            model,
            samples,
            plan,
            schedule,
            self.out / way,
            lambda share, what: self.progress(f"Training, {way}", share, what),
            teacher,
        )
        models.save_config(model, self.folder, folder)
        for checkpoint in checkpoints(self.out / way):
            shutil.rmtree(checkpoint)

    # Measuring

    def _measure(self, way: str) -> list[Case]:
        """The two cases of one trained model; it is left configured as measured sparse."""
        folder = self.out / way / "model"
        model = models.load(str(folder)).model
        # The thresholds that a model was trained with are its own, if they reach so far.
        trained_with_them = way == SPARSE or self.plan.distill
        for made in (UNTRAINED, way) if trained_with_them else (way,):
            config = self._calibration(made, model)
            dense = self._perplexities(model, way, made, 0.0)
            target = self._reaching_target(model, way, made)
            sparse = self._perplexities(model, way, made, target)
            if abs(sparse["sparsity"] - self.plan.target) <= CLOSE:
                break
        model.config.sparse_attention_config = config.with_targets(**{PHASE: target}).to_dict()
        models.save_config(model, self.folder, folder)
        return [Case(way, DENSE, **dense), Case(way, SPARSE, **sparse)]

    def _reaching_target(self, model: PreTrainedModel, way: str, made: str) -> float:
        """The target to read thresholds at so that the held-out texts skip what the plan says.

        They do not skip just what the prompts of the calibration `made` do.
        """
        wanted = self.plan.target
        config = self._calibration(made, model)
        low, high = 0.0, config.measured[PHASE].policies[-1].targets[-1]
        below, above = 0.0, None
        at, misses = min(wanted, high), {}
        for _ in range(TRIES):
            reached = self._perplexities(model, way, made, at)["sparsity"]
            misses[at] = abs(reached - wanted)
            if misses[at] <= CLOSE or (reached < wanted and at == high):
                break
            if reached < wanted:
                low, below = at, reached
            else:
                high, above = at, reached
            # Along the line between the nearest on both sides; as if on slope 1 if one is missing.
            slope = 1.0 if above is None else (above - below) / (high - low)
            at = round(min(max(low + (wanted - below) / max(slope, 1e-6), low), high), 4)
        return min(misses, key=misses.get)

    @torch.inference_mode()
    def _perplexities(
        self, model: PreTrainedModel, way: str, made: str, target: float
    ) -> dict[str, Any]:
        """Sparsity and perplexity over the held-out windows at a target of a calibration."""
        known = self.results.get("measured", way, made, target)
        if known is not None:
            return known
        config = self._calibration(made, model)
        model.config.sparse_attention_config = config.with_targets(**{PHASE: target}).to_dict()
        losses: dict[str, list[float]] = {}
        layers = models.sparse_layers(model, config)
        with record() as recording:
            for done, (name, tokens) in enumerate(self.windows):
                step = f"Measuring, {way} at target {target:.1%}"
                self.progress(step, done / len(self.windows), name)
                losses.setdefault(name, []).append(loss_of(model, tokens, self.plan.bf16))
            self.progress(step, 1.0, "")
        by_text = {name: sum(some) / len(some) for name, some in losses.items()}
        found = {
            "sparsity": recording.sparsity(PHASE, layers),
            "perplexity": math.exp(sum(by_text.values()) / len(by_text)),
            "by_text": {name: math.exp(loss) for name, loss in by_text.items()},
        }
        return self.results.put(found, "measured", way, made, target)


def loss_of(model: PreTrainedModel, tokens: Tensor, bf16: bool) -> float:
    """Mean negative log-likelihood of [1, length] tokens, nats; the last layer is float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = read(model, tokens)[0].float()
    total = 0.0
    for piece in torch.arange(tokens.shape[1] - 1).split(PIECE):
        found = log_probabilities(model, hidden[piece])
        total -= found.gather(1, tokens[0, piece + 1][:, None]).sum().item()
    return total / (tokens.shape[1] - 1)


# Data


def split_text(text: str | None) -> tuple[str, dict[str, str]]:
    """What is trained on, and what is held out, by name."""
    if text is None:
        return training_text(), evaluation_texts()
    lines = text.splitlines(keepends=True)
    cut = round(len(lines) * (1 - HELD_OUT_SHARE))
    return "".join(lines[:cut]), {"end of the text": "".join(lines[cut:])}


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], plan: Plan
) -> list[tuple[str, Tensor]]:
    """Names and [1, length] tokens: the first pieces of each held-out text, one after another."""
    return [
        (name, text_tokens(tokenizer, text, plan.length, name, start=plan.length * i))
        for name, text in texts.items()
        for i in range(plan.windows)
    ]


def training_samples(
    tokenizer: PreTrainedTokenizerBase, prose: str, plan: Plan
) -> list[dict[str, Tensor]]:
    """Samples of all steps: in turn a piece of the prose and a retrieval prompt with its answer.

    The same for the same plan, in the same order, each of exactly `plan.length` tokens (after the
    answer goes on a piece of the prose). Every token is a label.
    """
    maker = PromptMaker(tokenizer, prose, "the text to train on")
    whole = torch.tensor(tokenizer(prose, add_special_tokens=False).input_ids)
    spare = len(whole) - plan.length
    if spare < 0:
        raise ValueError(f"the text to train on has {len(whole)} tokens; {plan.length} are needed")
    generator = torch.Generator().manual_seed(plan.seed)
    samples = []
    for i in range(plan.steps * plan.batch):
        first = int(torch.randint(spare + 1, (), generator=generator))
        tokens = whole[first:]
        if i % 2:
            prompt = maker.make(KINDS[i // 2 % len(KINDS)], plan.length - ANSWER_ROOM, seed=i)
            answer = f" {', '.join(prompt.answers)}{tokenizer.eos_token}\n"
            answer = torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids)
            tokens = torch.cat([prompt.tokens[0], answer, tokens])
        tokens = tokens[: plan.length]
        samples.append({"input_ids": tokens, "labels": tokens})
    return samples


# Training


def train(
    model: PreTrainedModel,
    samples: Sequence[dict[str, Tensor]],
    plan: Plan,
    schedule: SparsitySchedule,
    out: Path,
    progress: Callable[[float, str], None],
    teacher: PreTrainedModel | None = None,
) -> None:
    """Train, from the last checkpoint in `out` if there is one.

    Data order, optimizer, learning rate and random state go on as if nothing had happened.

    Args:
        model: changed in place.
        samples: of all steps, in order.
        plan: how.
        schedule: of the target sparsity.
        out: folder of log.jsonl and of the checkpoint.
        progress: told the share that is done, and the last step's loss.
        teacher: whose predictions are learned in place of the samples' own tokens.
    """
    working = out / ".working"
    shutil.rmtree(working, ignore_errors=True)  # what a run that was killed left half-written
    found = checkpoints(out)
    arguments = TrainingArguments(
        output_dir=str(working),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        train_sampling_strategy="sequential",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, plan.steps // 20),
        weight_decay=0.0,
        logging_steps=1,
        save_steps=plan.save_every,
        seed=plan.seed,
        bf16=plan.bf16,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    callbacks = [schedule, FiniteGradients(), _Log(out / "log.jsonl", progress), _Checkpoints(out)]
    kind = Trainer if teacher is None else partial(_Distillation, teacher)
    trainer = kind(model, arguments, train_dataset=samples, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    cached, model.config.use_cache = model.config.use_cache, False
    try:
        with models.quiet():
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    except RuntimeError as error:
        if TORCH_SAVE not in str(error):
            raise
        raise OSError(f"a checkpoint could not be written into {out}: is the disk full?") from None
    model.config.use_cache = cached
    model.eval()
    shutil.rmtree(working)


class _Distillation(Trainer):
    """The loss is the divergence from a teacher's predictions."""

    def __init__(self, teacher: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> Tensor:
        """Mean KL divergence of the next token's distribution from the teacher's, nats."""
        tokens = inputs["input_ids"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            wanted = self._teacher(tokens, use_cache=False).logits[:, :-1]
        found = model(tokens, use_cache=False).logits[:, :-1]
        wanted, found = (logits.float().log_softmax(-1) for logits in (wanted, found))
        divergence = functional.kl_div(found, wanted, reduction="sum", log_target=True)
        return divergence / found[..., 0].numel()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, by step."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


class _Checkpoints(TrainerCallback):
    """Gives a checkpoint its place when it is whole, and then removes the one before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when the Trainer has written all files of a checkpoint."""
        before = checkpoints(self._folder)
        name = f"checkpoint-{state.global_step}"
        (Path(args.output_dir) / name).rename(self._folder / name)
        for older in before:
            shutil.rmtree(older)


class _Log(TrainerCallback):
    """Writes a line for each step, and tells the progress."""

    def __init__(self, path: Path, progress: Callable[[float, str], None]) -> None:
        self._path, self._progress = path, progress
        self._since = perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget the steps after the checkpoint that training goes on from."""
        lines = [entry for entry in read_log(self._path) if entry["step"] <= state.global_step]
        models.replace_file(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the time."""
        self._since = perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Write the line."""
        if "loss" not in logs:
            return
        kept = ("loss", "grad_norm", "learning_rate", "target_sparsity", "sparsity")
        line = {"step": state.global_step} | {name: logs[name] for name in kept}
        line["seconds"] = round(perf_counter() - self._since, 2)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._progress(
            state.global_step / state.max_steps,
            f"step {state.global_step}, loss {logs['loss']:.3f}, sparsity {logs['sparsity']:.1%}",
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log of training; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
