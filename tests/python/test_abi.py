"""_ops.so may use the stable C interface of torch and nothing else of torch or Python."""

import re
import subprocess
from pathlib import Path

import torch

import blasst


def undefined_symbols() -> list[str]:
    library = Path(blasst.__file__).with_name("_ops.so")
    nm = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in nm.stdout.splitlines()]


def test_only_stable_symbols_of_torch_and_none_of_python():
    symbols = undefined_symbols()
    stable = [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert len(stable) > 20
    # Mangled names start with _Z; c10, at and torch are torch's C++ namespaces.
    foreign = re.compile(r"_Z.*?(3c10|2at|5torch)|_?Py|THP")
    assert [name for name in symbols if foreign.match(name)] == []
    # The rest: libc, libm, libstdc++, the linker's own.
    known = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_?[0-9.]+|_Z.*St|_ITM_|__gmon|__cxa")
    assert [name for name in symbols if name not in stable and not known.match(name)] == []


def test_no_symbol_of_a_torch_newer_than_2_10():
    headers = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    newer = set()
    guard = None
    for line in headers.read_text().splitlines():
        if match := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line):
            guard = tuple(map(int, match.groups()))
        elif line.startswith("#endif // TORCH_FEATURE_VERSION"):
            guard = None
        elif guard and guard > (2, 10):
            newer.update(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    assert newer, "the header's guards were not understood"
    assert newer.isdisjoint(undefined_symbols())
