"""RecordIO: the bytes of MXNet, read and written, and every way in which they can be broken."""

import multiprocessing
import pickle
import struct
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import recordio
from data_tools.recordio import Header, IndexedReader, RecordFile, Writer, frame
from tests.real import real

MAGIC = bytes.fromhex("0a23d7ce")


def word(value: int) -> bytes:
    return struct.pack("<I", value)


def piece(cflag: int, payload: bytes) -> bytes:
    """A framed piece, by the book: 8 bytes of head, zeros up to a multiple of 4."""
    return MAGIC + word(cflag * 2**29 + len(payload)) + payload + b"\0" * (-len(payload) % 4)


def head(flag: int = 0, label: float = 0.0, id_: int = 0, id2: int = 0) -> bytes:
    return struct.pack("<IfQQ", flag, label, id_, id2)


def write(folder, records, name="train"):
    rec, idx = folder / f"{name}.rec", folder / f"{name}.idx"
    with Writer(idx, rec) as writer:
        for key, header, payload in records:
            writer.write(key, header, payload)
    return idx, rec


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (b"", piece(0, head())),
        (b"abc", piece(0, head() + b"abc")),
        (b"abcd", piece(0, head() + b"abcd")),
        (MAGIC, piece(1, head()) + piece(3, b"")),
        (b"xxxx" + MAGIC + b"yy", piece(1, head() + b"xxxx") + piece(3, b"yy")),
        (MAGIC * 2 + b"q", piece(1, head()) + piece(2, b"") + piece(3, b"q")),
        (b"xx" + MAGIC + b"zz", piece(0, head() + b"xx" + MAGIC + b"zz")),
        (b"x" + MAGIC + b"xxx" + MAGIC, piece(1, head() + b"x" + MAGIC + b"xxx") + piece(3, b"")),
        (MAGIC[:3], piece(0, head() + MAGIC[:3])),
    ],
)
def test_the_bytes_on_disk(tmp_path, payload, stored):
    idx, rec = write(tmp_path, [(7, Header(0, 0.0, 0, 0), payload)])
    assert rec.read_bytes() == stored
    assert idx.read_bytes() == b"7\t0\n"
    assert IndexedReader(idx, rec)[7] == (Header(0, 0.0, 0, 0), payload)


def test_a_magic_in_the_header_is_cut_too(tmp_path):
    idx, rec = write(tmp_path, [(0, Header(0, 1.0, 0xCED7230A, 5), b"image")])
    whole = head(0, 1.0, 0xCED7230A, 5) + b"image"
    assert rec.read_bytes() == piece(1, whole[:8]) + piece(3, whole[12:])
    reader = IndexedReader(idx, rec)
    assert reader[0] == (Header(0, 1.0, 0xCED7230A, 5), b"image")
    flags, labels = reader.file.first_labels(reader.offsets)
    assert (flags.tolist(), labels.tolist()) == ([0], [1.0])


def test_labels_set_the_flag(tmp_path):
    records = [
        (0, Header(9, 3.0, 1, 2), b"a"),  # a scalar forces flag 0
        (1, Header(1, np.array([4, 0.5], np.float64), 3, 4), b"b"),  # an array, its length
    ]
    idx, rec = write(tmp_path, records)
    expected = piece(0, head(0, 3.0, 1, 2) + b"a")
    expected += piece(0, head(2, 0.0, 3, 4) + struct.pack("<2f", 4, 0.5) + b"b")
    assert rec.read_bytes() == expected
    with IndexedReader(idx, rec) as reader:
        header, payload = reader[1]
        assert (header.flag, header.id, header.id2, payload) == (2, 3, 4, b"b")
        assert header.label.dtype == np.float32
        assert header.label.tolist() == [4.0, 0.5]
        assert reader.raw(0) == head(0, 3.0, 1, 2) + b"a"


