"""Evaluation: what a model loses and gains at several target sparsities, next to dense."""

from collections.abc import Mapping
from pathlib import Path

import torch

from blasst.evaluation.options import Options
from blasst.evaluation.prompted import measure_lengths, measure_needles
from blasst.evaluation.session import Session
from blasst.evaluation.texts import check_unchanged, measure_texts
from blasst.hf.models import Loaded, check_length
from blasst.measure.results import Results
from blasst.methods.registry import Method
from blasst.progress import Progress, silent
from blasst.prompts import text_tokens

WARM_UP = 256
"""Tokens that are read before a prefill is timed."""


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
        ValueError: no calibration, a text or context too short.
    """
    session = Session(loaded, options, methods or {}, out, progress or silent)
    # Made first: what is too short or too long is found before hours of work.
    texts = {
        name: text_tokens(loaded.tokenizer, text, options.length, name)
        for name, text in options.texts.items()
    }
    for length in options.other_lengths:
        check_length(loaded.model, length, "a prompt")
        for index in range(options.length_prompts):
            session.any_prompt(index, length)
    check_unchanged(session, texts)
    try:
        _time_sdpa(session)
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


def _time_sdpa(session: Session) -> None:
    """A prefill with torch's attention, for comparison."""
    if session.results.get("sdpa") is not None:
        return
    session.progress("Timing torch sdpa", 0.0, "")
    tokens = session.needle(0).tokens
    before = session.model.config._attn_implementation
    session.model.set_attn_implementation("sdpa")
    try:
        session.prefill(tokens[:, :WARM_UP])
        _, seconds = session.prefill(tokens)
    finally:
        session.model.set_attn_implementation(before)
    session.results.put({"prefill_seconds": seconds}, "sdpa")
    session.progress("Timing torch sdpa", 1.0, "")
