"""Texts that every installation carries, and long prompts made from them."""

from blasst.prompts.documents import DocumentMaker, read_records
from blasst.prompts.loop import ForwardLoop, fed_by
from blasst.prompts.maker import (
    NEEDLE,
    PROMPT_KINDS,
    QUESTION,
    Prompt,
    PromptMaker,
    a_phrase,
    a_place,
    evaluation_texts,
    kind_at,
    long_enough,
    read_text,
    reference_text,
    text_tokens,
    training_text,
)

__all__ = [
    "NEEDLE",
    "PROMPT_KINDS",
    "QUESTION",
    "DocumentMaker",
    "ForwardLoop",
    "Prompt",
    "PromptMaker",
    "a_phrase",
    "a_place",
    "evaluation_texts",
    "fed_by",
    "kind_at",
    "long_enough",
    "read_records",
    "read_text",
    "reference_text",
    "text_tokens",
    "training_text",
]
