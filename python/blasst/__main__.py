"""`blasst` and `python -m blasst`."""

import sys

from blasst.cli import native


def main() -> int:
    """Run a command; the exit status."""
    if sys.argv[1:2] and sys.argv[1] in native.COMMANDS:
        native.become(sys.argv[1:])
    from blasst.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
