"""Fine-tuning with the sparsity that inference will use, and without, for comparison.

Two models are trained on the same data, one dense, one under a rising target sparsity. Then each is
calibrated anew and measured dense and sparse, at the same reached sparsity. What is finished is
kept, so that a run which was stopped goes on where it stopped: checkpoints while training, one line
for each measurement.
"""

import hashlib
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blasst.calibration import calibrate
from blasst.config import SparseAttention, parse
from blasst.files import ROOM, check_folder
from blasst.hf import models, record
from blasst.hf.reading import read
from blasst.hf.weights import weights_size
from blasst.measure.agreement import PIECE, log_probabilities
from blasst.measure.results import Results, fingerprint
from blasst.progress import Progress, silent
from blasst.training.callbacks import PHASE, SparsitySchedule
from blasst.training.data import held_out_windows, split_text, training_samples
from blasst.training.plan import TRAINED, Case, TrainingPlan, Way
from blasst.training.processes import processes_of, whole_weights
from blasst.training.trainer import checkpoints, train

ORDERS = ("sink_first", "reverse")
SCHEMES = ("one_threshold", "water_filling")
"""What the calibrations before and after training choose from."""
CALIBRATION_PROMPTS = 2
CLOSE = 0.002
"""How near the sparsity of a measurement has to come to the target."""
TRIES = 8
PEAK = 7
"""Times the weights on the disk: the dense model, and two checkpoints with what Adam keeps."""


