"""Opening data sets: our shards and InsightFace directories, and what is refused."""

import json
import pickle
import shutil
import threading

import numpy as np
import pytest

from data_tools import insightface, shards
from data_tools.common.errors import UserError
from data_tools.common.partial_directory import MARKER, mark
from data_tools.inspect import verify
from data_tools.recordio import Header, Writer
from data_tools.shard_writer import ShardWriter, tidy, write_shard
from tests.real import real

IMAGES = [(label, f"image {i}".encode()) for i, label in enumerate([2, 0, 1, 1, 0, 2, 2])]


@pytest.fixture
def packed(tmp_path):
    """Seven "images" of three classes in two shards."""
    out = tmp_path / "set"
    with ShardWriter(out) as writer:
        written = [
            write_shard(writer.partial, "train-00000-of-00002", IMAGES[:4]),
            write_shard(writer.partial, "train-00001-of-00002", IMAGES[4:]),
        ]
        writer.finish(written, ["ann", "bob", "cy"], (112, 112), {})
    (out / "lfw.bin").write_bytes(b"pairs")
    return out


def insightface_set(folder, labels, vector=False, header_key=None, prop=None):
    """Layout A as face2rec2 writes it: images 1 .. N, identity records, the header with key 0."""
    folder.mkdir(parents=True, exist_ok=True)
    n, classes = len(labels), max(labels) + 1
    with Writer(folder / "train.idx", folder / "train.rec") as writer:
        for i, label in enumerate(labels):
            stored = np.array([label, 1]) if vector else label
            writer.write(i + 1, Header(0, stored, i + 1, 0), f"image {i}".encode())
        for c in range(classes):
            keys = [i + 1 for i, label in enumerate(labels) if label == c]
            span = np.array([keys[0], keys[-1] + 1])
            writer.write(n + 1 + c, Header(0, span, n + 1 + c, 0), b"")
        writer.write(0, Header(0, np.array([header_key or n + 1, n + 1 + classes]), 0, 0), b"")
    (folder / "property").write_text(prop or f"{classes},112,112\n")
    return folder


def test_a_data_set_is_a_sequence(packed):
    data = shards.open(packed)
    assert len(data) == data.num_images == 7
    assert list(data) == IMAGES
    assert data[-1] == IMAGES[-1]
    assert data[np.int64(3)] == IMAGES[3]
    for i in (7, -8):
        with pytest.raises(IndexError, match=f"image {i} of 7"):
            data[i]
    assert (data.num_classes, data.image_size, data.path) == (3, (112, 112), packed)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [2, 0, 1, 1, 0, 2, 2]
    assert data.identities == ["ann", "bob", "cy"]
    assert data.index["class_sizes"] == {"2": 2, "3": 1}
    assert data.where(4) == f"{packed}/train-00001-of-00002.rec: byte 0"


def test_any_reader_of_records_can_read_a_shard(packed):
    from data_tools.recordio import IndexedReader

    name = packed / "train-00001-of-00002"
    reader = IndexedReader(f"{name}.idx", f"{name}.rec")
    assert [reader[key] for key in (0, 1, 2)] == [
        (Header(0, label, key, 0), image) for key, (label, image) in enumerate(IMAGES[4:])
    ]


def test_labels_beyond_float32_are_exact(packed):
    exact = np.array([2**24 + 1, 2**24 + 3, 2**31 + 1, 0, 1, 2, 2**40 + 1], np.int64)
    np.save(packed / "labels.npy", exact)
    for name, some in (("train-00000-of-00002", exact[:4]), ("train-00001-of-00002", exact[4:])):
        write_shard(packed, name, [(label, b"image 0") for label in some.tolist()])
    edit_index(packed, classes=2**40 + 2)
    data = shards.open(packed)
    assert [label for label, _ in data] == exact.tolist()
    assert np.float32(exact[0]) != exact[0]  # a record's own label could not hold it


