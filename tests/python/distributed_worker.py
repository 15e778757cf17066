"""One of the processes that test_distributed.py starts: distributed_worker.py JOB FOLDER."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback

import blasst
from blasst.hf.models import Loading
from blasst.prompts import reference_text
from blasst.training import SparsitySchedule, finetune
from blasst.training.plan import TrainingPlan
from blasst.training.trainer import OneDevice

NEW_TOKENS = 8
PLAN = TrainingPlan(
    target=0.2, start=0.1, ramp=2, steps=4, length=512, batch=4, accumulate=2, learning_rate=1e-3,
    save_every=2,
)  # fmt: skip
TEXT = reference_text()[:40000]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if self.first is None:
            grads = ((n, p.grad) for n, p in model.named_parameters())
            whole = ((n, g.full_tensor() if hasattr(g, "full_tensor") else g) for n, g in grads)
            self.first = {n: g.detach().cpu().clone() for n, g in whole}


def fine_tune(model, samples, batch, folder, **options):
    """Two steps; gradients of the first, and the log."""
    arguments = OneDevice(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        **{"use_cpu": True} | options,
    )
    kept = Gradients()
    schedule = SparsitySchedule(0.1, 0.2, ramp=1)
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[schedule, kept])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return kept.first, [line for line in trainer.state.log_history if "loss" in line]


ON_GPUS = {"use_cpu": False, "bf16": True}
SHARDED = {
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def data_parallel(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="blasst")
    tokens = torch.load(folder / "tokens.pt")
    samples = [{"input_ids": sample, "labels": sample} for sample in tokens]
    batch = 2 // dist.get_world_size()
    found = fine_tune(model, samples, batch, folder, **{"ddp_backend": "gloo"} | options)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


def data_parallel_on_gpus(folder):
    data_parallel(folder, ddp_backend="nccl", **ON_GPUS)


def fully_sharded_on_gpus(folder):
    data_parallel(folder, ddp_backend="nccl", **ON_GPUS, **SHARDED)


def whole_run(folder, plan=PLAN, **options):
    """The four cases of `fine_tune`; the first process's alone."""
    options |= {"text": TEXT, "out": folder / "out"}
    cases = finetune.fine_tune(str(folder / "model"), plan, **options)
    torch.save(
        json.loads(json.dumps([asdict(case) for case in cases])),
        folder / f"rank{dist.get_rank()}.pt",
    )


def whole_run_on_gpus(folder, plan=PLAN):
    whole_run(folder, plan, loading=Loading(device="cuda"))


def whole_sharded_run_on_gpus(folder):
    whole_run_on_gpus(folder, replace(PLAN, fsdp=True))


def generated(model, tokens):
    """Greedy tokens, and what was recorded: [layers, 2, heads] by phase, and gaps of prefill."""
    with blasst.record(gaps=True) as recording:
        new = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "tokens": new,
        "prefill": recording.tiles("prefill"),
        "decode": recording.tiles("decode"),
        "gaps": recording.gaps("prefill"),
        "by_head": recording.by_head("prefill"),
    }


def cases(model, tokens, thresholds):
    """Under the configuration's thresholds, and under those of `configure`."""
    from_config = generated(model, tokens)
    setting = blasst.Threshold(tuple(thresholds.tolist()))
    blasst.configure(model, prefill=setting, decode=setting)
    return {"config": from_config, "configured": generated(model, tokens)}


def tensor_parallel(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="blasst", tp_plan="auto"
    )
    attention = model.model.layers[0].self_attn
    own = attention.q_proj.weight.to_local().shape[0] // attention.head_dim
    assert own == model.config.num_attention_heads // dist.get_world_size(), "heads are split"
    tokens, thresholds = torch.load(folder / "inputs.pt")
    found = cases(model, tokens, thresholds)
    found["errors"] = errors(model, tokens)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


def errors(model, tokens):
    """What is said about thresholds of too few heads, a policy, calibration, and reading early."""
    heads = model.config.num_attention_heads

    def too_few():
        blasst.configure(model, prefill=blasst.Threshold((0.5,) * (heads - 1)))
        model(tokens)

    def policy():
        blasst.reset(model)
        blasst.set_policy(model, blasst.Bands(512))
        model(tokens)

    def early():
        blasst.set_policy(model, None)
        with blasst.record() as recording:
            model(tokens)
            recording.sparsity("prefill")

    return [message_of(call) for call in (too_few, policy, early, lambda: calibrate(model))]


def calibrate(model):
    blasst.calibrate(model, tokenizer=None)


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, place = sys.argv[1:]
    if job.endswith("on_gpus"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    elif job != "whole_run":  # which makes its own
        dist.init_process_group("gloo")
    jobs = (
        *(data_parallel, data_parallel_on_gpus, fully_sharded_on_gpus),
        *(tensor_parallel, whole_run, whole_run_on_gpus, whole_sharded_run_on_gpus),
    )
    {run.__name__: run for run in jobs}[job](Path(place))
    dist.destroy_process_group()
