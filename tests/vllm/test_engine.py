"""Engines of vLLM on the CPU: blasst beside vLLM's own attention, and beside Transformers."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY
from transformers import AutoModelForCausalLM
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import blasst
from blasst.errors import NotSupportedError
from blasst.integrations.vllm import metadata, on_cpu
from blasst.integrations.vllm.backend import CpuBackend
from engines import generate, make_engine, prompts_of, tokens_of

PROMPTS = prompts_of(5, 130, 700, 1200, 33)
CUSTOM = {"attention_backend": "CUSTOM"}
REQUESTS = {"logits_processors": ["blasst.integrations.vllm:Requests"]}
SMALL_STEPS = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}
PHASES = ("prefill", "decode")
REFUSED = (ValueError, VLLMValidationError)  # the latter is none in newer versions


@pytest.fixture(scope="module")
def expected(llama):
    """What vLLM's own attention makes of the prompts."""
    return tokens_of(generate(make_engine(llama), PROMPTS))


@pytest.fixture
def log(caplog):
    """What vLLM's logger gets, which hands nothing on to the root."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_tokens_are_those_of_vllm(llama, expected, log):
    """In chunks, mixed with decodes, in small blocks, and from the prefix cache."""
    llm = make_engine(llama, **CUSTOM, **SMALL_STEPS, block_size=16, enable_prefix_caching=True)
    assert log.text.count("blasst computes every tile") == 1
    assert tokens_of(generate(llm, PROMPTS)) == expected
    again = generate(llm, PROMPTS)
    assert tokens_of(again) == expected
    assert any(output.num_cached_tokens for output in again)
    with pytest.raises(REFUSED, match=r"without --logits-processors blasst\.integrations"):
        generate(llm, PROMPTS[:1], extra_args={"blasst_prefill_threshold": 0.5})
    assert tokens_of(generate(llm, PROMPTS[:1])) == expected[:1]


def test_window_and_soft_cap(gemma):
    prompts = PROMPTS[1:3]
    own = tokens_of(generate(make_engine(gemma), prompts))
    assert len(set(own[1])) > 10
    assert tokens_of(generate(make_engine(gemma, **CUSTOM, **SMALL_STEPS), prompts)) == own


def test_a_cache_in_8_bits(llama):
    """Read in chunks, a prompt has the tokens that it has as a whole."""
    options = CUSTOM | {"kv_cache_dtype": "fp8"}
    whole = tokens_of(generate(make_engine(llama, **options), PROMPTS))
    llm = make_engine(llama, **options, **SMALL_STEPS, block_size=16)
    assert tokens_of(generate(llm, PROMPTS)) == whole


def test_calibration_and_requests(calibrated, expected, log):
    """A prompt in chunks drops what it drops as a whole in Transformers; a request may ask else."""
    counting = {"additional_config": {"blasst": {"statistics": True}}}
    llm = make_engine(calibrated, **CUSTOM, **REQUESTS, **SMALL_STEPS, **counting)
    prompt = PROMPTS[3]
    [ours] = tokens_of(generate(llm, [prompt]))
    generate(llm, PROMPTS[:1], new=1)  # counts are told at the next step
    sparsity = {phase: [sparsity_of(phase, layer) for layer in (0, 1)] for phase in PHASES}

    model = AutoModelForCausalLM.from_pretrained(
        calibrated, dtype=torch.float32, attn_implementation="blasst"
    )
    with torch.no_grad(), blasst.record() as record:
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        whole = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)
    assert ours == whole[0, len(prompt) :].tolist()
    assert sparsity == {phase: pytest.approx(record.by_layer(phase)) for phase in PHASES}
    assert sparsity["prefill"][0] == sparsity["decode"][0] == 0
    assert 0 < sparsity["prefill"][1] < 1
    assert 0 < sparsity["decode"][1] < 1
    for phase in PHASES:
        assert re.search(rf"blasst: {phase}: \d+\.\d% of \d+ tiles skipped, from 0\.0%", log.text)

    dense = {"blasst_prefill_threshold": 0, "blasst_decode_threshold": 0.0}
    assert tokens_of(generate(llm, [prompt], extra_args=dense)) == [expected[3]]
    wrong = {"blasst_prefill_threshold": 1.5}
    with pytest.raises(REFUSED, match=r"blasst_prefill_threshold is 1\.5; it must be a number"):
        generate(llm, [prompt], extra_args=wrong)
    with pytest.raises(REFUSED, match="'blasst_threshold'; of blasst it may have"):
        generate(llm, [prompt], extra_args={"blasst_threshold": 0.5})
    mixed = generate(llm, PROMPTS, extra_args=dense)
    assert tokens_of(mixed) == expected
    assert tokens_of(generate(llm, [prompt])) == [ours]


def sparsity_of(phase: str, layer: int) -> float:
    """That Prometheus would be told, of the engines of this process."""
    labels = {"phase": phase, "layer": f"model.layers.{layer}.self_attn.attn"}
    visitable, skipped = (
        REGISTRY.get_sample_value(f"blasst:tiles_{name}_total", labels)
        for name in ("visitable", "skipped")
    )
    return skipped / visitable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "a cache of fp8_e5m2"),
        ({"additional_config": {"blasst": {"prefil": {}}}}, "'prefil'; known keys"),
        (
            {"additional_config": {"blasst": {"prefill": {"threshold": [0.1, 0.2, 0.3]}}}},
            "thresholds for 3 heads; model.layers.0.self_attn.attn has 4",
        ),
        (
            {"additional_config": {"blasst": {"decode": {"target_sparsity": 0.5}}}},
            "has no sparse_attention_config",
        ),
        (REQUESTS | {"attention_backend": None}, "Requests without --attention-backend CUSTOM"),
    ],
)
def test_an_engine_that_cannot_be(llama, options, message):
    with pytest.raises(Exception, match=re.escape(message)):
        make_engine(llama, **CUSTOM | options)


@pytest.mark.parametrize(("threshold", "times"), [("threshold", 0), ("threshold_scale_factor", 1)])
def test_chunks_are_spoken_of_where_the_length_matters(llama, log, monkeypatch, threshold, times):
    monkeypatch.setattr(metadata, "_said", set())
    make_engine(llama, **CUSTOM, additional_config={"blasst": {"prefill": {threshold: 0.5}}})
    assert log.text.count("go by its length so far") == times


def test_a_draft_model_keeps_vllms_attention(llama):
    drafts = {"method": "draft_model", "num_speculative_tokens": 3, "model": llama}
    drafts["attention_backend"] = "CUSTOM"
    with pytest.raises(NotSupportedError, match="CUSTOM as the attention_backend of drafts"):
        make_engine(llama, **CUSTOM, speculative_config=drafts)


def test_cpus_have_no_kernel_for_mla(monkeypatch):
    """vLLM's CPU platform asks for its own backends, whatever the engine was asked for."""

    def backend(asked):
        config = SimpleNamespace(attention_config=SimpleNamespace(backend=asked))
        monkeypatch.setattr(on_cpu, "get_current_vllm_config_or_none", lambda: config)
        return AttentionBackendEnum

    assert backend(AttentionBackendEnum.CUSTOM).CPU_ATTN.get_class() is CpuBackend
    with pytest.raises(NotSupportedError, match="multi-head latent attention"):
        getattr(on_cpu, "CPU_MLA")  # noqa: B009, is made when it is asked for
    assert backend(None).CPU_ATTN.get_class().__module__.startswith("vllm.")


