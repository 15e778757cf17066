"""Engines of vLLM in this process, and what they are asked."""

import gc
import os
import random

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOG_STATS_INTERVAL": "0.001",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams

WORDS = 512
"""Of the models' vocabulary."""


def prompts_of(*lengths: int) -> list[list[int]]:
    """Random tokens, of which each prompt says its last fifty twice, so that drafts are found."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, WORDS) for _ in range(length)] for length in lengths]
    return [prompt + prompt[-50:] for prompt in prompts]


def make_engine(model: str, **options) -> LLM:
    gc.collect()  # an engine takes its process groups along when it goes, whoever uses them then
    defaults = {
        "dtype": "float32",
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.2,
        "enforce_eager": True,
        "seed": 0,
    }
    return LLM(model=model, **defaults | options)


def generate(llm: LLM, prompts: list[list[int]], new: int = 24, **params):
    sampling = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **params
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]
