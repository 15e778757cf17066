"""The RULER tasks of lm-eval that need no download, run one document at a time."""

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from blasst.evaluation.runner import Setting, generate, key
from blasst.hf import record

if TYPE_CHECKING:
    from blasst.evaluation.runner import _Evaluation

TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
"""What needs no download; the others read essays or question sets from the network."""


def check_tasks(tasks: list[str]) -> None:
    """An error that names the tasks that cannot be run."""
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"no task {', '.join(unknown)}; choose from {', '.join(TASKS)}")


def load_task(name: str, folder: str, length: int) -> Any:
    """One lm-eval task with prompts of at most `length` tokens of the tokenizer in `folder`."""
    try:
        with _silence(), _seeded():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [length]})
            return manager.load([name])["tasks"][name]
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval: {error}; pip install 'blasst[evaluate]'") from None


def run_task(
    evaluation: "_Evaluation",
    name: str,
    setting: Setting,
    limit: int,
    done: float,
    share: float,
) -> None:
    """Answer and score the first `limit` documents that have no result yet."""
    results, missing = evaluation.results, []
    for index in range(limit):
        if results.get("task", name, index, *key(setting)) is None:
            missing.append(index)
    if not missing:
        return
    tasks: dict[str, Any] = evaluation.__dict__.setdefault("_loaded_tasks", {})
    if name not in tasks:
        evaluation.progress("Tasks", done, f"{name}: making its documents")
        tasks[name] = load_task(name, evaluation.loaded.folder, evaluation.length)
    task = tasks[name]
    documents = list(task.test_docs())[:limit]
    options: Mapping[str, Any] = task.config.generation_kwargs
    for index in missing:
        if index >= len(documents):
            break
        what = f"{name} {index + 1} of {limit}, {setting.name}"
        evaluation.progress("Tasks", done + share * index / limit, what)
        document = documents[index]
        tokens = _prompt(evaluation.tokenizer, task, document)
        with record() as recording:
            answer = generate(
                evaluation.model,
                evaluation.tokenizer,
                tokens,
                options["max_gen_toks"],
                [end for end in options["until"] if end],
            )
        scores = task.process_results(document, [answer.text])
        results.put(
            {
                "score": scores[str(document["max_length"])],
                "answer": answer.text,
                "expected": list(document["outputs"]),
                "prefill_seconds": answer.prefill_seconds,
                "decode_seconds": answer.decode_seconds,
                "sparsity": evaluation.sparsity(setting, recording, tokens.shape[1]),
                "decode_sparsity": recording.sparsity("decode", evaluation.layers),
            },
            "task",
            name,
            index,
            *key(setting),
        )


def _prompt(tokenizer: Any, task: Any, document: Mapping[str, Any]) -> Any:
    """[1, length] tokens: the document as a user's message where the model chats."""
    text = task.doc_to_text(document)
    prefix = document["gen_prefix"]
    if tokenizer.chat_template is None:
        return tokenizer(f"{text} {prefix}", return_tensors="pt").input_ids
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(whole + prefix, add_special_tokens=False, return_tensors="pt").input_ids


@contextlib.contextmanager
def _seeded() -> Any:
    """The same documents in every process: a run that goes on compares what it began with."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _silence() -> Any:
    """Without lm-eval's prints, progress bars and advice."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
