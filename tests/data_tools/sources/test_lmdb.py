"""LMDB databases as the lmdb package writes them."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.sources.lmdb_file import Database
from data_tools.sources.source import open_source
from tests.data_tools.samples import encoded, folder
from tests.data_tools.sources.test_sources import expected, files_of, people

lmdb = pytest.importorskip("lmdb")


@pytest.fixture
def faces(tmp_path):
    return folder(tmp_path / "faces", [3, 2, 4])


def write(path, entries, subdir=False, **how):
    """A database written as users do, in one transaction."""
    env = lmdb.open(str(path), map_size=1 << 26, subdir=subdir, lock=False, **how)
    with env.begin(write=True) as transaction:
        for key, value in entries:
            transaction.put(key, value)
    env.close()
    return path


def numbered(faces):
    """(key, image, label) as HSFace's publishers number them."""
    for n, (name, content) in enumerate(sorted(files_of(faces).items())):
        yield str(n).encode(), content, int(name[1:3])


def packed_pair(image, label, *between):
    """msgpack.dumps((image, *between, label)), by the specification."""
    blocks = b"".join(b"\xc5" + struct.pack(">H", len(part)) + part for part in (image, *between))
    number = bytes([label]) if 0 <= label < 128 else b"\xd2" + struct.pack(">i", label)
    return bytes([0x92 + len(between)]) + blocks + number


NOTES = [(b"__keys__", b"\x90"), (b"__len__", b"\x09"), (b"__classnum__", b"\x03")]


@pytest.mark.parametrize("subdir", [False, True])
def test_keys_that_name_the_identity(faces, tmp_path, subdir):
    entries = [(f"a/set/{name}".encode(), image) for name, image in files_of(faces).items()]
    source = open_source(write(tmp_path / "a.lmdb", entries, subdir))
    assert (source.kind, people(source)) == ("lmdb", expected(faces))


def test_the_order_is_the_folders(tmp_path):
    entries = [
        (f"{name}/{j}.jpg".encode(), encoded(j)) for name in ("p", "p-", "p0") for j in (1, 0)
    ]
    source = open_source(write(tmp_path / "a.lmdb", entries))
    assert source.identities == ["p", "p-", "p0"]
    assert [source.name(i) for i in range(6)] == sorted(
        (key for key, _ in entries), key=lambda key: key.split(b"/")
    )


@pytest.mark.parametrize("between", [(), (b"feature" * 300,)])
def test_msgpack_as_hsface_and_vec2face_publish_it(faces, tmp_path, between):
    entries = [(key, packed_pair(image, label, *between)) for key, image, label in numbered(faces)]
    source = open_source(write(tmp_path / "hsface10k.lmdb", [*entries, *NOTES]))
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}


