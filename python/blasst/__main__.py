"""`blasst` and `python -m blasst`."""

import sys

from blasst.cli import native


def main() -> int:
    """Run a command; the exit status."""
    if sys.argv[1:2] and sys.argv[1] in native.COMMANDS:
        native.become(sys.argv[1:])
    try:
        from blasst.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "blasst":
            raise
        sys.exit(
            f"blasst: the commands other than {', '.join(native.COMMANDS)} need the package "
            f"{error.name}: pip install 'blasst[transformers]'"
        )
    return run()


if __name__ == "__main__":
    sys.exit(main())
