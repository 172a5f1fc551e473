"""Other people's software loads our files: insightface's client, and a script of one page.

In an environment of their own (`make test-peers`), which has nothing of this project.
"""

from __future__ import annotations

import json
import subprocess

import cv2
import numpy as np
import pytest
import torch

import launch.compare_photographs
from data_tools.images.template import TEMPLATE, warp
from data_tools.pack.detectors import detect
from recognition.export.to_onnx import GraphOptions, export_onnx
from tests.launch.test_export import normalised, trained, unit
from tests.real import ROOT, real

PEER = ROOT / ".venv-strangers" / "bin" / "python"
SCRIPT = ROOT / "tests" / "launch" / "strangers_peer.py"
EXAMPLE = launch.compare_photographs.__file__
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PEER.exists(), reason=f"no {PEER}: run `make test-peers`"),
]


def stranger(*arguments):
    command = [PEER, "-P", *arguments]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=240, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]


@pytest.fixture(scope="module")
def faces():
    paths = sorted(real("london112").glob("*/*.jpg"))[::9]
    return np.stack([cv2.imread(str(path))[:, :, ::-1] for path in paths])


@pytest.mark.parametrize("name", ["mbf_tiny", "r18", "vit_t"])
def test_insightface_gives_our_embedding(name, faces, tmp_path):
    module = trained(name)
    export_onnx(module, tmp_path / "x.onnx", metadata={})
    np.save(tmp_path / "faces.npy", faces)
    found = json.loads(stranger(SCRIPT, "get_feat", tmp_path / "x.onnx", tmp_path / "faces.npy"))
    with torch.no_grad():
        expected = module(torch.from_numpy(normalised(faces))).numpy()
    assert np.abs(np.array(found) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("normalise", [False, True])
def test_insightface_normalises_once(precision, normalise, faces, tmp_path):
    """Neither twice nor never, in every precision: either is an error far beyond int8's."""
    module = trained("mbf_tiny")
    export_onnx(
        module, tmp_path / "x.onnx", metadata={}, precision=precision, example_images=faces,
        calibration_images=faces,
        graph_options=GraphOptions(normalise=normalise, flip_sum=True, l2=True),
    )  # fmt: skip
    np.save(tmp_path / "faces.npy", faces)
    found = json.loads(stranger(SCRIPT, "get_feat", tmp_path / "x.onnx", tmp_path / "faces.npy"))
    with torch.no_grad():
        x = torch.from_numpy(normalised(faces))
        expected = unit((module(x) + module(x.flip(3))).numpy())
        missed = (module(x * 127.5 + 127.5) + module(x.flip(3) * 127.5 + 127.5)).numpy()
        twice = (module((x - 127.5) / 127.5) + module((x.flip(3) - 127.5) / 127.5)).numpy()
    error = np.abs(np.array(found) - expected).max()
    assert error < {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.1}[precision]
    for wrong in (missed, twice):
        assert np.abs(unit(wrong) - expected).max() > 0.15


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "yunet.onnx"
    stranger(SCRIPT, "detector", path)
    return str(path)


def test_the_example_aligns_as_we_do(detector):
    """Its least squares are our similarity, and its decoding finds OpenCV's five points."""
    rng = np.random.default_rng(0)
    points = TEMPLATE @ np.array([[2.0, 0.3], [-0.3, 2.0]], np.float32) + rng.normal(0, 2, (5, 2))
    rows = [r for x, y in points for r in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), np.ravel(TEMPLATE), rcond=None)[0]
    from data_tools.images.template import similarity

    assert np.abs(np.array([[a, -b, tx], [b, a, ty]]) - similarity(points)).max() < 1e-3
    import onnxruntime

    session = onnxruntime.InferenceSession(detector)
    for path in sorted(real("london_full").glob("*.jpg")):
        image = cv2.imread(str(path))
        mine = launch.compare_photographs.five_points(session, image)
        theirs = detect(np.ascontiguousarray(image[:, :, ::-1]), detector)
        eyes = np.linalg.norm(theirs[0] - theirs[1])
        assert np.abs(mine - theirs).max() < 0.05 * eyes
        assert warp(image, mine).std() > 10


def test_photographs_to_an_answer_without_us(detector, tmp_path):
    """The threshold between the scores that the file itself gives: the script must tell them."""
    module = trained("mbf_tiny")
    photographs = sorted(real("london_full").glob("*.jpg"))
    facts = {"alignment": ";".join(f"{x:.4f},{y:.4f}" for x, y in TEMPLATE)}

    def embed(path):
        image = np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1])
        face = warp(image, detect(image, detector))
        x = torch.from_numpy(normalised(face[None]))
        with torch.no_grad():
            return unit(module(x).numpy())[0]

    score = float(embed(photographs[0]) @ embed(photographs[1]))
    for offset, words in ((-0.02, "one person"), (0.02, "two persons")):
        points = [{"far_target": 0.01, "threshold": score + offset, "far": 0.01, "tar": 0.9}]
        entries = facts | {"thresholds": json.dumps({"points": points})}
        export_onnx(module, tmp_path / "x.onnx", metadata=entries)
        said = stranger(EXAMPLE, tmp_path / "x.onnx", detector, *photographs[:2])
        assert said.startswith(words), said
        assert abs(float(said.split("score ")[1].split(",")[0]) - score) < 0.02
    again = stranger(EXAMPLE, tmp_path / "x.onnx", detector, photographs[0], photographs[0])
    assert again.startswith("one person: score 1.0000")


@pytest.mark.parametrize("name", ["mbf_tiny", "r18"])
def test_opencv_of_the_next_major_version_too(name, faces, tmp_path):
    module = trained(name)
    export_onnx(module, tmp_path / "x.onnx", metadata={})
    np.save(tmp_path / "faces.npy", faces)
    found = json.loads(stranger(SCRIPT, "dnn", tmp_path / "x.onnx", tmp_path / "faces.npy"))
    with torch.no_grad():
        expected = module(torch.from_numpy(normalised(faces))).numpy()
    assert np.abs(np.array(found) - expected).max() < 1e-4 * np.abs(expected).max()
