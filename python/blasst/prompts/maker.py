"""Texts that every installation carries, and long prompts in the manner of RULER made from them.

Nothing is downloaded: the prose is Python's own language reference, licences, documentation and
source code of Python and of the packages that blasst needs.
"""

import argparse
import ast
import inspect
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

PROMPT_KINDS = ("needle", "chain", "pairs", "words")
"""Prose first: few prompts then say most about prose."""
TRAINED_ON = (
    *("calendar", "configparser", "dataclasses", "difflib", "ftplib", "functools", "random"),
    *("statistics", "threading"),
)
"""Modules of the standard library, not those of `evaluation_texts`."""
PLACES = ("north", "south", "east", "west", "upper", "lower", "inner", "outer")
THINGS = ("gate", "tower", "bridge", "harbour", "garden", "cellar", "library", "mill")
COLOURS = ("copper", "silver", "amber", "violet", "scarlet", "ivory", "cobalt", "emerald")
OBJECTS = ("lantern", "anchor", "feather", "compass", "kettle", "ladder", "whistle", "mirror")
NEEDLE = 'The secret passphrase of the {place} is "{phrase}".'
QUESTION = "What is the secret passphrase of the {place}?"
LEAST_TEXT = 64
"""Tokens between the instruction and the question."""
INSTRUCTION = "Read this text and answer the question.\n\n"


@dataclass(frozen=True)
class Prompt:
    """A long prompt with a question at its end."""

    kind: str
    tokens: torch.Tensor
    """[1, length] int64."""
    question: str
    answers: tuple[str, ...]
    """What a right answer contains, all of it."""

    def is_answered_by(self, text: str) -> bool:
        """Whether a text contains every expected answer, in any case."""
        return all(answer.lower() in text.lower() for answer in self.answers)


def kind_at(index: int) -> str:
    """Of the prompt of this number, where kinds follow one after the other."""
    return PROMPT_KINDS[index % len(PROMPT_KINDS)]


