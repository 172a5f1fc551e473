"""python -m eval as a person and a script meet it."""

import io
import json
import os
import pickle
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from rich.console import Console

from eval import __main__ as cli
from eval import verification
from eval.protocols.lfw_command import table
from eval.protocols.session import run_dir
from eval.report import tables
from tests.eval.embedders.test_embed import channel_means, make_run
from tests.eval.made import run_directory, tinted


@pytest.fixture
def model(tmp_path):
    return channel_means(tmp_path / "model.onnx")


def run(capsys, *arguments):
    code = cli.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(capsys, model, bin_file):
    code, out, _ = run(capsys, "lfw", model, bin_file)
    assert code == 0
    assert "colors" in out and "±" in out and "not one false accept is allowed" in out
    assert "†" not in out


def test_the_table_fits_80_columns():
    number = {"pairs": 13233, "same": 9000, "different": 700, "accuracy_mean": 1.0}
    number |= {"accuracy_std": 0.0, "eer": 0.5, "auc": 0.98765, "xnorm": 123.456}
    number |= {"operating_points": [{"far_target": 1e-3, "tar": 1.0, "resolved": False}]}
    name = "lfw_pairsDevTrain"
    console = Console(width=80, file=io.StringIO())
    console.print(table([tables.pair_row(name, number)]))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    words = ("100.00 ± 0.00 %†", "100.00 %*", "13233", "50.00 %", "0.98765", "123.46", "FAR 0.001")
    for word in words:
        assert word in text, word
    assert name in text


def test_progress_counts_images_not_their_mirrors(capsys, model, bin_file):
    _, _, err = run(capsys, "lfw", model, bin_file)
    assert "120/120" in err  # 60 pairs


def test_json_is_one_last_line_and_says_what_was_measured(capsys, model, bin_file):
    code, out, _ = run(capsys, "lfw", model, bin_file, "--json", "--batch-size", 7)
    assert code == 0 and out.count("\n") == 1
    content = json.loads(out)
    numbers = content["sets"]["colors"]
    # The network is the mean colour, which mirroring does not change: the sum is twice the mean.
    images, labels = pickle.loads(bin_file.read_bytes())
    pixels = [cv2.imdecode(np.frombuffer(x, np.uint8), cv2.IMREAD_COLOR) for x in images]
    means = (np.stack(pixels).mean(axis=(1, 2)) - 127.5) / 127.5
    expected = verification.evaluate(2 * means, labels)
    assert numbers["accuracy_mean"] == pytest.approx(expected["accuracy_mean"], abs=1e-12)
    assert numbers["auc"] == pytest.approx(expected["auc"], abs=1e-9)
    assert numbers["xnorm"] == pytest.approx(np.linalg.norm(means, axis=1).mean(), rel=1e-5)
    assert numbers["accuracy_mean"] > 0.9
    assert numbers["threshold_unit"].startswith("squared L2 distance")
    assert (numbers["pairs"], numbers["missing"]) == (60, 0)
    assert content["model"]["path"] == str(model)


def test_report_beside_a_run(capsys, tmp_path, bin_file):
    make_run(tmp_path)
    run_directory(tmp_path)
    page = tmp_path / "report.html"
    code, out, _ = run(capsys, "lfw", tmp_path, bin_file, "--report", page, "--json")
    assert code == 0 and json.loads(out)["report"] == str(page)
    assert "Accuracy during training" in page.read_text()
    (result,) = json.loads((tmp_path / "report.json").read_text())["models"][str(tmp_path)]
    assert result["model"]["network"] == "mbf_tiny"
    for inside in (tmp_path / "checkpoints" / "step-7", tmp_path / "model.onnx"):
        assert run_dir(inside) == tmp_path.resolve()


def test_pairs_list_with_absent_images(capsys, tmp_path, model):
    for person in range(12):
        folder = tmp_path / "images" / f"P{person}"
        folder.mkdir(parents=True)
        for n in (1, 2):
            (folder / f"P{person}_{n:04d}.jpg").write_bytes(tinted(person, n))
    same = [f"P{i} 1 2" for i in range(12)]
    different = [f"P{i} 1 P{(i + 5) % 12} 2" for i in range(12)]
    different[3] = "P3 1 P8 9"
    (tmp_path / "pairs.txt").write_text("\n".join(["12", *same, *different]))
    given = f"{tmp_path / 'pairs.txt'}:{tmp_path / 'images'}"
    code, out, err = run(capsys, "lfw", model, given, "--json")
    assert code == 0
    numbers = json.loads(out)["sets"]["pairs"]
    assert (numbers["pairs"], numbers["missing"]) == (23, 1)
    assert "1 of 24 pairs left out" in err and "no image P8_0009" in err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert "12 same and 11 different pairs" in warning and "other folds" in warning


