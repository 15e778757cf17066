"""Prompts made of the user's own documents: texts, conversations, tokens."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.prompts.maker import Prompt

KEYS = ("text", "prompt", "messages", "input_ids")
"""Of a record: the first that it has is its document."""


def read_records(path: Path) -> list[Any]:
    """The lines of a jsonl file.

    Raises:
        ValueError: a line is no JSON; the message names it.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found


class DocumentMaker:
    """Makes prompts of an exact length: documents one after the other, from another one on each.

    It takes the place of `PromptMaker`, without its questions.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Iterable[Any], most: int
    ) -> None:
        """Tokenise the documents.

        Args:
            tokenizer: of the model.
            documents: each a text, tokens, a conversation (a list of messages with a chat
                template), or a record with one of these under a key of `KEYS`: what a datasets
                object gives, for example.
            most: tokens that are needed at most; a longer, or endless, iterable is not read on.

        Raises:
            TypeError: a document that is none of these.
            ValueError: there is none.
        """
        self._tokenizer = tokenizer
        self._documents: list[list[int]] = []
        enough = 0
        for number, document in enumerate(documents):
            tokens = self._tokens(document, number)
            self._documents += [tokens] if tokens else []
            enough += len(tokens)
            if enough >= most:
                break
        if not self._documents:
            raise ValueError("the prompts hold no document")

    def _tokens(self, document: Any, number: int) -> list[int]:
        if isinstance(document, Mapping):
            key = next((key for key in KEYS if key in document), None)
            if key is None:
                raise ValueError(
                    f"prompt {number} has the keys {', '.join(map(str, document))}; it must have "
                    f"one of {', '.join(KEYS)}"
                )
            document = document[key]
        if isinstance(document, str):
            return self._tokenizer(document).input_ids
        if isinstance(document, torch.Tensor):
            return document.flatten().tolist()
        if isinstance(document, list | tuple) and document and isinstance(document[0], Mapping):
            if self._tokenizer.chat_template is None:
                raise ValueError(
                    f"prompt {number} is a conversation; the model has no chat template"
                )
            text = self._tokenizer.apply_chat_template(list(document), tokenize=False)
            return self._tokenizer(text, add_special_tokens=False).input_ids
        if isinstance(document, list | tuple) and all(isinstance(t, int) for t in document):
            return list(document)
        raise TypeError(
            f"prompt {number} is a {type(document).__name__}; it must be a text, tokens, a "
            "conversation, or a record with one of these"
        )

    def make(self, kind: str, length: int, seed: int) -> Prompt:
        """[1, length] tokens; another kind or seed begins with another document."""
        rng = random.Random(f"{kind} {seed}")
        first = rng.randrange(len(self._documents))
        tokens = list(itertools.islice(self._from(first), length))
        if len(tokens) < length:
            raise ValueError(
                f"the prompts have {len(tokens)} tokens in all; a prompt of {length} needs more"
            )
        return Prompt("document", torch.tensor([tokens]), "", ())

    def _from(self, first: int) -> Iterator[int]:
        """Every token once, from this document on."""
        for i in range(len(self._documents)):
            yield from self._documents[(first + i) % len(self._documents)]
