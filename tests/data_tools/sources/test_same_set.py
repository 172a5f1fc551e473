"""The same images make the same set, whatever holds them."""

import io
import tarfile
import zipfile

import pytest

from data_tools import shards
from data_tools.__main__ import main
from tests.data_tools.samples import folder
from tests.data_tools.sources.test_lmdb import numbered, packed_pair
from tests.data_tools.sources.test_lmdb import write as write_lmdb
from tests.data_tools.sources.test_parquet import columns, table
from tests.data_tools.sources.test_parquet import write as write_parquet
from tests.data_tools.sources.test_sources import files_of
from tests.data_tools.sources.test_table import rows_of
from tests.data_tools.sources.test_table import write as write_table
from tests.data_tools.sources.test_webdataset import samples_of
from tests.data_tools.sources.test_webdataset import write as write_webdataset


def make_zip(faces, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(files_of(faces).items()):
            archive.writestr(name, content)


def make_tar(faces, path):
    with tarfile.open(path, "w") as archive:
        for name, content in sorted(files_of(faces).items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def sources(tmp_path):
    faces = folder(tmp_path / "faces", [12, 7, 9, 3])
    files = sorted(files_of(faces).items())
    pairs = [(key, packed_pair(image, label)) for key, image, label in numbered(faces)]
    write_lmdb(tmp_path / "keys.lmdb", [(name.encode(), image) for name, image in files])
    write_lmdb(tmp_path / "pairs.lmdb", pairs)
    write_parquet(tmp_path / "a.parquet", table(*columns(faces)))
    write_webdataset(tmp_path / "samples.tar", samples_of(faces))
    write_webdataset(tmp_path / "backwards.tar", sorted(
        samples_of(faces), key=lambda sample: -sample["cls"])
    )  # fmt: skip
    write_table(faces / "faces.csv", rows_of(faces))
    make_zip(faces, tmp_path / "faces.zip")
    make_tar(faces, tmp_path / "faces.tar")
    return [path for path in sorted(tmp_path.iterdir()) if path != faces] + [
        faces, faces / "faces.csv",
    ]  # fmt: skip


def test_one_fingerprint(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets")
    found = {}
    for n, source in enumerate(sources):
        assert main(["pack", str(source), str(out / str(n)), "--shards", "3"]) == 0
        found[source.name] = shards.open(out / str(n)).fingerprint
    assert len(found) == 9 and len(set(found.values())) == 1
    other = ["pack", str(sources[0]), str(out / "seed"), "--shards", "3", "--seed", "1"]
    assert main(other) == 0
    assert shards.open(out / "seed").fingerprint not in found.values()
