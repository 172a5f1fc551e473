"""Real MXNet 1.9.1, in its own environment (`make test-peers`), reads and writes what we do."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.images.decode import decode
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions, Sources
from data_tools.recordio import Header, IndexedReader, Writer
from tests.data_tools.images.test_decode import exif
from tests.data_tools.samples import encoded, folder
from tests.real import REAL, ROOT, real

PEER = ROOT / ".venv-peers" / "bin" / "python"
MAGIC = bytes.fromhex("0a23d7ce")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PEER.exists(), reason=f"no MXNet at {PEER}: run `make test-peers`"),
]


def mxnet(*arguments: object) -> list:
    script = Path(__file__).with_name("mxnet_peer.py")
    done = subprocess.run(
        [PEER, script, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ours(stem: Path) -> list:
    with IndexedReader(f"{stem}.idx", f"{stem}.rec") as reader:
        found = []
        for key in reader.keys.tolist():
            header, payload = reader[key]
            label = np.ravel(header.label).tolist()
            sha256 = hashlib.sha256(payload).hexdigest()
            found.append([key, header.flag, label, header.id, header.id2, sha256])
        return found


def assert_same_bytes(one: Path, other: Path) -> None:
    for suffix in (".rec", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    source = folder(root / "faces", [5, 2, 7, 1, 4])
    pack(source, root / "set", PackOptions(shards=2))
    return root / "set"


def test_mxnet_reads_every_record_that_we_pack(packed):
    data = shards.open(packed)
    records = []
    for shard in data.index["shards"]:
        found = mxnet("read", packed / shard["name"])
        assert found == ours(packed / shard["name"])
        records += found
    expected = [[label, hashlib.sha256(image).hexdigest()] for label, image in data]
    assert [[int(label[0]), sha256] for _, _, label, _, _, sha256 in records] == expected


def test_mxnet_writes_the_same_shards_byte_for_byte(packed, tmp_path):
    for shard in shards.open(packed).index["shards"]:
        mxnet("copy", packed / shard["name"], tmp_path / "copy")
        assert_same_bytes(packed / shard["name"], tmp_path / "copy")


def test_every_kind_of_record(tmp_path):
    """Magics at every place and number, odd lengths, labels of both kinds, large ids."""
    random = np.random.default_rng(0)
    labels = [0, 1.5, 2**24 + 1, -3, np.array([7.0]), np.array([1, 0.25, 3]), np.zeros(40)]
    with Writer(tmp_path / "a.idx", tmp_path / "a.rec") as writer:
        for i, key in enumerate(random.permutation(5000)[:400].tolist()):
            pieces = [
                MAGIC if random.random() < 0.3 else random.bytes(int(random.integers(0, 7)))
                for _ in range(random.integers(0, 12))
            ]
            id_ = (key, 0xCED7230A, 2**64 - 1)[i % 3]
            header = Header(0, labels[i % len(labels)], id_, i % 2)
            writer.write(key, header, b"".join(pieces))
    cut = (tmp_path / "a.rec").read_bytes().count(MAGIC)
    assert cut > 600  # many records are cut in pieces
    assert mxnet("read", tmp_path / "a") == ours(tmp_path / "a")
    mxnet("copy", tmp_path / "a", tmp_path / "b")
    assert_same_bytes(tmp_path / "a", tmp_path / "b")


def test_mxnet_decodes_the_same_pixels(tmp_path):
    stem = tmp_path / "images"
    images = [encoded(i, suffix=suffix) for i, suffix in enumerate([".jpg", ".png"] * 3)]
    images += [path.read_bytes() for path in sorted(REAL.glob("london112/*/*.jpg"))[:20]]
    with Writer(f"{stem}.idx", f"{stem}.rec") as writer:
        for key, image in enumerate(images):
            writer.write(key, Header(0, 0, key, 0), image)
    for (key, shape, sha256), image in zip(mxnet("pixels", stem), images, strict=True):
        assert shape == [112, 112, 3]
        found = hashlib.sha256(decode(image).tobytes()).hexdigest()
        assert found == sha256, f"image {key}"


def test_mxnet_follows_exif_where_we_do_not(tmp_path):
    """The one difference in pixels: if this ever fails, decode.py's comment is no longer true."""
    plain = encoded(7)
    rotated = plain[:2] + exif(6) + plain[2:]
    stem = tmp_path / "rotated"
    with Writer(f"{stem}.idx", f"{stem}.rec") as writer:
        writer.write(0, Header(0, 0, 0, 0), rotated)
    ((_, _, sha256),) = mxnet("pixels", stem)
    turned = np.ascontiguousarray(np.rot90(decode(plain), -1))  # orientation 6: clockwise
    assert sha256 == hashlib.sha256(turned.tobytes()).hexdigest()
    np.testing.assert_array_equal(decode(rotated), decode(plain))


