"""What a fine-tuning run reads: samples to train on, and texts that are held out."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.prompts import PromptMaker, evaluation_texts, kind_at, text_tokens, training_text
from blasst.training.plan import TrainingPlan

HELD_OUT_SHARE = 0.2
"""Of a given text, its end: for the measurement."""
ANSWER_ROOM = 32
"""Tokens of a retrieval prompt's sample that are left for its answer."""


def split_text(text: str | None) -> tuple[str, dict[str, str]]:
    """What is trained on, and what is held out, by name."""
    if text is None:
        return training_text(), evaluation_texts()
    lines = text.splitlines(keepends=True)
    cut = round(len(lines) * (1 - HELD_OUT_SHARE))
    return "".join(lines[:cut]), {"end of the text": "".join(lines[cut:])}


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], plan: TrainingPlan
) -> list[tuple[str, Tensor]]:
    """Names and [1, length] tokens: the first pieces of each held-out text, one after another."""
    return [
        (name, text_tokens(tokenizer, text, plan.length, name, start=plan.length * i))
        for name, text in texts.items()
        for i in range(plan.windows)
    ]


def training_samples(
    tokenizer: PreTrainedTokenizerBase, prose: str, plan: TrainingPlan
) -> list[dict[str, Tensor]]:
    """Samples of all steps: in turn a piece of the prose and a retrieval prompt with its answer.

    The same for the same plan, in the same order, each of exactly `plan.length` tokens (after the
    answer goes on a piece of the prose). Every token is a label.
    """
    maker = PromptMaker(tokenizer, prose, "the text to train on")
    whole = torch.tensor(tokenizer(prose, add_special_tokens=False).input_ids)
    spare = len(whole) - plan.length
    if spare < 0:
        raise ValueError(f"the text to train on has {len(whole)} tokens; {plan.length} are needed")
    generator = torch.Generator().manual_seed(plan.seed)
    samples = []
    for i in range(plan.steps * plan.batch):
        first = int(torch.randint(spare + 1, (), generator=generator))
        tokens = whole[first:]
        if i % 2:
            prompt = maker.make(kind_at(i // 2), plan.length - ANSWER_ROOM, seed=i)
            answer = f" {', '.join(prompt.answers)}{tokenizer.eos_token}\n"
            answer = torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids)
            tokens = torch.cat([prompt.tokens[0], answer, tokens])
        tokens = tokens[: plan.length]
        samples.append({"input_ids": tokens, "labels": tokens})
    return samples