def test_uneven_pairs_get_a_balanced_accuracy(capsys, tmp_path, model):
    same, different = [(i, i) for i in range(40)], [(i, i + 2) for i in range(8)]
    order = [pair for k in range(8) for pair in (*same[5 * k : 5 * k + 5], different[k])]
    images = [tinted(person, i % 2) for pair in order for i, person in enumerate(pair)]
    (tmp_path / "odd.bin").write_bytes(pickle.dumps((images, [a == b for a, b in order])))
    code, out, err = run(capsys, "lfw", model, tmp_path / "odd.bin")
    assert code == 0 and "warning: odd: 40 same and 8 different pairs" in err
    text = " ".join(out.split())
    assert " %† " in text and "odd: 40 same and 8 different pairs, balanced accuracy" in text
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "lfw", model, tmp_path / "odd.bin", "--json", "--report", page)
    balanced = json.loads(out)["sets"]["odd"]["balanced_accuracy"]
    assert f"{100 * balanced:.2f} %" in text and f"{100 * balanced:.2f} %" in page.read_text()


def malicious(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    return pickle.dumps(([Evil()], [True]))


def test_user_errors_are_one_line(capsys, tmp_path, model, bin_file):
    (tmp_path / "evil.bin").write_bytes(malicious(tmp_path))
    (tmp_path / "same.bin").write_bytes(pickle.dumps(([tinted(0, 0)] * 40, [True] * 20)))
    images, labels = pickle.loads(bin_file.read_bytes())
    (tmp_path / "broken.bin").write_bytes(pickle.dumps(([*images[:-1], b""], labels)))
    (tmp_path / "few.bin").write_bytes(pickle.dumps((images[:8], labels[:4])))
    other = tmp_path / "colors.bin"
    other.write_bytes(bin_file.read_bytes())
    page = tmp_path / "page.html"
    for arguments, message in [
        ((model, tmp_path / "evil.bin"), "evil.bin: .*forbidden global posix.system"),
        ((model, tmp_path / "same.bin"), "same.bin holds only same or only different pairs"),
        ((model, tmp_path / "broken.bin"), "broken image 119: .*"),
        ((model, tmp_path / "few.bin"), "4 pairs cannot be split into 10 folds"),
        ((model, tmp_path / "absent.bin"), "absent.bin"),
        (
            (tmp_path / "absent", bin_file),
            "no run directory, .* file at .*absent",
        ),
        ((tmp_path / "few.bin", bin_file), "few.bin is not an ONNX model"),
        ((model, bin_file, other), "two sets have the same name, in colors, colors"),
        ((model, f"{tmp_path}/absent.txt:{tmp_path}"), "absent.txt"),
    ]:
        code, out, err = run(capsys, "lfw", *arguments, "--json", "--report", page)
        assert code == 1 and out == ""
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in err
        assert re.search(message, errors[0]), errors
        assert not page.exists() and not page.with_suffix(".json").exists()
    assert not (tmp_path / "ran").exists()
    code, _, err = run(capsys, "lfw", model, bin_file, "--report", tmp_path / "page.pdf")
    assert code == 1 and "page.pdf" in err


def test_help_needs_no_network_library():
    code = (
        "import sys; from eval.__main__ import main\n"
        "try: main(['lfw', '--help'])\n"
        "finally: print(*(x for x in ('torch', 'matplotlib', 'onnx') if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for word in (
        "MODEL",
        "LIST:IMAGE_DIR:LANDMARKS",
        "--report",
        "--json",
        "example:",
        "squared L2",
    ):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lfw", "model.onnx"], "required: SET"),
        (["lfw", "model.onnx", "a.bin", "--batch-size", "0"], "0 is not positive"),
        (["lfv", "model.onnx", "a.bin"], "invalid choice: 'lfv'"),
    ],
)
def test_mistyped_command_lines(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
