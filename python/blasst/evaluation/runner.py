"""Evaluation: what a model loses and gains at several target sparsities, next to dense.

Results are kept one by one in a file, so that a run which was stopped goes on where it stopped.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.config import SparseAttention, parse
from blasst.hf import Recording, record
from blasst.hf.models import Loaded, check_length, sparse_layers
from blasst.hf.reading import read
from blasst.measure.agreement import DenseRun
from blasst.methods.registry import Method, made_by, saved_tiles
from blasst.progress import Progress, silent
from blasst.prompts import KINDS, Prompt, PromptMaker, reference_text, text_tokens

ANSWER_TOKENS = 32
DENSE, CALIBRATED, PAPER = "dense", "calibrated", "forward, one threshold"
"""PAPER: the paper's scheme, and the only one that the ecosystem's keys can express."""
NEEDLE_SEED = 10**5


@dataclass(frozen=True)
class Setting:
    """One column of the comparison."""

    scheme: str
    target: float

    @property
    def name(self) -> str:
        """For tables."""
        return DENSE if self.scheme == DENSE else f"{self.scheme}, {self.target:.0%}"


class Results:
    """Finished pieces of work by key, in a file that is added to line by line."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or begin the file.

        Raises:
            ValueError: the file is of an evaluation of something else.
        """
        self._path = path
        self._known: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = {"fingerprint": fingerprint}
        whole = self._read() if path.exists() else []
        if not whole or [set(line) for line in whole] == [{"fingerprint"}]:
            whole = [begun]  # nothing was found yet, of whatever it was to be
        if whole[0] != begun:
            raise ValueError(
                f"{path} holds results of another model, calibration or length; choose another "
                "folder or remove it"
            )
        for line in whole[1:]:
            self._known[line["key"]] = line["value"]
        # Written anew without a line that a killed run left half-written.
        working = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            working.write_text("".join(json.dumps(line) + "\n" for line in whole))
            working.replace(path)
        finally:
            working.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def get(self, *key: Any) -> Any | None:
        """What was found for this key, None if nothing yet."""
        return self._known.get(json.dumps(key))

    def put(self, value: Any, *key: Any) -> Any:
        """Keep a result."""
        line = json.dumps({"key": json.dumps(key), "value": value})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[json.dumps(key)] = value
        return value

    def all(self, kind: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Keys that begin with `kind`, without it, and their values."""
        for key, value in self._known.items():
            first, *rest = json.loads(key)
            if first == kind:
                yield tuple(rest), value


