"""Prompts of our own: facts to find, and sparsity at other lengths."""

from blasst.evaluation.answers import answer
from blasst.evaluation.session import ANSWER_TOKENS, Session
from blasst.prompts import Prompt


def depth_of(index: int, needles: int) -> float:
    """Of the needle of this number among so many, as a share of the text: evenly spread."""
    return round((index + 0.5) / needles, 3)


def needle_prompt(session: Session, length: int, index: int) -> Prompt:
    """The prompt of this number; with its answer it has so many tokens."""
    depth = depth_of(index, session.options.needles)
    return session.prompt("needle", length - ANSWER_TOKENS, index, depth)


def measure_needles(session: Session) -> None:
    """Ask for one fact in each prompt, by length and depth, in every setting."""
    options = session.options
    work = [
        (length, index, setting)
        for length in options.needle_lengths or [options.length]
        for index in range(options.needles)
        for setting in session.prompt_settings
    ]
    for done, (length, index, setting) in enumerate(work):
        key = "needle", length, depth_of(index, options.needles), *setting.key
        if session.results.get(*key) is not None:
            continue
        what = f"{index + 1} of {options.needles} at {length} tokens, {setting.name}"
        session.progress("Needles", done / len(work), what)
        prompt = needle_prompt(session, length, index)
        with session.applied(setting) as recording:
            found = answer(
                session.model, session.tokenizer, prompt.tokens, ANSWER_TOKENS, options.chunk
            )
        session.results.put(
            {
                "question": prompt.question,
                "expected": list(prompt.answers),
                "answer": found.text,
                "right": prompt.is_answered_by(found.text),
                "prefill_seconds": found.times.prefill,
                "decode_seconds": found.times.decode,
                "sparsity": session.sparsity(setting, recording, prompt.tokens.shape[1]),
                "decode_sparsity": recording.sparsity("decode", session.layers),
            },
            *key,
        )
    session.progress("Needles", 1.0, "")


def measure_lengths(session: Session) -> None:
    """Sparsity of prompts of other lengths, in every setting that skips something."""
    options = session.options
    work = [
        (length, index, setting)
        for length in options.other_lengths
        for index in range(options.length_prompts)
        for setting in session.settings
        if setting.target
    ]
    for done, (length, index, setting) in enumerate(work):
        if session.results.get("length", length, index, *setting.key) is not None:
            continue
        session.progress("Other lengths", done / len(work), f"{length} tokens, {setting.name}")
        tokens = session.any_prompt(index, length).tokens
        with session.applied(setting) as recording:
            session.prefill(tokens)
        sparsity = session.sparsity(setting, recording, length)
        session.results.put(sparsity, "length", length, index, *setting.key)
    session.progress("Other lengths", 1.0, "")
