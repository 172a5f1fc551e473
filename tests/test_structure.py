"""The house rules that a machine can hold: who imports whom, and one file of collectives."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = ("recognition", "data_tools", "eval", "launch")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))

# Every file of ours and what of ours it may import; "a.*" is anything below a. The longest key that
# fits a file holds for it.
MAY_IMPORT = {
    "data_tools/recordio.py": [],
    "data_tools/order.py": [],
    "data_tools/augment.py": ["data_tools.order"],
    "data_tools/union.py": ["data_tools.shards"],
    "data_tools/shards.py": [
        "data_tools.recordio", "data_tools.insightface", "data_tools.relabel",
    ],
    "data_tools/relabel.py": [],
    "data_tools/alignment.py": ["data_tools.*", "eval.align"],
    "data_tools/embed.py": ["data_tools.*", "eval.embed"],
    "data_tools/overlap.py": ["data_tools.*", "eval.lfw"],
    "data_tools/purify.py": ["data_tools.*", "recognition.checkpoint"],
    "data_tools/insightface.py": ["data_tools.recordio"],
    "data_tools/": ["data_tools.*"],
    "eval/roc.py": [],
    "eval/verification.py": ["eval.roc"],
    "eval/identification.py": [],
    "eval/templates.py": [],
    "eval/bootstrap.py": ["eval.roc"],
    "eval/lfw.py": ["eval.extract", "eval.images", "eval.verification", "eval.unpickle"],
    "eval/embed.py": [
        "eval.contract", "eval.embed_onnx", "recognition.checkpoint", "recognition.run_dir",
        "recognition.convert",
        "recognition.backbones.*",
    ],
    "eval/": ["eval.*", "data_tools.*"],
    "recognition/config.py": [],
    "recognition/runtime.py": [],
    "recognition/sampling.py": [],
    "recognition/phases.py": [],
    "recognition/collectives.py": ["recognition.phases"],
    "recognition/lane.py": ["recognition.rows"],
    "recognition/rows.py": [],
    "recognition/storage.py": ["recognition.rows", "recognition.sampling"],
    "recognition/host.py": [
        "recognition.lane", "recognition.rows", "recognition.sampling", "recognition.storage",
    ],
    "recognition/passes.py": [],
    "recognition/start.py": [],
    "recognition/backbones/": ["recognition.backbones.*"],
    "recognition/losses/": ["recognition.losses.*", "recognition.rows"],
    "recognition/losses/reduction.py": ["recognition.losses.*", "recognition.collectives"],
    "recognition/kernels/": [
        "recognition.kernels.*", "recognition.losses.*", "recognition.rows", "recognition.passes",
    ],
    "recognition/kernels/choice.py": [
        "recognition.kernels.*", "recognition.losses.*", "recognition.rows", "recognition.head",
        "recognition.storage", "recognition.passes", "recognition.config",
        "recognition.collectives",
    ],
    "recognition/head.py": [
        "recognition.losses.*", "recognition.sampling", "recognition.collectives",
        "recognition.rows", "recognition.start", "recognition.storage", "recognition.host",
        "recognition.passes", "data_tools.order",
    ],
    "recognition/optim.py": ["recognition.head", "recognition.rows", "recognition.losses.chunks"],
    "recognition/schedule.py": [],
    "recognition/scaler.py": [],
    "recognition/stop.py": ["recognition.collectives", "recognition.runtime"],
    "recognition/watchdog.py": ["recognition.stop", "recognition.places"],
    "recognition/places.py": [],
    "recognition/replicas.py": ["data_tools.loader", "recognition.collectives"],
    "recognition/resize.py": ["recognition.config", "recognition.schedule"],
    "recognition/finite.py": ["recognition.collectives"],
    "recognition/logger.py": ["recognition.losses.margin"],
    "recognition/progress.py": ["data_tools.loader", "recognition.phases"],
    "recognition/agreement.py": [],
    "recognition/onnx_graph.py": ["recognition.agreement", "recognition.backbones.*"],
    "recognition/onnx_precision.py": ["recognition.agreement"],
    "recognition/export.py": [
        "recognition.agreement", "recognition.backbones.*", "recognition.onnx_graph",
        "recognition.onnx_precision",
    ],
    "recognition/checkpoint/": [
        "recognition.checkpoint.*", "recognition.backbones.*", "recognition.collectives",
        "recognition.head", "recognition.optim", "recognition.scaler", "data_tools.commands",
        "data_tools.partial",
    ],
    "recognition/mxnet_params.py": [],
    "recognition/freezing.py": [],
    "recognition/distill.py": [
        "recognition.checkpoint", "recognition.collectives", "recognition.precision",
        "recognition.convert", "eval.embed_onnx",
    ],
    "recognition/class_rows.py": [
        "recognition.checkpoint.*", "recognition.checkpoint", "recognition.collectives",
        "recognition.convert",
    ],
    "recognition/changes.py": ["recognition.config", "recognition.build"],
    "recognition/initialise.py": [
        "data_tools.decode", "data_tools.shards", "data_tools.union", "eval.embed_onnx",
        "recognition.class_rows", "recognition.head",
    ],
    "recognition/convert.py": [
        "recognition.mxnet_params", "recognition.backbones", "recognition.checkpoint.backbone",
        "recognition.checkpoint.directory",
    ],
    "recognition/run_dir.py": [
        "recognition.checkpoint", "recognition.config", "recognition.convert",
    ],
    "recognition/inversion/": ["recognition.*", "data_tools.*", "eval.embed", "eval.lfw"],
    "recognition/": ["recognition.*", "data_tools.*", "eval.lfw"],
    "launch/": ["recognition.*", "data_tools.*", "eval.*", "launch.*"],
}  # fmt: skip

NUMPY_ONLY = [
    "data_tools/recordio.py", "data_tools/order.py", "data_tools/shards.py",
    "data_tools/insightface.py", "data_tools/union.py", "data_tools/relabel.py", "eval/roc.py",
    "eval/verification.py", "eval/identification.py", "eval/templates.py", "eval/bootstrap.py",
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
                name if _is_module(ROOT / name.replace(".", "/")) else str(node.module)
                for name in submodules
            }
    return found


def _is_module(place: pathlib.Path) -> bool:
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def ours(path: pathlib.Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in OURS}


def ids(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_only_what_it_may(path):
    rule = max((key for key in MAY_IMPORT if ids(path).startswith(key)), key=len)
    for imported in ours(path):
        allowed = imported.startswith("data_tools.common") or any(
            (imported + ".").startswith(entry[:-1]) if entry.endswith(".*") else imported == entry
            for entry in MAY_IMPORT[rule]
        )
        assert allowed, f"{ids(path)} imports {imported}"


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_numpy_and_the_standard_library_alone(name):
    foreign = {module.split(".")[0] for module in imports(ROOT / name)}
    assert foreign <= {"numpy", "__future__", *OURS, *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nobody_imports_launch_and_nobody_imports_tests(path):
    names = imports(path)
    assert not any(name.split(".")[0] == "tests" for name in names)
    if path.relative_to(ROOT).parts[0] != "launch":
        assert not any(name.split(".")[0] == "launch" for name in names)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_collectives_are_called_in_one_file(path):
    if path in (
        ROOT / "recognition" / "collectives.py",
        ROOT / "launch" / "bench" / "standard_head.py",  # what ours is measured against
    ):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch.distributed"):
            assert not COLLECTIVES & {alias.name for alias in node.names}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            assert owner not in ("dist", "torch.distributed", "distributed"), (
                f"{path}:{node.lineno} calls {node.attr}"
            )


def test_the_reference_imports_nothing_of_ours():
    assert not ours(ROOT / "tests" / "reference.py")


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