def test_columns_that_contradict_the_records_are_refused(packed):
    """Each record of seven letters has 40 bytes: a shard has 160, the other 120."""
    offsets, labels = np.load(packed / "offsets.npy"), np.load(packed / "labels.npy")
    assert offsets.tolist() == [0, 40, 80, 120, 0, 40, 80]
    np.save(packed / "labels.npy", labels[::-1])  # 2 2 0 1 1 0 2
    data = shards.open(packed)
    fault = (
        r"00000-of-00002\.rec: byte 40: image 1: the record's label is 0\.0, but labels.npy says 2;"
        rf".*run `python -m data_tools verify {packed}`"
    )
    for i in (1, -6):
        with pytest.raises(ValueError, match=fault):
            data[i]
    assert data[0] == IMAGES[0] and data[6] == IMAGES[6]
    np.save(packed / "labels.npy", labels)
    np.save(packed / "offsets.npy", offsets[[0, 1, 3, 2, 6, 4, 5]])
    data = shards.open(packed)
    assert data[1] == IMAGES[1]
    # Images 2 and 3 are of one class: only their ids tell them apart.
    with pytest.raises(ValueError, match=r"rec: byte 120: image 2: the record's id is 3, not .* 2"):
        data[2]
    for i in (4, 5, 6):
        with pytest.raises(
            ValueError, match=rf"00001-of-00002\.rec: byte \d+: image {i}: .*verify"
        ):
            data[i]


def test_opening_reads_neither_the_idx_nor_the_records(packed):
    """At 42 million images text would take a minute to parse; the columns are mapped."""
    for idx in packed.glob("*.idx"):
        idx.unlink()
    data = shards.open(packed)
    assert isinstance(data.labels.base, np.memmap) and isinstance(data.offsets.base, np.memmap)


def test_threads_and_pickle(packed):
    data = shards.open(packed)
    assert list(pickle.loads(pickle.dumps(data))) == IMAGES
    wrong = []

    def read():
        wrong.extend(i for i in list(range(7)) * 200 if data[i] != IMAGES[i])

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bin_path(packed):
    data = shards.open(packed)
    assert data.bin_path("lfw") == data.bin_path("lfw.bin") == packed / "lfw.bin"
    with pytest.raises(FileNotFoundError, match=r"agedb_30\.bin.*there are: lfw"):
        data.bin_path("agedb_30")


def edit_index(packed, **changes):
    index = json.loads((packed / "index.json").read_text())
    index.update(changes)
    (packed / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda p: (p / "index.json").write_text("{"), r"index\.json: not JSON"),
        (lambda p: (p / "index.json").write_text("[]"), r"not the index of a data set"),
        (lambda p: edit_index(p, version=99), r"version 99; this program reads version 1"),
        (lambda p: edit_index(p, shards=[{"name": "x"}]), r"'images' is missing"),
        (lambda p: edit_index(p, images=8), r"contradict"),
        (lambda p: edit_index(p, images="7"), r"contradict"),
        (lambda p: edit_index(p, classes=0), r"contradict"),
        (lambda p: edit_index(p, labels={"file": "../labels.npy"}), r"contradict"),
        (lambda p: (p / "train-00001-of-00002.rec").unlink(), r"00001-of-00002\.rec: missing"),
        (
            lambda p: (p / "train-00001-of-00002.rec").write_bytes(b""),
            r"00001-of-00002\.rec: 0 bytes, but index\.json says 120",
        ),
        (lambda p: (p / "labels.npy").write_bytes(b""), r"labels\.npy"),
        (lambda p: np.save(p / "labels.npy", np.zeros(7)), r"labels\.npy: float64 \[7\]"),
        (lambda p: np.save(p / "labels.npy", np.zeros(6, int)), r"int64 \[6\], .* int64 \[7\]"),
        (lambda p: np.save(p / "offsets.npy", np.array(["x"] * 7, object)), r"offsets\.npy"),
    ],
)
def test_damage_is_named(packed, damage, fault):
    damage(packed)
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        shards.open(packed)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        shards.open(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"neither index\.json nor train\.rec"):
        shards.open(tmp_path)
    for name in ("a.rec", "b.rec"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"2 \.rec files, none of them train\.rec"):
        shards.open(tmp_path)


# --- complete or not at all ---


