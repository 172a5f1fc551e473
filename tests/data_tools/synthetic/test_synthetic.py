"""Generated identities: reproducible, aligned, fast, and not to be told apart without learning."""

import errno
import json
from dataclasses import astuple
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.common import parallel
from data_tools.common.partial_directory import mark
from data_tools.images.decode import decode
from data_tools.synthetic import generate
from data_tools.synthetic.canvas import Sheet
from data_tools.synthetic.generate import FaceOptions, encode, render, synthesize
from data_tools.synthetic.people import Person, Pose
from eval.verification import evaluate


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_picture_is_a_function_of_seed_identity_and_image():
    first = render(3, 5, 7)
    assert first.shape == (112, 112, 3) and first.dtype == np.uint8
    for other in [(3, 5, 8), (3, 6, 7), (4, 5, 7)]:  # in between: no state to disturb
        assert np.abs(render(*other).astype(int) - first).mean() > 5
    assert np.array_equal(render(3, 5, 7), first)
    assert encode(3, 5, 7) == encode(3, 5, 7)
    assert encode(2**64 - 1, 10**12, 10**9)  # any number of them


def test_another_drawing_needs_another_version():
    """Grey means of a 4 x 4 grid, as drawn by version 1: data made before would not match."""
    assert generate.VERSION == 1
    drawn = {
        (0, 0, 0): [
            [41, 93, 85, 50],
            [98, 166, 149, 119],
            [139, 155, 152, 120],
            [79, 126, 121, 57],
        ],
        (0, 1, 1): [[70, 67, 77, 84], [72, 68, 71, 78], [74, 75, 77, 73], [65, 77, 80, 117]],
    }
    for picture, want in drawn.items():
        grey = cv2.cvtColor(render(*picture), cv2.COLOR_RGB2GRAY)
        got = cv2.resize(grey, (4, 4), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(got - want).max() <= 1


def test_the_file_is_the_picture():
    errors, sizes = [], []
    for image in range(20):
        jpeg = encode(0, 1, image)
        errors.append(np.abs(decode(jpeg, 112).astype(int) - render(0, 1, image)).mean())
        sizes.append(len(jpeg))
    assert np.median(errors) < 8 and max(errors) < 20  # JPEG's own, at qualities from 35
    assert np.std(sizes) > 300  # the qualities differ


def test_faces_are_aligned_like_the_template():
    """Over many poses the eyes, nose and mouth corners are about where ArcFace's template is."""
    template = [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]
    random = np.random.default_rng(0)
    placed = []
    for _ in range(2000):
        person, pose = Person.draw(random), Pose.draw(random)
        sheet = Sheet(np.zeros((112, 112, 3), np.uint8), pose)
        eyes = [(side * person.eye_x, 51.6 + person.eye_y) for side in (-1, 1)]
        mouth = [(side * person.mouth_width, person.mouth_y) for side in (-1, 1)]
        face = np.array([*eyes, (0.0, person.nose_y), *mouth])
        placed.append(sheet.place(face, lift=2.0))
    assert np.abs(np.mean(placed, axis=0) - template).max() < 2
    assert 1 < np.std(placed, axis=0).min() and np.std(placed, axis=0).max() < 6  # pixels


def test_people_are_spread_over_every_trait():
    random = np.random.default_rng(0)
    people = np.array([astuple(Person.draw(random)) for _ in range(3000)])
    correlation = np.corrcoef(people.T) - np.eye(people.shape[1])
    assert np.abs(correlation).max() < 6 / np.sqrt(3000)  # independent factors
    assert people.shape[1] > 50


def test_pixels_do_not_tell_people_apart():
    """What 600 pairs say of untrained features: more than chance, far from a trained network's."""
    random = np.random.default_rng(1)
    pictures, issame = [], []
    for pair in range(600):
        one, other = random.choice(150, 2, replace=False).tolist()
        i, j = random.choice(20, 2, replace=False).tolist()
        pictures += [render(8, one, i), render(8, one if pair % 2 else other, j)]
        issame.append(bool(pair % 2))
    images, coarse = (
        np.stack([cv2.resize(x, (n, n), interpolation=cv2.INTER_AREA) for x in pictures])
        for n in (56, 16)
    )
    edges = np.stack([cv2.Laplacian(x, cv2.CV_32F, ksize=3) for x in images])
    for features in (images, images - images.mean(0), coarse, edges):
        flat = features.reshape(len(features), -1).astype(np.float64)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        assert 0.45 < evaluate(flat, np.array(issame))["accuracy_mean"] < 0.75


def test_any_number_of_processes_writes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parallel, "ITEMS_PER_WORKER", 1)  # processes, for few faces as well
    one = synthesize(tmp_path / "one", FaceOptions(19, 3, seed=4), workers=1)
    two = synthesize(tmp_path / "two", FaceOptions(19, 3, seed=4), workers=2)
    assert one["status"] == two["status"] == "made" and one["total"] == 57
    written = files(tmp_path / "one")
    assert written == files(tmp_path / "two")
    assert len(written) == 57 + 1 and written["000018/0002.jpg"] == encode(4, 18, 2)
    parameters = json.loads(written["synthetic.json"])
    assert parameters == {"version": generate.VERSION, "identities": 19, "images": 3, "seed": 4}


