"""Prefill by length: warm and repeated, of the whole model and of its attention alone."""

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from blasst.calibration.memory import Reading, check_memory
from blasst.evaluation.clock import now
from blasst.evaluation.session import Session
from blasst.evaluation.settings import SDPA, Setting
from blasst.hf import Recording
from blasst.hf.models import unwindowed_layers
from blasst.hf.operator import calling, current

FEW = 128
"""Tokens of a pass that is not timed."""
_log = logging.getLogger("blasst")


class Alone:
    """The operator that layers call, and the time that its calls take by themselves."""

    def __init__(self, device: torch.device) -> None:
        self._operator, self._device = current(), device
        self.tile_of = self._operator.tile_of
        self.seconds = 0.0

    def attention(self, *inputs: Tensor, **options: Any) -> Any:
        """A call, and twice the same on a device that does nothing else: the faster counts."""
        result = self._operator.attention(*inputs, **options)
        at = [now(self._device)]
        for _ in range(2):
            self._operator.attention(*inputs, **options | {"return_stats": False})
            at.append(now(self._device))
        self.seconds += min(after - before for before, after in pairwise(at))
        return result


def measure_times(session: Session) -> None:
    """Repeat a prefill of every timed length, in every setting and with torch's attention.

    The settings take turns, so that a machine that grows slower does so for all of them.
    """
    options = session.options
    for length in options.timed_lengths:
        settings = [SDPA] * _fits_whole(session, length) + session.prompt_settings
        missing = [s for s in settings if session.results.get("time", length, *s.key) is None]
        tokens = session.prompt("needle", length, 0).tokens if missing else None
        found: dict[str, dict[str, Any]] = {}
        step, passes = f"Timing {length} tokens", (1 + options.repeats) * len(missing)
        for done, setting in enumerate(missing):
            session.progress(step, done / passes, f"attention alone, {setting.name}")
            found[setting.name] = {"seconds": [], **_alone(session, setting, tokens)}
        for done in range(len(missing), passes):
            setting = missing[done % len(missing)]
            session.progress(step, done / passes, setting.name)
            with session.running(setting):
                session.prefill(tokens[:, :FEW])  # reads the configuration, as a model does once
                _, seconds = session.prefill(tokens)
            found[setting.name]["seconds"].append(seconds)
        for setting in missing:
            session.results.put(found[setting.name], "time", length, *setting.key)
        session.progress(step, 1.0, "")


def _fits_whole(session: Session, length: int) -> bool:
    """Whether a prompt can be read at once, as torch's attention needs it; says so if not."""
    try:
        check_memory(session.model, unwindowed_layers(session.model), [Reading(length)])
    except ValueError as error:
        _log.warning("%s is not timed at %d tokens: %s", SDPA.name, length, error)
        return False
    return True


def _alone(session: Session, setting: Setting, tokens: Tensor) -> dict[str, Any]:
    """Sparsity, and seconds of the attention calls; it also makes everything warm."""
    if setting == SDPA:
        with session.running(setting):
            session.prefill(tokens)
        return {"sparsity": 0.0}
    operator, recording = Alone(session.model.device), Recording()
    with session.applied(setting, recording), calling(operator):
        session.prefill(tokens)
    sparsity = session.sparsity(setting, recording, tokens.shape[1])
    return {"sparsity": sparsity, "attention": operator.seconds}
