"""Options of how a model is loaded, which every command that takes a model has."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from blasst.cli.options import Device, DeviceMap, Dtype, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from blasst.hf.models import Loading

OPTIONS = {
    "device": (Device, None),
    "dtype": (Dtype, "auto"),
    "device_map": (DeviceMap, None),
    "revision": (Revision, None),
    "trust_remote_code": (TrustRemoteCode, False),
}
"""By name: type and default, as typer reads them from a signature."""


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose argument `loading` becomes these options."""

    @wraps(command)
    def run(*arguments: Any, **given: Any) -> None:
        command(
            *arguments, loading=_loading(**{name: given.pop(name) for name in OPTIONS}), **given
        )

    signature = inspect.signature(command)
    kept = [p for name, p in signature.parameters.items() if name != "loading"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*kept, *added])
    run.__annotations__ = {
        **{name: kind for name, kind in command.__annotations__.items() if name != "loading"},
        **{name: kind for name, (kind, _) in OPTIONS.items()},
    }
    del run.__wrapped__  # typer would read the command's own signature
    return run


def _loading(**options: Any) -> "Loading":
    from blasst.hf.models import Loading

    return Loading(**options)
