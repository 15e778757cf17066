"""Looks at each request before its engine does.

vLLM ignores what it does not know in `extra_args`, and its prefix cache does not know that keys and
values depend on the thresholds that they were computed with.
"""

from collections.abc import Sequence
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from blasst.integrations.vllm.options import REQUEST_KEYS, REQUESTS, passes_requests_on


def watch() -> None:
    """From now on; may be called again."""
    before = InputProcessor.process_inputs
    if hasattr(before, "blasst_looks"):
        return

    @wraps(before)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        asked = {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, SamplingParams):
                asked = _asked(value)
        _check(asked, self.vllm_config.model_config.logits_processors)
        request = before(self, *args, **kwargs)
        if asked:  # shares its prefix with requests of the same thresholds only
            salt = [request.cache_salt] if request.cache_salt else []
            request.cache_salt = " ".join([*salt, *(f"{k}={asked[k]}" for k in sorted(asked))])
        return request

    process_inputs.blasst_looks = True
    InputProcessor.process_inputs = process_inputs


def _asked(params: SamplingParams) -> dict[str, Any]:
    return {k: v for k, v in (params.extra_args or {}).items() if str(k).startswith("blasst")}


def _check(asked: dict[str, Any], processors: Sequence[str | type] | None) -> None:
    """An error if thresholds are asked for and no `Requests` would pass them on."""
    if not asked or passes_requests_on(processors):
        return
    raise VLLMValidationError(
        f"extra_args has {', '.join(asked)}, but the engine was started without "
        f"--logits-processors {REQUESTS}, which passes {' and '.join(REQUEST_KEYS.values())} on"
    )
