"""Fine-tuning on a GPU: products in bfloat16, weights and optimizer in float32."""

import json

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

import blasst
from blasst.cli.app import main
from blasst.training import FiniteGradients, SparsitySchedule, trainer
from blasst.training.plan import TrainingPlan
from blasst.training.trainer import checkpoints, read_log
from gpu import hopper
from recency_model import make_recency_model, make_tokenizer
from test_finetuning import LENGTH, PLAN, Killed, calibrated_model, die, samples

pytestmark = hopper
STEPS = 4
NEAR = 2e-3
"""Between losses of the same steps: what is added up in another order each time."""


def model_on_gpu():
    """For the tiles of its kernels."""
    return calibrated_model((64, 128), head_dim=64).to("cuda")


def assert_near(log, expected):
    assert [line["step"] for line in log] == [line["step"] for line in expected]
    for line, other in zip(log, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=NEAR)
        assert line["sparsity"] == pytest.approx(other["sparsity"], abs=0.01)
    assert log[-1]["sparsity"] > 0.05


def test_a_trainer_of_ones_own(tmp_path):
    counted = []

    def trained(folder, **options):
        model = model_on_gpu()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **options,
        )
        callbacks = [SparsitySchedule(0.1, 0.2, ramp=2), FiniteGradients()]
        own = Trainer(model, arguments, train_dataset=samples(STEPS), callbacks=callbacks)
        own.remove_callback(PrinterCallback)
        with blasst.record() as recording:
            own.train()
        counted.append(recording.tiles("prefill")[:, 0].sum().item())
        assert all(p.dtype == torch.float32 and p.is_cuda for p in model.parameters())
        return [line for line in own.state.log_history if "loss" in line]

    whole = trained("whole")
    targets = [line["target_sparsity"] for line in whole]
    assert targets == pytest.approx([0.1, 0.15, 0.2, 0.2])
    assert whole[2]["sparsity"] > whole[0]["sparsity"], "thresholds move with the step"
    assert_near(trained("checkpointed", gradient_checkpointing=True), whole)
    assert counted[0] == counted[1] > 0, "tiles that a layer may visit, once each"


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    def train(folder, **changes):
        plan = TrainingPlan(**{**vars(PLAN), "steps": STEPS, "bf16": True, **changes})
        model, schedule = model_on_gpu(), SparsitySchedule(0.1, 0.2, ramp=2)
        data = samples(STEPS * plan.batch)
        trainer.train(model, data, plan, schedule, tmp_path / folder, lambda *_: None)
        assert all(p.dtype == torch.float32 and p.is_cuda for p in model.parameters())
        return read_log(tmp_path / folder / "log.jsonl")

    whole = train("whole")
    log_of = trainer._Log.on_log

    def die_at_third(self, args, state, control, logs, **rest):
        log_of(self, args, state, control, logs, **rest)
        if state.global_step == 3:
            die()

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Log, "on_log", die_at_third)
        with pytest.raises(Killed):
            train("killed")
    assert [p.name for p in checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    assert_near(train("killed"), whole)
    joined = train("joined", batch=2)
    for name, change in (("passes", {"accumulate": 2}), ("again", {"checkpointing": True})):
        assert_near(train(name, batch=2, **change), joined)


def test_the_command(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    make_recency_model(head_dim=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    options = f"--device cuda --target-sparsity 0.2 --steps {STEPS} --length {2 * LENGTH}"
    options += " --start-sparsity 0.1 --ramp 2 --learning-rate 1e-3 --batch 2 --accumulate 2"
    options += " --checkpointing --distill"
    assert main(["finetune", str(folder), "--out", str(out), *options.split()]) == 0
    cases = json.loads((out / "results.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        wanted = 0.2 if case["measured"] == "sparse" else 0
        assert case["sparsity"] == pytest.approx(wanted, abs=0.03)
    assert len(read_log(out / "sparse" / "log.jsonl")) == STEPS
