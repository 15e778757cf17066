"""Usage: fetch_highway.py DIRECTORY.

Puts Highway's sources into DIRECTORY (hwy/, LICENSE). They come from PyPI, where NumPy's source
distribution has them whole, through pip, so with whatever index, proxy and cache pip is set up for.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PINNED = (  # Highway 1.3.0
    "numpy==2.4.6 --hash=sha256:f3a3570c4a2a16746ac2c31a7c7c7b0c186b95ce902e33db6f28094ed7387dda\n"
)
INSIDE = "numpy-2.4.6/numpy/_core/src/highway/"
WANTED = re.compile(r"LICENSE|hwy/(ops/)?[^/]*\.(h|cc)")

# Before pip hands out a source distribution, it asks the package's build backend for its metadata.
# This one answers with what the distribution says of itself; NumPy's own would look for compilers.
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


def main() -> None:
    """Download, check the hash, unpack."""
    to = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "mesonpy.py").write_text(BACKEND)
        (work / "pinned.txt").write_text(PINNED)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        exact = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
        command = [*pip, *exact, "--dest", name, "--requirement", str(work / "pinned.txt")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": name})
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            for member in archive:
                inside = member.name.removeprefix(INSIDE)
                if inside != member.name and WANTED.fullmatch(inside):
                    member.name = inside
                    archive.extract(member, to, filter="data")


if __name__ == "__main__":
    main()
