"""What `unpack` writes for others, read by their own libraries and by pack."""

import json

import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.inspect import published
from tests.data_tools.packs import by_identity
from tests.data_tools.samples import folder

pq = pytest.importorskip("pyarrow.parquet")
webdataset = pytest.importorskip("webdataset")
yaml = pytest.importorskip("yaml")
NAMES = ["Anna: a", "Björn O'Neil", "yes", "012"]


@pytest.fixture
def data(tmp_path):
    faces = folder(tmp_path / "faces", [5, 3, 4, 2])
    for k, name in enumerate(NAMES):
        (faces / f"p{k:02d}").rename(faces / name)
    assert main(["pack", str(faces), str(tmp_path / "set"), "--shards", "2"]) == 0
    return shards.open(tmp_path / "set")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(published, "_IMAGES", 5)
    monkeypatch.setattr(published, "_GROUP", 2)


def unpack(data, layout, out):
    assert main(["unpack", str(data.path), str(out), "--layout", layout]) == 0
    return out


def test_parquet(data, tmp_path):
    out = unpack(data, "parquet", tmp_path / "out")
    found = []
    for path in sorted((out / "data").iterdir()):
        made = pq.read_table(path)
        features = json.loads(made.schema.metadata[b"huggingface"])["info"]["features"]
        assert features["label"]["names"] == data.identities
        found += [(row["label"], row["image"]["bytes"]) for row in made.to_pylist()]
    assert found == list(data) and len(list((out / "data").iterdir())) == 3
    card = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    _, label = card["dataset_info"]["features"]
    stated = label["dtype"]["class_label"]["names"]
    assert list(stated.values()) == data.identities


def test_webdataset(data, tmp_path):
    out = unpack(data, "webdataset", tmp_path / "out")
    tars = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    found = [(int(sample["cls"]), sample["jpg"]) for sample in samples]
    assert found == list(data) and len(tars) == 3
    assert (out / "classes.txt").read_text().splitlines() == data.identities


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_packed_again_it_is_the_same_people(data, tmp_path, layout):
    out = unpack(data, layout, tmp_path / "out")
    assert main(["pack", str(out), str(tmp_path / "again")]) == 0
    again = by_identity(shards.open(tmp_path / "again"))
    mine = by_identity(data)
    if layout == "webdataset":
        mine = {str(c): mine[name] for c, name in enumerate(data.identities)}
    assert again == mine


def test_a_card_alone_names_the_people(data, tmp_path):
    """The names of README.md hold where the files carry no features."""
    out = unpack(data, "parquet", tmp_path / "out")
    for path in (out / "data").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert main(["pack", str(out), str(tmp_path / "again")]) == 0
    assert by_identity(shards.open(tmp_path / "again")) == by_identity(data)
