"""Evaluation: what a model loses and gains at several target sparsities, next to dense."""

from collections.abc import Mapping
from pathlib import Path

import torch

from blasst.calibration.memory import Reading, check_memory
from blasst.evaluation.options import Options
from blasst.evaluation.prompted import measure_lengths, measure_needles, needle_prompt
from blasst.evaluation.session import Session
from blasst.evaluation.settings import Scheme
from blasst.evaluation.texts import check_unchanged, measure_texts
from blasst.evaluation.timing import measure_times
from blasst.hf.models import Loaded, check_length, unwindowed_layers
from blasst.measure.results import Results
from blasst.methods.registry import Method
from blasst.progress import Progress, silent
from blasst.prompts import text_tokens


@torch.inference_mode()
def evaluate(
    loaded: Loaded,
    options: Options,
    *,
    methods: Mapping[str, Method] | None = None,
    out: Path,
    progress: Progress | None = None,
) -> Results:
    """Measure a calibrated model at several target sparsities.

    Args:
        loaded: the model, calibrated (or with a `sparse_attention_config` from elsewhere).
        options: what is measured.
        methods: other sparse methods to compare, by name: see `methods.make_methods`.
        out: folder; results.jsonl in it is continued if it is there.
        progress: told what is being done: see `blasst.progress`.

    Raises:
        ValueError: no calibration or another model's, a text or context too short, too little
            memory.
    """
    session = Session(loaded, options, methods or {}, out, progress or silent)
    # Made first: what is too short or too long is found before hours of work.
    texts = {
        name: text_tokens(loaded.tokenizer, text, options.length, name)
        for name, text in options.texts.items()
    }
    lengths = {*options.other_lengths, *options.needle_lengths, *options.timed_lengths}
    for length in lengths:
        check_length(loaded.model, length, "a prompt")
    compared = options.length // options.every if texts else None
    readings = [Reading(options.length, compared=compared), *map(Reading, lengths)]
    check_memory(loaded.model, unwindowed_layers(loaded.model), readings, options.chunk)
    for length in options.other_lengths:
        for index in range(options.length_prompts):
            session.any_prompt(index, length)
    for length in options.needle_lengths if options.needles else ():
        needle_prompt(session, length, 0)
    for length in options.timed_lengths:
        session.prompt("needle", length, 0)
    check_unchanged(session, texts)
    try:
        _try_out(session)
        if options.timed_lengths:
            measure_times(session)
        if texts:
            measure_texts(session, texts)
        if options.needles:
            measure_needles(session)
        if options.other_lengths:
            measure_lengths(session)
        if options.tasks:
            from blasst.evaluation.lm_eval import measure_tasks  # it takes seconds to import

            measure_tasks(session)
    finally:
        session.restore()
    return session.results


def _try_out(session: Session) -> None:
    """An error if the thresholds are another model's: two tokens tell."""
    calibrated = (s for s in session.settings if s.target and s.scheme == Scheme.CALIBRATED)
    for setting in calibrated:
        with session.running(setting):
            session.prefill(torch.zeros(1, 2, dtype=torch.int64))