def test_values_that_do_not_fit_are_refused(tmp_path):
    with Writer(tmp_path / "a.idx", tmp_path / "a.rec") as writer:
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(0, Header(0, 0.0, -1, 0), b"")
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(0, Header(0, 1e300, 0, 0), b"")
    with pytest.raises(ValueError, match="536870912 bytes"):
        frame(bytes(2**29))
    assert (tmp_path / "a.rec").read_bytes() == b""


def test_offsets_beyond_4_gib(tmp_path):
    rec, idx = tmp_path / "big.rec", tmp_path / "big.idx"
    offset = 5 * 2**30 + 12
    with open(rec, "wb") as file:
        file.seek(offset)  # a hole: no disk is used
        file.write(piece(0, head(0, 2.0) + b"far"))
    idx.write_text(f"3\t{offset}\n")
    reader = IndexedReader(idx, rec)
    assert reader[3] == (Header(0, 2.0, 0, 0), b"far")
    assert reader.file.first_labels(reader.offsets)[1].tolist() == [2.0]


def test_first_labels_of_a_cut_record_in_a_large_file(tmp_path):
    """Its piece's length, with the flag in the top bits, is less than what is left of the file."""
    idx, rec = write(tmp_path, [(0, Header(0, np.array([5.0]), 0xCED7230A, 0), b"x" * 40)])
    with open(rec, "r+b") as file:
        file.truncate(2**30)  # a hole: no disk is used
    flags, labels = RecordFile(rec).first_labels(np.array([0]))
    assert (flags.tolist(), labels.tolist()) == ([1], [5.0])


# --- keys ---


def test_keys_in_any_order(tmp_path):
    keys = [4, 0, 7, 10**12, 1]
    idx, rec = write(tmp_path, [(key, Header(0, i, key, 0), b"x") for i, key in enumerate(keys)])
    reader = IndexedReader(idx, rec)
    assert reader.keys.dtype == reader.offsets.dtype == np.int64
    assert reader.keys.tolist() == keys
    assert [reader[key][0].label for key in keys] == [0, 1, 2, 3, 4]
    assert 7 in reader and 5 not in reader and len(reader) == 5
    with pytest.raises(KeyError, match=r"train.idx: no record has the key 5; its 5 keys: 0 \.\. "):
        reader[5]


def test_keys_come_in_file_order_whatever_the_order_of_the_lines(tmp_path):
    idx, rec = write(tmp_path, [(key, Header(0, key, 0, 0), b"x") for key in (5, 3, 9)])
    idx.write_text("".join(sorted(idx.read_text().splitlines(keepends=True))))
    reader = IndexedReader(idx, rec)
    assert reader.keys.tolist() == [5, 3, 9]
    assert (np.diff(reader.offsets) > 0).all()
    assert [reader[key][0].label for key in (3, 5, 9)] == [3, 5, 9]


def test_without_an_idx_the_file_is_walked(tmp_path):
    records = [(9 - i, Header(0, i, 0, 0), MAGIC * i) for i in range(5)]
    idx, rec = write(tmp_path, records)
    reader = IndexedReader(None, rec)
    assert reader.keys.tolist() == [0, 1, 2, 3, 4]
    assert reader.offsets.tolist() == IndexedReader(idx, rec).offsets.tolist()
    assert [reader[i] for i in range(5)] == [(header, image) for _, header, image in records]


def test_no_records_at_all(tmp_path):
    idx, rec = write(tmp_path, [])
    assert len(IndexedReader(idx, rec)) == len(IndexedReader(None, rec)) == 0
    with pytest.raises(KeyError, match="none"):
        IndexedReader(idx, rec)[0]


@pytest.mark.parametrize("block", [1, 7, 64, 2**24])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_idx_text_in_blocks(tmp_path, monkeypatch, block, ending):
    monkeypatch.setattr(recordio, "_IDX_BLOCK", block)
    lines = [f"{key}\t{offset}" for key, offset in ((3, 0), (1, 40), (2**53 + 1, 2**59 + 3))]
    for last in (ending, ""):
        (tmp_path / "a.idx").write_bytes((ending.join(lines) + last).encode())
        keys, offsets = recordio.read_idx(tmp_path / "a.idx")
        assert keys.tolist() == [3, 1, 2**53 + 1]
        assert offsets.tolist() == [0, 40, 2**59 + 3]


