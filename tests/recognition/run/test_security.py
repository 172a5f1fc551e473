"""What a stranger hands over runs nothing and reaches nowhere; what we write tells no secrets."""

from __future__ import annotations

import ast
import json
import os
import pathlib

import pytest

from recognition import config
from tests import ranks
from tests.conftest import run
from tests.recognition import runs

ROOT = pathlib.Path(__file__).parents[3]
OURS = [
    p for d in ("recognition", "data_tools", "eval", "launch") for p in (ROOT / d).rglob("*.py")
]


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), given, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_nothing_is_unpickled_that_a_stranger_could_have_written():
    for path in OURS:
        for name, given, place in calls(path):
            if name == "torch.load":
                assert given.get("weights_only") == "True", place
            if name in ("np.load", "numpy.load"):
                assert given.get("allow_pickle", "False") == "False", place
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec",
                                "marshal.loads", "yaml.load", "torch.jit.load"), place  # fmt: skip


def test_no_command_goes_through_a_shell():
    for path in OURS:
        for name, given, place in calls(path):
            assert given.get("shell", "False") == "False", place
            assert name not in ("os.system", "os.popen", "subprocess.getoutput"), place


def test_a_recipe_in_json_says_the_same(tmp_path):
    keys = {"rec": "x", "network": "r18", "margin_list": [1.0, 0.5, 0.0], "val_targets": ["lfw"]}
    (tmp_path / "a.json").write_text(json.dumps(keys))
    (tmp_path / "a.py").write_text(f"config = {keys!r}\n")
    as_json = config.load(str(tmp_path / "a.json"), ["lr=0.2"], safe=True)
    assert as_json == config.load(str(tmp_path / "a.py"), ["lr=0.2"])


def test_safe_runs_no_recipe(tmp_path):
    recipe = tmp_path / "evil.py"
    recipe.write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); config = {{'rec': 'x'}}\n")
    with pytest.raises(PermissionError, match="--safe does not run"):
        config.load(str(recipe), safe=True)
    done = run("launch/train.py", recipe, "--safe")
    assert done.returncode == 1 and "--safe does not run" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "1", '{"rec": {"a": 1}}', '{"no": 1, "rec": "x"}'])
def test_a_json_that_is_no_recipe_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises((ValueError, TypeError, KeyError)):
        config.load(str(tmp_path / "a.json"), safe=True)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/b", "..", ""])
def test_a_val_target_is_no_path(name):
    with pytest.raises(ValueError, match="not a path"):
        config.make({"rec": "x", "val_targets": [name]})


def test_a_run_writes_no_secret_and_nothing_outside(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run"), "val_targets": ["heldout"]}
    ranks.run(1, run_with_a_secret, keys | {"max_steps": 2})
    assert os.listdir(tmp_path) == ["run"]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def run_with_a_secret(keys):
    os.environ["AWS_SECRET_ACCESS_KEY"] = "hunter2"
    try:
        runs.run(keys)
    finally:
        del os.environ["AWS_SECRET_ACCESS_KEY"]
