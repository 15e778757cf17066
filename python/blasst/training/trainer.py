"""Training with Transformers' Trainer, from checkpoints that are whole or not there."""

import json
import shutil
from collections.abc import Callable, Sequence
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

from blasst.files import replace_file
from blasst.hf import models
from blasst.training.callbacks import FiniteGradients, SparsitySchedule
from blasst.training.plan import TrainingPlan
from blasst.training.processes import Processes
from blasst.versions import checkpoint_layers, sharding_arguments

TORCH_SAVE = "inline_container.cc"
"""In the message of torch.save's RuntimeError where a file cannot be written."""


def train(
    model: PreTrainedModel,
    samples: Sequence[dict[str, Tensor]],
    plan: TrainingPlan,
    schedule: SparsitySchedule,
    out: Path,
    progress: Callable[[float, str], None],
    teacher: PreTrainedModel | None = None,
    processes: Processes | None = None,
) -> None:
    """Train, from the last checkpoint in `out` if there is one.

    Data order, optimizer, learning rate and random state go on as if nothing had happened.

    Args:
        model: changed in place; its weights stay sharded, if they were: see `whole_weights`.
        samples: of all steps, in order.
        plan: how.
        schedule: of the target sparsity.
        out: folder of log.jsonl and of the checkpoint.
        progress: told the share that is done, and the last step's loss.
        teacher: whose predictions are learned in place of the samples' own tokens.
        processes: that train together; default: this one alone.
    """
    processes = processes or Processes(1, 0, model.device)
    working = out / ".working"
    # What a run that was killed left half-written.
    processes.first(lambda: shutil.rmtree(working, ignore_errors=True))
    found = checkpoints(out)
    arguments = OneDevice(
        output_dir=str(working),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.samples_a_pass(processes.count),
        gradient_accumulation_steps=plan.accumulate,
        train_sampling_strategy="sequential",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, plan.steps // 20),
        weight_decay=0.0,
        logging_steps=1,
        save_steps=plan.save_every,
        seed=plan.seed,
        bf16=plan.bf16,
        use_cpu=processes.device.type == "cpu",
        ddp_backend=None if processes.device.type == "cuda" or processes.count == 1 else "gloo",
        disable_tqdm=True,
        report_to="none",
        **(sharding_arguments(sorted(model._no_split_modules)) if plan.fsdp else {}),
    )
    callbacks = [schedule, FiniteGradients(), _Checkpoints(out, processes)]
    if processes.is_first:
        callbacks.append(_Log(out / "log.jsonl", progress))
    kind = Trainer if teacher is None else partial(_Distillation, teacher)
    trainer = kind(model, arguments, train_dataset=samples, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    cached, model.config.use_cache = model.config.use_cache, False
    if plan.checkpointing:
        checkpoint_layers(model, wanted=True)
    try:
        with models.quiet():
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    except RuntimeError as error:
        if TORCH_SAVE not in str(error):
            raise
        raise OSError(f"a checkpoint could not be written into {out}: is the disk full?") from None
    model.config.use_cache = cached
    model.eval()
    if plan.checkpointing:
        checkpoint_layers(model, wanted=False)
    processes.first(lambda: shutil.rmtree(working))


class OneDevice(TrainingArguments):
    """Of a process with one device: the Trainer would split a batch over all GPUs that it sees."""

    @property
    def n_gpu(self) -> int:
        """GPUs of this process."""
        return min(1, super().n_gpu)


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
        autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.args.bf16)
        with torch.no_grad(), autocast:
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

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder, self._processes = folder, processes

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when the Trainer has written all files of a checkpoint that are this process's."""
        self._processes.wait()
        self._processes.first(lambda: self._keep(Path(args.output_dir), state.global_step))

    def _keep(self, written: Path, step: int) -> None:
        before = checkpoints(self._folder)
        name = f"checkpoint-{step}"
        (written / name).rename(self._folder / name)
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
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in lines))

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
