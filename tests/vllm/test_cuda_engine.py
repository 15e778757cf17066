"""Engines of vLLM on a GPU: blasst beside FlashAttention, eager and in graphs. `make gpu-test`."""

import pytest
import torch

from engines import generate, make_engine, prompts_of
from gpu import hopper, needs_gpu
from test_engine import CUSTOM, REQUESTS, sparsity_of

pytestmark = needs_gpu

PROMPTS = prompts_of(5, 130, 700, 3000, 33)
PHASES = ("prefill", "decode")
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8],
}
ON_GPU = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "gpu_memory_utilization": 0.25,
    "max_num_seqs": 8,
}
NOISE = 0.05
"""Of the log-probability of a token, between two kernels in bfloat16, on average."""


@pytest.fixture(scope="module")
def expected(llama_for_gpu):
    """Log-probabilities of the prompts' tokens by FlashAttention."""
    llm = make_engine(llama_for_gpu, **ON_GPU, attention_backend="FLASH_ATTN")
    return logprobs_of(generate(llm, PROMPTS, new=1, prompt_logprobs=0))


def logprobs_of(outputs) -> list[torch.Tensor]:
    return [
        torch.tensor([next(iter(token.values())).logprob for token in output.prompt_logprobs[1:]])
        for output in outputs
    ]


def assert_near(outputs, expected) -> None:
    for ours, theirs in zip(logprobs_of(outputs), expected, strict=True):
        assert (ours - theirs).abs().mean() < NOISE


@pytest.mark.parametrize("block", [16, 64, 256])
def test_prompts_have_the_probabilities_of_flash_attention(llama_for_gpu, expected, block):
    llm = make_engine(
        llama_for_gpu, **ON_GPU, **CUSTOM, block_size=block, max_num_batched_tokens=1024
    )
    assert_near(generate(llm, PROMPTS, new=1, prompt_logprobs=0), expected)


def test_a_graph_reads_the_thresholds_of_its_requests(llama_for_gpu, expected):
    llm = make_engine(
        llama_for_gpu,
        **ON_GPU | {"enforce_eager": False},
        **CUSTOM,
        **REQUESTS,
        compilation_config=GRAPHS,
        additional_config={"blasst": {"statistics": True}},
    )
    assert_decoded_as_read(llm)
    assert [sparsity_of(phase, 1) for phase in PHASES] == [0, 0]
    sparse = {"blasst_prefill_threshold": 1.0, "blasst_decode_threshold": 1.0}
    generate(llm, PROMPTS, extra_args=sparse)
    generate(llm, PROMPTS[:1], new=1)
    assert all(sparsity_of(phase, 1) > 0 for phase in PHASES)
    assert_near(generate(llm, PROMPTS, new=1, prompt_logprobs=0), expected)


@hopper
def test_a_cache_in_8_bits(llama_for_gpu):
    options = {"compilation_config": GRAPHS, "enforce_eager": False, "kv_cache_dtype": "fp8"}
    assert_decoded_as_read(make_engine(llama_for_gpu, **ON_GPU | options, **CUSTOM))


def test_heads_of_96(heads_of_96_for_gpu):
    """On any GPU these are the portable kernels' own."""
    own = make_engine(heads_of_96_for_gpu, **ON_GPU, attention_backend="FLASH_ATTN")
    expected = logprobs_of(generate(own, PROMPTS, new=1, prompt_logprobs=0))
    llm = make_engine(heads_of_96_for_gpu, **ON_GPU, **CUSTOM)
    assert_near(generate(llm, PROMPTS, new=1, prompt_logprobs=0), expected)
    assert_decoded_as_read(llm)


def test_compiled_by_vllms_defaults(llama_for_gpu, expected):
    """Layers by Inductor, in pieces around attention; graphs of pieces and of whole decodes."""
    llm = make_engine(llama_for_gpu, **ON_GPU | {"enforce_eager": False}, **CUSTOM)
    assert_near(generate(llm, PROMPTS, new=1, prompt_logprobs=0), expected)
    assert_decoded_as_read(llm)


def assert_decoded_as_read(llm) -> None:
    """Decoded tokens are read again as a prompt, densely, and have the same probabilities."""
    outputs = generate(llm, PROMPTS, logprobs=0)
    whole = [p + list(o.outputs[0].token_ids) for p, o in zip(PROMPTS, outputs, strict=True)]
    again = logprobs_of(generate(llm, whole, new=1, prompt_logprobs=0))
    for output, read in zip(outputs, again, strict=True):
        decoded = [next(iter(token.values())).logprob for token in output.outputs[0].logprobs]
        assert (torch.tensor(decoded) - read[-len(decoded) :]).abs().mean() < NOISE


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(llama_for_gpu, expected):
    threshold = {"threshold": [0.0, 0.0, 0.9, 0.9]}  # of the second rank's heads alone
    options = {"additional_config": {"blasst": {"decode": threshold}}, "tensor_parallel_size": 2}
    llm = make_engine(llama_for_gpu, **ON_GPU, **CUSTOM, **options)
    assert_near(generate(llm, PROMPTS, new=1, prompt_logprobs=0), expected)
    assert len(generate(llm, PROMPTS)[0].outputs[0].token_ids) == 24


def test_windows_and_soft_cap(gemma_for_gpu):
    options = ON_GPU | {"enforce_eager": True}
    prompts = PROMPTS[1:3]
    theirs = generate(make_engine(gemma_for_gpu, **options), prompts, new=1, prompt_logprobs=0)
    ours = make_engine(gemma_for_gpu, **options, **CUSTOM)
    assert_near(generate(ours, prompts, new=1, prompt_logprobs=0), logprobs_of(theirs))


def test_drafts(llama_for_gpu):
    """Requests have different numbers of drafts. The last of this file: see test_engine.py."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_max": 4, "prompt_lookup_min": 1}
    options = {"compilation_config": GRAPHS, "enforce_eager": False, "speculative_config": drafts}
    assert_decoded_as_read(make_engine(llama_for_gpu, **ON_GPU | options, **CUSTOM))