@pytest.mark.parametrize(
    "line", ["", "7", "7 8", "7\t8\t9", "x\t8", "7\t-8", "1.5\t8", "7\t" + "9" * 19, "\t8", "é\t1"]
)
@pytest.mark.parametrize("block", [4, 2**24])
def test_a_bad_line_of_the_idx_is_named(tmp_path, monkeypatch, line, block):
    monkeypatch.setattr(recordio, "_IDX_BLOCK", block)
    (tmp_path / "a.idx").write_text(f"0\t0\n1\t40\n{line}\n3\t80\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.idx: byte 9, line 3: .* is not key<TAB>offset"):
        recordio.read_idx(tmp_path / "a.idx")


def test_an_idx_of_another_file(tmp_path):
    idx, rec = write(tmp_path, [(key, Header(0, 0, 0, 0), b"x" * 8) for key in range(3)])
    idx.write_text("0\t0\n1\t400\n2\t800\n")
    with pytest.raises(
        ValueError, match=r"key 1 points to byte 400, but .*train\.rec ends at byte 120; 2 of 3"
    ):
        IndexedReader(idx, rec)
    idx.write_text("0\t0\n1\t4\n2\t81\n")
    reader = IndexedReader(idx, rec)
    with pytest.raises(ValueError, match=r"train\.rec: byte 4: 0x00000020 is not the magic"):
        reader[1]
    with pytest.raises(ValueError, match=r"train\.rec: byte 81: not an offset"):
        reader[2]


def test_an_idx_that_is_cut_short(tmp_path):
    """Each record: 8 bytes of frame, 24 of header, 5 of image, 3 of padding."""
    idx, rec = write(tmp_path, [(key, Header(0, 0, 0, 0), b"image") for key in range(40)])
    lines = idx.read_text().splitlines(keepends=True)
    assert len(IndexedReader(idx, rec)) == 40
    for kept in (0, 13, 39):
        idx.write_text("".join(reversed(lines[:kept])))
        fault = rf"train\.idx: .* byte {40 * kept} of .*train\.rec, .* {40 * (40 - kept)} bytes"
        with pytest.raises(ValueError, match=fault):
            IndexedReader(idx, rec)
    idx.write_text("".join(lines)[:-1])  # "39<TAB>1560" without its end is byte 156
    assert len(IndexedReader(idx, rec)) == 40
    idx.write_text("".join(lines)[:-2])
    with pytest.raises(ValueError, match=r"covers the last 40 bytes"):
        IndexedReader(idx, rec)


def test_duplicate_keys(tmp_path):
    idx, rec = write(tmp_path, [(key, Header(0, 0, 0, 0), b"") for key in (1, 5, 2, 5, 2)])
    with pytest.raises(ValueError, match=r"train\.idx: two lines have the key 2 \(1 other"):
        IndexedReader(idx, rec)


# --- damage ---


