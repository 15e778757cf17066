"""Perplexity, and agreement with dense, on texts."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from blasst.evaluation.bounds import RowBounds
from blasst.evaluation.kept_tiles import AtThresholds, KeptByThreshold, KeptTiles
from blasst.evaluation.session import Session
from blasst.evaluation.settings import DENSELY, Scheme, Setting
from blasst.heads import heads_by_layer, query_size, value_size
from blasst.hf import Recording, recording_with
from blasst.hf.operator import calling, current
from blasst.measure.agreement import Agreement, DenseRun

SHOWN = 2048
"""Tokens of a text that a report shows: its last, which see the most keys."""
MOST_TOKENS = 4096
"""Of a text whose tiles are shown at any threshold: every call is made again for each."""


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
            is_shown = setting.target > 0 and setting.scheme in (Scheme.CALIBRATED, Scheme.INT8)
            tiles = _tiles(session, tokens.shape[1]) if is_shown and index == 0 else None
            with (
                session.applied(setting, bounds) as recording,
                recording_with(tiles) if tiles else nullcontext(),
            ):
                hidden, _ = session.prefill(tokens)
            if dense is None:
                dense = DenseRun(session.model, hidden, tokens[0], every=session.options.every)
            agreement = dense.compare(hidden)
            found = _found(agreement, recording)
            found["sparsity"] = session.sparsity(setting, recording, tokens.shape[1])
            if bounds:
                found["bound"] = bounds.summary(tokens[0], session.tokenizer)
            if is_shown:
                found["cost"] = shown_costs(agreement.cost, session.options.every, len(tokens[0]))
            if tiles:
                shown = tiles.packed() | {"thresholds": session.thresholds(setting, len(tokens[0]))}
                session.results.put(shown, "tiles", name, *setting.key)
            session.results.put(found, "text", name, *setting.key)
            done += 1
        if index == 0:
            _measure_thresholds(session, name, tokens[:, :MOST_TOKENS])
        if missing:
            session.results.put(shown_pieces(tokens[0], session.tokenizer), "pieces", name)
    session.progress("Perplexity", 1.0, "")


def _tiles(session: Session, length: int, kind: type[KeptTiles] = KeptTiles) -> KeptTiles:
    """For the tiles of the layers that are sparse."""
    config = session.model.config.get_text_config()
    heads, larger = heads_by_layer(config), query_size(config) - value_size(config)
    return kind(session.layers, length, sum(heads[layer] for layer in session.layers), larger)


def _measure_thresholds(session: Session, name: str, tokens: Tensor) -> None:
    """Which tiles thresholds keep that are the same for all heads, of a text's first tokens."""
    if not session.options.with_calibrated or session.results.get("thresholds", name):
        return
    session.progress("Thresholds", 0.0, name)
    tiles = _tiles(session, tokens.shape[1], KeptByThreshold)
    with session.applied(DENSELY, tiles), calling(AtThresholds(current())):
        session.prefill(tokens)
    session.results.put(tiles.packed(), "thresholds", name)
    session.progress("Thresholds", 1.0, "")


def shown_costs(cost: Tensor, every: int, length: int) -> list[float | None]:
    """Of the last SHOWN tokens of a text: what each costs more than after dense, in nats.

    Args:
        cost: [positions] of the tokens that follow them.
        every: compared positions are so far apart; other tokens have no cost.
        length: tokens of the text.
    """
    by_token: list[float | None] = [None] * length
    by_token[1::every] = [round(value, 2) for value in cost.tolist()]
    return by_token[-SHOWN:]


def shown_pieces(tokens: Tensor, tokenizer: Any) -> list[str]:
    """The last SHOWN tokens of a text, each as it reads."""
    return [tokenizer.decode([token]) for token in tokens[-SHOWN:].tolist()]


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