def test_a_second_run_reuses_the_first(tmp_path: Path):
    out = tmp_path / "faces"
    synthesize(out, FaceOptions(3, 2))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert synthesize(out, FaceOptions(3, 2))["status"] == "reused"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


@pytest.mark.parametrize("change", ["other parameters", "an image is gone", "not made here"])
def test_what_cannot_be_reused_is_left_alone(tmp_path: Path, change: str):
    out = tmp_path / "faces"
    options, message = FaceOptions(3, 2), "choose another"
    synthesize(out, options)
    if change == "other parameters":
        options = FaceOptions(3, 2, seed=1)
    elif change == "an image is gone":
        (out / "000001" / "0000.jpg").unlink()
        message = "5 of its 6"
    else:
        (out / "synthetic.json").unlink()
    before = files(out)
    with pytest.raises(FileExistsError, match=message):
        synthesize(out, options)
    assert files(out) == before


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "0001.jpg" and path.parent.name == "000002":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize(tmp_path / "faces", FaceOptions(4, 2))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path):
    (tmp_path / "faces.partial" / "000000").mkdir(parents=True)
    (tmp_path / "faces.partial" / "000099").mkdir()
    mark(tmp_path / "faces.partial")
    synthesize(tmp_path / "faces", FaceOptions(2, 1))
    assert sorted(files(tmp_path)) == [
        "faces/000000/0000.jpg",
        "faces/000001/0000.jpg",
        "faces/synthetic.json",
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["synthesize", str(tmp_path / "faces"), "--identities", "2", "--images", "3"]
    assert main([*words, "--workers", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["status"], printed["total"]) == ("made", 6)
    assert main([*words, "--seed", "5"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("option", ["identities", "images", "workers"])
def test_numbers_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
):
    words = {"identities": "2", "images": "2", "workers": "1"} | {option: "0"}
    line = [word for name, value in words.items() for word in (f"--{name}", value)]
    assert main(["synthesize", str(tmp_path / "faces"), *line]) == 1
    assert f"--{option} 0: must be 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_leave_one_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, write = tmp_path / "faces", generate._write

    def interfered(*task):
        with pytest.raises(FileExistsError, match="another process is writing it"):
            synthesize(out, FaceOptions(3, 2))
        write(*task)

    monkeypatch.setattr(generate, "_write", interfered)
    assert synthesize(out, FaceOptions(3, 2))["status"] == "made"
    assert len(files(tmp_path)) == 3 * 2 + 1
    monkeypatch.undo()
    assert synthesize(out, FaceOptions(3, 2))["status"] == "reused"
