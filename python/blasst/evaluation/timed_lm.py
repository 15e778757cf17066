"""lm-eval's language model over Transformers, that takes the time of what it generates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blasst.evaluation.clock import Clock


class TimedLM(HFLM):
    """Generates for one request at a time."""

    _timed: list[tuple[Tensor, Clock]]

    @contextmanager
    def timed(self) -> Iterator[list[tuple[Tensor, Clock]]]:
        """What is generated inside: [1, length] tokens of each prompt, and its clock."""
        self._timed = []
        yield self._timed

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        clock = Clock(context.device)
        self._timed.append((context, clock))
        return super()._model_generate(context, *args, **kwargs, streamer=clock)


def make_timed_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TimedLM:
    """A model of lm-eval's over one that is loaded."""
    return TimedLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(model.device))