@pytest.mark.parametrize(
    ("damaged", "at", "fault"),
    [
        (b"\1" + MAGIC[1:] + word(0), 0, "is not the magic 0xCED7230A"),
        (MAGIC, 0, "the file ends at byte 4"),
        (MAGIC + word(100) + b"x" * 96, 0, r"goes on to byte 144, but the file ends at byte 140"),
        (MAGIC + word(3) + b"xyz", 0, "goes on to byte 48"),  # its padding is cut off
        (piece(2, b"abcd"), 0, r"a continuation \(flag 2\) where a record should start"),
        (piece(3, b"abcd"), 0, r"a continuation \(flag 3\)"),
        (piece(1, b"abcd"), 12, "the file ends at byte 48"),
        (piece(1, b"abcd") + piece(0, b"e"), 12, r"a new record \(flag 0\) starts before the one"),
        (piece(1, b"abcd") + piece(1, b"e"), 12, r"a new record \(flag 1\)"),
        (MAGIC + word(7 << 29), 0, "unknown continuation flag 7"),
        (piece(0, head()[:23]), 0, "a record of 23 bytes has no 24-byte header"),
        (piece(0, head(flag=5) + b"x" * 19), 0, "43 bytes cannot hold the 5 labels"),
    ],
)
def test_damage_is_named_with_its_byte(tmp_path, damaged, at, fault):
    good = piece(0, head() + b"good")  # 36 bytes
    rec, idx = tmp_path / "a.rec", tmp_path / "a.idx"
    rec.write_bytes(good + damaged)
    idx.write_text("0\t0\n1\t36\n")
    reader = IndexedReader(idx, rec)
    assert reader[0][1] == b"good"
    with pytest.raises(ValueError, match=rf"a\.rec: byte {36 + at}\b.*{fault}"):
        reader[1]
    with pytest.raises(ValueError, match=rf"a\.rec: byte {36 + at}\b.*{fault}"):
        reader.file.first_labels(reader.offsets)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzzed_files_give_records_or_named_errors(tmp_path_factory, data):
    pieces = st.sampled_from([MAGIC, word(0), word(24), word(1 << 29), word(3 << 29), b"\xff"])
    raw = b"".join(data.draw(st.lists(st.one_of(pieces, st.binary(max_size=9)), max_size=30)))
    if data.draw(st.booleans()):  # a good file, changed in one place and cut
        good = b"".join(frame(head() + bytes(range(n)) + MAGIC * (n % 3)) for n in range(12))
        place = data.draw(st.integers(0, len(good)))
        raw = (good[:place] + raw + good[place:])[: data.draw(st.integers(0, len(good)))]
    folder = tmp_path_factory.getbasetemp()
    rec, idx = folder / "fuzz.rec", folder / "fuzz.idx"
    rec.write_bytes(raw)
    idx.write_bytes(b"".join(b"%d\t%d\n" % (i, 4 * i) for i in range(len(raw) // 4 + 1)))
    with pytest.raises(ValueError, match="fuzz.idx") if len(raw) % 4 == 0 else _nothing():
        IndexedReader(idx, rec)
    file = RecordFile(rec)
    for offset in range(0, len(raw) + 4, 2):
        for read in (file.read, lambda at: file.first_labels(np.array([at]))):
            try:
                read(offset)
            except ValueError as error:
                assert "fuzz.rec: byte" in str(error)
    try:
        IndexedReader(None, rec)
    except ValueError as error:
        assert "fuzz.rec: byte" in str(error)


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
@example(b"1\t2\n")
@example(b"\xfe\xff")
def test_fuzzed_idx(tmp_path_factory, text):
    idx = tmp_path_factory.getbasetemp() / "fuzz2.idx"
    idx.write_bytes(text)
    try:
        keys, offsets = recordio.read_idx(idx)
    except ValueError as error:
        wanted = (
            "fuzz2.idx is UTF-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "fuzz2.idx: byte"
        )
        assert wanted in str(error)
    else:
        text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        lines = text.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n") if text else []
        expected = [tuple(map(int, line.split(b"\t"))) for line in lines]
        assert list(zip(keys.tolist(), offsets.tolist(), strict=True)) == expected


# --- round trips ---

labels = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=6),
)
payloads = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=5)), max_size=9).map(b"".join)
ids = st.one_of(st.integers(0, 2**64 - 1), st.just(0xCED7230A), st.just(0xCED7230ACED7230A))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(labels, ids, ids, payloads), max_size=6), st.randoms())
def test_what_is_written_is_read(tmp_path_factory, records, random):
    keys = random.sample(range(1000), len(records))
    folder = tmp_path_factory.getbasetemp()
    written = [
        (key, Header(0, np.array(label) if isinstance(label, list) else label, id_, id2), payload)
        for key, (label, id_, id2, payload) in zip(keys, records, strict=True)
    ]
    idx, rec = write(folder, written, "trip")
    reader = IndexedReader(idx, rec)
    flags, first = reader.file.first_labels(reader.offsets)
    for i, (key, (label, id_, id2, payload)) in enumerate(zip(keys, records, strict=True)):
        header, image = reader[key]
        assert (header.id, header.id2, image) == (id_, id2, payload)
        expected = label if isinstance(label, list) else [label]
        assert np.ravel(header.label).tolist() == expected
        assert header.flag == flags[i] == (len(label) if isinstance(label, list) else 0)
        assert first[i] == np.float32(expected[0])
    scanned = IndexedReader(None, rec)
    assert scanned.offsets.tolist() == reader.offsets.tolist()


