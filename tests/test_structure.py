"""The house rules that a machine can hold: who imports whom, and one file of collectives."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = ("recognition", "data_tools", "eval", "launch")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))

# Files and what of ours they may import; a missing file is free. "*" ends a prefix.
MAY_IMPORT = {
    "recognition/config.py": [],
    "recognition/runtime.py": [],
    "recognition/sampling.py": [],
    "recognition/collectives.py": [],
    "recognition/rows.py": [],
    "recognition/losses/margin.py": [],
    "recognition/losses/reduction.py": ["recognition.losses.margin", "recognition.rows"],
    "recognition/head.py": [
        "recognition.losses*", "recognition.sampling", "recognition.collectives",
        "recognition.rows",
    ],
    "recognition/optim.py": ["recognition.head"],
    "data_tools/recordio.py": [],
    "data_tools/order.py": [],
    "data_tools/shards.py": ["data_tools.recordio", "data_tools.*"],
    "eval/verification.py": [],
    "eval/identification.py": [],
}  # fmt: skip

NUMPY_ONLY = [
    "data_tools/recordio.py", "data_tools/order.py", "eval/verification.py",
    "eval/identification.py",
]  # fmt: skip

COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object",
    "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "reduce", "gather",
    "scatter", "broadcast", "broadcast_object_list", "barrier", "all_to_all", "send", "recv",
}  # fmt: skip


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {
                name if (ROOT / (name.replace(".", "/") + ".py")).exists() else str(node.module)
                for name in submodules
            }
    return found


def ours(path: pathlib.Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in OURS}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_only_what_it_may(name):
    for imported in ours(ROOT / name):
        allowed = any(
            imported.startswith(rule[:-1]) if rule.endswith("*") else imported == rule
            for rule in MAY_IMPORT[name]
        )
        assert allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_numpy_and_the_standard_library_alone(name):
    foreign = {m.split(".")[0] for m in imports(ROOT / name)} & {"torch", "cv2", "rich", "sklearn"}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_launch_and_nobody_imports_tests(path):
    names = imports(path)
    assert not any(name.split(".")[0] == "tests" for name in names)
    if path.relative_to(ROOT).parts[0] != "launch":
        assert not any(name.split(".")[0] == "launch" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_collectives_are_called_in_one_file(path):
    if path == ROOT / "recognition" / "collectives.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = node.value.id in ("dist", "distributed") and node.attr in COLLECTIVES
            assert not called, f"{path}:{node.lineno} calls {node.attr}"


def test_the_reference_imports_nothing_of_ours():
    assert not ours(ROOT / "tests" / "reference.py")


def test_losses_know_no_process_group():
    for path in (ROOT / "recognition" / "losses").glob("*.py"):
        assert "torch.distributed" not in path.read_text(), path
