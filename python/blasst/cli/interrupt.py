"""Ctrl-C while `python -m blasst` is still importing, which takes seconds: a line, no traceback."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def quit_at_once() -> None:
    """From now on Ctrl-C ends the process, unless something else was to be done with it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def raise_again() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt, unless `quit_at_once` left it alone."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(_signal: int, _frame: FrameType | None) -> None:
    # An exception would go through import statements, some of which catch what they can.
    sys.stdout.flush()
    os.write(sys.stderr.fileno(), b"\nblasst: stopped\n")
    os._exit(INTERRUPTED)
