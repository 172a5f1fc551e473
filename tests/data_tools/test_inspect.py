"""`inspect`: the facts of a data set, for a person and as JSON."""

import json

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.inspect import _histogram
from data_tools.pack import pack
from data_tools.pack_options import Options
from tests.data_tools.samples import folder
from tests.data_tools.test_shards import insightface_set
from tests.real import real


def inspect(path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def test_shards(tmp_path, capsys):
    source = folder(tmp_path / "faces", [1, 2, 7, 9, 5, 6])
    options = Options(shards=6, seed=3, hold_out=2, pairs=20)
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
    pack(folder(tmp_path / "faces", [1, 1]), tmp_path / "set", Options(shards=2))
    facts, text = inspect(tmp_path / "set", capsys)
    first = facts["shards"][0]
    assert 1000 < first["bytes"] < 1e6
    assert f"{first['name']}  1 image, {first['bytes'] / 1000:.1f} kB" in text
    assert "0.0 MB" not in text and "1 to 1 image, " in text
