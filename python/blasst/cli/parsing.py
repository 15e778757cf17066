"""What an option makes of its text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from typer import BadParameter

DEVICES = ("cpu", "cuda")
"""As in `ops.library`, which would load torch."""
NONE = "none"
"""What an option that takes several values takes where there shall be none."""
T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """A number in a range; an error says what is allowed."""

    kind: type[int] | type[float]
    allowed: str
    is_allowed: Callable[[float], bool]

    def __call__(self, text: str) -> float | str:
        """The number; `NONE` as it is."""
        if text == NONE:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan  # in no range
        if not self.is_allowed(value):
            raise BadParameter(f"{text!r} is not {self.allowed}")
        return value


POSITIVE = Number(int, "a whole number of 1 or more", lambda n: n >= 1)
COUNT = Number(int, "a whole number of 0 or more", lambda n: n >= 0)
FRACTION = Number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
RATE = Number(float, "a number between 0 and 1", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> str:
        """The name; `NONE` as it is."""
        if text not in (*self.names, NONE):
            raise BadParameter(f"{text!r} is not one of {', '.join(self.names)}")
        return text


def shape(text: str) -> tuple[int, int] | str:
    """Query rows and keys, as in 64x128, or a device."""
    if text in DEVICES:
        return text
    rows, x, keys = text.lower().partition("x")
    if not x or not (rows.isdecimal() and keys.isdecimal() and int(rows) and int(keys)):
        raise BadParameter(
            f"{text!r} is neither ROWSxKEYS, like 64x128, nor a device: {', '.join(DEVICES)}"
        )
    return int(rows), int(keys)


def several(given: Sequence[T] | None) -> list[T] | None:
    """The values of an option that takes several; None if it was not given."""
    return None if given is None else [value for value in given if value != NONE]


def spread(arguments: Sequence[str], many: set[str]) -> list[str]:
    """`--lengths 1 2` as `--lengths 1 --lengths 2`, and `--lengths` alone as `--lengths none`.

    Args:
        arguments: of a command.
        many: its options that take several values.
    """
    found: list[str] = []
    option, count = None, 0
    for argument in [*arguments, "--"]:
        if option is not None and not argument.startswith("--"):
            found += [option, argument]
            count += 1
            continue
        if option is not None and not count:
            found += [option, NONE]
        option, count = (argument, 0) if argument in many else (None, 0)
        if option is None:
            found.append(argument)
    return found[:-1]
