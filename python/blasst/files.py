"""Files of results: whether they will find a place, writing them whole, reading them again."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

ROOM = 32 << 20
"""Bytes: more than tables, reports and plots take."""


def check_folder(folder: Path, needed: int = ROOM) -> None:
    """An error if files of so many bytes cannot be written into a folder, which may not exist yet.

    Raises:
        ValueError: no folder, no right to write, or too little room; the message says which.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; a folder is needed there")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written into {there}: {error.strerror}") from None
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{there} is on a disk with {free / 1e6:,.0f} MB free; results may take "
            f"{needed / 1e6:,.0f} MB"
        )


def check_file(file: Path, load: Callable[[Path], object]) -> None:
    """An error if results cannot be written into this file: see `check_folder`.

    Only a file that `load` reads, older results, would be replaced.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder; a file is needed there")
    check_folder(file.parent)
    if file.exists():
        try:
            load(file)
        except ValueError as error:
            raise ValueError(f"{file} exists and is not replaced: {error}") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file of ours, open.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, working = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(working, 0o644)
        os.replace(working, path)
    except BaseException:
        Path(working).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """`value` as JSON, whole or not at all."""
    replace_file(path, json.dumps(value, indent=2) + "\n")
