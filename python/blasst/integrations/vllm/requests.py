"""What requests bring along: thresholds of their own, and how long their prompts are."""

from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from blasst.config import PHASES
from blasst.integrations.vllm.options import REQUESTS, is_asked_for, thresholds_of_request

try:  # vLLM 0.32: another interface for the other of its two model runners
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor
except ImportError:
    SlotProcessor = object


class Requests(LogitsProcessor, SlotProcessor):
    """For `--logits-processors`: hears of each request, and leaves its logits alone.

    vLLM tells no attention backend what a request asked for; logits processors it does.
    """

    _newest: "Requests | None" = None

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        """Args: what vLLM's two model runners pass, which blasst does not need.

        Raises:
            ValueError: the engine has another attention, which would leave thresholds unread.
        """
        if not is_asked_for(vllm_config.attention_config):
            raise ValueError(
                f"--logits-processors {REQUESTS} without --attention-backend CUSTOM: nothing would "
                "read the thresholds of requests"
            )
        most = vllm_config.scheduler_config.max_num_seqs
        self._model = vllm_config.model_config
        self.prompt_lengths = np.zeros(most, np.int32)
        """[slots] tokens of the prompt, 0: not known."""
        self.thresholds = {phase: np.full(most, np.nan, np.float32) for phase in PHASES}
        """[slots] by phase; NaN: the request asked for none."""
        self._prompt_len = getattr(runner[0], "prompt_len", None) if runner else None
        Requests._newest = self

    @property
    def has_slots(self) -> bool:
        """Whether requests keep a slot while rows change, as in the newer model runner."""
        return self._prompt_len is not None

    @classmethod
    def of(cls, vllm_config: Any) -> "Requests | None":
        """The one of this engine; None: it was started without."""
        found = cls._newest
        return found if found and found._model is vllm_config.model_config else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """A ValueError if a request's thresholds are out of range."""
        thresholds_of_request(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """Logits stay what they are."""
        return True

    def apply(self, logits: Any, context: Any = None) -> Any:
        """Logits stay what they are."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Requests come, go and move from row to row; rows are slots here."""
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._set(slot, 0, {})
        for slot, params, prompt, _ in batch_update.added:
            self._set(slot, len(prompt or ()), thresholds_of_request(params.extra_args))
        for a, b, direction in batch_update.moved:
            for values in (self.prompt_lengths, *self.thresholds.values()):
                values[b], values[a] = values[a], values[b]
            if direction == MoveDirectionality.UNIDIRECTIONAL:
                self._set(a, 0, {})

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request gets a slot, in the other model runner; False: nothing to do for its logits."""
        length = 0 if self._prompt_len is None else int(self._prompt_len.np[req_idx])
        self._set(req_idx, length, thresholds_of_request(sampling_params.extra_args))
        return False

    def _set(self, slot: int, prompt_length: int, thresholds: dict[str, float]) -> None:
        self.prompt_lengths[slot] = prompt_length
        for phase, values in self.thresholds.items():
            values[slot] = thresholds.get(phase, np.nan)