def fine_tune(
    name: str,
    plan: TrainingPlan,
    *,
    text: str | None = None,
    out: Path,
    progress: Progress | None = None,
    loading: models.Loading | None = None,
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
        loading: how the model is loaded, and onto which device; default: `models.Loading()`. Its
            weights are float32 unless another type is asked for.

    Several processes, as torchrun starts them, share the samples of a step; on GPUs each has one.
    The first calibrates, writes and measures.

    Returns:
        The four cases; of several processes the first's, the others' is empty.

    Raises:
        ValueError: a device that cannot be had, quantised weights, a folder of another run, a
            length beyond the model's context, a text too short, a target that cannot be reached,
            gradients that are not finite, samples that processes cannot share evenly, sharding
            without several GPUs, too little room on the disk.
        OSError: the disk is full nevertheless.
    """
    return _Run(name, plan, text, out, progress or silent, loading or models.Loading()).run()


class _Run:
    """One run, step by step."""

    def __init__(
        self,
        name: str,
        plan: TrainingPlan,
        text: str | None,
        out: Path,
        progress: Progress,
        loading: models.Loading,
    ) -> None:
        self.processes, self.loading = processes_of(loading)
        if self.processes.device.type == "cuda":
            plan = replace(plan, bf16=True)
        plan.samples_a_pass(self.processes.count)
        if plan.fsdp:
            self.processes.check_sharding()
        self.name, self.plan, self.out, self.progress = name, plan, out, progress
        loaded = self._load(name)
        is_new = not (out / "results.jsonl").exists()
        check_folder(out, ROOM + is_new * PEAK * weights_size(loaded.model))
        models.check_length(loaded.model, plan.length, "a sample")
        self.tokenizer = loaded.tokenizer
        self.prose, held_out = split_text(text)
        self.windows = held_out_windows(self.tokenizer, held_out, plan)
        mark = hashlib.sha256(self.prose.encode()).hexdigest()
        made_of = fingerprint(loaded.model, asdict(plan), mark)

        def begin() -> None:
            self.results = Results(out / "results.jsonl", made_of)
            self._calibration(Way.UNTRAINED, loaded.model)

        self.processes.first(begin)
        if not self.processes.is_first:
            self.results = Results.read(out / "results.jsonl", made_of)
        self.processes.wait()

    def run(self) -> list[Case]:
        for way in TRAINED:
            if not (self.out / way / "model").exists():
                self._train(way)
            self.processes.wait()
        if not self.processes.is_first:
            return []
        return [case for way in TRAINED for case in self._measure(way)]

    def _load(self, name: str, **how: Any) -> models.Loaded:
        """A model, which a GPU's kernels read in bfloat16."""
        with self.processes.autocast(self.plan.bf16):
            return models.load(name, to_train=True, **{"loading": self.loading} | how)

    def _calibration(self, way: str, model: PreTrainedModel) -> SparseAttention:
        """Thresholds for a model: the one that training starts from, or one it has made."""
        if self.results.get("calibration", way) is None:
            model.config.__dict__.pop("sparse_attention_config", None)
            with self.processes.autocast(self.plan.bf16 and self.processes.device.type == "cuda"):
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
        model = self._load(self.name).model
        model.config.sparse_attention_config = self.results.get("calibration", Way.UNTRAINED)
        plan, folder = self.plan, self.out / way / "model"
        if plan.distill and way == Way.DENSE:
            self.processes.first(lambda: models.save_config(model, self.tokenizer, folder))
            return
        sparse = way == Way.SPARSE
        schedule = SparsitySchedule(
            plan.start if sparse else 0.0, plan.target if sparse else 0.0, plan.ramp
        )
        teacher = None
        if plan.distill:
            # With another attention, so that the schedule records the student's alone.
            teacher = self._load(self.name, attention="sdpa").model
        samples = training_samples(self.tokenizer, self.prose, plan)
        train(
            model,
            samples,
            plan,
            schedule,
            self.out / way,
            lambda share, what: self.progress(f"Training, {way}", share, what),
            teacher,
            self.processes,
        )

        weights = whole_weights(model) if plan.fsdp else None

        def keep() -> None:
            whole = model if weights is None else self._load(self.name).model
            if weights is not None:
                whole.load_state_dict(weights)
                whole.config.sparse_attention_config = model.config.sparse_attention_config
            models.save_config(whole, self.tokenizer, folder)
            for checkpoint in checkpoints(self.out / way):
                shutil.rmtree(checkpoint)

        self.processes.first(keep)

    # Measuring

    def _measure(self, way: str) -> list[Case]:
        """The two cases of one trained model; it is left configured as measured sparse."""
        folder = self.out / way / "model"
        of_folder = replace(self.loading, revision=None)
        model = self._load(str(folder), loading=of_folder).model
        # The thresholds that a model was trained with are its own, if they reach so far.
        trained_with_them = way == Way.SPARSE or self.plan.distill
        for made in (Way.UNTRAINED, way) if trained_with_them else (way,):
            config = self._calibration(made, model)
            dense = self._perplexities(model, way, made, 0.0)
            target = self._reaching_target(model, way, made)
            sparse = self._perplexities(model, way, made, target)
            if abs(sparse["sparsity"] - self.plan.target) <= CLOSE:
                break
        model.config.sparse_attention_config = config.with_targets(**{PHASE: target}).to_dict()
        models.save_config(model, self.tokenizer, folder)
        return [Case(way, Way.DENSE, **dense), Case(way, Way.SPARSE, **sparse)]

    def _reaching_target(self, model: PreTrainedModel, way: str, made: str) -> float:
        """The target to read thresholds at so that the held-out texts skip what the plan says.

        They do not skip just what the prompts of the calibration `made` do.
        """
        wanted = self.plan.target
        config = self._calibration(made, model)
        low, high = 0.0, config.measured[PHASE].tables[-1].targets[-1]
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
                with self.processes.autocast(self.plan.bf16):
                    hidden = read(model, tokens)[0].float()
                losses.setdefault(name, []).append(loss_of(model, hidden, tokens[0]))
            self.progress(step, 1.0, "")
        by_text = {name: sum(some) / len(some) for name, some in losses.items()}
        found = {
            "sparsity": recording.sparsity(PHASE, layers),
            "perplexity": math.exp(sum(by_text.values()) / len(by_text)),
            "by_text": {name: math.exp(loss) for name, loss in by_text.items()},
        }
        return self.results.put(found, "measured", way, made, target)


def loss_of(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> float:
    """Mean negative log-likelihood of [length] tokens with [length, hidden] last states, nats."""
    total, tokens = 0.0, tokens.to(hidden.device)
    for piece in torch.arange(len(tokens) - 1).split(PIECE):
        found = log_probabilities(model, hidden[piece])
        total -= found.gather(1, tokens[piece + 1][:, None]).sum().item()
    return total / (len(tokens) - 1)