def test_an_unfinished_data_set_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "set") as writer:
        write_shard(writer.partial, "train-00000-of-00001", IMAGES)
        assert not (tmp_path / "set").exists()
        raise RuntimeError
    with ShardWriter(tmp_path / "set") as writer:
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time_and_left_overs_are_cleared(tmp_path):
    (tmp_path / "set.partial" / "deep").mkdir(parents=True)
    mark(tmp_path / "set.partial")
    (tmp_path / "set.partial" / "train-00000-of-00001.rec").write_bytes(b"half")
    with ShardWriter(tmp_path / "set") as writer:
        assert [path.name for path in writer.partial.iterdir()] == [MARKER]
        with pytest.raises(FileExistsError, match="another process is writing it"):
            ShardWriter(tmp_path / "set")
        written = [write_shard(writer.partial, "train-00000-of-00001", IMAGES)]
        writer.finish(written, ["a", "b", "c"], (112, 112), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]
    assert list(shards.open(tmp_path / "set")) == IMAGES


def test_overwriting_replaces_data_sets_only(packed, tmp_path):
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        ShardWriter(packed)
    with ShardWriter(packed, overwrite=True) as writer:
        assert list(shards.open(packed)) == IMAGES  # the old one stands until the new one is whole
        written = [write_shard(writer.partial, "train-00000-of-00001", IMAGES[:2])]
        writer.finish(written, ["a", "b", "c"], (112, 112), {})
    assert list(shards.open(packed)) == IMAGES[:2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]
    home = tmp_path / "home"
    home.mkdir()
    ShardWriter(home).__exit__(None, None, None)  # empty: nothing to lose
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a data set that pack made"):
        ShardWriter(home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"


def test_a_crash_between_the_two_renames_is_mended(packed):
    mark(packed)
    packed.rename(packed.with_name("set.replaced"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        ShardWriter(packed)
    assert list(shards.open(packed)) == IMAGES


@pytest.mark.parametrize("half_removed", [False, True])
def test_a_crash_before_the_removal_of_the_old_set_is_mended(packed, tmp_path, half_removed):
    replaced = packed.with_name("set.replaced")
    shutil.copytree(packed, replaced)
    mark(replaced)
    if half_removed:
        (replaced / "index.json").unlink()
    with pytest.raises(FileExistsError, match="--overwrite"):
        ShardWriter(packed)
    with ShardWriter(packed, overwrite=True) as writer:
        assert not replaced.exists()
        written = [write_shard(writer.partial, "train-00000-of-00001", IMAGES[:2])]
        writer.finish(written, ["a", "b", "c"], (112, 112), {})
    assert list(shards.open(packed)) == IMAGES[:2]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_crash_after_the_old_set_is_removed_leaves_nothing(packed, tmp_path):
    """Its directory is empty, and no marker says that we made it."""
    packed.with_name("set.replaced").mkdir()
    with ShardWriter(packed, overwrite=True) as writer:
        assert [p.name for p in tmp_path.iterdir() if p.suffix == ".replaced"] == []
        written = [write_shard(writer.partial, "train-00000-of-00001", IMAGES[:2])]
        writer.finish(written, ["a", "b", "c"], (112, 112), {})
    packed.with_name("set.replaced").mkdir()
    tidy(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_an_empty_directory_does_not_cost_the_old_set(packed, tmp_path):
    mark(packed)
    packed.rename(packed.with_name("set.replaced"))
    packed.mkdir()  # by a script, after the crash
    with pytest.raises(FileExistsError, match="--overwrite"):
        ShardWriter(packed)
    assert list(shards.open(packed)) == IMAGES
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


# --- InsightFace directories ---


@pytest.mark.parametrize("vector", [False, True])
def test_layout_a(tmp_path, vector):
    labels = [0, 0, 1, 2, 2, 2]
    data = shards.open(insightface_set(tmp_path, labels, vector))
    assert list(data) == [(label, f"image {i}".encode()) for i, label in enumerate(labels)]
    assert data.labels.tolist() == labels
    assert data.labels.dtype == np.int64
    assert (data.num_classes, data.image_size) == (3, (112, 112))
    assert data.index["format"] == "insightface-A"
    assert data.identities == ["0", "1", "2"]
    assert list(pickle.loads(pickle.dumps(data))) == list(data)


def test_the_float32_header_beyond_2_to_the_24(tmp_path):
    """Images end at an even-odd boundary that float32 cannot say: it rounds to the last image."""
    first = 2**24 + 5  # first identity record; float32 has ..4 and ..6 only
    assert np.float32(first) == 2**24 + 4
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key in range(first - 3, first):
            writer.write(key, Header(0, key - first + 3, key, 0), b"pixels")
        for key in (first, first + 1):
            writer.write(key, Header(0, np.array([1, 2]), key, 0), b"")
        writer.write(0, Header(0, np.array([first, first + 2]), 0, 0), b"")
    data = shards.open(tmp_path)
    assert data.labels.tolist() == [0, 1, 2]
    assert [image for _, image in data] == [b"pixels"] * 3


def test_two_labels_on_the_first_image_make_no_header(tmp_path):
    """im2rec --pack-label: key 0 has flag 2, but it has pixels."""
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key in (2, 0, 1):
            writer.write(key, Header(0, np.array([2 - key, 9]), key, 0), b"pixels")
    data = shards.open(tmp_path)
    assert data.labels.tolist() == [0, 2, 1]  # that of key 0, 2, is a key: it is no header yet
    assert data.index["format"] == "insightface-plain"
    assert (data.num_classes, data.image_size) == (3, None)


def test_a_record_without_pixels_whose_label_is_no_key_is_no_header(tmp_path):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        writer.write(0, Header(0, np.array([5, 6]), 0, 0), b"")
        writer.write(1, Header(0, 0, 1, 0), b"pixels")
    data = shards.open(tmp_path)
    assert data[0] == (5, b"")  # decoding will name it


@pytest.mark.parametrize("label", [-1.0, 0.5, 3.0, float("nan"), float("inf"), 2.0**25])
def test_labels_that_are_no_classes_are_named(tmp_path, label):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        writer.write(0, Header(0, 2, 0, 0), b"pixels")
        writer.write(1, Header(0, label, 1, 0), b"pixels")
    (tmp_path / "property").write_text("3,112,112")
    data = shards.open(tmp_path)
    assert data[0][0] == 2
    for read in (lambda: data[1], lambda: data.labels):
        with pytest.raises(ValueError, match=r"train\.rec: byte 40: the label .* below the 3 cl"):
            read()
    (tmp_path / "property").unlink()
    if label != 3:
        with pytest.raises(ValueError, match=r"train\.rec: byte 40: the label"):
            shards.open(tmp_path)


def test_idx_and_property_as_an_editor_saves_them(tmp_path):
    plain = shards.open(insightface_set(tmp_path / "plain", [0, 1, 1, 2]))
    other = insightface_set(tmp_path / "other", [0, 1, 1, 2])
    for name in ("train.idx", "property"):
        content = (other / name).read_bytes()
        (other / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    data = shards.open(other)
    assert list(data) == list(plain) and data.num_classes == plain.num_classes == 3


@pytest.mark.parametrize("name", ["train.idx", "property"])
def test_an_idx_or_property_in_utf16_is_refused_by_name(tmp_path, name):
    path = insightface_set(tmp_path, [0, 1]) / name
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(UserError, match=f"{name}.* UTF-16 text: save it as UTF-8"):
        shards.open(tmp_path)


@pytest.mark.parametrize("line", ["", "3", "3,112", "a,112,112", "3;112;112", "-1,112,112"])
def test_a_bad_property(tmp_path, line):
    insightface_set(tmp_path, [0, 1], prop=line + "\n")
    with pytest.raises(ValueError, match=r"property: .* is not num_classes,height,width"):
        shards.open(tmp_path)


def test_a_property_of_absurd_numbers(tmp_path):
    for classes in (0, 2**24 + 1, 2**31, 99999999999999):  # more names than a memory could hold
        insightface_set(tmp_path, [0, 1], prop=f"{classes},112,112\n")
        with pytest.raises(ValueError, match=rf"property: {classes} classes; .* 1 \.\. 16777216"):
            shards.open(tmp_path)
    for classes in ("9e23", "9" * 5000):
        insightface_set(tmp_path, [0, 1], prop=f"{classes},112,112\n")
        with pytest.raises(ValueError, match=r"property: '9\S+ is not num_classes,height,width"):
            shards.open(tmp_path)
    insightface_set(tmp_path, [0, 1], prop=f"{2**24}, 112 ,112,more\n")
    assert shards.open(tmp_path).num_classes == 2**24


def test_labels_that_float32_rounds_are_refused(tmp_path):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key, label in enumerate((2**24 - 1, 2**24 + 1)):
            writer.write(key, Header(0, label, key, 0), b"pixels")
    fault = r"train\.rec: byte 40: the label 16777216 is 2\^24 or more, .* pack the images from"
    with pytest.raises(ValueError, match=fault):
        shards.open(tmp_path)
    (tmp_path / "property").write_text(f"{2**24},112,112\n")
    data = shards.open(tmp_path)
    assert data[0] == (2**24 - 1, b"pixels")
    for read in (lambda: data[1], lambda: data.labels):
        with pytest.raises(ValueError, match="the label 16777216.0 is not a class number from 0 b"):
            read()


def test_an_insightface_directory_without_images(tmp_path):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec"):
        pass
    with pytest.raises(ValueError, match=r"train\.rec: no image record among its 0 records"):
        shards.open(tmp_path)


def test_without_an_idx_and_under_another_name(tmp_path):
    insightface_set(tmp_path, [0, 1, 1])
    for suffix in ("rec", "idx"):
        (tmp_path / f"train.{suffix}").rename(tmp_path / f"mine.{suffix}")
    assert shards.open(tmp_path).labels.tolist() == [0, 1, 1]
    (tmp_path / "mine.idx").unlink()
    assert shards.open(tmp_path).labels.tolist() == [0, 1, 1]
    assert verify.verify_insightface(tmp_path, tmp_path / "mine.rec", False, 1) == (6, [])


@pytest.mark.parametrize("images", [1, 2, 7, 64])
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("header_at", [0, 3])
def test_layout_a_without_an_idx(tmp_path, images, gap, header_at):
    """The header is found on either side of the identities, whatever keys the .idx had."""
    first = 1 + images + gap
    empty = [(key, np.array([1, 2])) for key in range(first, first + 3)]
    empty.insert(header_at, (0, np.array([first, first + 3])))
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for i in range(images):
            writer.write(1 + i + gap, Header(0, i % 3, i, 0), b"pixels")
        for key, span in empty:
            writer.write(key, Header(0, span, key, 0), b"")
    (tmp_path / "train.idx").unlink()
    data = shards.open(tmp_path)
    assert data.index["format"] == "insightface-A"
    assert data.labels.tolist() == [i % 3 for i in range(images)]


@pytest.mark.parametrize("header", [(4, 9), (4, float("nan")), (9, 4)])
def test_empty_records_at_the_end_that_no_header_counts_stay_images(tmp_path, header):
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key in range(3):
            writer.write(key, Header(0, key, key, 0), b"pixels")
        writer.write(3, Header(0, np.array([1, 2]), 3, 0), b"")
        writer.write(4, Header(0, np.array(header), 4, 0), b"")
    (tmp_path / "train.idx").unlink()
    data = shards.open(tmp_path)
    assert (data.index["format"], len(data)) == ("insightface-plain", 5)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("name", ["recbuilder", "face2rec2", "seq"])
def test_the_london_set_in_three_layouts_of_real_mxnet(tmp_path, name, keys):
    folder = real(f"recordio/london/{name}")
    if not keys:
        for file in ("train.rec", "property"):
            (tmp_path / file).symlink_to(folder / file)
        folder = tmp_path
    data = shards.open(folder)
    assert (len(data), data.num_classes, data.image_size) == (204, 102, (112, 112))
    assert data.labels.tolist() == [i // 2 for i in range(204)]
    assert [label for label, _ in data] == data.labels.tolist()
    images = sorted(real("london112").glob("*/*.jpg"))
    assert len({image for _, image in data}) == len(images) == 204


def test_first_labels_agree_with_the_records_one_by_one():
    folder = real("recordio/london/face2rec2")
    records = insightface.open_directory(folder, folder / "train.rec")
    assert (records.layout, records.num_identity_records) == ("A", 102)
    data = shards.open(folder)
    slow = [int(label) for label, _ in data]
    assert insightface.class_labels(records.file, records.offsets).tolist() == slow
