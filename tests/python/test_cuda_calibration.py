"""Calibration on a GPU: its tiles, the CPU's, and what it costs there."""

from base64 import b64decode

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import blasst
from blasst.calibration import calibrate, emulation
from blasst.calibration.curves import sparsity_at
from blasst.calibration.memory import Reading, bytes_needed, sizes_of
from blasst.config import parse
from blasst.evaluation import Options, evaluate, report
from blasst.evaluation.summary import timings
from blasst.hf.models import Loaded
from blasst.prompts import reference_text
from gpu import hopper, needs_gpu
from latent_models import HOPPER, ON_GPUS, make_recency_latent_model, present
from recency_model import make_recency_model, make_tokenizer
from test_calibration import tokens

pytestmark = needs_gpu

LENGTH = 4096
OPTIONS = {
    "lengths": [2048, LENGTH],
    "target_sparsity": {"prefill": 0.3, "decode": 0.3},
    "prompts": 2,
    "held_out": [],
}


def model_on(device: str) -> LlamaForCausalLM:
    model = make_recency_model(LENGTH, head_dim=64)
    return model.to(device, torch.bfloat16) if device == "cuda" else model


def reached(model: LlamaForCausalLM, phase: str = "prefill") -> float:
    with blasst.record() as recording, torch.inference_mode():
        for seed in range(5, 9):
            ids = tokens(LENGTH, seed=seed).to(model.device)
            if phase == "prefill":
                model(ids)
            else:
                model.generate(ids[:, : LENGTH - 40], max_new_tokens=32, do_sample=False)
    return recording.sparsity(phase)


@pytest.fixture(scope="module")
def calibrated() -> LlamaForCausalLM:
    model = model_on("cuda")
    calibrate(model, make_tokenizer(), **OPTIONS, batch=2)
    return model


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_model_reaches_its_target_on_the_tiles_of_the_gpu(calibrated, phase, caplog):
    config = parse(calibrated.config.sparse_attention_config)
    assert config.measured["prefill"].tile_shape == (64, 128)
    assert reached(calibrated, phase) == pytest.approx(0.3, abs=0.05)
    assert not [r for r in caplog.records if "tiles of" in r.getMessage()]


@pytest.mark.parametrize("order", ["forward", "reverse", "sink_first"])
def test_gaps_are_those_that_the_cpu_emulates(order):
    generator = torch.Generator("cuda").manual_seed(0)
    q = 2 * torch.randn(1, 1024, 4, 64, device="cuda", generator=generator)
    k = torch.randn(1, 1024, 2, 64, device="cuda", generator=generator)
    q, k = q.bfloat16(), k.bfloat16()
    options = {"causal": True, "phase": "prefill", "order": order}
    own = blasst.attention(q, k, k, **options, return_gaps=True).gaps.cpu()
    emulated = emulation.gaps(q.cpu(), k.cpu(), (64, 128), options)
    there = emulation.gaps(q, k, (64, 128), options).cpu()
    for ln in (-4.0, -2.0, -1.0, -0.5, 0.0):
        wanted = [sparsity_at(row.numpy(), ln) for row in emulated]
        for counts in (own, there):
            found = [sparsity_at(row.numpy(), ln) for row in counts]
            assert found == pytest.approx(wanted, abs=0.01), ln


