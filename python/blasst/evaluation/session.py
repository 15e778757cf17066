"""A model under evaluation: its settings, one after the other, and what was found so far."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blasst.config import SparseAttention
from blasst.config.laws import on_host
from blasst.evaluation.clock import now
from blasst.evaluation.options import Options
from blasst.evaluation.settings import DENSELY, Scheme, Setting
from blasst.heads import query_size, value_size
from blasst.hf import Recording, Threshold, configure, dense_on_purpose, recording_with
from blasst.hf.models import Loaded, check_length, sparse_layers
from blasst.hf.operator import current
from blasst.hf.reading import read
from blasst.hf.saving import calibration_in
from blasst.measure.results import Results, fingerprint
from blasst.methods.registry import Method, made_by, saved_tiles
from blasst.progress import Progress
from blasst.prompts import Prompt, PromptMaker, kind_at

ANSWER_TOKENS = 32
NEEDLE_SEED = 10**5
RESULTS = 2
"""Version of what is kept: results of another are not gone on with."""
_INT8 = Threshold(scores="int8")
_SCHEMES = {"exact": Scheme.CALIBRATED, "int8": Scheme.INT8}


class Session:
    """What the parts of an evaluation share."""

    def __init__(
        self,
        loaded: Loaded,
        options: Options,
        methods: Mapping[str, Method],
        out: Path,
        progress: Progress,
    ) -> None:
        """Check that the model can be evaluated so.

        Raises:
            ValueError: it cannot; the message says why.
        """
        self.loaded, self.options, self.progress = loaded, options, progress
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._methods = methods
        check_length(self.model, options.length, "a prompt")
        self.config: SparseAttention | None = calibration_in(self.model)
        self._check_calibrated()
        made: list[Any] = [RESULTS, options.length, options.every]
        if options.chunk is not None and options.chunk < options.length:
            made.append(options.chunk)
        if methods:
            made.append(made_by(methods))
        self.results = Results(out / "results.jsonl", fingerprint(self.model, *made))
        self.layers = sparse_layers(self.model, self.config)

    def _check_calibrated(self) -> None:
        needed = any(method.needs_calibration for method in self._methods.values())
        needed = (needed or self.options.with_calibrated) and any(self.options.targets)
        if needed and self.config is None:
            raise ValueError(
                f"{self.loaded.title} has no sparse_attention_config: calibrate it first "
                "(python -m blasst calibrate)"
            )

    @cached_property
    def settings(self) -> list[Setting]:
        """What is compared, dense first."""
        options = self.options
        schemes = [_SCHEMES[scores] for scores in self._scores if options.with_calibrated]
        alone = [Setting(Scheme.INT8, 0.0)] if Scheme.INT8 in schemes else []
        targets = [target for target in options.targets if target]
        schemes += list(self._methods)
        return [DENSELY, *alone, *(Setting(scheme, t) for scheme in schemes for t in targets)]

    @property
    def _scores(self) -> Sequence[str]:
        """Of prefill, under the calibrated thresholds."""
        if self.options.scores is not None:
            return self.options.scores
        prefill = self.config.measured.get("prefill") if self.config else None
        return ["exact" if prefill is None else prefill.scores]

    @property
    def prompt_settings(self) -> list[Setting]:
        """What is timed, and asked for facts."""
        wanted = self.options.prompt_targets
        return [s for s in self.settings if wanted is None or not s.target or s.target in wanted]

    @property
    def text_settings(self) -> list[Setting]:
        """What is compared on texts: the paper's scheme too, if that is asked for."""
        options = self.options
        measured = self.config.measured if self.config else {}
        if not (options.with_calibrated and measured):
            return self.settings
        return self.settings + [Setting(Scheme.PAPER, t) for t in options.paper_targets]

    @contextmanager
    def applied(self, setting: Setting, recording: Recording | None = None) -> Iterator[Recording]:
        """The model runs as the setting says, and is recorded, in this recording or a new one."""
        recording = recording or Recording()
        with self.running(setting), recording_with(recording):
            yield recording

    @contextmanager
    def running(self, setting: Setting) -> Iterator[None]:
        """The model runs as the setting says."""
        self.model.config.__dict__.pop("sparse_attention_config", None)
        if setting.scheme in self._methods:
            method = self._methods[setting.scheme]
            with method.applied(self.model, self.config, setting.target, self.options.length):
                yield
            return
        if setting.scheme == Scheme.SDPA:
            before = self.model.config._attn_implementation
            self.model.set_attn_implementation("sdpa")
            try:
                yield
            finally:
                self.model.set_attn_implementation(before)
            return
        int8 = setting.scheme == Scheme.INT8
        if not setting.is_dense and self.config is not None:
            phases = dict.fromkeys(self.config.target_sparsity, setting.target)
            config = self.config.with_targets(**phases)
            if setting.scheme == Scheme.PAPER:
                config = config.under_the_law()
            if int8 or "prefill" in phases:
                config = config.with_scores(prefill="int8" if int8 else "exact")
            self.model.config.sparse_attention_config = config.to_dict()
        uncalibrated = int8 and self.config is None
        configured = configure(self.model, prefill=_INT8) if uncalibrated else nullcontext()
        with configured, dense_on_purpose():
            yield

    def thresholds(self, setting: Setting, length: int) -> tuple[float, float, float]:
        """Lowest, median and highest of a calibrated setting's prefill of so many tokens."""
        config = self.config.with_targets(prefill=setting.target)
        text = self.model.config.get_text_config()
        sizes = query_size(text), value_size(text)
        tile = current().tile_of("prefill", self.model.device, self.model.dtype, *sizes)
        rules = config.rules("prefill", on_host([length], torch.float64), length, tile)
        values = torch.cat([rules.of_layer(layer).flatten() for layer in self.layers])
        return values.min().item(), values.median().item(), values.max().item()

    def restore(self) -> None:
        """The model's configuration is what it was."""
        if self.config:
            self.model.config.sparse_attention_config = self.config.to_dict()

    def sparsity(self, setting: Setting, recording: Recording, length: int) -> float:
        """Share of a prefill's tiles that were dropped; of a method's, those never visited too."""
        if setting.scheme in self._methods:
            return saved_tiles(recording, self.model, length)
        return recording.sparsity("prefill", self.layers)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, float]:
        """[length, hidden] last hidden states of [1, length] tokens, and seconds."""
        # Torch's attention is slow on a part of a prompt, which it needs a whole mask for.
        is_sdpa = self.model.config._attn_implementation == "sdpa"
        began = now(self.model.device)
        hidden = read(self.model, tokens, chunk=None if is_sdpa else self.options.chunk)[0]
        return hidden, now(self.model.device) - began

    @cached_property
    def _maker(self) -> PromptMaker:
        return PromptMaker(self.tokenizer, None)

    def prompt(self, kind: str, length: int, index: int, depth: float | None = None) -> Prompt:
        """A prompt of so many tokens."""
        return self._maker.make(kind, length, NEEDLE_SEED + index, depth)

    def any_prompt(self, index: int, length: int) -> Prompt:
        """A prompt of so many tokens, of one kind after the other."""
        return self.prompt(kind_at(index), length, index)
