"""The house rules that a machine can hold: the order of the rooms, and one file of collectives.

A room is a folder. Imports run downward only, imports inside functions included. To add a room,
give it a line in ROOMS; to add a file to a room, do nothing here.
"""

from __future__ import annotations

import ast
import pathlib
import sys

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
    "data_tools": [],  # the formats
    "data_tools.load": ["data_tools"],
    "data_tools.sources": ["data_tools"],
    "data_tools.pack": ["data_tools", "data_tools.sources"],
    "data_tools.clean": ["data_tools", "data_tools.sources"],
    "data_tools.inspect": ["data_tools", "data_tools.clean"],
    "data_tools.synthetic": [],
    "eval": [],  # the metrics
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


def upward(path: pathlib.Path) -> set[tuple[str, str]]:
    """What a file imports against the order; entry points join the commands of their package."""
    own = room_of(path)
    others = {room(name) for name in house.imports(path.relative_to(ROOT))}
    if path.name == "__main__.py":
        below = {"data_tools", own.split(".")[0]}
        return {(ids(path), other) for other in others if other.split(".")[0] not in below}
    return {(ids(path), other) for other in others if not may_import(own, other)}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_run_downward(path):
    assert upward(path) <= UPWARD


def test_the_door_is_the_only_exception_and_is_needed():
    assert {found for path in FILES for found in upward(path)} == UPWARD


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_modules_are_imported_by_name_at_the_door_alone(path):
    """A name that is computed, or hidden in __import__(), would escape the order."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [ast.unparse(node.func) for node in calls]
    dynamic = [name for name in names if name.endswith(("import_module", "__import__"))]
    assert dynamic == (["importlib.import_module"] if ids(path) == house.DOOR[0] else [])


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


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_are_absolute(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


def modules(path: pathlib.Path) -> set[str]:
    """The first part of every module that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_numpy_and_the_standard_library_alone(name):
    allowed = {"numpy", "__future__", *house.PACKAGES, *sys.stdlib_module_names}
    assert modules(ROOT / name) <= allowed


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nobody_imports_launch_and_nobody_imports_tests(path):
    assert "tests" not in modules(path)
    if path.relative_to(ROOT).parts[0] != "launch":
        assert "launch" not in modules(path)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_collectives_are_called_in_one_file(path):
    if path in (COLLECTIVES_FILE, ROOT / "launch" / "bench" / "standard_head.py"):
        return  # the latter is the form that ours is measured against
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch.distributed"):
            assert not COLLECTIVES & {alias.name for alias in node.names}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            assert owner not in ("dist", "torch.distributed", "distributed"), (
                f"{path}:{node.lineno} calls {node.attr}"
            )


def test_the_collectives_file_exists():
    assert COLLECTIVES_FILE.is_file()


def test_the_reference_imports_nothing_of_ours():
    assert not modules(ROOT / "tests" / "reference.py") & set(house.PACKAGES)


def test_losses_know_no_process_group():
    for path in (ROOT / "recognition" / "losses").glob("*.py"):
        assert "torch.distributed" not in path.read_text(), path


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_absence_is_asked_in_one_way(path):
    """os.path.exists and its kin read an I/O error as absence; since Python 3.13 pathlib does."""
    if path == ROOT / "data_tools" / "common" / "files.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        of_path = owner == "os.path" and name in ("exists", "isfile", "isdir")
        of_pathlib = name in ("exists", "is_file", "is_dir") and not node.args
        entry = owner in ("entry", "e")  # an os.DirEntry, whose is_dir() raises
        assert not (of_path or (of_pathlib and not entry)), f"{ids(path)}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_read_that_fails_names_its_file(path):
    """pathlib's own read_text and read_bytes name it only where the file cannot be opened."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("read_text", "read_bytes"):
            owner = ast.unparse(node.value)
            assert owner in ("files", "text") or "/proc/" in owner, f"{ids(path)}:{node.lineno}"


SINCE_2_11 = {
    line
    for line in (ROOT / "tests" / "torch_since_2_11.txt").read_text().splitlines()
    if not line.startswith("#")
}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_name_of_torch_is_newer_than_2_11(path):
    """The newest torch of a GPU machine that we know. A newer name is asked for by getattr, with
    what stands in for it."""
    assert not names_since_2_11(path.read_text()), ids(path)


def test_a_newer_name_of_torch_is_seen_in_every_way_of_writing_it():
    found = names_since_2_11(
        "import torch\nimport torch.distributed as dist\nfrom torch.nn import functional as F\n"
        "from torch.nn import LinearCrossEntropyOptions as Options\n"
        "F.linear_cross_entropy(x, w, y)\ndist.all_gather_single(a, b)\n"
        "torch.distributed.reduce_scatter_single(a, b)\n"
        "getattr(dist, 'all_gather_single', None)\nother.linear_cross_entropy()\n"
    )
    assert found == {
        "LinearCrossEntropyOptions", "linear_cross_entropy", "all_gather_single",
        "reduce_scatter_single",
    }  # fmt: skip


def names_since_2_11(source: str) -> set[str]:
    tree, bound, found = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            bound |= {alias.asname or "torch" for alias in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {alias.name for alias in node.names} & SINCE_2_11
            bound |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in SINCE_2_11:
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in bound:
                found.add(node.attr)
    return found
