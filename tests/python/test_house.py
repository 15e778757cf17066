"""Rooms stand in floors, functions are small, and nothing is imported before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "python/blasst"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST_FUNCTION, LONGEST_CLASS = 60, 200
LONGER = {"attention": 80}
"""Passes every argument of the operator on."""


def room_of(path: Path) -> str:
    """The folder of a module, or the module itself where it is in none."""
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def rooms_imported(path: Path) -> Iterator[str]:
    """Also inside functions, where an import can hide a circle; not what only types need."""
    tree = ast.parse(path.read_text())
    for_types = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.module == "blasst":
            names = [f"blasst.{alias.name}" for alias in node.names]
        else:
            names = [node.module]
        for name in names:
            first, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if first == "blasst" and ((ROOT / room).is_dir() or (ROOT / f"{room}.py").exists()):
                yield room


def test_no_room_needs_itself_through_others():
    needs: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        if room not in ("__init__", "__main__"):
            needs.setdefault(room, set()).update(set(rooms_imported(path)) - {room, ""})
    floors = [*TopologicalSorter(needs).static_order()]  # a CycleError names the circle
    assert floors.index("hf") < floors.index("calibration") < floors.index("evaluation")
    assert not any({"cli", "integrations"} & others for others in needs.values())


def test_what_hf_needs_does_not_import_transformers():
    """Whose import brings in hf, which would find such a module half made."""
    needs = {}
    for path in FILES:
        needs.setdefault(room_of(path), set()).update(rooms_imported(path))
    beneath, waiting = set(), ["hf"]
    while waiting:
        new = needs[waiting.pop()] - beneath - {"", "hf"}
        beneath |= new
        waiting += new
    assert "policies" in beneath
    for path in FILES:
        if room_of(path) in beneath:
            top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
            assert "transformers" not in [node.module for node in top], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_are_read_in_one_sitting(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        documented = ast.get_docstring(node) is not None
        first = node.body[documented] if len(node.body) > documented else node.body[0]
        lines = node.end_lineno - first.lineno + 1
        usual = LONGEST_FUNCTION if isinstance(node, ast.FunctionDef) else LONGEST_CLASS
        most = LONGER.get(node.name, usual)
        assert lines <= most, f"{node.name} has {lines} lines beside its docstring"


def test_the_operator_and_the_native_commands_need_torch_alone():
    """`pip install blasst` brings nothing else."""
    code = (
        "import sys, torch; before = {*sys.modules}; import blasst, blasst.__main__; "
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["blasst"]


def test_importing_the_package_does_not_import_what_is_slow():
    slow = ("transformers", "matplotlib", "lm_eval", "torch._dynamo")
    loaded = f"[m for m in {slow} if m in sys.modules]"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, blasst; print({loaded})"],
        env={"PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
