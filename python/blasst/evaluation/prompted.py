"""Prompts of our own: facts to find, and sparsity at other lengths."""

from blasst.evaluation.answers import answer
from blasst.evaluation.session import ANSWER_TOKENS, Session


def measure_needles(session: Session) -> None:
    """Ask for one fact in each prompt, in every setting."""
    work = [(i, s) for i in range(session.options.needles) for s in session.settings]
    for done, (index, setting) in enumerate(work):
        if session.results.get("needle", index, *setting.key) is not None:
            continue
        session.progress("Needles", done / len(work), f"{index + 1}, {setting.name}")
        prompt = session.needle(index)
        with session.applied(setting) as recording:
            found = answer(
                session.model,
                session.tokenizer,
                prompt.tokens,
                ANSWER_TOKENS,
                session.options.chunk,
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
            "needle",
            index,
            *setting.key,
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
