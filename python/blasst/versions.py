"""The versions of Transformers that blasst runs with, and what they call differently."""

import inspect
from functools import cache
from importlib.metadata import version
from typing import Any

LOWEST = "5.6"
"""The oldest that the tests run under."""
CACHE_NAMES = ("cache", "past_key_values")
"""A forward pass calls its cache one of these, the newer versions the first."""


def check_version() -> None:
    """An error if Transformers is older than `LOWEST`.

    Raises:
        ImportError: it is; the message names both versions.
    """
    from packaging.version import Version  # Transformers' own requirement, not torch's

    found = version("transformers")
    if Version(found) < Version(LOWEST):
        raise ImportError(
            f"transformers {found} is installed; blasst needs {LOWEST} or newer: "
            f"pip install 'transformers>={LOWEST}'"
        )


@cache
def cache_name(model_class: type) -> str:
    """What the forward pass of this class calls its cache.

    Others than the one it knows would be passed on and ignored, and the pass would have no cache.

    Raises:
        ValueError: it takes none.
    """
    known = inspect.signature(model_class.forward).parameters
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise ValueError(
        f"{model_class.__name__}.forward takes no cache; it must have one of the arguments "
        f"{' or '.join(CACHE_NAMES)}"
    )


def checkpoint_layers(model: Any, *, wanted: bool) -> None:
    """Turn gradient checkpointing on or off, which newer versions call activation checkpointing."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def sharding_arguments(layers: list[str]) -> dict[str, Any]:
    """TrainingArguments that shard a model (FSDP2) by layers of these classes.

    Weights are read by each process: what one of them trains on may not be sharded (a teacher).
    """
    from transformers import TrainingArguments

    older = not hasattr(TrainingArguments, "_apply_legacy_fsdp_to_config")
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": layers,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    return {"fsdp": "full_shard" if older else True, "fsdp_config": config}
