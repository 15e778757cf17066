"""Usage: fetch.py LIBRARY DIRECTORY.

Puts the sources of a C++ library into DIRECTORY, and its licence, as LICENSE. They come from PyPI,
where a package has them whole, through pip, so with whatever index, proxy and cache pip is set up
for.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a library's files are."""

    package: str
    """With its version."""
    sha256: str
    inside: str
    """A pattern of the wanted files' names in it; the last group is the name that a file gets."""
    backend: str = ""
    """Of a source distribution: the package's own build backend. Without: a wheel."""
    header: str = ""
    """The name of the one file, if it has another in the package."""
    licence_in: str = "LICENSE"
    """Which of the files has the licence: alone, or in the comment that it begins with."""


SOURCES = {
    "highway-1.3.0": Source(
        "numpy==2.4.6",
        "f3a3570c4a2a16746ac2c31a7c7c7b0c186b95ce902e33db6f28094ed7387dda",
        r"numpy-2\.4\.6/numpy/_core/src/highway/(LICENSE|hwy/(?:ops/)?[^/]*\.(?:h|cc))",
        backend="mesonpy",
    ),
    "fmt-12.2.0": Source(
        "cmeel-fmt==12.2.0",
        "81f0ea1df41d81bfa097c552bc2adf3a5df49978b91555f7883fd3b89bb7ba61",
        r"cmeel\.prefix/include/(fmt/[^/]*\.h)",
        licence_in="fmt/format.h",
    ),
    "CLI11-2.5.0": Source(
        "highspy==1.16.0",
        "83519368321b1ac0ed508b8562b335928b6fd249e2ab42ff0218491e1486d985",
        r"highspy-1\.16\.0/extern/cli11/(CLI11\.hpp)",
        backend="scikit_build_core.build",
        header="CLI/CLI.hpp",
        licence_in="CLI/CLI.hpp",
    ),
    "nlohmann_json-3.12.0": Source(
        "nlohmann-json==3.12.0",
        "5f6132720fb25d0d70bf0742f8397b49a540dcc193e7312a914f6aa49f054810",
        r"nlohmann_json[^/]*/(?:include|licenses)/(nlohmann/.*\.hpp|LICENSE)",
    ),
}

# Before pip hands out a source distribution, it asks the package's build backend for its metadata.
# This one answers with what the distribution says of itself; the own one would look for compilers.
BACKEND = """
import email, pathlib

def prepare_metadata_for_build_wheel(directory, settings=None):
    text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    package = email.message_from_string(text)
    info = pathlib.Path(directory, f"{package['Name']}-{package['Version']}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(text, encoding="utf-8")
    return info.name
"""


def download(source: Source, work: Path) -> Path:
    """The package's archive, in `work`; its hash is checked."""
    (work / "pinned.txt").write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
    # Only headers are taken from a wheel: one for any machine will do.
    kind = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64"]
    if source.backend:
        kind = ["--no-binary=:all:", "--no-build-isolation"]
        backend = work / f"{source.backend.replace('.', '/')}.py"
        backend.parent.mkdir(exist_ok=True)
        if backend.parent != work:
            (backend.parent / "__init__.py").touch()
        backend.write_text(BACKEND)
    to = work / "archive"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    wanted = ["--no-deps", "--require-hashes", "--requirement", work / "pinned.txt", "--dest", to]
    subprocess.run([*pip, *kind, *wanted], check=True, env={**os.environ, "PYTHONPATH": str(work)})
    return next(to.iterdir())


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            yield from ((name, opened.read(name)) for name in opened.namelist())
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, opened.extractfile(member).read()


def first_comment(header: str) -> str:
    """The text of the comment that a header begins with.

    Raises:
        ValueError: it begins with none.
    """
    if block := re.match(r"\s*/\*(.*?)\*/", header, re.DOTALL):
        return block[1].strip() + "\n"
    if lines := re.match(r"(?://.*\n)+", header):
        return re.sub("^// ?", "", lines[0], flags=re.MULTILINE)
    raise ValueError("a header without a comment at its beginning, where its licence should be")


def main() -> None:
    """Download, check the hash, unpack."""
    source, to = SOURCES[sys.argv[1]], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as work:
        for name, contents in files(download(source, Path(work))):
            if match := re.fullmatch(source.inside, name):
                path = to / (source.header or match[1])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
    if source.licence_in != "LICENSE":
        header = (to / source.licence_in).read_text(encoding="utf-8")
        (to / "LICENSE").write_text(first_comment(header), encoding="utf-8")


if __name__ == "__main__":
    main()
