"""Fine-tuning of a small random model: the schedule, checkpoints, the command from end to end."""

import json
from functools import cache

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import blasst
from blasst.cli.app import main
from blasst.config import Law, Measured, SparseAttention, ThresholdTable, parse
from blasst.hf import models
from blasst.hf.saving import calibration_in
from blasst.prompts import reference_text
from blasst.training import FiniteGradients, SparsitySchedule, finetune, trainer
from blasst.training.data import split_text, training_samples
from blasst.training.plan import TrainingPlan, Way
from blasst.training.trainer import checkpoints, read_log
from recency_model import make_recency_model, make_tokenizer

LENGTH = 512
PLAN = TrainingPlan(
    target=0.2,
    start=0.1,
    ramp=2,
    steps=6,
    length=LENGTH,
    learning_rate=1e-3,
    save_every=2,
    windows=1,
)


def calibrated_model(tile=(64, 64), **sizes):
    """With one threshold for all heads, lower at a lower target, for prefill's tiles."""
    model = make_recency_model(**sizes)
    ln = torch.tensor([-6.0, 0.0]).reshape(1, 2, 1, 1)
    policy = ThresholdTable(
        "reverse", "one_threshold", Law(9.0, 2.0, 1.5), (LENGTH,), (0.1, 0.2), ln
    )
    config = SparseAttention(
        targets=("LlamaAttention",),
        laws={},
        target_sparsity={"prefill": 0.5},
        measured={"prefill": Measured(tile, (policy,))},
    )
    model.config.sparse_attention_config = config.to_dict()
    return model


@cache
def samples(steps=PLAN.steps):
    plan = TrainingPlan(**{**vars(PLAN), "steps": steps})
    return training_samples(make_tokenizer(), reference_text()[:20000], plan)


def train(out, model=None, schedule=None, steps=PLAN.steps, data=None):
    """Losses, step by step."""
    plan = TrainingPlan(**{**vars(PLAN), "steps": steps})
    schedule = schedule or SparsitySchedule(PLAN.start, PLAN.target, PLAN.ramp)
    trainer.train(
        model or calibrated_model(), data or samples(steps), plan, schedule, out, lambda *_: None
    )
    return read_log(out / "log.jsonl")


# The schedule, in a Trainer of one's own


def make_trainer(folder, model, *callbacks, steps=4):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=samples(steps), callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_a_target_rises_linearly_and_stays():
    schedule = SparsitySchedule(start=0.1, end=0.5, ramp=4)
    assert [schedule.target(step) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    )
    assert SparsitySchedule(start=0.1, end=0.5, ramp=0).target(0) == 0.5


def test_the_trainer_follows_the_schedule_and_logs_what_it_reached(tmp_path):
    model = calibrated_model()
    trainer = make_trainer(tmp_path, model, SparsitySchedule(0.1, 0.2, ramp=2))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["target_sparsity"] for line in lines] == pytest.approx([0.1, 0.15, 0.2, 0.2])
    reached = [line["sparsity"] for line in lines]
    assert reached[0] < reached[1] < reached[2], "thresholds move with the step"
    group = model.config.sparse_attention_config["config_groups"]["group_0"]
    assert group["target_sparsity"]["prefill"] == 0.2, "the model keeps the last target"


def test_what_is_logged_is_what_the_step_skipped(tmp_path):
    model = calibrated_model()
    trainer = make_trainer(tmp_path, model, SparsitySchedule(0.2, 0.2, ramp=0), steps=1)
    with blasst.record() as recording:
        trainer.train()
    assert trainer.state.log_history[0]["sparsity"] == recording.sparsity("prefill") > 0


def test_target_zero_trains_as_a_dense_model_does(tmp_path):
    dense = make_recency_model()
    zero = calibrated_model()
    make_trainer(tmp_path, dense).train()
    make_trainer(tmp_path, zero, SparsitySchedule(0, 0, ramp=0)).train()
    for a, b in zip(dense.parameters(), zero.parameters(), strict=True):
        assert torch.equal(a, b)


def uncalibrated():
    return make_recency_model()


def of_decode_only():
    model = make_recency_model()
    config = SparseAttention(("LlamaAttention",), {"decode": Law(1.0, 2.0)}, {"decode": 0.5})
    model.config.sparse_attention_config = config.to_dict()
    return model


def configured():
    model = calibrated_model()
    blasst.configure(model, prefill=blasst.Threshold(0.5))
    return model


