"""Texts that every installation carries, and long prompts made from them."""

from blasst.prompts.maker import (
    KINDS,
    NEEDLE,
    QUESTION,
    Prompt,
    PromptMaker,
    a_phrase,
    a_place,
    evaluation_texts,
    read_text,
    reference_text,
    text_tokens,
    training_text,
)

__all__ = [
    "KINDS",
    "NEEDLE",
    "QUESTION",
    "Prompt",
    "PromptMaker",
    "a_phrase",
    "a_place",
    "evaluation_texts",
    "read_text",
    "reference_text",
    "text_tokens",
    "training_text",
]