def test_compiled(llama, expected):
    """With thresholds of requests, which a compiled step reads, too."""
    llm = make_engine(llama, **CUSTOM, **REQUESTS, **SMALL_STEPS, enforce_eager=False)
    assert tokens_of(generate(llm, PROMPTS)) == expected
    sparse = {"blasst_prefill_threshold": 1.0, "blasst_decode_threshold": 1.0}
    assert tokens_of(generate(llm, PROMPTS, extra_args=sparse)) != expected
    assert tokens_of(generate(llm, PROMPTS)) == expected


def test_each_rank_takes_the_thresholds_of_its_heads(llama, expected):
    threshold = {"threshold": [0.0, 0.0, 0.9, 0.5]}  # the second rank's heads drop tiles
    options = {"additional_config": {"blasst": {phase: threshold for phase in PHASES}}}
    prompts, asked = PROMPTS[1:3], {"blasst_decode_threshold": 1.0}

    def tokens_on(**ranks) -> list:
        """By the engine's thresholds, and by those of requests, of which each rank hears."""
        llm = make_engine(llama, **CUSTOM, **REQUESTS, **options, **ranks)
        return [tokens_of(generate(llm, prompts, extra_args=own)) for own in (None, asked)]

    one = tokens_on()
    assert one == tokens_on(tensor_parallel_size=2)
    assert one[0] != expected[1:3]
    assert one[1] != one[0]


def test_speculation_changes_no_token(llama, expected):
    """Requests have different numbers of drafts, so decode is ragged.

    The last of this file: vLLM 0.32 starts no second engine in a process that has Numba, which
    drafts need.
    """
    drafts = {"method": "ngram", "num_speculative_tokens": 15}
    drafts |= {"prompt_lookup_max": 4, "prompt_lookup_min": 1}
    llm = make_engine(llama, **CUSTOM, speculative_config=drafts, block_size=256)
    assert tokens_of(generate(llm, PROMPTS)) == expected
