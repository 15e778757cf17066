"""lm-eval's tasks, through its own runner, one document at a time so that a run can be stopped."""

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from blasst.evaluation.clock import Clock, Times
from blasst.evaluation.session import Session
from blasst.evaluation.settings import Setting
from blasst.hf import Recording

WITHOUT_DOWNLOAD = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
"""Tasks of RULER; the others read essays or question sets from the network."""
MISSING = -1
"""RULER's score for lengths that a document does not have."""


def check_tasks(tasks: Sequence[str]) -> None:
    """An error that names the tasks that lm-eval does not know."""
    if all(task in WITHOUT_DOWNLOAD for task in tasks):
        return
    known = set(_manager("", 0).all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(
            f"no task {', '.join(unknown)}; choose from {', '.join(WITHOUT_DOWNLOAD)}, or from "
            f"lm-eval's other {len(known)} (`lm_eval ls tasks`), which download what they need"
        )


def load_tasks(name: str, folder: str, length: int) -> Any:
    """A task or group, as lm-eval loads it.

    Args:
        name: lm-eval's.
        folder: of the tokenizer that RULER makes its documents with.
        length: the most tokens that these have.
    """
    with _seeded():
        loaded = _manager(folder, length).load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def measure_tasks(session: Session) -> None:
    """Answer and score the first documents of every task, in every setting."""
    from blasst.evaluation.timed_lm import make_timed_lm

    options = session.options
    with _silence():
        lm = make_timed_lm(session.model, session.tokenizer)
    for place, name in enumerate(options.tasks):
        share = place / len(options.tasks)
        session.progress("Tasks", share, f"{name}: making its documents")
        loaded = load_tasks(name, session.loaded.folder, options.length)
        work = [
            (task, setting, index)
            for task in loaded["tasks"]
            for setting in session.settings
            for index in range(min(options.limit, len(loaded["tasks"][task].eval_docs)))
        ]
        for done, (task, setting, index) in enumerate(work):
            if session.results.get("task", task, index, *setting.key) is not None:
                continue
            what = f"{task} {index + 1} of {options.limit}, {setting.name}"
            session.progress("Tasks", share + done / len(work) / len(options.tasks), what)
            one = {"tasks": {task: loaded["tasks"][task]}, "groups": {}}
            with session.applied(setting) as recording, lm.timed() as timed:
                sample = _evaluate(lm, one, task, index)
            found = _found(session, setting, sample, recording, timed)
            session.results.put(found, "task", task, index, *setting.key)
    session.progress("Tasks", 1.0, "")


def _evaluate(lm: Any, tasks: Any, name: str, index: int) -> Mapping[str, Any]:
    """One document, as lm-eval's log of samples has it."""
    from lm_eval.evaluator import evaluate

    with _silence(), _seeded():
        found = evaluate(
            lm,
            tasks,
            samples={name: [index]},
            apply_chat_template=lm.tokenizer.chat_template is not None,
            bootstrap_iters=0,
        )
    return found["samples"][name][0]


def _found(
    session: Session,
    setting: Setting,
    sample: Mapping[str, Any],
    recording: Recording,
    timed: Sequence[tuple[Tensor, Clock]],
) -> dict[str, Any]:
    scores = [sample[metric] for metric in sample["metrics"]]
    [score, *_] = [score for score in scores if score != MISSING]
    found = {
        "score": float(score),
        "answer": str(sample["filtered_resps"][0]),
        "expected": sample["target"],
        "sparsity": recording.sparsity("prefill", session.layers),
        "decode_sparsity": recording.sparsity("decode", session.layers),
    }
    if not timed:  # answers that are ranked, not written
        return found
    [(tokens, clock)] = timed
    times: Times = clock.times
    return found | {
        "sparsity": session.sparsity(setting, recording, tokens.shape[1]),
        "prefill_seconds": times.prefill,
        "decode_seconds": times.decode,
    }


def _manager(folder: str, length: int) -> Any:
    try:
        with _silence():
            from lm_eval.tasks import TaskManager

            return TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [length]})
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval: {error}; pip install 'blasst[evaluate]'") from None


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
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
def _silence() -> Iterator[None]:
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