# --- processes and threads ---


def _label_of(reader, key, queue):
    queue.put(reader[key][0].label)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_other_processes(tmp_path, method):
    idx, rec = write(tmp_path, [(key, Header(0, 2 * key, 0, 0), b"") for key in range(9)])
    reader = IndexedReader(idx, rec)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_label_of, args=(reader, 7, queue))
    process.start()
    assert queue.get(timeout=60) == 14
    process.join()


def test_pickle(tmp_path):
    idx, rec = write(tmp_path, [(3, Header(0, 1.0, 0, 0), b"x")])
    for path in (idx, None):
        reader = IndexedReader(path, rec)
        copy = pickle.loads(pickle.dumps(reader))
        assert copy.keys.tolist() == reader.keys.tolist()
        assert copy[int(copy.keys[0])] == (Header(0, 1.0, 0, 0), b"x")


def test_many_threads_read_the_same_file(tmp_path):
    payload = [bytes([i]) * (i * 37 % 211) + MAGIC for i in range(200)]
    idx, rec = write(tmp_path, [(i, Header(0, i, 0, 0), p) for i, p in enumerate(payload)])
    reader = IndexedReader(idx, rec)
    wrong = []

    def read_all(start):
        wrong.extend(i for i in range(start, start + 200) if reader[i % 200][1] != payload[i % 200])

    threads = [threading.Thread(target=read_all, args=(25 * t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- files of real MXNet ---


def test_records_written_by_mxnet():
    folder = real("recordio/magic")
    reader = IndexedReader(folder / "train.idx", folder / "train.rec")
    expected = [b"", b"abc", b"abcd", MAGIC, b"xxxx" + MAGIC, b"xxxx" + MAGIC * 2 + b"yy"]
    expected += [b"xx" + MAGIC + b"zz", MAGIC * 3 + b"q", bytes(range(256))]
    for key, payload in enumerate(expected):
        assert reader[key] == (Header(0, key, key, 0), payload)
    header, payload = reader[9]
    assert (header.flag, header.label.tolist(), header.id, header.id2) == (
        3,
        [1.5, 2.5, 3.5],
        99,
        7,
    )
    assert payload == b"multi"


@pytest.mark.parametrize(
    "name",
    ["magic", "popkorn", "enkhtogtokh", "london/recbuilder", "london/face2rec2", "london/seq"],
)
def test_rewriting_a_file_of_others_gives_the_same_bytes(tmp_path, name):
    folder = real("recordio") / name
    reader = IndexedReader(folder / "train.idx", folder / "train.rec")
    idx, rec = write(tmp_path, [(key, *reader[key]) for key in reader.keys.tolist()])
    assert rec.read_bytes() == (folder / "train.rec").read_bytes()
    assert idx.read_bytes() == (folder / "train.idx").read_bytes()


def test_a_file_of_2016_without_an_idx():
    rec = real("recordio/EsraaRagaa/train.rec")
    reader = IndexedReader(None, rec)
    assert len(reader) == 1632
    assert all(reader[key][1].startswith(b"\xff\xd8") for key in range(1632))