def shorter_lengths(length: int) -> list[int]:
    """Up to four, from a quarter of the evaluated length on: where sparsity is measured besides it.

    Prompts of fewer than 256 tokens have no room for their question.
    """
    shorter = (length * eighths // 8 for eighths in (2, 3, 4, 6))
    return [n for n in shorter if n >= 256]


def fingerprint(model: PreTrainedModel, *rest: Any) -> str:
    """Changes whenever results would; of each weight tensor it looks at 64 values."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    made_of = hashlib.sha256(json.dumps([config, rest], default=str).encode())
    for weights in model.parameters():
        values = weights.detach().flatten()
        some = values[:: max(1, len(values) // 64)].float()
        made_of.update(some.numpy().tobytes())
    return made_of.hexdigest()


@torch.inference_mode()
def evaluate(
    loaded: Loaded,
    *,
    targets: Sequence[float],
    length: int,
    texts: Mapping[str, str],
    needles: int = 0,
    tasks: Sequence[str] = (),
    limit: int = 10,
    compare_paper: bool = False,
    other_lengths: Sequence[int] = (),
    length_prompts: int = 1,
    every: int = 1,
    methods: Mapping[str, Method] | None = None,
    with_calibrated: bool = True,
    out: Path,
    progress: Progress | None = None,
) -> Results:
    """Measure a calibrated model at several target sparsities.

    Args:
        loaded: the model, calibrated (or with a `sparse_attention_config` from elsewhere).
        targets: shares of the tiles to skip, of prefill and of decode; 0: dense.
        length: tokens of every prompt and text.
        texts: for perplexity and agreement with dense, by name.
        needles: prompts with a fact to find.
        tasks: names of lm-eval tasks.
        limit: documents of each task.
        compare_paper: measure texts under the paper's scheme too.
        other_lengths: where only sparsity is measured.
        length_prompts: prompts at each of these, of one kind after the other.
        every: compare texts with dense at every so many positions.
        methods: other sparse methods to compare, by name: see `methods.make_methods`.
        with_calibrated: measure the calibrated thresholds alone, too.
        out: folder; results.jsonl in it is continued if it is there.
        progress: told what is being done: see `blasst.progress`.

    Raises:
        ValueError: no calibration, a target outside 0 to 1, a text or context too short.
    """
    evaluation = _Evaluation(
        loaded,
        targets,
        length,
        compare_paper,
        every,
        methods or {},
        with_calibrated,
        out,
        progress,
    )
    return evaluation.run(texts, needles, tasks, limit, other_lengths, length_prompts)


class _Evaluation:
    """One evaluation, piece by piece."""

    def __init__(
        self,
        loaded: Loaded,
        targets: Sequence[float],
        length: int,
        compare_paper: bool,
        every: int,
        methods: Mapping[str, Method],
        with_calibrated: bool,
        out: Path,
        progress: Progress | None,
    ) -> None:
        self.loaded, self.length, self.every = loaded, length, every
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.progress = progress or silent
        check_length(self.model, length, "a prompt")
        entry = getattr(self.model.config, "sparse_attention_config", None)
        calibrated = with_calibrated or any(m.needs_calibration for m in methods.values())
        if entry is None and any(targets) and calibrated:
            raise ValueError(
                f"{loaded.title} has no sparse_attention_config: calibrate it first "
                "(python -m blasst calibrate)"
            )
        for target in targets:
            if not 0 <= target <= 1:
                raise ValueError(f"target sparsity is {target}; it must be 0 to 1")
        self.config: SparseAttention | None = parse(entry) if entry is not None else None
        self.methods = methods
        made = [length, every, made_by(methods)] if methods else [length, every]
        self.results = Results(out / "results.jsonl", fingerprint(self.model, *made))
        self.settings = [Setting(DENSE, 0.0)]
        schemes = [CALIBRATED] * with_calibrated + list(methods)
        self.settings += [Setting(scheme, t) for scheme in schemes for t in targets if t]
        self.text_settings = list(self.settings)
        if compare_paper and with_calibrated and self.config and self.config.measured:
            self.text_settings += [Setting(PAPER, t) for t in targets if t]
        self.layers = sparse_layers(self.model, self.config)

    def run(
        self,
        texts: Mapping[str, str],
        needles: int,
        tasks: Sequence[str],
        limit: int,
        other_lengths: Sequence[int],
        length_prompts: int,
    ) -> Results:
        # Made first: what is too short or too long is found before hours of work.
        tokens = {
            name: text_tokens(self.tokenizer, text, self.length, name)
            for name, text in texts.items()
        }
        for length in other_lengths:
            check_length(self.model, length, "a prompt")
            for index in range(length_prompts):
                self._any_prompt(index, length)
        self._check_unchanged(tokens)
        try:
            self._time_sdpa()
            if tokens:
                self._texts(tokens)
            if needles:
                self._needles(needles)
            if other_lengths:
                self._lengths(other_lengths, length_prompts)
            if tasks:
                self._tasks(tasks, limit)
        finally:
            if self.config:
                self.model.config.sparse_attention_config = self.config.to_dict()
        return self.results

    @contextmanager
    def _set(self, setting: Setting) -> Iterator[Recording]:
        """The model runs as the setting says, and is recorded."""
        self.model.config.__dict__.pop("sparse_attention_config", None)
        if setting.scheme in self.methods:
            method = self.methods[setting.scheme]
            with (
                method.applied(self.model, self.config, setting.target, self.length),
                record() as recording,
            ):
                yield recording
            return
        if setting.scheme != DENSE:
            config = self.config.with_targets(
                **dict.fromkeys(self.config.target_sparsity, setting.target)
            )
            if setting.scheme == PAPER:
                config = config.under_the_law()
            self.model.config.sparse_attention_config = config.to_dict()
        with record() as recording:
            yield recording

    def sparsity(self, setting: Setting, recording: Recording, length: int) -> float:
        """Share of a prefill's tiles that were dropped; of a method's, those never visited too."""
        if setting.scheme in self.methods:
            return saved_tiles(recording, self.model, length)
        return recording.sparsity("prefill", self.layers)

    def _time_sdpa(self) -> None:
        if self.results.get("sdpa") is not None:
            return
        self.progress("Timing torch sdpa", 0.0, "")
        tokens = self._needle(0).tokens
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")
        try:
            _, seconds = self._prefill(tokens, warm=True)
        finally:
            self.model.set_attn_implementation(before)
        self.results.put({"prefill_seconds": seconds}, "sdpa")
        self.progress("Timing torch sdpa", 1.0, "")

    def _prefill(self, tokens: Tensor, warm: bool = False) -> tuple[Tensor, float]:
        """[length, hidden] last hidden states, and seconds."""
        if warm:
            read(self.model, tokens[:, :256])
        start = time.perf_counter()
        hidden = read(self.model, tokens)[0]
        return hidden, time.perf_counter() - start

    # Perplexity and agreement

    def _check_unchanged(self, texts: Mapping[str, Tensor]) -> None:
        """An error if a text of this name was another when results of it were kept."""
        for name, tokens in texts.items():
            digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
            known = self.results.get("read", name)
            if known is None:
                self.results.put(digest, "read", name)
            elif known != digest:
                raise ValueError(
                    f"{name} has changed since the results that are kept; choose another folder"
                )

    def _texts(self, texts: Mapping[str, Tensor]) -> None:
        work = [(name, s) for name in texts for s in self.text_settings]
        done, dense = 0, None
        for name, tokens in texts.items():
            missing = [
                s for s in self.text_settings if self.results.get("text", name, *key(s)) is None
            ]
            if missing and missing[0].scheme != DENSE:
                missing.insert(0, Setting(DENSE, 0.0))
            for setting in missing:
                self.progress("Perplexity", done / len(work), f"{name}, {setting.name}")
                with self._set(setting) as recording:
                    hidden, seconds = self._prefill(tokens)
                if setting.scheme == DENSE:
                    dense = None  # the last text's may be large: not both at once
                    dense = DenseRun(self.model, hidden, tokens[0], every=self.every)
                found = dense.compare(hidden)
                self.results.put(
                    {
                        "kl": found.kl,
                        "top1": found.top1,
                        "perplexity": found.perplexity,
                        "dense_perplexity": found.dense_perplexity,
                        "sparsity": self.sparsity(setting, recording, tokens.shape[1]),
                        "by_head": [
                            [round(s, 4) for s in layer[:heads]]
                            for layer, heads in zip(
                                recording.by_head("prefill").tolist(),
                                recording.heads("prefill"),
                                strict=True,
                            )
                        ],
                        "prefill_seconds": seconds,
                    },
                    "text",
                    name,
                    *key(setting),
                )
                done += 1
            done = (list(texts).index(name) + 1) * len(self.text_settings)
        self.progress("Perplexity", 1.0, "")

    # Needles

    @cached_property
    def _maker(self) -> PromptMaker:
        return PromptMaker(self.tokenizer, reference_text(), "the reference text")

    def _needle(self, index: int) -> Prompt:
        return self._maker.make("needle", self.length - ANSWER_TOKENS, NEEDLE_SEED + index)

    def _any_prompt(self, index: int, length: int) -> Prompt:
        return self._maker.make(KINDS[index % len(KINDS)], length, NEEDLE_SEED + index)

    def _needles(self, count: int) -> None:
        work = [(i, s) for i in range(count) for s in self.settings]
        for done, (index, setting) in enumerate(work):
            if self.results.get("needle", index, *key(setting)) is not None:
                continue
            self.progress("Needles", done / len(work), f"{index + 1}, {setting.name}")
            prompt = self._needle(index)
            with self._set(setting) as recording:
                answer = generate(self.model, self.tokenizer, prompt.tokens, ANSWER_TOKENS)
            self.results.put(
                {
                    "question": prompt.question,
                    "expected": list(prompt.answers),
                    "answer": answer.text,
                    "right": prompt.is_answered_by(answer.text),
                    "prefill_seconds": answer.prefill_seconds,
                    "decode_seconds": answer.decode_seconds,
                    "sparsity": self.sparsity(setting, recording, prompt.tokens.shape[1]),
                    "decode_sparsity": recording.sparsity("decode", self.layers),
                },
                "needle",
                index,
                *key(setting),
            )
        self.progress("Needles", 1.0, "")

    # Sparsity by length

    def _lengths(self, lengths: Sequence[int], prompts: int) -> None:
        work = [
            (length, index, setting)
            for length in lengths
            for index in range(prompts)
            for setting in self.settings[1:]
        ]
        for done, (length, index, setting) in enumerate(work):
            if self.results.get("length", length, index, *key(setting)) is not None:
                continue
            what = f"{length} tokens, {setting.name}"
            self.progress("Other lengths", done / len(work), what)
            tokens = self._any_prompt(index, length).tokens
            with self._set(setting) as recording:
                self._prefill(tokens)
            sparsity = self.sparsity(setting, recording, length)
            self.results.put(sparsity, "length", length, index, *key(setting))
        self.progress("Other lengths", 1.0, "")

    # lm-eval

    def _tasks(self, tasks: Sequence[str], limit: int) -> None:
        from blasst.evaluation.lm_eval import run_task

        work = [(task, s) for task in tasks for s in self.settings]
        for done, (task, setting) in enumerate(work):
            with self._set(setting):
                run_task(self, task, setting, limit, done / len(work), 1 / len(work))
        self.progress("Tasks", 1.0, "")


def key(setting: Setting) -> tuple[str, float]:
    """A setting's part of a result's key."""
    return setting.scheme, setting.target


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    prefill_seconds: float
    decode_seconds: float
    """A token."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    most: int,
    until: Sequence[str] = (),
) -> Answer:
    """Answer a prompt greedily with at most `most` tokens.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tokens: [1, length] the prompt.
        most: tokens of the answer.
        until: texts that end it.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    head = model.get_output_embeddings()
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    hidden = read(model, tokens, cache)
    answer = [head(hidden[:, -1]).argmax(-1)]
    prefilled = time.perf_counter()
    text = ""
    while len(answer) < most and answer[-1].item() not in ends:
        hidden = read(model, answer[-1][:, None], cache)
        answer.append(head(hidden[:, -1]).argmax(-1))
        if until:
            text = tokenizer.decode(torch.cat(answer), skip_special_tokens=True)
            if any(end in text for end in until):
                break
    seconds = (time.perf_counter() - prefilled) / max(1, len(answer) - 1)
    text = tokenizer.decode(torch.cat(answer), skip_special_tokens=True)
    for end in until:
        text = text.split(end)[0]
    return Answer(text.strip(), prefilled - start, seconds)


@dataclass(frozen=True)
class Row:
    """One setting's means over the texts, with the standard error of each mean."""

    setting: Setting
    texts: int
    sparsity: tuple[float, float]
    perplexity_change: tuple[float, float]
    """Perplexity over dense perplexity - 1."""
    top1: tuple[float, float]
    kl: tuple[float, float]
    prefill_seconds: float


def rows(results: Results) -> list[Row]:
    """The table of perplexity and agreement, in the order in which the settings were run."""
    by_setting: dict[Setting, list[dict[str, Any]]] = {}
    for (_, scheme, target), value in results.all("text"):
        by_setting.setdefault(Setting(scheme, target), []).append(value)
    return [
        Row(
            setting,
            len(values),
            mean_and_error([v["sparsity"] for v in values]),
            mean_and_error([v["perplexity"] / v["dense_perplexity"] - 1 for v in values]),
            mean_and_error([v["top1"] for v in values]),
            mean_and_error([v["kl"] for v in values]),
            statistics.fmean(v["prefill_seconds"] for v in values),
        )
        for setting, values in by_setting.items()
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error
