"""The exported file equals torch on every batch size, says how to feed it, or does not exist."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import launch.export
import recognition.export.parity
import recognition.export.to_onnx
from data_tools import shards, verification_bin
from eval.report import results
from recognition.backbones import BACKBONES
from recognition.export.graph import check_graph
from recognition.export.parity import Agreement, ExportError
from recognition.export.to_onnx import GraphOptions, export_onnx
from recognition.run.data import hashes_of
from tests.eval.embedders.test_embed import make_run
from tests.real import ROOT, real

SCRIPT = Path(launch.export.__file__)
METADATA = {"network": "mbf_tiny", "margin": "arcface", "commit": "abc123"}


def trained(name):
    """A network whose BatchNorm statistics are those of its inputs, as after training."""
    torch.manual_seed(0)
    module = BACKBONES[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = 1.0  # the statistics of one batch, not mostly the initial ones
    with torch.no_grad():
        module(torch.from_numpy(normalised(pixels(8))))
    return module.eval()


def pixels(n):
    patches = np.random.default_rng(n).integers(0, 256, (n, 14, 14, 3), dtype=np.uint8)
    return patches.repeat(8, axis=1).repeat(8, axis=2)


def normalised(images):
    """The contract's formula, on its own: ((x / 255) - 0.5) / 0.5, channels first."""
    return np.ascontiguousarray(
        ((images / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2)
    )


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tiny():
    return trained("mbf_tiny")


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "tiny.onnx"
    return path, export_onnx(tiny, path, metadata=METADATA)


def test_file_equals_torch_at_batches_it_never_saw(tiny, exported):
    session = onnxruntime.InferenceSession(str(exported[0]))
    for n in (1, 2, 7, 32):
        batch = normalised(pixels(n))
        (embedding,) = session.run(None, {"input": batch})
        with torch.no_grad():
            expected = tiny(torch.from_numpy(batch)).numpy()
        assert embedding.shape == (n, 512) and embedding.dtype == np.float32
        assert np.abs(unit(embedding) - unit(expected)).max() < 1e-5
        assert np.abs(np.linalg.norm(embedding, axis=1) - 1).min() > 0.1  # not normalised


def test_iresnet_equals_torch(tmp_path):
    module = trained("r18")
    report = export_onnx(module, tmp_path / "r18.onnx", metadata=METADATA)
    assert report["max_abs_error"] < 1e-5
    batch = normalised(pixels(5))
    session = onnxruntime.InferenceSession(str(tmp_path / "r18.onnx"))
    (embedding,) = session.run(None, {"input": batch})
    with torch.no_grad():
        assert np.abs(unit(embedding) - unit(module(torch.from_numpy(batch)).numpy())).max() < 1e-5


def test_opencv_reads_the_file(tiny, exported):
    batch = normalised(pixels(2))
    network = cv2.dnn.readNetFromONNX(str(exported[0]))
    network.setInput(batch)
    with torch.no_grad():
        expected = tiny(torch.from_numpy(batch)).numpy()
    assert np.abs(unit(network.forward()) - unit(expected)).max() < 1e-4


def test_interface_and_metadata(exported):
    path, report = exported
    model = onnx.load(path)
    (graph_input,), (output,) = model.graph.input, model.graph.output
    sizes = [d.dim_param or d.dim_value for d in graph_input.type.tensor_type.shape.dim]
    assert (graph_input.name, sizes[1:]) == ("input", [3, 112, 112]) and isinstance(sizes[0], str)
    assert (output.name, output.type.tensor_type.shape.dim[1].dim_value) == ("embedding", 512)
    assert model.opset_import[0].version >= 17
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts == {
        **METADATA,
        "format_version": "1",
        "input_size": "112,112",
        "color_order": "RGB",
        "mean": "127.5",
        "std": "127.5",
        "embedding": "e(image), not normalised",
        "embedding_size": "512",
        "precision": "fp32",
        "agreement": json.dumps(report["cosine"]),
    }
    assert report["cosine"]["count"] == 1 + 2 + 7 + 32 and report["cosine"]["min"] > 1 - 1e-6
    mean, std = float(facts["mean"]), float(facts["std"])
    fed = ((pixels(1) - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(fed, normalised(pixels(1)), atol=1e-6)
    assert report["metadata"] == facts
    assert report["bytes"] == path.stat().st_size
    assert list(report["max_abs_error_by_batch"]) == ["1", "2", "7", "32"]


def test_names_do_not_tell_clients_that_pixels_are_normalised_inside(exported):
    first = [node.name for node in onnx.load(exported[0]).graph.node[:8]]
    assert all(first) and not any(n.startswith(("Sub", "_minus", "Mul", "_mul")) for n in first)


def test_file_holds_no_path_of_this_machine(exported):
    assert str(SCRIPT.parent.parent).encode() not in exported[0].read_bytes()


def test_nothing_but_the_file_is_left(exported):
    assert [p.name for p in exported[0].parent.iterdir()] == ["tiny.onnx"]


def test_examples_are_what_is_compared(tmp_path, monkeypatch):
    module, seen = Linear().eval(), []
    real = recognition.export.parity.difference
    monkeypatch.setattr(
        recognition.export.parity, "difference", lambda a, e: seen.append(e.copy()) or real(a, e)
    )
    images = pixels(3)
    report = export_onnx(module, tmp_path / "x.onnx", metadata={}, example_images=images)
    with torch.no_grad():
        expected = module(torch.from_numpy(normalised(images))).numpy()
    assert [len(e) for e in seen] == [1, 2, 7, 32]
    together = expected[np.arange(42) % 3]  # the images in turn
    np.testing.assert_allclose(np.concatenate(seen), together, rtol=1e-3, atol=1e-4)
    assert report["checked_on"] == "3 images"


class Linear(nn.Module):
    """A quick network with a place to plant a fault in its exported form."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 112 * 112, 8)

    def forward(self, images):
        embedding = self.fc(images.flatten(1))
        return self.fault(embedding) if torch.compiler.is_compiling() else embedding

    def fault(self, embedding):
        return embedding


class OneCoordinateOff(Linear):
    """Beyond the tolerance in one coordinate of one row: only batches of 3 or more show it."""

    def fault(self, embedding):
        row = (torch.arange(embedding.shape[0]) == 3).float()[:, None]
        return embedding + 1e-2 * row * torch.eye(8)[5]


class NotFinite(Linear):
    def fault(self, embedding):
        return embedding * float("nan")


class BakedBatch(Linear):
    def fault(self, embedding):
        return embedding.reshape(2, 8)


class Zero(Linear):
    def forward(self, images):
        return self.fc(images.flatten(1)) * 0


class NormalisingInside(Linear):
    def forward(self, images):
        return super().forward((images - 0.5) * 2)


FAULTS = {
    OneCoordinateOff: r"batch 2: \S+e-0\d, batch 7: \S+e-03, .*\); .* was not written",
    NotFinite: "inf",
    BakedBatch: "batch of 'input' is fixed",
    Zero: "untrained or damaged",
}


def test_planted_network_without_a_fault_is_written(tmp_path):
    report = export_onnx(Linear().eval(), tmp_path / "x.onnx", metadata={})
    assert report["max_abs_error"] < 1e-5 and report["embedding_size"] == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_differs_is_refused_and_nothing_remains(fault, tmp_path):
    with pytest.raises(ExportError, match=FAULTS[fault]):
        export_onnx(fault().eval(), tmp_path / "x.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_a_refused_file_leaves_the_previous_one(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"good")
    with pytest.raises(ExportError):
        export_onnx(OneCoordinateOff().eval(), path, metadata={})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"good"]


def test_a_runtime_that_computes_something_else_is_noticed(tmp_path, monkeypatch):
    class Session(onnxruntime.InferenceSession):
        def run(self, names, feed):
            (embedding,) = super().run(names, feed)
            return [embedding[::-1]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ExportError, match=r"batch 1: \S+e-0[5-9], batch 2: \S+e[+-]0[012]"):
        export_onnx(Linear().eval(), tmp_path / "x.onnx", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Sub", "Sub_3", "_minus0", "Mul_1", "_mulscalar0"])
def test_names_that_mislead_clients_are_refused(name, exported):
    model = onnx.load(exported[0])
    model.graph.node[7].name = name
    with pytest.raises(ExportError, match=name):
        check_graph(model)
    model.graph.node[7].name, model.graph.node[8].name = "first", name  # nobody looks there
    check_graph(model)


def test_normalisation_inside_the_graph_may_not_fool_the_clients(tmp_path):
    report = export_onnx(NormalisingInside().eval(), tmp_path / "x.onnx", metadata={})
    names = [node.name for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert not any(n.startswith(("Sub", "Mul")) for n in names) and report["embedding_size"] == 8


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(Linear().eval(), tmp_path / "x.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "x.onnx"
    program = (
        "import os, signal, sys, tests.launch.test_export as t\n"
        "t.export_onnx(t.Linear().eval(), sys.argv[1], metadata={},\n"
        "              verify=lambda aside: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left != path
    export_onnx(Linear().eval(), path, metadata={})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "module, images, message",
    [
        (Linear().train(), None, "training mode"),
        (Linear().eval().double(), None, "float64"),
        (Linear().eval(), np.zeros((0, 112, 112, 3), np.uint8), "n > 0"),
        (Linear().eval(), np.zeros((2, 3, 112, 112), np.uint8), r"\[2, 3, 112, 112\]"),
        (Linear().eval(), np.zeros((2, 112, 112, 3), np.float32), "float32"),
    ],
)
def test_wrong_arguments(module, images, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(module, tmp_path / "x.onnx", metadata={}, example_images=images)
    assert not list(tmp_path.iterdir())


def test_missing_directory_is_told_before_the_work(tmp_path):
    with pytest.raises(OSError, match="missing is not a directory"):
        export_onnx(Linear().eval(), tmp_path / "missing" / "x.onnx", metadata={})


# The command


@pytest.fixture
def run(monkeypatch):
    config = {**METADATA, "rec": "nowhere", "val_targets": [], "lr": 0.1, "seed": 3}
    monkeypatch.setattr(launch.export, "find", lambda path: path)
    monkeypatch.setattr(launch.export, "load_backbone", lambda path: (Linear().eval(), config))
    monkeypatch.setattr(launch.export, "_weights", lambda *_: {})


def test_command_writes_the_file_and_one_json_line_last(run, tmp_path, capsys):
    path = tmp_path / "x.onnx"
    assert launch.export.main(["run", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["path"] == str(path) and report["max_abs_error"] < 1e-4
    assert report["checked_on"] == "noise" and "verification" not in report
    assert json.loads((tmp_path / "x.export.json").read_text()) == report
    facts = {e.key: e.value for e in onnx.load(path).metadata_props}
    assert facts["alignment"].startswith("38.2946,51.6963;73.5318,51.5014;56.0252,71.7366;")
    assert (facts["network"], facts["margin"], facts["commit"]) == tuple(METADATA.values())
    assert json.loads(facts["recipe"]) == {"margin": "arcface", "lr": 0.1, "seed": 3}
    assert facts["training_data_licence"] == "not stated"


def test_hashes_are_those_that_the_run_noted(shards_dir):
    """Before: of whatever lay at `rec` at the export, packed anew or not."""
    noted = [{"name": "a", "sha256": "1" * 64, "of": "index.json"}]
    config = {"rec": [str(shards_dir)], "data_sha256": noted}
    facts = launch.export._data(config, "CC0")
    assert facts["training_index_sha256"] == "1" * 64
    assert facts["training_data"] == "shards" and facts["training_data_licence"] == "CC0"
    in_place = {"name": "b", "sha256": "2" * 64, "of": "labels and offsets"}
    both = launch.export._data(config | {"data_sha256": [*noted, in_place]}, "")
    assert both["training_data_sha256"].count("labels and offsets") == 1
    assert "training_index_sha256" not in both
    before = launch.export._data({"rec": str(shards_dir), "labels_crc32": 7}, "")
    assert not [key for key in before if "sha256" in key]
    own = hashes_of(shards.open(shards_dir))
    index = hashlib.sha256((shards_dir / "index.json").read_bytes()).hexdigest()
    assert own == [{"name": shards_dir.name, "sha256": index, "of": "index.json"}]


def thresholds_of(tmp_path, flip):
    """(entries that an export writes, run) of a run whose thresholds are of `flip`."""
    make_run(tmp_path)
    weights = (tmp_path / "checkpoints/step-7/model.safetensors").read_bytes()
    content = {
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "contract": {"flip": flip},
        "points": [{"far_target": 1e-3, "threshold": 0.3}],
    }
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    return lambda graph_options: launch.export._weights(
        str(tmp_path / "checkpoints/step-7"), tmp_path, graph_options
    )


@pytest.mark.parametrize("flip_sum", [False, True])
def test_thresholds_are_those_of_what_the_file_gives(tmp_path, capsys, flip_sum):
    entries = thresholds_of(tmp_path, results.FLIP_SUM if flip_sum else results.ALONE)
    assert "thresholds" in entries(GraphOptions(flip_sum=flip_sum)) and not capsys.readouterr().err
    assert "thresholds" not in entries(GraphOptions(flip_sum=not flip_sum))
    assert "the thresholds are left out" in capsys.readouterr().err


def test_an_accuracy_says_in_what_it_differs(run, tmp_path, capsys, monkeypatch):
    encoded = [cv2.imencode(".png", image)[1].tobytes() for image in pixels(80)]
    pairs = verification_bin.PairSet("forty", encoded, np.arange(40) % 2 == 0)
    monkeypatch.setattr(launch.export, "pairs_of", lambda *_: pairs)
    assert launch.export.main(["run", str(tmp_path / "x.onnx"), "--max-pairs", "20"]) == 0
    text = capsys.readouterr().out
    assert "20 of the 40 pairs of forty, e(image) alone (`eval lfw` takes all pairs" in text


def test_images_of_the_data_set_are_what_is_checked():
    rec = real("recordio/london/recbuilder")
    checked, calibrated = (launch.export.images_of(str(rec), n, s) for n, s in ((32, 0.5), (99, 0)))
    assert checked.shape == (32, 112, 112, 3) and checked.dtype == np.uint8
    assert calibrated.shape == (99, 112, 112, 3)
    assert len({image.tobytes() for image in checked}) == 32
    assert launch.export.images_of("nowhere", 7, 0) is None


def test_command_refuses_with_one_line(run, tmp_path, capsys, monkeypatch):
    found = Agreement({1: 1e-6, 2: 0.5, 7: 1e-6}, np.ones(10))
    monkeypatch.setattr(recognition.export.to_onnx, "measure", lambda *_: found)
    assert launch.export.main(["run", str(tmp_path / "x.onnx")]) == 1
    captured = capsys.readouterr()
    (line,) = [li for li in captured.err.splitlines() if "error" in li]
    assert line.startswith("error: ") and "batch 2: 5.00e-01" in line
    assert not captured.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-pairs", "-3"], "--max-pairs -3: 0"),
        (["--max-drop", "nan"], "--max-drop nan"),
        (["--max-drop", "-1"], "--max-drop -1"),
        (["--data", "none"], "--data none: no such directory"),
    ],
)
def test_what_cannot_be_asked_is_told(run, more, told, tmp_path, capsys):
    for name, words in (("x.onnx", told), ("x", "*.onnx"), ("none/x.onnx", "not a directory")):
        arguments = more if name == "x.onnx" else []
        assert launch.export.main(["run", str(tmp_path / name), *arguments]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_line(run, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.export, "images_of", interrupted)
    assert launch.export.main(["run", str(tmp_path / "x.onnx")]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: interrupted; nothing half-made is left"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("of_one", "told"), [(True, "all of one kind"), (False, "not finite")])
def test_a_loss_that_cannot_be_told_is_refused(run, of_one, told, tmp_path, capsys, monkeypatch):
    """Pairs of one kind, and a file whose embeddings are NaN on faces alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    encoded = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
    issame = np.array([True, True, True, True]) if of_one else np.array([True, False, True, False])
    pairs = verification_bin.PairSet("few", encoded, issame)
    monkeypatch.setattr(launch.export, "pairs_of", lambda *_: pairs)
    if not of_one:
        broken = lambda path: lambda images: np.full((len(images), 8), np.nan)  # noqa: E731
        monkeypatch.setattr(launch.export, "OnnxEmbedder", broken)
    assert launch.export.main(["run", str(tmp_path / "x.onnx")]) == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def call(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_help_names_the_file_and_the_precisions(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.export.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "OUT.onnx" in said and "int8" in said


def test_script_runs_from_anywhere_and_refuses_what_is_no_run(tmp_path):
    done = call("nothing-here", "x.onnx", cwd=tmp_path)
    assert done.returncode == 1 and "nothing-here" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
