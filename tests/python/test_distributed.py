"""Several processes give what one gives. Needs torch.distributed with gloo."""

import math
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distributed_worker
from blasst.config import Law, Measured, SparseAttention, ThresholdTable
from blasst.hf.tensor_parallel import Share
from blasst.training import finetune
from blasst.training.trainer import read_log
from distributed_worker import PLAN, TEXT, cases, fine_tune
from gpu import hopper
from recency_model import make_recency_model, make_tokenizer

SECONDS = 300
LENGTH = 400


def run(job: str, processes: int, folder: Path) -> list:
    """What each process left in the folder."""
    here = Path(__file__).parent
    paths = [str(here.parents[1] / "python"), str(here), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launched = subprocess.run(
        [sys.executable, *launcher, distributed_worker.__file__, job, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert launched.returncode == 0, launched.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def configuration(heads: int, decoding: int | None = None, keys: int = 64) -> SparseAttention:
    """A threshold of its own for every head of two layers; `decoding` heads decide together.

    keys: of a tile.
    """
    generator = torch.Generator().manual_seed(3)
    low = torch.rand((1, 1, 2, heads), generator=generator) * 6 - 7
    table = torch.cat([low, low + 1], 1)  # of targets 0.1 and 0.2
    policy = ThresholdTable(
        "sink_first", "water_filling", Law(9.0, 2.0, 1.0), (LENGTH,), (0.1, 0.2), table
    )
    rows = {"prefill": 64, "decode": decoding}
    measured = {phase: Measured((n, keys), (policy,)) for phase, n in rows.items() if n}
    return SparseAttention(
        targets=("LlamaAttention",),
        laws={},
        target_sparsity=dict.fromkeys(measured, 0.2),
        measured=measured,
    )


def model_and_samples(
    folder: Path, head_dim: int, keys: int
) -> tuple[LlamaForCausalLM, list[dict]]:
    """What the processes find in the folder, too."""
    model = make_recency_model(head_dim=head_dim)
    model.config.sparse_attention_config = configuration(4, keys=keys).to_dict()
    model.save_pretrained(folder / "model")
    tokens = torch.randint(1, 257, (4, LENGTH), generator=torch.Generator().manual_seed(5))
    torch.save(tokens, folder / "tokens.pt")
    return model, [{"input_ids": sample, "labels": sample} for sample in tokens]


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((), ()),
        ((1,), (1,)),
        ((8,), (3,)),
        ((2, 1), (2, 1)),
        ((2, 8), (2, 3)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 8, 1), (2, 3, 1)),
        ((1, 8, 5), (1, 3, 5)),
        ((2, 1, 8), (2, 1, 8)),
    ],
)
def test_a_process_takes_the_thresholds_of_its_heads(shape, own):
    share = Share(2, 5, 8, group=None)
    values = torch.arange(math.prod(shape)).float().view(shape)
    found = share.of_thresholds(values)
    assert found.shape == own
    heads = 1 if len(shape) == 3 else -1
    if own != shape:
        assert torch.equal(found, values.index_select(heads, torch.tensor([2, 3, 4])))
    with pytest.raises(ValueError, match=r"must be 1 or the model's 8 heads"):
        share.of_thresholds(torch.zeros(2, 7, 1))


def test_data_parallel_gradients_are_those_of_the_joined_batch(tmp_path):
    model, samples = model_and_samples(tmp_path, head_dim=16, keys=64)
    ranks = run("data_parallel", 2, tmp_path)

    gradients, log = fine_tune(model, samples, 2, tmp_path)
    for found, found_log in ranks:
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        for line, expected in zip(found_log, log, strict=True):
            assert line["target_sparsity"] == expected["target_sparsity"]
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found_log[0]["sparsity"] == log[0]["sparsity"] > 0, "tiles of both processes"
        assert found_log[1]["sparsity"] == pytest.approx(log[1]["sparsity"], abs=0.01)


@hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("job", ["data_parallel_on_gpus", "fully_sharded_on_gpus"])
def test_gradients_of_two_gpus_are_those_of_one_on_the_joined_batch(job, tmp_path):
    model_and_samples(tmp_path, head_dim=64, keys=128)
    ranks = run(job, 2, tmp_path)
    [(gradients, log)] = run(job, 1, tmp_path)  # what is bfloat16 depends on the job
    # The sharded job's loss is: one step of it.
    rounding = 2**-7 if job == "fully_sharded_on_gpus" else 1e-3
    for found, found_log in ranks:
        for name, gradient in gradients.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 0.02, f"{name}: {error}, bfloat16's rounding is 0.004"
        for line, expected in zip(found_log, log, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=rounding)
        assert found_log[0]["sparsity"] == pytest.approx(log[0]["sparsity"], abs=0.01)
        assert found_log[0]["sparsity"] > 0


def saved_in(*folders: Path, head_dim: int) -> None:
    for folder in folders:
        make_recency_model(head_dim=head_dim).save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")


def assert_same_run(one: Path, two: Path, cases: list, expected: list, loss: float) -> None:
    """Logs and the four cases of the processes' run, against those of one process."""
    for way in ("dense", "sparse"):
        logs = [read_log(folder / "out" / way / "log.jsonl") for folder in (two, one)]
        for line, other in zip(*logs, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=loss)
            assert line["sparsity"] == pytest.approx(other["sparsity"], abs=0.01)
    for case, other in zip(cases, expected, strict=True):
        assert (case["trained"], case["measured"]) == (other["trained"], other["measured"])
        assert case["perplexity"] == pytest.approx(other["perplexity"], rel=1e-2)
    assert not list((two / "out").glob("*/checkpoint-*"))


def test_fine_tuning_in_two_processes_is_that_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    saved_in(one, two, head_dim=16)
    first, second = run("whole_run", 2, two)
    assert second == [], "the first measures and tells"
    cases = finetune.fine_tune(str(one / "model"), PLAN, text=TEXT, out=one / "out")
    assert_same_run(one, two, first, [asdict(case) for case in cases], loss=1e-3)


@hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("job", ["whole_run_on_gpus", "whole_sharded_run_on_gpus"])
def test_fine_tuning_on_two_gpus_is_that_of_one(job, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    saved_in(one, two, head_dim=64)
    first, _ = run(job, 2, two)
    [expected] = run("whole_run_on_gpus", 1, one)
    assert_same_run(one, two, first, expected, loss=2**-6)  # the sharded loss is bfloat16


def llama(heads: int, kv_heads: int) -> LlamaForCausalLM:
    """Random; heads of 64, as SmolLM2 has them, that prefer near keys, some more than others."""
    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=heads * 64,
        intermediate_size=24 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="blasst",
    )
    model = LlamaForCausalLM(config).eval()
    strength = torch.linspace(0.5, 2.5, heads)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.copy_(strength.repeat_interleave(64))
            layer.self_attn.k_proj.bias.fill_(1)
    model.config.sparse_attention_config = configuration(heads, heads // kv_heads).to_dict()
    return model


@pytest.mark.parametrize(("heads", "kv_heads", "processes"), [(9, 3, 3), (8, 4, 2)])
def test_tensor_parallel_gives_the_tokens_and_statistics_of_one_process(
    heads, kv_heads, processes, tmp_path
):
    model = llama(heads, kv_heads)
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(96, (2, LENGTH), generator=generator)
    thresholds = torch.rand(heads, generator=generator)
    torch.save((tokens, thresholds), tmp_path / "inputs.pt")
    ranks = run("tensor_parallel", processes, tmp_path)

    expected = cases(model, tokens, thresholds)
    for case, one in expected.items():
        parts = one["by_head"].unflatten(1, (processes, -1)).unbind(1)
        assert not any(torch.equal(a, b) for a, b in pairwise(parts)), "a wrong place is seen"
        for found in (rank[case] for rank in ranks):
            assert torch.equal(found["tokens"], one["tokens"])
            torch.testing.assert_close(found["by_head"], one["by_head"], rtol=0, atol=0.03)
            torch.testing.assert_close(found["decode"], one["decode"], rtol=0, atol=2)
            assert torch.equal(found["prefill"][:, 0], one["prefill"][:, 0]), "visitable tiles"
            assert torch.equal(found["gaps"].sum(-1), one["gaps"].sum(-1)), "visited tiles"
    for found in ranks:
        threshold, policy, early, calibration = found["errors"]
        assert f"the dimension of heads must be 1 or the model's {heads} heads" in threshold
        assert "is not supported for a tensor-parallel model" in policy
        assert "can be read after the block of blasst.record has ended" in early
        assert "calibrate it in one process" in calibration
