"""How long work tells what it is doing."""

from collections.abc import Callable

Progress = Callable[[str, float, str], None]
"""Called with the step, the share of it, 0 to 1, that is done, and what is being done now."""


def silent(step: str, share: float, what: str) -> None:
    """A `Progress` that tells nobody."""