@pytest.mark.parametrize("kv_heads", [2, 66])
def test_decode_decides_as_the_emulation_of_its_splits(kv_heads):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (
        torch.randn(1, n, heads, 64, device="cuda", generator=generator).bfloat16()
        for n, heads in ((1, 2 * kv_heads), (5000, kv_heads))
    )
    k *= torch.linspace(0, 3.14, 5000, device="cuda").sin()[:, None, None]
    shape = blasst.tile_shape(q, k, k, phase="decode")
    assert shape[2:] == (8, 264 // kv_heads), "at 66 heads splits are longer"
    options = {"causal": True, "phase": "decode", "threshold": 0.5, "return_tile_mask": True}
    own = blasst.attention(q, k, k, **options).tile_mask.cpu()
    for tile, few in ((shape, True), (shape[:2], False)):
        decode = emulation.Emulation({"decode": tile}).attention
        found = decode(q.cpu(), k.cpu(), k.cpu(), **options, order="sink_first").tile_mask
        assert (found != own).float().mean() < 0.01 if few else (found != own).any()


def test_thresholds_for_the_cpus_tiles_reach_the_target_there_within_a_point():
    model = model_on("cuda")
    calibrate(model, make_tokenizer(), **OPTIONS, tile_shape=(64, 64))
    entry = model.config.sparse_attention_config
    there = model_on("cpu")
    there.config.sparse_attention_config = entry
    by_gpu = reached(there)
    own = model_on("cpu")
    calibrate(own, make_tokenizer(), **OPTIONS)
    assert by_gpu == pytest.approx(reached(own), abs=0.015)


def test_an_evaluation_there_shows_tiles_costs_and_times(calibrated, tmp_path):
    loaded = Loaded("tiny", calibrated, make_tokenizer(), "")
    options = Options(
        targets=(0, 0.1, 0.3),
        length=LENGTH,
        texts={"prose": reference_text()[: 2 * LENGTH]},
        chunk=1024,
        timed_lengths=(2048, LENGTH),
        repeats=2,
    )
    results = evaluate(loaded, options, out=tmp_path)
    for (name, scheme, target), shown in results.all("tiles"):
        assert shown["cells"] == 64
        # Tiles are 64 x 128: each covers two cells of a row.
        kept = np.frombuffer(b64decode(shown["kept"]), np.uint8).reshape(8, -1)
        cells = np.stack([kept & 15, kept >> 4], -1).reshape(8, -1)[:, : 64 * 65 // 2]
        assert set(np.unique(cells)) <= {0, 15}
        assert 1 - cells.mean(1) / 15 == pytest.approx(np.array(shown["skipped"]).ravel(), abs=0.06)
        measured = results.get("text", name, scheme, target)["sparsity"]
        assert shown["sparsity"] == pytest.approx(measured)
    for time in timings(results):
        assert len(time.seconds) == 2
        if time.setting.target:
            assert 0 < time.attention < 10 * time.median
    assert report.write("Title", "About", results, None, tmp_path).exists()


@pytest.mark.parametrize(
    ("name", "sizes", "absorbed"),
    [
        ("DeepseekV3", HOPPER, False),
        pytest.param("DeepseekV3", HOPPER, True, marks=hopper),
        ("MiniCPM3", ON_GPUS["MiniCPM3"], False),
    ],
)
def test_latent_attention_is_calibrated_and_recorded(name, sizes, absorbed):
    """In the form that decodes: absorbed, the heads decide together."""
    if name not in present():
        pytest.skip(f"{name} is not in this Transformers")
    model = make_recency_latent_model(name, **sizes).to("cuda", torch.bfloat16)
    if absorbed:
        blasst.absorb(model)
    tokenizer, target = make_tokenizer(), {"prefill": 0.2, "decode": 0.2}
    given = {"lengths": [1024], "target_sparsity": target, "prompts": 2, "held_out": [1024]}
    # In bfloat16 the gaps of two decisions a token, absorbed, lie too close for any target.
    achieved = {h.phase: h.achieved for h in calibrate(model, tokenizer, **given).held_out}
    ids = torch.tensor([tokenizer.encode("Which of them was it? " * 80)[:1024]], device="cuda")
    with blasst.record() as recording:
        model.generate(ids, max_new_tokens=8, do_sample=False)
    for phase in target:
        assert 0.1 < achieved[phase] < 0.5
        assert recording.sparsity(phase) == pytest.approx(achieved[phase], abs=0.1)
        assert recording.heads(phase) == [4, 4]


def test_memory_stays_within_what_is_said_before(calibrated):
    model = model_on("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calibrate(model, make_tokenizer(), **OPTIONS, chunk=1024)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= bytes_needed(sizes_of(model, 2), Reading(LENGTH), 1024)


def test_too_little_memory_is_said_first(monkeypatch):
    model = model_on("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    with pytest.raises(ValueError, match=r"need about .* GB besides the weights; cuda:0 has 0\.0"):
        calibrate(model, make_tokenizer(), **OPTIONS)