def test_keys_that_are_numbers_count_as_numbers(tmp_path):
    entries = [(str(n).encode(), packed_pair(encoded(n), n // 20)) for n in range(60)]
    source = open_source(write(tmp_path / "a.lmdb", entries))
    assert [source.name(i) for i in range(60)] == [str(n).encode() for n in range(60)]


def test_pickled_pairs_are_read_without_being_executed(faces, tmp_path):
    entries = [
        (key, pickle.dumps((image, np.int64(label) if label else label)))
        for key, image, label in numbered(faces)
    ]
    source = open_source(write(tmp_path / "a.lmdb", entries))
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_a_pickle_that_asks_for_more_is_refused_by_name(tmp_path, capsys):
    path = write(tmp_path / "a.lmdb", [(b"0", pickle.dumps((b"x", Evil())))])
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert "forbidden global" in error and ".system" in error and "a.lmdb: 0" in error


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("subdir", [True, False])
def test_a_list_of_keys_and_labels(faces, tmp_path, given, subdir):
    entries = [(b"%08d" % int(key), image) for key, image, _ in numbered(faces)]
    path = write(tmp_path / "a.lmdb", [*entries, (b"99999999", encoded(1))], subdir)
    lines = [f"{int(key):08d}\t{label}" for key, _, label in numbered(faces)]
    lines += [lines[0].replace("\t0", "\t2"), "00000077\t1"]
    place = (path / "labels.tsv" if subdir else path.with_suffix(".txt")) if not given else None
    place = place or tmp_path / "mine"
    place.write_text("\n".join(lines))
    source = open_source(path, labels=place if given else None)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    name = "data.mdb" if subdir else "a.lmdb"
    assert source.skipped == [
        (f"{place.name}: 00000000", "listed again with label 2 instead of 0: the first counts"),
        (f"{name}: 99999999", f"no label in {place.name}"),
    ]
    assert source.notes == [f"{place}: 1 key of it are not in the database"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("0\t-1", "line 1: '-1' is not a whole number"),
        ("0\tanna", "line 1: 'anna' is not a whole number"),
        ("0\t", "line 1: '0' is not key<TAB>label"),
        ("0 1", "line 1: '0 1' is not key<TAB>label"),
        ("5\t1", "lists none of the keys"),
        ("", "lists none of the keys"),
    ],
)
def test_bad_lists(tmp_path, line, fault, capsys):
    path = write(tmp_path / "a.lmdb", [(b"0", encoded(0)), (b"1", encoded(1))])
    (tmp_path / "labels").write_text(line)
    command = ["pack", str(path), str(tmp_path / "set"), "--labels", str(tmp_path / "labels")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists() and not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([], "no image in it"),
        ([(b"0", encoded(0))], "the key '0' names no identity, as identity/name would"),
        ([(b"0", b"\x08\x03\x10\x70 a Datum")], "neither images, nor msgpack or pickles"),
        ([(b"0", packed_pair(encoded(0), -3))], "the label of 0: '-3' is not a whole number"),
        ([(b"0", b"\x92\xc4\x02ab\xa4anna")], "the label of 0: 'anna' is not a whole number"),
        ([(b"0", packed_pair(encoded(0), 3)[:-1])], "not msgpack of (image, label)"),
        ([(b"0", pickle.dumps((b"x", 1))[:-3])], "the pickle ends early"),
    ],
)
def test_bad_databases(tmp_path, entries, fault, capsys):
    path = write(tmp_path / "a.lmdb", entries)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.lmdb"]


@pytest.mark.parametrize("flags", [{"dupsort": True}, {}])
def test_databases_in_a_database_are_refused(tmp_path, flags, capsys):
    env = lmdb.open(str(tmp_path / "a.lmdb"), max_dbs=2, subdir=False, lock=False)
    inner = env.open_db(b"inner", **flags)
    with env.begin(write=True) as transaction:
        transaction.put(b"0", b"x", db=inner)
    env.close()
    assert main(["pack", str(tmp_path / "a.lmdb"), str(tmp_path / "set")]) == 1
    assert "'inner' is a database of its own" in capsys.readouterr().err


def thousand(tmp_path):
    """900 images, one of them of many pages."""
    entries = [
        (f"p{n // 9:03d}/{n}.jpg".encode(), encoded(n, suffix=".png" if n == 500 else ".jpg"))
        for n in range(900)
    ]
    return write(tmp_path / "a.lmdb", entries)


def test_the_tree_is_read_as_the_library_reads_it(tmp_path):
    path = thousand(tmp_path)
    entries = [(b"%d" % n, os.urandom(n % 4000)) for n in range(3000)]
    for written in (path, write(tmp_path / "b.lmdb", entries)):
        env = lmdb.open(str(written), subdir=False, readonly=True, lock=False)
        with env.begin() as transaction:
            theirs = list(transaction.cursor())
        env.close()
        with Database(written) as database:
            ours = [
                (value.key, os.pread(database.descriptor, value.size, value.at))
                for value in database.values()
            ]
            assert ours == theirs and database.entries == len(ours)


@pytest.mark.parametrize("kind", ["empty", "cut", "short", "magic"])
def test_a_file_that_is_not_whole(tmp_path, kind, capsys):
    path = thousand(tmp_path)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[:-4096], "short": content[:100],
         "magic": b"\x89HDF" + content[4:16] + bytes(4) + content[20:]}[kind]
    )  # fmt: skip
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    said = {"empty": "an empty file", "cut": "cut short", "short": "not an LMDB", "magic": "HDF5"}
    assert said[kind] in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.lmdb"]


def test_damaged_pages_and_values_are_named_counted_and_skipped(tmp_path, capsys):
    path = thousand(tmp_path)
    content = bytearray(path.read_bytes())
    page = content.index(encoded(500, suffix=".png")[:400]) - 16
    assert page % 4096 == 0
    content[page : page + 8] = bytes(8)
    leaf = next(
        page
        for page in range(0, len(content), 4096)
        if content[page + 10] == 2 and b"p003/27.jpg" in content[page : page + 4096]
    )
    content[leaf : leaf + 4096] = bytes(4096)
    path.write_bytes(content)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 0
    data = shards.open(tmp_path / "set")
    lost = 899 - len(data)
    assert 100 < lost < 200  # the keys of a page
    skipped = (tmp_path / "set" / "skipped.txt").read_text()
    assert f"a.lmdb: page {leaf // 4096}\tdamaged: it is no page of keys" in skipped
    assert "a.lmdb: p055/500.jpg\tdamaged in the database" in skipped
    assert "the database states 900" in capsys.readouterr().err


def test_no_damage_of_its_pages_ends_the_process_otherwise(tmp_path):
    """Single bytes and whole pages at random: each opens, or is a user's error."""
    path = thousand(tmp_path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    with Database(path) as database:
        ends = [value.key for value in database.values()]
    assert len(ends) == 900
    tree = [
        page
        for page in range(0, len(content), 4096)
        if struct.unpack_from("<H", content, page + 10)[0] & 11
    ]
    for _ in range(100):
        damaged = bytearray(content)
        start = int(random.choice(tree))
        for at in random.integers(start, start + 200, 3).tolist():
            damaged[at] = int(random.integers(256))
        path.write_bytes(damaged)
        try:
            with Database(path) as database:
                assert len(list(database.values())) <= 4000
        except ValueError as error:
            assert str(path) in str(error)


def test_many_entries_are_not_held_as_objects(tmp_path):
    entries = ((b"%08d" % n, b"\x92\xc4\x02ab" + bytes([n % 100])) for n in range(10_000))
    path = write(tmp_path / "a.lmdb", entries)
    tracemalloc.start()
    source = open_source(path)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 10_000
    assert held < 10_000 * 60 and most < 10_000 * 150
