"""The house rules that a machine can hold: the order of the rooms, and one file of collectives.

A room is a folder. Imports run downward only, imports inside functions included. To add a room,
give it a line in ROOMS; to add a file to a room, do nothing here.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import sys
from typing import Any

import pytest

from data_tools.common.networks import networks
from tests import house

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(ROOT / path for path in house.files() if path.parts[0] in house.PACKAGES)

# Each room and the rooms that it may import beside itself and data_tools.common. `a.*` is every
# room of the package; a file at a package's top level belongs to the room named after the package,
# unless it has a line of its own.
ROOMS: dict[str, list[str]] = {
    "data_tools.common": [],
    "data_tools.images": [],
    "data_tools": [],  # the formats
    "data_tools.load": ["data_tools", "data_tools.images"],
    "data_tools.sources": ["data_tools", "data_tools.images"],
    "data_tools.pack": ["data_tools", "data_tools.images", "data_tools.sources"],
    "data_tools.clean": ["data_tools", "data_tools.images", "data_tools.sources"],
    "data_tools.inspect": ["data_tools", "data_tools.images", "data_tools.clean"],
    "data_tools.synthetic": ["data_tools.images"],
    "eval": ["data_tools.images"],  # the metrics, and the alignment template under its public name
    "eval.embedders": ["eval", "data_tools.*"],
    "eval.report": ["eval", "data_tools.*"],
    "eval.protocols": ["eval", "eval.embedders", "eval.report", "data_tools.*"],
    "recognition": [],
    "recognition.config": [],
    "recognition.losses": [],
    "recognition.backbones": [],
    "recognition.distributed": ["data_tools.*"],
    "recognition.precision": ["recognition.distributed", "data_tools.*"],
    "recognition.head": [
        "recognition.config",
        "recognition.distributed",
        "recognition.losses",
        "data_tools.*",
    ],
    "recognition.optim": ["recognition.head"],
    "recognition.checkpoint": [
        "recognition.backbones",
        "recognition.distributed",
        "recognition.head",
        "recognition.precision",
        "recognition.optim",
    ],
    "recognition.weights": [
        "recognition.backbones",
        "recognition.checkpoint",
        "recognition.distributed",
        "recognition.head",
        "recognition.precision",
        "data_tools.*",
        "eval.embedders",
    ],
    "recognition.convert": ["recognition.weights"],
    "recognition.export": ["recognition.backbones"],
    "recognition.run": [
        "recognition.*",
        "data_tools.*",
        "eval.protocols",
    ],
    "recognition.inversion": [
        "recognition.*",
        "data_tools.*",
        "eval.embedders",
        "eval.protocols",
    ],
    "launch": ["launch.*", "recognition.*", "eval.*", "data_tools.*"],
    "launch.planner": ["recognition.*", "data_tools.*"],
    "launch.preflight_checks": ["recognition.*", "data_tools.*"],
    "launch.bench": ["launch.*", "recognition.*", "eval.*", "data_tools.*"],
    "launch.recipe_bases": [],
    "launch.configs": ["launch.recipe_bases"],
}
NOBODY_BELOW = {"recognition.run", "recognition.inversion", "recognition.export"}

# The one import against the order, (file, room): by it commands open a network.
UPWARD = {(house.DOOR[0], "recognition.weights")}

NUMPY_ONLY = [
    *(f"data_tools/{name}.py" for name in ("recordio", "shards", "insightface", "union")),
    *(f"data_tools/{name}.py" for name in ("unpickle", "verification_bin")),
    *(f"data_tools/{name}.py" for name in ("relabel", "load/order")),
    *(f"eval/{name}.py" for name in ("roc", "verification", "identification")),
    *(f"eval/{name}.py" for name in ("templates", "bootstrap")),
]

BY_NAME = ("import_module", "__import__")  # functions that import a module by its name
COLLECTIVES_FILE = ROOT / "recognition" / "distributed" / "collectives.py"
COLLECTIVES = set(
    "all_reduce all_gather all_gather_into_tensor all_gather_single all_gather_object "
    "reduce_scatter reduce_scatter_tensor reduce_scatter_single reduce gather scatter broadcast "
    "broadcast_object_list barrier all_to_all send recv".split()
)


def room(module: str) -> str:
    """The room of a module: the longest line of ROOMS that it lies in."""
    parts = module.split(".")
    while parts and ".".join(parts) not in ROOMS:
        parts.pop()
    assert parts, f"{module} lies in no room of ROOMS"
    return ".".join(parts)


def room_of(path: pathlib.Path) -> str:
    return room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def may_import(own: str, other: str) -> bool:
    if own == other or other == "data_tools.common":
        return True
    return any(
        other.split(".")[0] == entry[:-2]
        and (own.startswith("launch") or own in NOBODY_BELOW or other not in NOBODY_BELOW)
        if entry.endswith(".*")
        else other == entry
        for entry in ROOMS[own]
    )


def ids(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def nodes(kind: type[ast.AST]) -> list[tuple[pathlib.Path, Any]]:
    """Every node of a kind in all files of the packages."""
    return [(path, node) for path in FILES for node in ast.walk(tree(path)) if type(node) is kind]


def place(path: pathlib.Path, node: ast.stmt | ast.expr) -> str:
    return f"{ids(path)}:{node.lineno}"


def upward(path: pathlib.Path) -> set[tuple[str, str]]:
    """What a file imports against the order; entry points join the commands of their package."""
    own = room_of(path)
    others = {room(name) for name in house.imports(path.relative_to(ROOT))}
    if path.name == "__main__.py":
        below = {"data_tools", own.split(".")[0]}
        return {(ids(path), other) for other in others if other.split(".")[0] not in below}
    return {(ids(path), other) for other in others if not may_import(own, other)}


def test_the_door_is_the_only_exception_and_is_needed():
    """All other imports run downward."""
    assert {found for path in FILES for found in upward(path)} == UPWARD


def test_modules_are_imported_by_name_at_the_door_alone():
    """A name that is computed, or hidden in __import__(), would escape the order."""
    found = [
        ids(path)
        for path, node in nodes(ast.Call)
        if getattr(node.func, "attr", getattr(node.func, "id", None)) in BY_NAME
    ]
    assert found == [house.DOOR[0]]


def test_the_measures_show_no_circle_but_the_door():
    assert house.circles(house.arrows()) == []


def test_the_door_opens_what_it_promises():
    found, promised = networks(), {"open_embedder", "Centres"}
    assert found.__name__ == house.DOOR[1] and promised <= set(found.__all__)
    assert all(callable(getattr(found, name)) for name in promised)


def test_rooms_form_no_circle():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.name != "__main__.py":
            own = room_of(path)
            others = {room(name) for name in house.imports(path.relative_to(ROOT))}
            others -= {own} | {other for file, other in UPWARD if file == ids(path)}
            graph.setdefault(own, set()).update(others)
    assert house.circles(graph) == []


def test_every_room_exists():
    for name in ROOMS:
        place = ROOT.joinpath(*name.split("."))
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


def test_imports_are_absolute():
    assert [place(path, node) for path, node in nodes(ast.ImportFrom) if node.level] == []


def modules(path: pathlib.Path) -> set[str]:
    """The first part of every module that a file imports."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_numpy_and_the_standard_library_alone(name):
    allowed = {"numpy", "__future__", *house.PACKAGES, *sys.stdlib_module_names}
    assert modules(ROOT / name) <= allowed