@pytest.mark.parametrize("layout", ["folder", "insightface"])
def test_mxnet_reads_what_we_unpack(packed, tmp_path, layout):
    """Layout A, with header and identity records; and a folder through im2rec and back."""
    assert main(["unpack", str(packed), str(tmp_path / "out"), "--layout", layout]) == 0
    if layout == "insightface":
        stem = tmp_path / "out" / "train"
        assert mxnet("read", stem) == ours(stem)
        mxnet("copy", stem, tmp_path / "copy")
        assert_same_bytes(stem, tmp_path / "copy")
        return
    im2rec = [PEER, "-W", "ignore", "-m", "mxnet.tools.im2rec"]
    for words in (["--list", "--recursive"], ["--pass-through"]):
        done = subprocess.run(
            [*im2rec, *words, tmp_path / "im", tmp_path / "out"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    stem = tmp_path / "im"
    assert mxnet("read", stem) == ours(stem)
    expected = sorted(shards.open(packed))
    (tmp_path / "only").mkdir()
    shutil.copy(f"{stem}.rec", tmp_path / "only" / "x.rec")  # layout E: no .idx
    for source in (Path(f"{stem}.rec"), tmp_path / "only"):
        pack(source, tmp_path / f"{source.name}-again", PackOptions(shards=1))
        assert sorted(shards.open(tmp_path / f"{source.name}-again")) == expected
    pack(
        Sources([Path(f"{stem}.lst")], root=tmp_path / "out"),
        tmp_path / "lst",
        PackOptions(shards=1),
    )
    assert sorted(shards.open(tmp_path / "lst")) == expected


@pytest.mark.parametrize(
    "name", ["london/recbuilder", "london/face2rec2", "london/seq", "popkorn", "enkhtogtokh"]
)
def test_mxnet_and_we_read_the_recordings_of_others_alike(name, tmp_path):
    stem = real(f"recordio/{name}") / "train"
    found = mxnet("read", stem)
    assert sorted(found) == sorted(ours(stem))
    mxnet("copy", stem, tmp_path / "theirs")
    with (
        IndexedReader(f"{stem}.idx", f"{stem}.rec") as reader,
        Writer(tmp_path / "ours.idx", tmp_path / "ours.rec") as writer,
    ):
        for key, *_ in found:
            writer.write(key, *reader[key])
    assert_same_bytes(tmp_path / "ours", tmp_path / "theirs")


def test_what_float32_cannot_hold_is_exact_with_us(tmp_path):
    """A layout-A header beyond 2^24: MXNet's own ranges are rounded, ours come from the labels."""
    first = 2**24 + 1
    stem = tmp_path / "train"
    with Writer(f"{stem}.idx", f"{stem}.rec") as writer:
        for key in range(first - 6, first):  # a set whose other images were left away
            writer.write(key, Header(0, float((key - first + 6) // 2), key, 0), encoded(key % 9))
        for c in range(3):
            keys = np.array([first - 6 + 2 * c, first - 4 + 2 * c], np.float32)
            writer.write(first + c, Header(2, keys, first + c, 0), b"")
        writer.write(0, Header(2, np.array([first, first + 3], np.float32), 0, 0), b"")
    header = next(row for row in mxnet("read", stem) if row[0] == 0)
    assert header[2][0] != first  # what MXNet would take for the first identity
    assert [label for label, _ in shards.open(tmp_path)] == [0, 0, 1, 1, 2, 2]
