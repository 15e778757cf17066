"""Callbacks for Transformers' Trainer: a target sparsity that moves with the step, and a check.

    trainer = Trainer(model, arguments, train_dataset=..., callbacks=[
        SparsitySchedule(start=0.3, end=0.75, ramp=20), FiniteGradients()])

The model is one loaded with `attn_implementation="blasst"` and calibrated (`blasst.calibrate`).
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from blasst.config import SparseAttention
from blasst.hf import NAME, Recording, record
from blasst.hf.models import sparse_layers
from blasst.hf.saving import calibration_in

PHASE = "prefill"
"""A training pass reads whole sequences."""


class SparsitySchedule(TrainerCallback):
    """Moves the target sparsity of a calibrated model linearly from `start` to `end`.

    Before each step the model's `sparse_attention_config` gets the step's target, and with it the
    thresholds that the calibration found for it. The target and the sparsity that the step reached,
    over all processes, join the Trainer's logs as "target_sparsity" and "sparsity".
    """

    def __init__(self, start: float, end: float, ramp: int) -> None:
        """Describe the schedule.

        Args:
            start: target of the first step, 0 (dense) to 1.
            end: target from step `ramp` on.
            ramp: steps from one to the other; 0: `end` at once.

        Raises:
            ValueError: a number out of range.
        """
        for name, target in (("start", start), ("end", end)):
            if not 0 <= target <= 1:
                raise ValueError(f"{name} is {target}; it must be 0 to 1")
        if ramp < 0:
            raise ValueError(f"ramp is {ramp}; it must be 0 steps or more")
        self.start, self.end, self.ramp = start, end, ramp
        self.sparsity = 0.0
        """Of the last step: skipped tiles over visitable tiles."""
        self._recording: Recording | None = None
        self._stack = ExitStack()

    def target(self, step: int) -> float:
        """Target sparsity of the step after `step` finished ones."""
        if step >= self.ramp:
            return self.end
        return self.start + (self.end - self.start) * step / self.ramp

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Read the calibration.

        Raises:
            ValueError: the model runs another attention, has no calibration of prefill or one that
                does not reach so far, or `blasst.configure` has set its thresholds.
        """
        self._config = _calibration(model, max(self.start, self.end))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Set this step's target and count tiles from here on."""
        config = self._config.with_targets(**{PHASE: self.target(state.global_step)})
        model.config.sparse_attention_config = config.to_dict()
        self._stack.close()  # what a step that failed left open
        self._recording = self._stack.enter_context(record())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Read what the step reached."""
        self._stack.close()
        layers = sparse_layers(model, self._config)
        self.sparsity = _sparsity(self._recording, layers, args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Add this step's target and sparsity to the logs."""
        if "loss" not in logs:
            return
        target = self.target(state.global_step - 1)
        for entry in (logs, state.log_history[-1]):
            entry |= {"target_sparsity": target, "sparsity": self.sparsity}


def _calibration(model: PreTrainedModel, highest: float) -> SparseAttention:
    """The model's calibration; an error unless it can follow targets up to `highest`."""
    used = model.config._attn_implementation
    if used != NAME:
        raise ValueError(f"the model's attn_implementation is {used!r}; load it with {NAME!r}")
    if any(hasattr(module, "blasst_thresholds") for module in model.modules()):
        raise ValueError(
            "blasst.configure has set the thresholds of this model, which a schedule cannot move; "
            "load it anew and calibrate it"
        )
    config = calibration_in(model)
    if config is None:
        raise ValueError("the model has no sparse_attention_config: calibrate it first")
    if PHASE not in config.measured and PHASE not in config.laws:
        raise ValueError(f"the model's sparse_attention_config has no thresholds of {PHASE}")
    if PHASE in config.measured:
        reached = config.measured[PHASE].tables[-1].targets[-1]
        if highest > reached:
            raise ValueError(
                f"the schedule goes to a target sparsity of {highest}; the model is calibrated up "
                f"to {reached}"
            )
    return config


def _sparsity(recording: Recording, layers: list[int], args: TrainingArguments) -> float:
    """Skipped tiles over visitable tiles, over all processes."""
    wanted = [layer in layers for layer in recording.layers(PHASE)]
    counts = recording.tiles(PHASE)[wanted].sum((0, 2))
    if args.world_size > 1:
        counts = counts.to(args.device)
        torch.distributed.all_reduce(counts)
    visitable, skipped = counts.tolist()
    return skipped / max(1, visitable)


class FiniteGradients(TrainerCallback):
    """Ends training with an error at the first gradient that holds NaN or infinity."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Watch every parameter.

        Raises:
            ValueError: later, out of the backward pass; names step, layer and parameter.
        """
        self._remove()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._check_of(name, state))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Watch no longer."""
        self._remove()

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _check_of(self, name: str, state: TrainerState) -> Callable[[Tensor], None]:
        """A check of the gradient of the parameter `name`."""
        found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        where = f"layer {found[1]}, {name}" if found else name

        def check(parameter: Tensor) -> None:
            if parameter.grad.isfinite().all():
                return
            self._remove()  # training ends here without on_train_end; the model may train again
            raise ValueError(
                f"step {state.global_step + 1}: the gradient of {where} is not finite; it is the "
                "first that the backward pass reached, which goes from the last layer to the first"
            )

        return check
