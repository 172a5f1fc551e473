"""Tables of paths and labels (CSV, TSV) as sources."""

import csv

import pytest

from data_tools.__main__ import main
from data_tools.sources.labels import Fields
from data_tools.sources.source import open_source
from tests.data_tools.samples import folder
from tests.data_tools.sources.test_sources import expected, files_of, people


@pytest.fixture
def faces(tmp_path):
    return folder(tmp_path / "faces", [3, 2, 4])


def write(path, rows, **how):
    with open(path, "w", newline="") as file:
        csv.writer(file, **how).writerows(rows)
    return path


def rows_of(faces):
    return [[name, int(name[1:3])] for name in sorted(files_of(faces))]


@pytest.mark.parametrize("header", [None, ["image", "label"], ["path", "label"]])
@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_is_the_folder_that_it_lists(faces, tmp_path, header, suffix, separator):
    rows = ([header] if header else []) + rows_of(faces)
    path = write(tmp_path / f"a{suffix}", rows, delimiter=separator)
    source = open_source(path, root=faces)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    assert (source.kind, source.skipped) == ("table", [])


def test_columns_by_name_and_quoted_paths(faces, tmp_path):
    (faces / "p00" / "0.jpg").rename(faces / "p00" / 'a, "b".jpg')
    rows = [["id", "file", "n"]] + [[label, name, 9] for name, label in rows_of(faces)]
    source = open_source(write(tmp_path / "a.csv", rows), root=faces, fields=Fields("file", "id"))
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    other = open_source(write(tmp_path / "a.csv", rows), root=faces, fields=Fields("file", "n"))
    assert other.identities == ["9"] and other.sha256 != source.sha256


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no image in it; it is an empty file"),
        ("image,label\n", "no image in it"),
        ("a/0.jpg,1\na/1.jpg,-1\n", "line 2: '-1' is not a whole number"),
        ("a/0.jpg,1\na/1.jpg,anna\n", "line 2: 'anna' is not a whole number"),
        ("a/0.jpg,anna\na/1.jpg,2\n", "line 1: 'anna' is not a whole number"),
        ("a/0.jpg,1\na/1.jpg,\n", "line 2: the label is missing"),
        ("a/0.jpg,1\na/1.jpg\n", "line 2: 'a/1.jpg' has 1 fields"),
        ("a/0.jpg,1\na/1.txt,1\n", "line 2: 'a/1.txt' is not the path of an image"),
        ('a/0.jpg,1\n"a/1.jpg,1\n', "line 2: unexpected end of data"),
        ("file,who,age\na/0.jpg,1,2\n", "line 1: the columns are 'file, who, age': name those"),
        ("\x89HDF\r\n,1\n", "it is an HDF5 file"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path, text, fault, capsys):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="latin1", newline="")
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


def test_a_column_that_is_not_there(tmp_path, capsys):
    path = write(tmp_path / "a.csv", [["image", "label"], ["a/0.jpg", 1]])
    assert main(["pack", str(path), str(tmp_path / "set"), "--label-column", "id"]) == 1
    assert "the columns are 'image, label'" in capsys.readouterr().err


def test_what_a_table_lists_twice_or_is_no_image(faces, tmp_path):
    (faces / "p01" / "0.jpg").write_bytes(b"\xff\xd8 nothing")
    rows = [*rows_of(faces), ["p00/0.jpg", 2], ["p00/gone.jpg", 0], ["p02/.x.jpg", 2]]
    path = write(tmp_path / "a.csv", rows)
    assert main(["pack", str(path), str(tmp_path / "set"), "--root", str(faces)]) == 0
    skipped = (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in skipped) == [
        "p00/0.jpg", "p00/gone.jpg", "p01/0.jpg", "p02/.x.jpg",
    ]  # fmt: skip
    assert "listed again with label 2 instead of 0" in skipped[0]
