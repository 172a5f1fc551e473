"""`verify`: silent on what is sound, and names every record that is not."""

import hashlib
import json
import os
import re

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.common import parallel
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.recordio import Header, Writer
from tests.data_tools.inspect.test_inspect import records_with_a_gap
from tests.data_tools.samples import encoded, folder
from tests.data_tools.test_shards import edit_index, insightface_set
from tests.real import real

FIRST, SECOND = "train-00000-of-00002", "train-00001-of-00002"


@pytest.fixture
def packed(tmp_path):
    """Ten images of three identities in two shards."""
    pack(folder(tmp_path / "faces", [4, 3, 3]), tmp_path / "set", PackOptions(shards=2))
    return tmp_path / "set"


def verify(path, capsys, *arguments):
    """Exit code, the result, and what was printed."""
    code = main(["verify", str(path), "--workers", "1", "--json", *arguments])
    *lines, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), lines


def poke(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_sound_set(packed, capsys, workers, monkeypatch):
    monkeypatch.setattr(parallel, "ITEMS_PER_WORKER", 1)  # processes, for few records as well
    code, result, lines = verify(packed, capsys, "--deep", "--workers", workers)
    assert code == 0
    assert result == {"ok": True, "path": str(packed), "records": 10, "deep": True, "bad": []}
    assert lines == [f"{packed}: 10 records, 0 faults"]


def test_every_bad_record_is_named(packed, capsys):
    offsets = shards.open(packed).offsets
    rec = packed / f"{SECOND}.rec"
    poke(rec, int(offsets[6]), b"\0\0\0\0")  # key 1: no magic
    poke(rec, int(offsets[8]) + 12, np.float32(7).tobytes())  # key 3: another label
    poke(rec, int(offsets[9]) + 16, b"\x63")  # key 4: another id
    code, result, lines = verify(packed, capsys)
    assert code == 1 and not result["ok"]
    named = {bad["key"]: bad for bad in result["bad"] if bad["key"] is not None}
    assert named.keys() == {1, 3, 4}
    assert named[1]["byte"] == offsets[6]
    assert "is not the magic" in named[1]["problem"]
    assert "the record's label is 7.0, but labels.npy says" in named[3]["problem"]
    assert "the record's id is 99" in named[4]["problem"]
    assert {bad["file"] for bad in result["bad"]} == {f"{SECOND}.rec"}
    assert any("sha256" in bad["problem"] for bad in result["bad"])
    assert lines[1].startswith(f"bad: {SECOND}.rec key 1 byte {offsets[6]}: ")
    assert lines[-1] == f"{packed}: 10 records, 4 faults"


def test_a_length_that_swallows_the_next_record(packed, capsys):
    data = shards.open(packed)
    length = int(data.offsets[2] - data.offsets[0] - 8)
    poke(packed / f"{FIRST}.rec", 4, length.to_bytes(4, "little"))
    _, result, _ = verify(packed, capsys)
    named = [bad for bad in result["bad"] if bad["key"] is not None]
    assert [(bad["key"], bad["byte"]) for bad in named] == [(0, 0)]
    problem = f"ends at byte {data.offsets[2]}, but the next record starts at {data.offsets[1]}"
    assert named[0]["problem"] == problem


def test_pixels_are_looked_at_only_when_deep(packed, capsys):
    data = shards.open(packed)
    rec = packed / f"{FIRST}.rec"
    end = 8 + 24 + len(data[0][1])
    poke(rec, end - 2, b"\0\0")  # the end marker of the JPEG with key 0
    edit_index(packed, shards=[
        {**shard, "sha256": {**shard["sha256"], "rec": sha256}}
        for shard, sha256 in zip(
            data.index["shards"], (sha(rec), data.index["shards"][1]["sha256"]["rec"]), strict=True
        )
    ])  # fmt: skip
    assert verify(packed, capsys)[0] == 0
    code, result, _ = verify(packed, capsys, "--deep")
    assert code == 1
    assert [(bad["file"], bad["key"]) for bad in result["bad"]] == [(f"{FIRST}.rec", 0)]
    assert "truncated" in result["bad"][0]["problem"]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (lambda p: (p / f"{FIRST}.rec").unlink(), f"{FIRST}.rec", "missing"),
        (lambda p: (p / f"{FIRST}.idx").unlink(), f"{FIRST}.idx", "missing"),
        (lambda p: (p / "labels.npy").unlink(), "labels.npy", "missing"),
        (
            lambda p: (p / "identities.txt").write_text("ann\n"),
            "identities.txt",
            "1 name for 3 classes",
        ),
        (
            lambda p: (p / f"{FIRST}.idx").write_text("0\t0\n"),
            f"{FIRST}.idx",
            "keys are not 0 .. 4",
        ),
        (lambda p: (p / f"{FIRST}.idx").write_text("0 0\n"), FIRST, "is not key<TAB>offset"),
        (lambda p: os.truncate(p / f"{FIRST}.rec", 300), f"{FIRST}.rec", "file ends at byte 300"),
        (lambda p: np.save(p / "labels.npy", np.full(10, 3)), "labels.npy", r"outside \[0, 3\)"),
        (lambda p: np.save(p / "labels.npy", np.zeros(10, int)), "labels.npy", "the class sizes"),
        (
            lambda p: np.save(p / "labels.npy", np.zeros(9, int)),
            "labels.npy",
            r"needs int64 \[10\]",
        ),
        (
            lambda p: np.save(p / "offsets.npy", np.zeros(10, int)),
            f"{FIRST}.idx",
            "4 offsets not as in offsets.npy",
        ),
    ],
)
def test_every_file_is_checked(packed, capsys, damage, file, problem):
    damage(packed)
    code, result, lines = verify(packed, capsys)
    assert code == 1
    assert any(bad["file"] == file and re.search(problem, bad["problem"]) for bad in result["bad"])
    assert len(lines) == len(result["bad"]) + 1


