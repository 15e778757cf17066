"""What vLLM's CPU platform finds in the place of its own backends.

It takes those whatever `--attention-backend` says. So each name here is vLLM's backend, unless the
engine that is being built was asked for ours.
"""

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from blasst.errors import NotSupportedError
from blasst.integrations.vllm import CPU_BACKENDS
from blasst.integrations.vllm.backend import CpuBackend
from blasst.integrations.vllm.options import is_asked_for


def _asks_for_blasst() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and is_asked_for(config.attention_config)


def __getattr__(name: str) -> Any:
    if name not in CPU_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _asks_for_blasst():
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if name != "CPU_ATTN":
        raise NotSupportedError(
            "blasst: the model has multi-head latent attention (MLA), which the backend does not do"
        )
    return CpuBackend
