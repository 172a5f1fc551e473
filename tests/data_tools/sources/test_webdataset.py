"""Labelled tars as the webdataset package writes them."""

import json

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.sources.labels import Fields
from data_tools.sources.source import open_source
from tests.data_tools.samples import encoded, folder
from tests.data_tools.sources.test_sources import expected, files_of, make_tar, people

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def faces(tmp_path):
    return folder(tmp_path / "faces", [3, 2, 4])


def samples_of(faces, label=lambda k: {"cls": k}):
    """What a user gives to webdataset's writers."""
    for n, (name, content) in enumerate(sorted(files_of(faces).items())):
        yield {"__key__": f"{n:06d}", "jpg": content, **label(int(name[1:3]))}


def write(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.mark.parametrize(
    ("label", "fields"),
    [
        (lambda k: {"cls": k}, Fields()),
        (lambda k: {"json": {"label": k}}, Fields()),
        (lambda k: {"cls": 7, "json": {"id": k}}, Fields(label="id")),
        (lambda k: {"cls": 7, "person.txt": str(k)}, Fields("jpg", "person.txt")),
    ],
)
def test_a_tar_is_the_folder_whose_images_it_holds(faces, tmp_path, label, fields):
    source = open_source(write(tmp_path / "a.tar", samples_of(faces, label)), fields=fields)
    assert source.kind == "webdataset"
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}


def test_a_directory_of_tars_in_any_order(faces, tmp_path):
    samples = list(samples_of(faces))[::-1]
    (tmp_path / "set").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "set" / "%04d.tar"), maxcount=4, verbose=0) as out:
        for sample in samples:
            out.write(sample)
    source = open_source(tmp_path / "set")
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    assert np.all(np.diff(source.labels) >= 0)


def test_what_stands_oddly_is_listed_and_counted(faces, tmp_path):
    bad = encoded(1)[:-300]
    samples = [
        *samples_of(faces, lambda k: {"cls": k, "txt": "a face"}),
        {"__key__": "a", "jpg": encoded(5)},
        {"__key__": "b", "cls": 3},
        {"__key__": "c", "jpg": bad, "cls": 2},
        {"__key__": "d", "jpg": b"no image", "cls": 2},
    ]
    path = write(tmp_path / "a.tar", samples)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 0
    data = shards.open(tmp_path / "set")
    assert (len(data), data.num_classes, data.index["left_out"]) == (9, 3, {".txt": 9})
    skipped = dict(
        line.split("\t") for line in (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    )
    assert skipped.keys() == {"a.tar: a.jpg", "a.tar: c.jpg", "a.tar: d.jpg"}
    assert "no label: neither a .cls" in skipped["a.tar: a.jpg"]
    assert "truncated" in skipped["a.tar: c.jpg"]


def test_a_name_that_appears_twice_counts_once(faces, tmp_path):
    samples = list(samples_of(faces))
    path = write(tmp_path / "a.tar", [*samples, {**samples[0], "cls": 2}])
    source = open_source(path)
    assert len(source) == 9
    assert source.skipped == [("a.tar: 000000.jpg", "appears twice: the last one counts")]
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):  # names start anew in every tar
        write(tmp_path / "set" / f"{name}.tar", samples)
    assert len(open_source(tmp_path / "set")) == 18


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"0.jpg": encoded(1), "0.cls": b"-1"}, "the label of 0.jpg: '-1' is not a whole"),
        ({"0.jpg": encoded(1), "0.cls": b"anna"}, "the label of 0.jpg: 'anna' is not a whole"),
        ({"0.jpg": encoded(1), "0.cls": b""}, "the label is missing"),
        ({"0.jpg": encoded(1), "0.json": b'{"label": [1]}'}, "'[1]' is not a whole number"),
        ({"0.jpg": encoded(1), "0.json": b'{"label"'}, "none has a .cls or .json with a label"),
        ({"0.jpg": encoded(1), "0.png": encoded(1), "0.cls": b"1"}, "has 2 images: name the"),
        ({}, "no image lies in an identity folder"),
    ],
)  # fmt: skip
def test_bad_samples(tmp_path, members, fault, capsys):
    path = make_tar(tmp_path / "a.tar", members)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", ["empty", "cut", "magic"])
def test_bad_tars(faces, tmp_path, kind, capsys):
    path = write(tmp_path / "a.tar", samples_of(faces))
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[: len(content) // 2], "magic": b"\x89HDF" + content[4:]}[kind]
    )
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar", "faces"]


def test_two_kinds_of_tars_are_not_mixed(faces, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.tar", samples_of(faces))
    make_tar(tmp_path / "set" / "b.tar", files_of(faces))
    assert main(["pack", str(tmp_path / "set"), str(tmp_path / "out")]) == 1
    assert "a.tar holds labelled samples, b.tar does not" in capsys.readouterr().err


def test_a_tar_of_folders_with_notes_beside_the_images_stays_one_of_folders(faces, tmp_path):
    members = {}
    for name, content in sorted(files_of(faces).items()):
        members |= {name: content, name.replace(".jpg", ".json"): json.dumps({"age": 3}).encode()}
    source = open_source(make_tar(tmp_path / "a.tar", members))
    assert (source.kind, people(source)) == ("archives", expected(faces))