def reference_text() -> str:
    """Prose for calibration: the language reference that Python carries."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def training_text() -> str:
    """Text to train on: `reference_text`, and source code that is not among `evaluation_texts`."""
    folder = Path(inspect.getfile(argparse)).parent
    sources = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in TRAINED_ON]
    return "\n\n".join([reference_text(), *sources])


def evaluation_texts() -> dict[str, str]:
    """Texts of other kinds than `reference_text`, by name: for perplexity and agreement."""
    return {
        "licences": _licences(),
        "source code": inspect.getsource(argparse),
        "torch documentation": _docstrings(torch.nn.functional) + _docstrings(torch),
        "numpy documentation": _docstrings(np),
        "library documentation": _library_documentation(),
    }


def _licences() -> str:
    texts = []
    for package in ("numpy", "matplotlib", "torch"):
        files = [f for f in distribution(package).files or [] if "LICENSE" in f.name.upper()]
        for file in sorted(files, key=str):
            texts.append(Path(file.locate()).read_text(encoding="utf-8", errors="replace").strip())
    return "\n\n".join(dict.fromkeys(texts))


def _docstrings(module: object) -> str:
    documented = [getattr(module, name) for name in sorted(vars(module)) if name[0] != "_"]
    documents = [
        inspect.cleandoc(value.__doc__)
        for value in documented
        if callable(value) and isinstance(value.__doc__, str) and len(value.__doc__) > 400
    ]
    return "\n\n".join(dict.fromkeys(documents))


def _library_documentation() -> str:
    """Docstrings of modules of the standard library."""
    folder = Path(inspect.getfile(argparse)).parent
    documents = []
    for name in (
        "datetime",
        "decimal",
        "doctest",
        "email/message",
        "fractions",
        "heapq",
        "optparse",
    ):
        for stem in (name, f"_py{name}"):
            path = folder / f"{stem}.py"
            if path.exists():
                tree = ast.parse(path.read_text(encoding="utf-8"))
                documents += [
                    ast.get_docstring(node)
                    for node in ast.walk(tree)
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                ]
    return "\n\n".join(dict.fromkeys(text for text in documents if text))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: it is empty, or no UTF-8 text.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def long_enough(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int
) -> dict[str, str]:
    """Those texts that have at least so many tokens.

    Raises:
        ValueError: none has.
    """
    counts = {
        name: len(tokenizer(text[: 16 * length], add_special_tokens=False).input_ids)
        for name, text in texts.items()
    }
    found = {name: text for name, text in texts.items() if counts[name] >= length}
    if not found:
        raise ValueError(
            f"the longest text here has {max(counts.values())} tokens; {length} are needed"
        )
    return found


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, what: str, start: int = 0
) -> torch.Tensor:
    """[1, length] int64: `length` tokens of a text, from its token `start` on.

    Raises:
        ValueError: the text is shorter than that.
    """
    # A token has at most some tens of bytes; what lies beyond need not be tokenised.
    tokens = tokenizer(text[: 16 * (start + length)], add_special_tokens=False).input_ids
    if len(tokens) < start + length:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
    if len(tokens) < start + length:
        raise ValueError(f"{what} has {len(tokens)} tokens; {start + length} are needed")
    first = tokenizer("").input_ids  # the token that every text begins with, if there is one
    return torch.tensor([(first + tokens[start:])[:length]])


class PromptMaker:
    """Makes prompts of an exact length from a haystack."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None, what: str = "the text"
    ) -> None:
        """Tokenise the haystack.

        Args:
            tokenizer: of the model.
            text: prose; None: `reference_text()`, which begins anew where a prompt is longer.
            what: errors call the text.
        """
        self._tokenizer = tokenizer
        self._what, self._begins_anew = what, text is None
        text = reference_text() if text is None else text
        self._lines = [line for line in text.splitlines(keepends=True) if line]
        self._counts = [
            len(ids) for ids in tokenizer(self._lines, add_special_tokens=False).input_ids
        ]

    def make(self, kind: str, length: int, seed: int, depth: float | None = None) -> Prompt:
        """A prompt of exactly `length` tokens.

        Args:
            kind: "needle": one fact in prose; "pairs": one fact among many of its kind; "chain":
                variables to follow through prose; "words": the most frequent words of a list.
            length: its tokens, the question included.
            seed: another seed, another stretch of the haystack and other facts.
            depth: of a needle in its text, 0 (its beginning) to 0.9; default: anywhere.
        """
        rng = random.Random(f"{kind} {length} {seed}")
        facts, question, answers = getattr(self, f"_{kind}")(rng, length)
        head, tail = self._frame(question)
        room = length - len(head) - len(tail)
        if room < LEAST_TEXT:
            shortest = len(head) + len(tail) + LEAST_TEXT
            raise ValueError(
                f"a prompt of {length} tokens is too short; at least {shortest} are needed"
            )
        if kind in ("needle", "chain"):
            body = self._in_prose(rng, facts, room, depth)
        else:
            body = self._encode("".join(facts))[:room]
        if len(body) < room:
            raise ValueError(f"{self._what} has too few tokens for a prompt of {length}")
        return Prompt(kind, torch.tensor([[*head, *body, *tail]]), question, answers)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _frame(self, question: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the text: as a user's message where the model chats."""
        mark = "\u2063"
        content = f"{INSTRUCTION}{mark}\n\nQuestion: {question}"
        if self._tokenizer.chat_template is None:
            bos = self._tokenizer.bos_token or ""
            whole = f"{bos}{content}\nAnswer:"
        else:
            whole = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        head, tail = whole.split(mark)
        return self._encode(head), self._encode(tail)

    def _in_prose(
        self, rng: random.Random, facts: list[str], room: int, depth: float | None
    ) -> list[int]:
        """Up to `room` tokens of the haystack from a random place on, the facts spread in them."""
        total = sum(self._counts)
        # At most 0.9: what is cut to length must not be a fact.
        shares = [rng.uniform(0.05, 0.9) if depth is None else min(depth, 0.9) for _ in facts]
        places = sorted(share * room for share in shares)
        start = rng.random()
        # Lines tokenised together can have fewer tokens than apart: take more, as many as it needs.
        for spare in (room // 16, room // 4, room):
            wanted = room + spare + 64
            if total < wanted and not self._begins_anew:
                raise ValueError(f"{self._what} has {total} tokens; {wanted} are needed")
            offset = int(start * (total - wanted + 1 if wanted <= total else total))
            lines = self._lines_from(offset, wanted, [*zip(places, facts, strict=True)])
            body = self._encode("".join(lines))[:room]
            if len(body) == room:
                break
        return body

    def _lines_from(
        self, offset: int, wanted: int, places: list[tuple[float, str]]
    ) -> Iterator[str]:
        """Lines from the one at token `offset` on, and each fact after so many tokens of them."""
        waiting = list(places)
        skipped = count = 0
        for line, tokens in itertools.cycle(zip(self._lines, self._counts, strict=True)):
            skipped += tokens
            if skipped <= offset:
                continue
            while waiting and count >= waiting[0][0]:
                yield waiting.pop(0)[1]
            yield line
            count += tokens
            if count >= wanted:
                return

    def _needle(self, rng: random.Random, _length: int) -> tuple[list[str], str, tuple[str, ...]]:
        place, phrase = a_place(rng), a_phrase(rng)
        fact = f"\n{NEEDLE.format(place=place, phrase=phrase)}\n\n"
        return [fact], QUESTION.format(place=place), (phrase,)

    def _pairs(self, rng: random.Random, length: int) -> tuple[list[str], str, tuple[str, ...]]:
        codes = {}
        while len(codes) < length // 8:
            codes[f"{a_place(rng)} {rng.randrange(10**4)}"] = str(rng.randrange(10**6, 10**7))
        facts = [f"The number of the {place} is {number}.\n" for place, number in codes.items()]
        # Asked for one that the cut to length cannot have taken.
        asked = rng.choice(list(codes)[: length // 32])
        return facts, f"What is the number of the {asked}?", (codes[asked],)

    def _chain(self, rng: random.Random, _length: int) -> tuple[list[str], str, tuple[str, ...]]:
        names = ["".join(rng.choices("BCDFGHKLMNPRSTVZ", k=5)) for _ in range(4)]
        value = rng.randrange(10**4, 10**5)
        facts = [f"\nVAR {names[0]} = {value}\n"]
        facts += [f"\nVAR {right} = VAR {left}\n" for left, right in itertools.pairwise(names)]
        return facts, f"Which variables have the value {value}?", tuple(names)

    def _words(self, rng: random.Random, length: int) -> tuple[list[str], str, tuple[str, ...]]:
        words = sorted({w for line in self._lines for w in line.split() if w.isalpha()})
        frequent = rng.sample(words, 3)
        rare = rng.sample(words, min(len(words), 200))
        drawn = [rng.choice(frequent if rng.random() < 0.3 else rare) for _ in range(length)]
        facts = [f"{i + 1}. {word} " for i, word in enumerate(drawn)]
        return facts, "Which three words appear most often in this list?", tuple(frequent)


def a_place(rng: random.Random) -> str:
    """A place that a fact can be about."""
    return f"{rng.choice(PLACES)} {rng.choice(THINGS)}"


def a_phrase(rng: random.Random) -> str:
    """A passphrase."""
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
