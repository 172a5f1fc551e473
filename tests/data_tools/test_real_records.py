"""Other people's recordings open, verify, pack and train; what is no set of faces says so."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions, Sources
from tests.real import ROOT, real

LONDON = [f"london/{name}" for name in ("recbuilder", "face2rec2", "seq")]


@pytest.mark.parametrize(
    ("name", "images", "classes"),
    [*((name, 204, 102) for name in LONDON), ("popkorn", 8, 2), ("EsraaRagaa", 1632, 1)],
)
def test_it_opens_and_verifies(name, images, classes, capsys):
    path = real(f"recordio/{name}")
    data = shards.open(path)
    assert (len(data), data.num_classes) == (images, classes)
    assert main(["verify", str(path), "--deep", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"] == []


def test_what_is_no_set_of_faces_is_named(tmp_path, capsys):
    """Nine values a label are boxes of cars; their images open, but are not square."""
    path = real("recordio/enkhtogtokh")
    assert len(shards.open(path)) == 12
    assert main(["verify", str(path), "--deep", "--workers", "1"]) == 1
    assert "1920x800 pixels, not " in capsys.readouterr().out
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    assert "1 of 5 identities" in capsys.readouterr().err


@pytest.mark.long
def test_three_of_them_joined_train(tmp_path):
    """64x64 without .idx, a shuffled .idx, and layout A with vector labels, as one set."""
    names = ("EsraaRagaa", "popkorn", "london/face2rec2")
    paths = [real(f"recordio/{name}") for name in names]
    done = pack(Sources(paths), tmp_path / "set", PackOptions(shards=2))
    assert (done["images"], done["classes"]) == (1632 + 8 + 204, 1 + 2 + 102)
    sizes = np.bincount(shards.open(tmp_path / "set").labels)
    assert sizes[0] == 1632 and sizes[3:].tolist() == [2] * 102
    words = [
        "launch/train.py", "launch/configs/demo.py", f"rec={tmp_path / 'set'}",
        f"output={tmp_path / 'run'}", "max_steps=4", "global_batch_size=32", "log_every=1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 4 and np.isfinite(losses).all()