def of_sdpa():
    model = calibrated_model()
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (uncalibrated, "no sparse_attention_config: calibrate it first"),
        (of_decode_only, "no thresholds of prefill"),
        (configured, r"blasst\.configure has set the thresholds"),
        (of_sdpa, "attn_implementation is 'sdpa'"),
        (calibrated_model, "goes to a target sparsity of 0.9; the model is calibrated up to 0.2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_schedule_that_could_not_act_is_an_error(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make(), SparsitySchedule(0.1, 0.9, ramp=2)).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 0.5, 1), r"start is -0\.1; it must be 0 to 1"),
        ((0.1, 1.5, 1), r"end is 1\.5; it must be 0 to 1"),
        ((0.1, 0.5, -1), "ramp is -1; it must be 0 steps or more"),
    ],
)
def test_a_schedule_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(*arguments)


# Gradients that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_name_layer_and_step(value, tmp_path):
    model = make_recency_model()
    backward_passes = []

    def spoil(gradient):
        backward_passes.append(None)
        return gradient * value if len(backward_passes) == 3 else gradient

    # Both layers' gradients become NaN: layer 1, which the backward pass reaches first, is named.
    model.model.layers[1].self_attn.o_proj.weight.register_hook(spoil)
    trainer = make_trainer(tmp_path, model, FiniteGradients())
    expected = (
        r"step 3: the gradient of layer 1, model\.layers\.1\.self_attn\.o_proj\.weight is not"
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_finite_gradients_leave_no_hooks_behind(tmp_path):
    model = make_recency_model()
    make_trainer(tmp_path, model, FiniteGradients(), steps=1).train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_pass_of_one_token_has_a_gradient():
    model = make_recency_model()
    model(torch.ones(1, 1, dtype=torch.long)).logits.sum().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpointed_layer_computes_again_is_not_counted_again(reentrant):
    counted = []
    for checkpointed in (False, True):
        model = calibrated_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tokens = samples()[0]["input_ids"][None]
        with blasst.record(gaps=True) as recording:
            for _ in range(2):
                model(tokens, labels=tokens, use_cache=False).loss.backward()
        counted.append((recording.tiles("prefill"), recording.gaps("prefill")))
    assert all(map(torch.equal, *counted))
    assert counted[0][0].sum() > 0


# Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Log and weights of a run that nothing stopped."""
    model = calibrated_model()
    return train(tmp_path_factory.mktemp("whole"), model), model.state_dict()


class Killed(BaseException):
    """The process is gone: nothing cleans up."""


def die(*_, **__):
    raise Killed


def assert_same_training(log, model, whole):
    def plain(lines):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert plain(log) == plain(whole[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[1][name]), name


def test_a_run_that_is_killed_resumes_at_the_same_loss(whole, tmp_path, monkeypatch):
    log_of = trainer._Log.on_log

    def die_at_fifth(self, args, state, control, logs, **rest):
        log_of(self, args, state, control, logs, **rest)
        if state.global_step == 5:
            die()

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Log, "on_log", die_at_fifth)
        with pytest.raises(Killed):
            train(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4"]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    model = calibrated_model()
    assert_same_training(train(tmp_path, model), model, whole)


@pytest.mark.parametrize("written", ["save_model", "_save_optimizer_and_scheduler"])
def test_a_checkpoint_cut_short_does_not_replace_a_good_one(written, whole, tmp_path, monkeypatch):
    save = getattr(Trainer, written)

    def die_at_fourth(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            die()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, written, die_at_fourth)
        with pytest.raises(Killed):
            train(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    model = calibrated_model()
    assert_same_training(train(tmp_path, model), model, whole)
    assert not (tmp_path / ".working").exists()


# A teacher


class Constant(torch.nn.Module):
    """A model that predicts the same everywhere, and counts its passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0
        self.logits = torch.linspace(-2, 2, 257)

    def forward(self, tokens, use_cache):
        self.passes += 1
        return CausalLMOutput(logits=self.logits.expand(*tokens.shape, -1))


def test_the_loss_is_the_divergence_from_the_teacher(tmp_path):
    model, teacher = calibrated_model(), Constant()
    data = samples(1)
    with torch.no_grad():
        model.config.sparse_attention_config = None
        found = model(data[0]["input_ids"][None]).logits[0, :-1].double().log_softmax(-1)
    wanted = teacher.logits.double().log_softmax(-1)
    expected = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    plan = TrainingPlan(**{**vars(PLAN), "steps": 1})
    model = calibrated_model()
    dense = SparsitySchedule(0, 0, ramp=0)
    trainer.train(model, data, plan, dense, tmp_path, lambda *_: None, teacher)
    [line] = read_log(tmp_path / "log.jsonl")
    assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert teacher.passes == 1


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(tmp_path):
    teacher = calibrated_model()
    teacher.set_attn_implementation("sdpa")
    schedule = SparsitySchedule(0, 0, ramp=0)
    plan = TrainingPlan(**{**vars(PLAN), "steps": 1})
    trainer.train(
        calibrated_model(), samples(1), plan, schedule, tmp_path, lambda *_: None, teacher
    )
    [line] = read_log(tmp_path / "log.jsonl")
    assert abs(line["loss"]) < 1e-6


# Data


def test_a_checkpoint_that_the_disk_does_not_hold_is_one_clear_message(tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, _: save(value, "/dev/full"))
    with pytest.raises(OSError, match=r"could not be written into .*: is the disk full"):
        train(tmp_path)
    assert not checkpoints(tmp_path)


def test_samples_are_the_same_each_time_and_of_one_length():
    first, second = samples(8), samples(8)
    assert all(s["input_ids"].shape == (LENGTH,) for s in first)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    assert len({tuple(s["input_ids"].tolist()) for s in first}) == 8
    text = make_tokenizer().decode(first[1]["input_ids"])
    assert "Question: What is the secret passphrase" in text
    assert text.count("Question") < text.count("passphrase"), "question, fact and answer"


def test_what_is_held_out_is_not_trained_on():
    prose, held_out = split_text(None)
    paragraphs = {p for p in prose.split("\n\n") if len(p) > 100}
    for name, text in held_out.items():
        assert paragraphs.isdisjoint(text.split("\n\n")), name


def test_a_given_text_is_not_trained_on_at_its_end():
    text = "".join(f"line {i}\n" for i in range(10))
    prose, held_out = split_text(text)
    assert (prose, held_out) == (text[:56], {"end of the text": text[56:]})


# The command


def saved_model(folder):
    make_recency_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def command(folder, out, *more):
    options = {
        "--target-sparsity": 0.2,
        "--start-sparsity": 0.1,
        "--ramp": 2,
        "--steps": 4,
        "--length": LENGTH,
        "--save-every": 2,
        "--learning-rate": 1e-3,
        "--out": out,
    }
    given = [str(part) for pair in options.items() for part in pair]
    return main(["finetune", str(folder), *given, *map(str, more)])


def test_the_command_compares_four_cases_and_goes_on_after_a_stop(tmp_path, monkeypatch, capsys):
    folder, out = saved_model(tmp_path / "model"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(reference_text()[:40000])

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "loss_of", stop)
        assert command(folder, out, "--text", text) == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", stop)  # is not called again
        assert command(folder, out, "--text", text) == 0

    kept = json.loads((out / "results.json").read_text())
    cases = {(case["trained"], case["measured"]): case for case in kept["cases"]}
    assert len(cases) == 4
    for way in (Way.DENSE, Way.SPARSE):
        assert cases[way, Way.DENSE]["sparsity"] == 0
        assert cases[way, Way.SPARSE]["sparsity"] == pytest.approx(0.2, abs=0.02)
        assert len(read_log(out / way / "log.jsonl")) == 4
        assert not checkpoints(out / way)
        model = models.load(str(out / way / "model")).model
        tokens = make_tokenizer()(text.read_text()[-30000:], return_tensors="pt").input_ids
        with blasst.record() as recording:
            model(tokens[:, :LENGTH])
        assert recording.sparsity("prefill") > 0, "the model is saved as it was measured"
    assert kept["training"][Way.SPARSE][-1]["target_sparsity"] == 0.2
    assert kept["training"][Way.DENSE][-1]["sparsity"] == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert {p.name for p in out.glob("*.png")} == {"perplexity.png", "loss.png", "sparsity.png"}
    assert "Report:" in capsys.readouterr().out

    assert command(folder, out, "--text", text, "--steps", 5) == 1
    assert "choose another folder or remove it" in capsys.readouterr().err


def test_a_distilled_model_is_compared_with_its_untrained_teacher(tmp_path):
    folder, out = saved_model(tmp_path / "model"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(reference_text()[:40000])
    assert command(folder, out, "--text", text, "--distill") == 0
    kept = json.loads((out / "results.json").read_text())
    assert kept["training"][Way.DENSE] == []
    assert len(kept["training"][Way.SPARSE]) == 4
    assert kept["training"][Way.SPARSE][0]["loss"] < 0.1, "near the teacher from the start"
    assert "towards the predictions of the untrained model" in kept["about"]
    before = models.load(str(folder)).model.state_dict()
    dense = models.load(str(out / Way.DENSE / "model")).model.state_dict()
    sparse = models.load(str(out / Way.SPARSE / "model")).model.state_dict()
    assert all(torch.equal(before[name], dense[name]) for name in before)
    assert not all(torch.equal(before[name], sparse[name]) for name in before)


def test_a_sparse_model_is_measured_with_the_thresholds_that_it_was_trained_with(
    tmp_path, monkeypatch
):
    folder, out = saved_model(tmp_path / "model"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(reference_text()[:40000])
    asked = []
    calibrate = finetune.calibrate

    def count(model, *arguments, **options):
        asked.append(None)
        return calibrate(model, *arguments, **options)

    monkeypatch.setattr(finetune, "calibrate", count)
    assert command(folder, out, "--text", text) == 0
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    kept = {tuple(json.loads(r["key"])): r["value"] for r in results if "key" in r}
    reached = [
        v["sparsity"] for k, v in kept.items() if k[:3] == ("measured", Way.SPARSE, "untrained")
    ]
    assert any(abs(sparsity - 0.2) <= finetune.CLOSE for sparsity in reached)
    assert len(asked) == 2, "the untrained model and the dense-trained one"
    written = calibration_in(models.load(str(out / Way.SPARSE / "model")).model)
    untrained = parse(kept["calibration", "untrained"])
    assert written.to_dict()["blasst"] == untrained.to_dict()["blasst"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--start-sparsity", 0.5), r"start sparsity is 0.5; it must be 0 to the target, 0.2"),
        (
            ("--target-sparsity", 0, "--start-sparsity", 0),
            "target sparsity is 0.0; it must be",
        ),
        (("--length", 4096), "a sample is 4096 tokens; the model's context is 1024"),
        (("--target-sparsity", 0.9), "target sparsity 90% of prefill cannot be reached at 512"),
    ],
)
def test_bad_input_is_one_clear_message(more, message, tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    capsys.readouterr()
    assert command(folder, tmp_path / "out", *more) == 1
    found = capsys.readouterr().err
    assert message in found
    assert "Traceback" not in found


def test_a_learning_rate_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="learning rate is nan; it must be between 0 and 1"):
        TrainingPlan(learning_rate=float("nan"))


@pytest.mark.parametrize("name", ["ramp", "steps", "length", "batch", "save_every", "windows"])
def test_a_plan_of_nothing_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        TrainingPlan(**{name: 0})


def test_a_text_too_short_is_one_clear_message(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    (tmp_path / "note.txt").write_text("a\nshort\nnote\nof\nfive lines\n")
    assert command(folder, tmp_path / "out", "--text", tmp_path / "note.txt") == 1
    assert "end of the text has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "'cuda', with CUDA_VISIBLE_DEVICES=1 in the environment"),
        ({"device_map": "auto"}, "device_map is 'auto'; a model that is trained is on one device"),
    ],
)
def test_a_device_that_the_trainer_would_not_take(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(models.Loading, "__post_init__", lambda self: None)  # finds no GPU here
    plan, loading = TrainingPlan(), models.Loading(**options)
    with pytest.raises(ValueError, match=message):
        finetune.fine_tune("smollm2", plan, out=tmp_path / "out", loading=loading)
    assert not (tmp_path / "out").exists()


def test_samples_that_passes_and_processes_cannot_share(tmp_path, capsys):
    folder = saved_model(tmp_path / "model")
    assert command(folder, tmp_path / "out", "--batch", 3, "--accumulate", 2) == 1
    assert "batch is 3 for 2 passes; it must be a multiple of 2" in capsys.readouterr().err
    assert command(folder, tmp_path / "out", "--fsdp") == 1
    assert "fsdp is asked for with 1 process(es) on cpu" in capsys.readouterr().err
    plan = TrainingPlan(batch=8, accumulate=2)
    assert plan.samples_a_pass(4) == 1
    with pytest.raises(ValueError, match=r"batch is 8 for 3 processes of 2 passes; .* of 6"):
        plan.samples_a_pass(3)


def test_passes_and_checkpointing_train_the_same(tmp_path):
    def trained(folder, **changes):
        plan = TrainingPlan(**{**vars(PLAN), "steps": 2, "batch": 2, **changes})
        model, schedule = calibrated_model(), SparsitySchedule(0.2, 0.2, ramp=0)
        data = samples(4)
        trainer.train(model, data, plan, schedule, tmp_path / folder, lambda *_: None)
        return read_log(tmp_path / folder / "log.jsonl"), model

    whole, model = trained("whole")
    for name, changes in (("passes", {"accumulate": 2}), ("kept", {"checkpointing": True})):
        log, other = trained(name, **changes)
        for line, expected in zip(log, whole, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert line["sparsity"] == expected["sparsity"]
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
