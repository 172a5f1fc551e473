"""Any bytes give records, or an error naming file and offset: no crash, hang or memory blow-up."""

import os
import pickle
import random
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools import shards
from data_tools.recordio import Header, IndexedReader, RecordFile, Writer, frame, pack_record
from data_tools.sources.archives import ArchiveSource
from data_tools.sources.lst import ListSource
from data_tools.verification_bin import load_bin
from tests.real import REAL, ROOT

MAGIC = bytes.fromhex("0a23d7ce")
_QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PIECES = st.one_of(
    st.binary(max_size=40),
    st.just(MAGIC),
    st.just(bytes(4)),
    st.just(b"\xff" * 4),
    st.binary(max_size=30).map(frame),
    st.binary(max_size=30).map(lambda b: frame(pack_record(Header(0, 1.0, 2, 3), b))),
    st.integers(0, 2**32 - 1).map(lambda n: n.to_bytes(4, "little")),
)
BYTES = st.lists(PIECES, max_size=12).map(b"".join)


def read_records(path):
    """Everything readable in a .rec; the number of records."""
    file = RecordFile(path)
    try:
        offsets = list(file.scan())
        file.first_labels(np.array(offsets, np.int64))
        return len(offsets)
    finally:
        file.close()


def check_rec(path):
    try:
        read_records(path)
    except ValueError as error:
        assert f"{path}: byte " in str(error), error


def check_pair(idx, rec):
    try:
        with IndexedReader(idx, rec) as reader:
            for key in reader.keys.tolist():
                try:
                    reader[key]
                except ValueError as error:
                    assert f"{rec}: byte " in str(error)
    except ValueError as error:
        assert str(idx) in str(error) or str(rec) in str(error)


def check_directory(directory):
    try:
        for _ in shards.open(directory):
            pass
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error)


def check_bin(path):
    try:
        load_bin(path)
    except ValueError as error:
        assert str(path) in str(error)


def check_zip(path):
    try:
        source = ArchiveSource(path, [path])
        for i in range(len(source)):
            try:
                source.read(i)
            except ValueError as error:
                assert path.name in str(error)
    except ValueError as error:
        assert str(path) in str(error)


def check_list(path):
    try:
        ListSource(path)
    except ValueError as error:
        assert str(path) in str(error)


@_QUICK
@given(BYTES)
def test_records_of_any_bytes(tmp_path, content):
    rec = tmp_path / "a.rec"
    rec.write_bytes(content)
    check_rec(rec)


IDX = st.one_of(
    st.binary(max_size=60),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200))).map(
        lambda rows: "".join(f"{k}\t{o}\n" for k, o in rows).encode()
    ),
)


@_QUICK
@given(BYTES, IDX)
def test_indexes_of_any_bytes(tmp_path, content, index):
    directory = tmp_path / "set"
    directory.mkdir(exist_ok=True)
    (directory / "train.rec").write_bytes(content)
    (directory / "train.idx").write_bytes(index)
    check_pair(directory / "train.idx", directory / "train.rec")
    check_directory(directory)


@_QUICK
@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_damaged_zips(tmp_path, content, at, patch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/0.jpg", content)
        archive.writestr("q/1.jpg", content)
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + patch + whole[at + len(patch) :])
    check_zip(path)


@_QUICK
@given(st.one_of(st.binary(max_size=80), st.text("0123456789.ajpg/\t\n", max_size=60)))
@example(b"\x08")  # the first byte of an ONNX file
def test_lists_of_any_bytes(tmp_path, content):
    path = tmp_path / "a.lst"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_list(path)


# --- ten minutes of mutations ---


def seeds(directory):
    """Whole files to start from: records of every kind, real ones where they are, and a .bin."""
    found = []
    with Writer(directory / "seed.idx", directory / "seed.rec") as writer:
        for key in range(12):
            label = [0.0, [1.0, 2.0], [1.0] * 9][key % 3]
            writer.write(key, Header(0, label, key, 0), MAGIC * (key % 4) + bytes(key))
    found.append((directory / "seed.rec").read_bytes())
    found += [path.read_bytes()[:20000] for path in sorted(REAL.glob("recordio/magic/*.rec"))]
    found += [path.read_bytes()[:9000] for path in sorted(REAL.glob("recordio/london/*/*.rec"))]
    bins = []
    images = [b"\xff\xd8" + bytes(n) for n in range(8)]
    for protocol in range(6):
        bins.append(pickle.dumps((images, [True, False] * 2), protocol))
        arrays = [np.frombuffer(image, np.uint8) for image in images]
        bins.append(pickle.dumps((arrays, np.array([True, False] * 2)), protocol))
    return found, bins


def mutated(content, others, draw):
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + 4] = draw.choice([MAGIC, b"\xff" * 4, bytes(4), b"\x80" + bytes(3)])
        elif kind == 2:
            del data[at : at + draw.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = draw.randbytes(draw.randrange(1, 16))
        elif kind == 4:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            data[at:at] = other[start : start + draw.randrange(1, 64)]
        elif kind == 5:
            data[at : at + 8] = draw.randrange(2**64).to_bytes(8, "little")
        else:
            del data[at:]
    return bytes(data)


class Coverage:
    """Which lines of the readers an input reaches: one that reaches a new line joins the seeds."""

    FILES = ("recordio.py", "unpickle.py", "verification_bin.py")

    def __init__(self):
        self.seen = set()

    def __enter__(self):
        self.fresh = False
        sys.settrace(self._call)

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        name = os.path.basename(frame.f_code.co_filename)
        return self._line if name in self.FILES else None

    def _line(self, frame, event, arg):
        place = frame.f_code.co_filename, frame.f_lineno
        if place not in self.seen:
            self.seen.add(place)
            self.fresh = True
        return self._line


def fuzz(seconds, seed, directory):
    """Coverage-guided mutations of .rec and .bin; what was tried."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    draw, coverage = random.Random(seed), Coverage()
    corpora = list(seeds(directory))
    checks, suffixes, tried = (check_rec, check_bin), (".rec", ".bin"), [0, 0]
    worst, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        which = draw.randrange(2)
        corpus = corpora[which]
        content = mutated(draw.choice(corpus), corpus, draw)
        path = directory / f"fuzzed{suffixes[which]}"
        path.write_bytes(content)
        started = time.monotonic()
        with coverage:
            checks[which](path)
        worst = max(worst, time.monotonic() - started)
        tried[which] += 1
        if coverage.fresh and len(content) < 40000:
            corpus.append(content)
        assert worst < 20, f"{path} took {worst:.0f} s"
    print(*tried, *(len(corpus) for corpus in corpora), len(coverage.seen), f"{worst:.2f}")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_minutes_of_guided_mutations(tmp_path):
    seconds = float(os.environ.get("ARCLINE_FUZZ_SECONDS", 600))
    program = (
        f"from pathlib import Path; from tests.data_tools.test_fuzz import fuzz; "
        f"fuzz({seconds}, {time.time_ns()}, Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    kept = Path(tmp_path / "fuzzed.rec"), Path(tmp_path / "fuzzed.bin")
    assert done.returncode == 0, f"{done.stderr}\ninputs kept: {kept}"
    print("inputs .rec .bin, corpora, lines, worst seconds:", done.stdout)
