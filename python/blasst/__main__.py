"""Command line: `python -m blasst`."""

from typing import Annotated

import typer

from blasst.huggingface import Threshold

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Long-context attention made sparse by softmax thresholding."""


@app.command()
def demo(
    length: Annotated[int, typer.Option(min=512, max=8000, help="Tokens in the prompt.")] = 4000,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Of prefill.")] = 0.03,
    decode_threshold: Annotated[float, typer.Option(min=0, max=1, help="Of decode.")] = 0.003,
) -> None:
    """Let a small model answer a long prompt, densely and sparsely, and compare."""
    from blasst import demo as demonstration

    demonstration.demo(length, Threshold(threshold), Threshold(decode_threshold))


if __name__ == "__main__":
    app()
