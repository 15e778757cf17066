"""Perplexity, and agreement with dense, on texts."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blasst.evaluation.bounds import RowBounds
from blasst.evaluation.session import Session
from blasst.evaluation.settings import DENSELY, Scheme, Setting
from blasst.hf import Recording
from blasst.measure.agreement import Agreement, DenseRun


def check_unchanged(session: Session, texts: Mapping[str, Tensor]) -> None:
    """An error if a text of this name was another when results of it were kept."""
    for name, tokens in texts.items():
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        known = session.results.get("read", name)
        if known is None:
            session.results.put(digest, "read", name)
        elif known != digest:
            raise ValueError(
                f"{name} has changed since the results that are kept; choose another folder"
            )


def measure_texts(session: Session, texts: Mapping[str, Tensor]) -> None:
    """Compare every setting with dense on [1, length] tokens of each text."""
    total = len(texts) * len(session.text_settings)
    for index, (name, tokens) in enumerate(texts.items()):
        missing = [s for s in session.text_settings if not _known(session, name, s)]
        if missing and not missing[0].is_dense:
            missing.insert(0, DENSELY)
        dense = None  # the last text's may be large: not both at once
        done = (index + 1) * len(session.text_settings) - len(missing)
        for setting in missing:
            session.progress("Perplexity", done / total, f"{name}, {setting.name}")
            bounds = RowBounds(session.layers) if _is_bounded(setting) else None
            with session.applied(setting, bounds) as recording:
                hidden, seconds = session.prefill(tokens)
            if bounds and session.model.device.type == "cuda":
                # The kernel that bounds errors is not the one that is timed, nor that will run.
                with session.applied(setting):
                    _, seconds = session.prefill(tokens)
            if dense is None:
                dense = DenseRun(session.model, hidden, tokens[0], every=session.options.every)
            sparsity = session.sparsity(setting, recording, tokens.shape[1])
            found = _found(dense.compare(hidden), recording)
            found |= {"sparsity": sparsity, "prefill_seconds": seconds}
            if bounds:
                found["bound"] = bounds.summary(tokens[0], session.tokenizer)
            session.results.put(found, "text", name, *setting.key)
            done += 1
    session.progress("Perplexity", 1.0, "")


def _known(session: Session, name: str, setting: Setting) -> bool:
    return session.results.get("text", name, *setting.key) is not None


def _is_bounded(setting: Setting) -> bool:
    """Whether tiles are dropped by the test alone, whose bound then says what is missing."""
    return setting.target > 0 and setting.scheme in [*Scheme]


def _found(agreement: Agreement, recording: Recording) -> dict[str, Any]:
    # Layers may differ in their number of heads.
    layers = zip(recording.by_head("prefill").tolist(), recording.heads("prefill"), strict=True)
    return {
        "kl": agreement.kl,
        "top1": agreement.top1,
        "perplexity": agreement.perplexity,
        "dense_perplexity": agreement.dense_perplexity,
        "by_head": [[round(sparsity, 4) for sparsity in layer[:heads]] for layer, heads in layers],
    }