def test_nobody_imports_launch_and_nobody_imports_tests():
    assert [ids(path) for path in FILES if "tests" in modules(path)] == []
    below = [path for path in FILES if path.relative_to(ROOT).parts[0] != "launch"]
    assert [ids(path) for path in below if "launch" in modules(path)] == []


def test_collectives_are_called_in_one_file():
    # The second is the form that ours is measured against.
    allowed = {COLLECTIVES_FILE, ROOT / "launch" / "bench" / "standard_head.py"}
    imported = [
        place(path, node)
        for path, node in nodes(ast.ImportFrom)
        if path not in allowed
        and str(node.module).startswith("torch.distributed")
        and COLLECTIVES & {alias.name for alias in node.names}
    ]
    called = [
        place(path, node)
        for path, node in nodes(ast.Attribute)
        if path not in allowed
        and node.attr in COLLECTIVES
        and ast.unparse(node.value) in ("dist", "torch.distributed", "distributed")
    ]
    assert imported == [] and called == []


def test_the_collectives_file_exists():
    assert COLLECTIVES_FILE.is_file()


def test_the_reference_imports_nothing_of_ours():
    assert not modules(ROOT / "tests" / "reference.py") & set(house.PACKAGES)


def test_losses_know_no_process_group():
    for path in (ROOT / "recognition" / "losses").glob("*.py"):
        assert "torch.distributed" not in path.read_text(), path


