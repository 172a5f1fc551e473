"""Parquet files as pyarrow writes them, laid out as Hugging Face's `datasets` does."""

import errno
import json
import os
import sys

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.sources.labels import Fields
from data_tools.sources.source import open_source
from tests.data_tools.samples import encoded, folder
from tests.data_tools.sources.test_sources import expected, files_of, people

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def faces(tmp_path):
    return folder(tmp_path / "faces", [3, 2, 4])


def columns(faces):
    found = sorted(files_of(faces).items())
    return [image for _, image in found], [int(name[1:3]) for name, _ in found]


def table(images, labels, struct=True, names=None, label="label"):
    if struct:
        images = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
    made = pa.table({"image": images, label: pa.array(labels, pa.int64())})
    if names:
        features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    return made


def write(path, made, rows=4, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=rows, **how)
    return path


def numbers(faces):
    return {str(k): v for k, v in enumerate(expected(faces).values())}


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_file_is_the_folder_whose_images_it_holds(faces, tmp_path, struct, rows):
    path = write(tmp_path / "a.parquet", table(*columns(faces), struct), rows)
    source = open_source(path)
    assert (source.kind, people(source)) == ("parquet", numbers(faces))


@pytest.mark.parametrize("metadata", [True, False])
def test_a_repository_of_datasets(faces, tmp_path, metadata):
    images, labels = columns(faces)
    names = ["anna", "Björn O'Neil", "c: d"]
    root = tmp_path / "repo"
    stated = names if metadata else None
    for n in range(2):
        name = f"train-{n:05d}-of-00002.parquet"
        made = table(images[n::2], labels[n::2], names=stated)
        write(root / "data" / name, made)
    write(root / "data" / "test-00000-of-00001.parquet", table(images[:1], [-1]))
    (root / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': anna\n"
        "          '1': Björn O'Neil\n          '2': 'c: d'\n  splits:\n  - name: train\n"
        "---\n# Faces\n"
    )
    source = open_source(root)
    assert people(source) == dict(zip(names, expected(faces).values(), strict=True))
    assert "the split train is packed; the files of test are left out" in source.notes[0]


def test_columns_by_name(faces, tmp_path):
    images, labels = columns(faces)
    made = pa.table({"jpg": images, "id": pa.array(labels, pa.uint16()), "label": ["x"] * 9})
    path = write(tmp_path / "a.parquet", made)
    assert people(open_source(path, fields=Fields("jpg", "id"))) == numbers(faces)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (pa.table({"a": [1], "label": [1]}), "no column 'image'; its columns are a, label: name"),
        (pa.table({"image": [b"x"], "a": [1]}), "no column 'label'; its columns are image, a"),
        (pa.table({"image": [1], "label": [1]}), "the column 'image' is of type int64"),
        (pa.table({"image": [b"x"], "label": ["anna"]}), "the column 'label' is of type string"),
        (table([b"x"] * 3, [0, 1, -1]), "row 2: '-1' is not a whole number from 0 below 2^31"),
        (table([b"x"] * 6, [0, 1, 1, 1, None, 2]), "row 4: the label is missing"),
        (table([b"x"] * 2, [0, 2], names=["a", "b"]), "the label 2, but its features name 2"),
        (table([b"x"] * 2, [0, 1], names=["a", "a"]), "its features name two classes 'a'"),
        (table([b"x"], [1]).slice(1), "no image in it"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path, made, fault, capsys):
    path = write(tmp_path / "a.parquet", made)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("kind", ["empty", "cut", "magic"])
def test_a_file_that_is_not_whole(faces, tmp_path, kind, capsys):
    path = write(tmp_path / "a.parquet", table(*columns(faces)))
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "magic": b"\x89HDF" + whole[4:-4] + b"xxxx"}
        [kind]
    )  # fmt: skip
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert f"{path}: not a whole parquet file" in error and error.count("\n") == 1
    assert not (tmp_path / "set.partial").exists()


def test_damaged_groups_and_rows_are_named_counted_and_skipped(faces, tmp_path):
    images, labels = columns(faces)
    images += [None, encoded(1)[:-200], b"no image"]
    path = write(tmp_path / "a.parquet", table(images, [*labels, 2, 2, 2]), rows=2)
    whole = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    at = column.data_page_offset
    whole[at : at + 12] = b"\xff" * 12  # the header of a page
    path.write_bytes(whole)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 0
    data = shards.open(tmp_path / "set")
    assert (len(data), data.num_classes) == (7, 3)
    skipped = dict(
        line.split("\t") for line in (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    )
    assert skipped.keys() == {f"a.parquet: row {n}" for n in (2, 3, 9, 10, 11)}
    assert skipped["a.parquet: row 2"].startswith("damaged: ")
    assert skipped["a.parquet: row 9"] == "no image bytes in this row, only the path '9.jpg'"
    assert not (tmp_path / "set" / "staged").exists()


def test_an_error_of_the_disk_is_not_damage(faces, tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", table(*columns(faces)))
    images = open_source(path).select(np.arange(2))

    def failing(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", failing)
    with pytest.raises(OSError, match="a.parquet") as raised:
        images.read(0)
    assert raised.value.errno == errno.EIO


def test_every_row_group_is_decoded_once_and_staged_images_are_used_again(faces, tmp_path):
    source = open_source(write(tmp_path / "a.parquet", table(*columns(faces)), rows=2))
    source.stage(tmp_path / "staged", np.array([0, 3, 8]))
    before = (tmp_path / "staged" / "images").stat()
    (tmp_path / "a.parquet").unlink()
    some = source.select(np.array([8, 0]))
    images, _ = columns(faces)
    assert [some.read(n) for n in range(2)] == [images[8], images[0]]
    source.stage(tmp_path / "staged", np.array([0, 3, 8]))  # without the file it came from
    assert (tmp_path / "staged" / "images").stat() == before


def test_without_pyarrow_the_error_names_the_extra(faces, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.parquet", table(*columns(faces)))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert "pip install 'arcline[formats]'" in error and error.count("\n") == 1


def test_arrow_files_of_save_to_disk_are_refused_with_the_way_on(tmp_path, capsys):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "state.json").write_text("{}")
    (tmp_path / "ds" / "data-00000-of-00001.arrow").write_bytes(b"x")
    assert main(["pack", str(tmp_path / "ds"), str(tmp_path / "set")]) == 1
    assert "to_parquet" in capsys.readouterr().err
