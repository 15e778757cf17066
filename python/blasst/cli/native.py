"""The commands of the native program that comes with the package."""

import os
import sys
from pathlib import Path
from typing import NoReturn

COMMANDS = ("info", "verify", "bench")
_PROGRAM = Path(__file__).parents[1] / "bin/blasst"


def become(arguments: list[str]) -> NoReturn:
    """Go on as the native program, with these arguments."""
    if not _PROGRAM.exists():
        sys.exit(
            f"blasst: {arguments[0]} is a command of the native program, which this installation "
            "was built without (BLASST_BUILD_TOOLS)"
        )
    os.execv(_PROGRAM, ["blasst", *arguments])
