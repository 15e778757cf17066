"""Greedy answers, and how long they take."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.evaluation.clock import Clock, Times
from blasst.hf.models import quiet


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    times: Times


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    most: int,
    chunk: int | None = None,
) -> Answer:
    """Answer a prompt greedily with at most `most` tokens.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tokens: [1, length] the prompt.
        most: tokens of the answer.
        chunk: tokens of the prompt that are read at once; None: all.
    """
    clock = Clock(model.device)
    prompt = tokens.to(model.device)
    with quiet():  # of sampling options that a greedy answer has no use for
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            streamer=clock,
            prefill_chunk_size=chunk if chunk and chunk < tokens.shape[1] else None,
        )
    text = tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True)
    return Answer(text.strip(), clock.times)