def test_absence_is_asked_in_one_way():
    """os.path.exists and its kin read an I/O error as absence; since Python 3.13 pathlib does."""
    found = []
    for path, node in nodes(ast.Call):
        if not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if name not in ("exists", "isfile", "isdir", "is_file", "is_dir"):
            continue
        owner = ast.unparse(node.func.value)
        of_path = owner == "os.path" and name in ("exists", "isfile", "isdir")
        of_pathlib = name in ("exists", "is_file", "is_dir") and not node.args
        entry = owner in ("entry", "e")  # an os.DirEntry, whose is_dir() raises
        if of_path or (of_pathlib and not entry):
            found.append((ids(path), owner, name))
    files = "data_tools/common/files.py"
    assert [use for use in found if use[0] != files] == []


def test_a_read_that_fails_names_its_file():
    """pathlib's own read_text and read_bytes name it only where the file cannot be opened."""
    reads = [
        (place(path, node), ast.unparse(node.value))
        for path, node in nodes(ast.Attribute)
        if node.attr in ("read_text", "read_bytes")
    ]
    named = ("files", "text")
    assert [read for read in reads if read[1] not in named and "/proc/" not in read[1]] == []


SINCE_2_11 = {
    line
    for line in (ROOT / "tests" / "torch_since_2_11.txt").read_text().splitlines()
    if not line.startswith("#")
}


def test_no_name_of_torch_is_newer_than_2_11():
    """The newest torch of a GPU machine that we know. A newer name is asked for by getattr, with
    what stands in for it."""
    found = {ids(path): names_since_2_11(tree(path)) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_newer_name_of_torch_is_seen_in_every_way_of_writing_it():
    found = names_since_2_11(
        ast.parse(
            "import torch\nimport torch.distributed as dist\nfrom torch.nn import functional as F\n"
            "from torch.nn import LinearCrossEntropyOptions as Options\n"
            "F.linear_cross_entropy(x, w, y)\ndist.all_gather_single(a, b)\n"
            "torch.distributed.reduce_scatter_single(a, b)\n"
            "getattr(dist, 'all_gather_single', None)\nother.linear_cross_entropy()\n"
        )
    )
    assert found == {
        "LinearCrossEntropyOptions", "linear_cross_entropy", "all_gather_single",
        "reduce_scatter_single",
    }  # fmt: skip


def names_since_2_11(source: ast.Module) -> set[str]:
    bound, found = set(), set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            bound |= {alias.asname or "torch" for alias in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {alias.name for alias in node.names} & SINCE_2_11
            bound |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and node.attr in SINCE_2_11:
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in bound:
                found.add(node.attr)
    return found


def test_the_formatter_lays_out_every_line_of_the_packages():
    packages = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
    assert not [ids(p) for p in packages if "# fmt: skip" in p.read_text(encoding="utf-8")]