def test_a_damaged_pair_file_is_named(tmp_path, capsys):
    source = folder(tmp_path / "faces", [6, 6, 6, 6])
    pack(source, tmp_path / "set", PackOptions(shards=1, hold_out=2, pairs=20))
    assert verify(tmp_path / "set", capsys)[0] == 0
    poke(tmp_path / "set" / "heldout.bin", 100, b"\0\1\2\3")
    _, result, _ = verify(tmp_path / "set", capsys)
    assert [bad["file"] for bad in result["bad"]] == ["heldout.bin"]


def test_what_cannot_be_verified(tmp_path, capsys):
    for path, fault in ((tmp_path, "no data set"), (tmp_path / "absent", "no such directory")):
        assert main(["verify", str(path)]) == 1
        assert fault in capsys.readouterr().err
    (tmp_path / "index.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


# --- InsightFace directories ---


@pytest.mark.parametrize("vector", [False, True])
def test_insightface_directories(tmp_path, capsys, vector):
    path = insightface_set(tmp_path / "rec", [0, 0, 1, 2], vector)
    code, result, _ = verify(path, capsys)
    assert (code, result["records"]) == (0, 8)  # four images, three identities, the header
    code, result, _ = verify(path, capsys, "--deep")
    assert [bad["key"] for bad in result["bad"]] == [1, 2, 3, 4]  # the images are text here


def test_bad_records_of_an_insightface_directory(tmp_path, capsys):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key, label in ((4, 0), (9, 5), (2, 1), (7, 0.5)):
            writer.write(key, Header(0, label, key, 0), encoded(key))
    (tmp_path / "property").write_text("2,112,112\n")
    _, result, _ = verify(tmp_path, capsys, "--deep")
    assert [bad["key"] for bad in result["bad"]] == [9, 7]
    size = (tmp_path / "train.rec").stat().st_size
    os.truncate(tmp_path / "train.rec", size - 4)
    _, result, _ = verify(tmp_path, capsys)
    assert [bad["key"] for bad in result["bad"]] == [9, 7]
    assert "the file ends at" in result["bad"][1]["problem"]


def test_an_idx_with_a_gap_names_the_way_to_the_records_in_it(tmp_path, capsys):
    root = records_with_a_gap(tmp_path / "set")
    code, result, _ = verify(root, capsys)
    assert code == 1 and len(result["bad"]) == 1
    assert "--walk of pack and inspect reads the .rec" in result["bad"][0]["problem"]


def test_an_idx_beyond_the_file_names_every_key(tmp_path, capsys):
    path = insightface_set(tmp_path / "rec", [0, 1, 1])
    lines = (path / "train.idx").read_text().splitlines()
    lines[1], lines[4] = "2\t80000", "5\t80004"
    (path / "train.idx").write_text("\n".join(lines) + "\n")
    code, result, _ = verify(path, capsys)
    assert code == 1
    assert {2, 5} <= {bad["key"] for bad in result["bad"]}


def test_a_rec_without_idx_that_is_cut(tmp_path, capsys):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key in range(4):
            writer.write(key, Header(0, 0, key, 0), encoded(key))
    (tmp_path / "train.idx").unlink()
    assert verify(tmp_path, capsys)[0] == 0
    os.truncate(tmp_path / "train.rec", (tmp_path / "train.rec").stat().st_size - 8)
    code, result, _ = verify(tmp_path, capsys)
    assert code == 1
    assert any(bad["key"] == 3 for bad in result["bad"])


@pytest.mark.parametrize(
    "name", ["london/recbuilder", "london/face2rec2", "london/seq", "popkorn", "EsraaRagaa"]
)
def test_real_files_are_sound(capsys, name):
    code, result, lines = verify(real(f"recordio/{name}"), capsys, "--deep")
    assert code == 0, lines
    assert result["records"] in (307, 204, 8, 1632)
