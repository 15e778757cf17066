"""The wheel: built in one new environment, installed and used in another.

Both borrow the packages of this environment, torch before all, but not the sources.
"""

import os
import re
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def new_environment(folder: Path) -> Path:
    """A virtual environment's `bin`."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # What a .pth in a folder that a .pth names would add is not added: the sources stay out.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        **{"cwd": cwd, "env": ENVIRONMENT, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    settings = {
        # The folder of an earlier run, if there is one: what did not change is not built again.
        "build-dir": ROOT / "build/wheel",
        # Little to compile, in little time.
        "cmake.define.BLASST_CPU_TARGETS": "native",
        "cmake.define.BLASST_CUDA": "off",
        "cmake.define.CMAKE_CXX_FLAGS_RELEASE": "-O1",
    }
    run(
        *(new_environment(folder / "environment") / "python", "-m", "pip", "wheel", ROOT),
        *("--no-deps", "--no-build-isolation", "--wheel-dir", folder),
        *(f"--config-settings={name}={value}" for name, value in settings.items()),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("use")
    programs = new_environment(folder / "environment")
    run(programs / "python", "-m", "pip", "install", "--no-deps", wheel, cwd=folder)
    return programs


def test_one_wheel_for_every_python_with_types_operator_and_command(wheel):
    assert re.fullmatch(r"blasst-[0-9.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("_ops.so", "_version.py", "bin/blasst", "py.typed"):
        assert names.count(f"blasst/{wanted}") == 1


def test_licences_of_what_is_linked_in(wheel):
    opened = zipfile.ZipFile(wheel)
    found = {
        re.fullmatch(r"blasst/licenses/(\w+)-[0-9.]+\.txt", name)[1]: opened.read(name).decode()
        for name in opened.namelist()
        if name.startswith("blasst/licenses/")
    }
    assert found.keys() == {"highway", "fmt", "CLI11", "nlohmann_json"}
    for library, text in found.items():
        assert "Copyright" in text, library
        assert re.search(r'PROVIDED\s*(BY\s.*)?"AS IS"|"AS IS" BASIS', text, re.DOTALL), library


def test_operator(installed):
    program = """
import blasst, pathlib, sys, torch
assert pathlib.Path(blasst.__file__).is_relative_to(sys.prefix), blasst.__file__
q, k, v = torch.randn(3, 1, 200, 4, 64).unbind()
out = blasst.attention(q, k, v, causal=True)
wanted = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
print(blasst.__version__)
"""
    version = run(installed / "python", "-c", program, cwd=installed)
    stated = re.search(r"project\(blasst VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert version.strip() == stated[1]


def test_command_reaches_python_and_native_commands(installed):
    assert "calibrate" in run(installed / "blasst", "--help", cwd=installed)
    assert "in use" in run(installed / "blasst", "info", cwd=installed)
    assert "3 problems agree" in run(installed / "blasst", "verify", "--cases", "3", cwd=installed)
    assert "in use" in run(installed / "python", "-m", "blasst", "info", cwd=installed)


def test_needs_no_library_but_torch_and_the_compilers(wheel, tmp_path):
    allowed = {"libtorch_cpu.so", "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
    allowed |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    for name in ("blasst/_ops.so", "blasst/bin/blasst"):
        file = zipfile.ZipFile(wheel).extract(name, tmp_path)
        dynamic = run("readelf", "--dynamic", file, cwd=tmp_path)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
        assert needed <= allowed
