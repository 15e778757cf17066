"""The command line."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import typer
from typer.main import get_command

import blasst
from blasst.cli import commands, interrupt, native
from blasst.cli.parsing import spread

app = typer.Typer(
    help="Long-context attention made sparse by softmax thresholding.",
    epilog=f"{', '.join(native.COMMANDS)}: commands of the native program; each takes --help.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"blasst {blasst.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
    ),
) -> None:
    pass


def _add(function: Callable[..., None], *, resumes: bool = False) -> None:
    """Make a command; `resumes`: the same command goes on where it was stopped."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        import torch
        import transformers  # noqa: F401, every command needs it; here Ctrl-C still ends the process
        from safetensors import SafetensorError

        from blasst.cli.console import console, log_to_console

        try:
            interrupt.raise_again()
            with log_to_console():
                function(*arguments, **options)
        except KeyboardInterrupt:
            more = "; the same command goes on from there" if resumes else ""
            console.print(f"\nblasst: stopped{more}")
            raise typer.Exit(interrupt.INTERRUPTED) from None
        except (ValueError, OSError, SafetensorError) as error:
            print(f"blasst: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except torch.OutOfMemoryError as error:
            more = "; the same command goes on from what is finished" if resumes else ""
            what = str(error).split(". ")
            print(
                f"blasst: {'. '.join(what[:2])}. A smaller chunk or batch, or fewer tokens, take "
                f"less{more}",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None

    app.command()(run)


_add(commands.calibrate, resumes=True)
_add(commands.evaluate, resumes=True)
_add(commands.finetune, resumes=True)
_add(commands.demo, resumes=True)
_add(commands.bsfa)
_add(commands.chunks, resumes=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = get_command(app).commands.get(given[0]) if given else None
    if command is not None:
        many = {name for option in command.params if option.multiple for name in option.opts}
        given = spread(given, many)
    try:
        app(given, prog_name="blasst")
    except SystemExit as ended:
        return ended.code or 0
    return 0
