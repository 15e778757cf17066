"""On what something was measured."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blasst._version import __version__
from blasst.hf.weights import quantisation_of

_PACKAGES = ("torch", "transformers", "lm_eval")
_FOLDER = Path(__file__).parents[1]


def environment(model: nn.Module | None = None) -> dict[str, Any]:
    """The same for a file: versions, commit, device and when.

    Args:
        model: as for `about_run`.
    """
    weight = _weight(model)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "blasst": __version__,
            "python": platform.python_version(),
            **{package: found for package in _PACKAGES if (found := _version_of(package))},
        },
        "commit": _commit(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantised_by": None if model is None else quantisation_of(model),
        "device": _device(weight),
        "machine": platform.platform(),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the source tree that this runs from; None: it was installed."""
    if not (_FOLDER.parents[1] / ".git").exists():
        return None
    try:
        found = subprocess.run(
            [
                "git",
                "-C",
                str(_FOLDER),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's tree
        return None
    return found.stdout.strip()


def _device(weight: torch.Tensor) -> str:
    if weight.device.type == "cuda":
        return torch.cuda.get_device_name(weight.device)
    return f"{torch.get_num_threads()} CPU threads"


def about_run(more: str, model: nn.Module | None = None) -> str:
    """One sentence on the machine, for a report.

    Args:
        more: sentences that follow.
        model: of the measurement, for its type and device; None: float32 on the CPU.
    """
    weight = _weight(model)
    kind = str(weight.dtype).removeprefix("torch.")
    method = None if model is None else quantisation_of(model)
    if method is not None:
        kind = f"Weights quantised by {method}, {kind}"
    return (
        f"{kind} on {_device(weight)}, torch {torch.__version__}. {more} "
        "Sparsity: tiles skipped, of those that the causal mask leaves."
    )


def _weight(model: nn.Module | None) -> torch.Tensor:
    """Of the type and on the device of a measurement: one that is no quantised one."""
    if model is None:
        return torch.empty(0)
    return next(weight for weight in model.parameters() if weight.is_floating_point())
