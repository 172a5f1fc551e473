"""`inspect`: the facts of a data set, for a person and as JSON."""

import json
import pickle

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.inspect.inspect import _histogram
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.recordio import Header, Writer
from data_tools.union import Union
from tests.data_tools.samples import encoded, folder
from tests.data_tools.test_shards import insightface_set
from tests.real import real


def inspect(path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def test_shards(tmp_path, capsys):
    source = folder(tmp_path / "faces", [1, 2, 7, 9, 5, 6])
    options = PackOptions(shards=6, seed=3, hold_out=2, pairs=20)
    pack(source, tmp_path / "set", options)
    facts, text = inspect(tmp_path / "set", capsys)
    held = (tmp_path / "set" / "heldout.txt").read_text()
    sizes = sorted(n for k, n in enumerate([1, 2, 7, 9, 5, 6]) if f"p{k:02d}" not in held)
    assert (facts["images"], facts["classes"], facts["image_size"]) == (sum(sizes), 4, [112, 112])
    expected = {"min": sizes[0], "median": (sizes[1] + sizes[2]) / 2, "max": sizes[3]}
    assert facts["images_per_class"] == expected
    assert sum(row["classes"] for row in facts["histogram"]) == 4
    assert len(facts["shards"]) == 6 and len(facts["fingerprint"]) == 12
    assert facts["bytes"] == sum(p.stat().st_size for p in (tmp_path / "set").glob("*.rec"))
    assert facts["verification"][0]["file"] == "heldout.bin"
    assert facts["options"]["seed"] == 3 and facts["held_out"]["identities"] == 2
    for line in (
        "classes      4",
        "format       arcline-shards (",
        "112x112",
        "seed=3",
        "2 held out",
        "heldout.bin",
        "and 2 more",
    ):
        assert line in text
    assert facts["fingerprint"] in text


def test_the_fingerprint_tells_sets_apart(tmp_path, capsys):
    found = []
    for name, labels in (("a", [0, 1, 1]), ("b", [0, 0, 1]), ("c", [0, 1, 1])):
        path = insightface_set(tmp_path / name, labels)
        found.append(inspect(path, capsys)[0]["fingerprint"])
    assert found[0] == found[2] != found[1]


def test_histogram_steps_double():
    sizes = np.array([0, 1, 1, 2, 3, 4, 4, 5, 8, 9, 16, 17])
    assert [(row["from"], row["to"], row["classes"]) for row in _histogram(sizes)] == [
        (0, 0, 1), (1, 1, 2), (2, 2, 1), (3, 4, 3), (5, 8, 2), (9, 16, 2), (17, 32, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "images", "classes", "layout"),
    [
        ("london/face2rec2", 204, 102, "layout A"),
        ("london/seq", 204, 102, "plain records"),
        ("popkorn", 8, 2, "plain records"),
    ],
)
def test_insightface_directories(capsys, name, images, classes, layout):
    facts, text = inspect(real(f"recordio/{name}"), capsys)
    assert (facts["images"], facts["classes"]) == (images, classes)
    assert layout in text
    assert "skipped" not in facts


def test_what_is_no_data_set(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"data_tools pack {tmp_path} OUT`" in error


def test_one_of_a_kind_and_small_sizes(tmp_path, capsys):
    pack(folder(tmp_path / "faces", [1, 1]), tmp_path / "set", PackOptions(shards=2))
    facts, text = inspect(tmp_path / "set", capsys)
    first = facts["shards"][0]
    assert 1000 < first["bytes"] < 1e6
    assert f"{first['name']}  1 image, {first['bytes'] / 1000:.1f} kB" in text
    assert "0.0 MB" not in text and "1 to 1 image, " in text


def records_with_a_gap(root, number=9, lost=(3, 4)):
    """A plain .rec of `number` images; the .idx lacks the lines `lost`."""
    root.mkdir()
    with Writer(root / "train.idx", root / "train.rec") as writer:
        for i in range(number):
            writer.write(i, Header(0, float(i % 3), i, 0), encoded(i))
    lines = (root / "train.idx").read_text().splitlines(keepends=True)
    (root / "train.idx").write_text("".join(x for i, x in enumerate(lines) if i not in lost))
    return root


def test_records_on_no_line_of_the_idx_are_counted_and_walked(tmp_path, capsys):
    root = records_with_a_gap(tmp_path / "set")
    assert shards.open(root).class_counts() == (7, 3, 0, 0, 2)
    both = Union([shards.open(root), shards.open(root, walk=True)])
    assert both.class_counts() == (16, 6, 0, 0, 2) and "2 of the records" in both.unlisted_note()
    for path in (root, root / "train.rec"):
        assert main(["inspect", str(path), "--json"]) == 0
        said = capsys.readouterr().out
        assert '"images": 7' in said and '"unlisted_records": 2' in said and "--walk" in said
        assert main(["inspect", str(path), "--walk", "--json"]) == 0
        said = capsys.readouterr().out
        assert '"images": 9' in said and "unlisted" not in said
    for words, images in (([], 7), (["--walk"], 9)):
        out = tmp_path / f"out{images}"
        assert main(["pack", str(root), str(out), "--shards", "1", *words]) == 0
        assert len(shards.open(out)) == images
        assert ("does not list 2 of the records" in capsys.readouterr().err) == (images == 7)
    walked = pickle.loads(pickle.dumps(shards.open(root, walk=True)))
    assert len(walked) == 9


@pytest.mark.parametrize("words", [[], ["--walk"]])
def test_a_broken_frame_costs_that_record(tmp_path, words, capsys):
    root = records_with_a_gap(tmp_path / "set", lost=())
    offsets = shards.open(root).offsets
    content = bytearray((root / "train.rec").read_bytes())
    content[offsets[4]] ^= 1  # of the magic
    (root / "train.rec").write_bytes(content)
    assert main(["inspect", str(root), *words, "--json"]) == 0
    assert '"images": 8' in (said := capsys.readouterr().out) and f"byte {offsets[4]}" in said
    assert main(["pack", str(root), str(tmp_path / "out"), "--shards", "1", *words]) == 0
    listed = (tmp_path / "out" / "skipped.txt").read_text()
    assert listed.endswith(f"train.rec: byte {offsets[4]}\tthe record cannot be read\n")
    with pytest.raises(ValueError, match=f"train.rec: byte {offsets[4]}: 0x"):
        shards.open(root).labels  # noqa: B018
    assert main(["verify", str(root / "train.rec")]) == 1
    assert f"byte {offsets[4]}" in capsys.readouterr().out


def test_another_file_under_the_name_of_a_rec_is_named(tmp_path, capsys):
    (tmp_path / "train.rec").write_bytes(b"<!DOCTYPE html><html>not here</html>")
    assert main(["inspect", str(tmp_path / "train.rec")]) == 1
    assert "it is an HTML page" in capsys.readouterr().err
