"""Every kind of source gives the same images and people, in place, and its damage is named."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.images.image_table import Names, repeated
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions, Sources
from data_tools.recordio import Header, Writer
from data_tools.sources import zip_index
from data_tools.sources.source import open_source
from tests.data_tools.pack.test_pack import by_identity
from tests.data_tools.samples import encoded, folder

SIZES = [3, 2, 4]


@pytest.fixture
def faces(tmp_path):
    return folder(tmp_path / "faces", SIZES)


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("*/*.jpg")}


def people(source):
    """identity -> its images, read by the source; through select, as workers do."""
    found = {}
    images = source.select(np.arange(len(source))[::-1])
    for n, label in enumerate(source.labels[::-1].tolist()):
        found.setdefault(source.identities[label], set()).add(images.read(n))
    return found


def expected(root):
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {p.name: {image.read_bytes() for image in p.iterdir()} for p in folders}


def make_zip(path, files, method=zipfile.ZIP_STORED, before=b""):
    with open(path, "wb") as file:
        file.write(before)
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    return path


def make_tar(path, files, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def im2rec_list(root, path, form="{:f}"):
    names = sorted(files_of(root))
    people_of = sorted({name.split("/")[0] for name in names})
    lines = [
        f"{n}\t{form.format(people_of.index(name.split('/')[0]))}\t{name}\n"
        for n, name in enumerate(names)
    ]
    path.write_text("".join(reversed(lines)))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("above", ["", "set/", "a/b/c/"])
def test_a_zip_is_the_folder_that_it_holds(faces, tmp_path, method, above):
    files = {above + name: content for name, content in reversed(files_of(faces).items())}
    path = make_zip(tmp_path / "set.ZIP", {**files, "__MACOSX/x/._0.jpg": b""}, method, b"#!stub\n")
    source = open_source(path)
    assert people(source) == expected(faces)
    assert source.identities == ["p00", "p01", "p02"] and source.ignored == 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_the_folder_that_it_holds(faces, tmp_path, form):
    long = "" if form == tarfile.USTAR_FORMAT else "n" * 150 + "/"
    files = {f"./{long}{name}": content for name, content in files_of(faces).items()}
    source = open_source(make_tar(tmp_path / "set.tar", files, form))
    assert people(source) == expected(faces)


def test_ten_zips_of_nested_folders_are_one_set(faces, tmp_path):
    """WebFace42M's: WebFace_k.zip holds k/<person>/<image>."""
    (tmp_path / "zips").mkdir()
    files = files_of(faces)
    for k in range(3):
        own = {f"{k}/{k}_{name}": content for name, content in files.items()}
        make_zip(tmp_path / "zips" / f"WebFace_{k}.zip", own)
    source = open_source(tmp_path / "zips")
    assert len(source) == 27 and len(source.identities) == 9
    assert source.identities[4] == "1/1_p01"
    done = pack(tmp_path / "zips", tmp_path / "set", PackOptions(shards=2), workers=2)
    assert (done["images"], done["classes"], done["skipped"]) == (27, 9, 0)


def test_the_directory_of_a_zip_is_read_as_zipfile_reads_it(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for n in range(70000):  # beyond 2^16 entries: Zip64 records
            archive.writestr(f"é{n % 7}/{n}.jpg", random.bytes(3), compress_type=8 * (n % 2))
    found = list(zip_index.members(path))
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = archive.infolist()
        assert len(found) == len(infos) == 70000
        for info, own in zip(infos, found, strict=True):
            assert (info.filename.encode(), info.header_offset, info.CRC) == (
                own.name, own.header, own.crc
            )  # fmt: skip
        for n in range(0, 70000, 997):
            content = zip_index.read_member(file.fileno(), *found[n][1:6])
            assert content == archive.read(infos[n])


def test_wide_zip64_fields(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("p/0.jpg", "w", force_zip64=True) as f:
        f.write(encoded(0))
    (found,) = zip_index.members(path)
    with open(path, "rb") as file:
        assert zip_index.read_member(file.fileno(), *found[1:6]) == encoded(0)


def test_what_stands_oddly_in_an_archive_is_listed(faces, tmp_path):
    files = files_of(faces)
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as z,
    ):
        z.writestr("set/p00/0.jpg", b"old")
        for name, content in files.items():
            z.writestr(f"set/{name}", content)
        z.writestr("set/beside.jpg", encoded(1))
        z.writestr("top.jpg", encoded(2))
    source = open_source(tmp_path / "a.zip")
    assert people(source) == expected(faces)
    reasons = {where.split(": ")[1]: why for where, why in source.skipped}
    assert reasons == {
        "set/p00/0.jpg": "appears twice: the last one counts",
        "set/beside.jpg": "lies beside identity folders",
        "top.jpg": "lies outside any identity folder",
    }


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives_are_named(faces, tmp_path, kind, capsys):
    make = {"zip": make_zip, "tar": make_tar}[kind]
    whole = make(tmp_path / f"a.{kind}", files_of(faces)).read_bytes()
    bad = tmp_path / f"bad.{kind}"
    for content in (b"", b"rubbish" * 500, whole[: len(whole) // 2], whole[:-30], whole[:-9500]):
        bad.write_bytes(content)
        if kind == "tar" and content == whole[:-30]:
            continue  # within the padding after the end mark: nothing lost
        assert main(["pack", str(bad), str(tmp_path / "set")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"bad.{kind}" in error
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "an HTML page; an error or login page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0", "compressed by gzip"),
    ],
)
def test_another_file_under_an_archives_name_is_named(tmp_path, kind, content, what, capsys):
    path = tmp_path / f"faces.{kind}"
    path.write_bytes(content)
    assert main(["pack", str(path), str(tmp_path / "set")]) == 1
    assert f"; it is {what}" in capsys.readouterr().err


def test_an_archive_under_the_other_ones_name_is_named(faces, tmp_path, capsys):
    make_zip(tmp_path / "a.tar", files_of(faces))
    make_tar(tmp_path / "b.zip", files_of(faces))
    for name, what in (("a.tar", "zip"), ("b.zip", "tar")):
        assert main(["pack", str(tmp_path / name), str(tmp_path / "set")]) == 1
        error = capsys.readouterr().err
        assert f"{name}: not a whole" in error
        assert f"it is a {what} archive: give it the ending .{what}" in error


def test_damaged_files_in_a_zip_are_skipped_and_listed(faces, tmp_path):
    files = files_of(faces)
    path = make_zip(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    at = content.index(files["p02/1.jpg"])
    content[at + 700] ^= 1
    path.write_bytes(content)
    done = pack(path, tmp_path / "set", PackOptions(shards=1))
    assert (done["images"], done["skipped"]) == (8, 1)
    assert "CRC-32" in (tmp_path / "set" / "skipped.txt").read_text()


def test_a_zip_bomb_does_not_fill_the_memory(tmp_path):
    files = {f"p{k}/0.jpg": encoded(k) for k in range(3)}
    path = make_zip(tmp_path / "a.zip", {**files, "p3/0.jpg": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    end = content.rindex(b"PK\1\2") + 24  # its unpacked size, understated
    path.write_bytes(content[:end] + (1000).to_bytes(4, "little") + content[end + 4 :])
    source = open_source(path)
    with pytest.raises(ValueError, match=r"a\.zip: p3/0\.jpg: damaged in the archive"):
        source.read(3)


def test_compressed_archives_are_refused(tmp_path, capsys):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    assert main(["pack", str(tmp_path / "a.tar.gz"), str(tmp_path / "set")]) == 1
    assert "cannot be read in place; unpack it once" in capsys.readouterr().err


def test_nested_folders(faces, tmp_path):
    root = tmp_path / "nested"
    for k in range(2):
        folder(root / f"part{k}", SIZES)
    with pytest.raises(ValueError, match="--nested looks into"):
        open_source(root)
    (root / "part0" / "stray.jpg").write_bytes(encoded(1))
    source = open_source(root, nested=True)
    assert source.identities == [f"part{k}/p{i:02d}" for k in range(2) for i in range(3)]
    assert source.skipped == [("part0/stray.jpg", "lies beside identity folders")]


# --- lists ---


@pytest.mark.parametrize("form", ["{:f}", "{}"])
def test_a_list_of_im2rec(faces, tmp_path, form):
    source = open_source(im2rec_list(faces, tmp_path / "a.lst", form), root=faces)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}


@pytest.mark.parametrize("label", ["0", "1", "0.000000"])
def test_a_list_of_im2rec_that_starts_with_zero_is_no_classic_one(tmp_path, label):
    (tmp_path / "a.lst").write_text(f"0\t{label}\ta/0.jpg\n1\t3\tb/1.jpg\n")
    source = open_source(tmp_path / "a.lst")
    assert source.identities == [label[0], "3"] and source.landmarks is None


def test_a_classic_list_and_its_landmarks(faces):
    points = "\t".join(map(str, [38.3, 73.5, 56, 41.5, 70.7, 51.7, 51.5, 71.7, 92.4, 92.2]))
    lines = [f"1\t{name}\t{int(name[1:3])}" for name in sorted(files_of(faces))]
    lines[0] += f"\t0\t0\t112\t112\t{points}"
    path = faces / "train.lst"
    path.write_text("\n".join(lines))
    source = open_source(path)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    assert source.landmarks.shape == (9, 10) and np.isnan(source.landmarks[1:]).all()
    path.write_text("\n".join(lines).replace("1\tp00/1", "0\tp00/1"))
    with pytest.raises(ValueError, match="1 of its images are not aligned yet"):
        pack(path, faces.parent / "set", PackOptions(shards=1))


def test_a_path_that_stands_twice_counts_once(faces, tmp_path):
    path = im2rec_list(faces, faces / "a.lst", "{}")
    path.write_text(path.read_text() + "77\t0\tp00/0.jpg\n78\t2\tp00/1.jpg\n79\t2\tp00/1.jpg\n")
    source = open_source(path)
    assert len(source) == 9
    assert sorted(why for _, why in source.skipped) == [
        "listed again with label 2 instead of 0: the first line counts",
        "listed again with label 2 instead of 0: the first line counts",
        "listed again: the first line counts",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0\t1\ta/0.jpg\n1\t1.5\ta/1.jpg\n", r"line 2: '1.5' is not a whole number"),
        ("0\t-1\ta/0.jpg\n", "line 1: '-1' is not a whole number"),
        ("0\tnan\ta/0.jpg\n", "line 1: 'nan'"),
        ("0\t1\n", "not index<TAB>label<TAB>path"),
        ("0\t1\ta/0.txt\n", "not the path of an image"),
        ("1\ta/0.jpg\t3\t4\n", "with 4 numbers of a box"),
        ("1\ta/0.jpg\tx\n", "'x' is not a whole number"),
        ("0\tAnn\ta/0.jpg\n", "'Ann' is not a whole number"),  # im2rec's, with a text for its label
        ("", "no image in it"),
    ],
)
def test_bad_lists(tmp_path, text, fault):
    (tmp_path / "a.lst").write_text(text)
    with pytest.raises(ValueError, match=fault):
        open_source(tmp_path / "a.lst")


def spaced(line):
    return " \t ".join(f" {field} " for field in line.split("\t"))


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("change", [str, spaced, lambda line: line.replace("p0", "./p0")])
def test_lists_as_people_have_them(faces, tmp_path, start, ends, change):
    path = im2rec_list(faces, faces / "a.lst", "{}")
    lines = [change(line) for line in path.read_text().splitlines()]
    path.write_bytes((start + ends.join([*lines, "  ", ""])).encode())
    source = open_source(path)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    assert not source.skipped and not source.notes


def test_a_list_in_utf16_is_named(faces):
    (faces / "a.lst").write_text("0\t0\tp00/0.jpg\n", encoding="utf-16")
    with pytest.raises(ValueError, match="a.lst is UTF-16 text: save it as UTF-8"):
        open_source(faces / "a.lst")


def test_two_spellings_of_a_path_are_one(faces):
    (faces / "a.lst").write_text("0\t0\tp00/0.jpg\n1\t1\t./p00//0.jpg\n2\t1\tp01/0.jpg\n")
    source = open_source(faces / "a.lst")
    assert len(source) == 2 and "listed again with label 1 instead of 0" in source.skipped[0][1]


def test_back_slashes_in_a_list_are_read_with_a_word(faces, tmp_path, capsys):
    path = im2rec_list(faces, faces / "a.lst", "{}")
    path.write_text(path.read_text().replace("/", "\\"))
    source = open_source(path)
    assert people(source) == {str(k): v for k, v in enumerate(expected(faces).values())}
    assert source.notes == [f"{path}: the back slashes in 9 of its paths are read as slashes"]
    assert main(["pack", str(path), str(tmp_path / "set"), "--shards", "1", "--json"]) == 0
    said = capsys.readouterr()
    assert "back slashes in 9" in said.err and "back slashes in 9" in said.out


def test_a_back_slash_that_is_a_letter_of_a_name_stays_one(tmp_path):
    for name in ("a\\0.jpg", "a\\1.jpg"):
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "a.lst").write_text("0\t0\ta\\0.jpg\n1\t1\ta\\1.jpg\n")
    source = open_source(tmp_path / "a.lst")
    assert source.read(0) == encoded(1) and not source.notes


def test_a_tab_in_a_path_is_no_label(tmp_path):
    (tmp_path / "a.lst").write_text("0\t1\ta/0.jpg\n1\t3\tAnn\tB/1.jpg\n")
    with pytest.raises(ValueError, match=r"a.lst: line 2: 'Ann' is among the labels"):
        open_source(tmp_path / "a.lst")


def test_a_hidden_file_in_a_list_is_skipped(faces):
    (faces / "a.lst").write_text("0\t0\tp00/0.jpg\n1\t1\tp01/0.jpg\n2\t1\tp01/._0.jpg\n")
    source = open_source(faces / "a.lst")
    assert len(source) == 2 and source.skipped == [("p01/._0.jpg", "a hidden file")]


def test_back_slashes_in_a_zip_are_read_with_a_word(faces, tmp_path):
    """.NET before 4.6.1 wrote them."""
    files = {name.replace("/", "\\"): content for name, content in files_of(faces).items()}
    path = make_zip(tmp_path / "a.zip", files | {"p00\\": b""})
    source = open_source(path)
    assert people(source) == expected(faces)
    assert source.notes == [f"{path}: the back slashes in 9 of its paths are read as slashes"]


ODD = {"a.jfif": "jpg", "b.JPE": "jpg", "c.tif": "tif", "d.ppm": "ppm", "n0001_0001": "jpg"}
NO_IMAGES = {"notes.txt": b"x", "more.txt": b"x", "moving.gif": b"GIF89a", "LICENSE": b"text",
             "._a.jfif": b"x", ".DS_Store": b"x"}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip", "stored", "tar"])
def test_images_of_other_endings_and_of_none(tmp_path, kind, capsys):
    files = {f"p{k}/{name}": encoded(k, suffix=f".{suffix}") for k in range(2)
             for name, suffix in ODD.items()}  # fmt: skip
    wanted = {f"p{k}": {files[f"p{k}/{name}"] for name in ODD} for k in range(2)}
    files |= {f"p0/{name}": content for name, content in NO_IMAGES.items()}
    if kind == "folder":
        path = tmp_path / "faces"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "tar":
        path = make_tar(tmp_path / "a.tar", files)
    else:
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        path = make_zip(tmp_path / "a.zip", files, method)
    source = open_source(path)
    assert people(source) == wanted
    assert source.ignored == 6
    assert source.left_out == {".txt": 2, ".gif": 1, "none": 1}
    assert main(["pack", str(path), str(tmp_path / "set"), "--shards", "1", "--json"]) == 0
    said = capsys.readouterr()
    assert "4 files left out" in said.err and "2 .txt" in said.err
    assert '"left_out": {' in said.out


def test_repeated_names():
    names = Names.of([b"a", b"b", b"a", b"", b"a", b"c", b""])
    assert repeated(names) == [(0, 2), (2, 4), (3, 6)]
    assert list(names.select(np.array([5, 3, 0]))) == [b"c", b"", b"a"]


# --- records, and several sources ---


def write_rec(directory, labels, seeds, idx=True):
    directory.mkdir()
    with Writer(directory / "train.idx", directory / "train.rec") as writer:
        for key, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            writer.write(key, Header(0, label, key, 0), encoded(seed))
    if not idx:
        (directory / "train.idx").unlink()
    return directory


def test_a_rec_by_its_file_with_and_without_idx(tmp_path):
    for idx in (True, False):
        rec = write_rec(tmp_path / f"{idx}", [0, 1, 1, 2], range(4), idx)
        assert len(open_source(rec / "train.rec")) == 4
        pack(rec / "train.rec", tmp_path / f"set{idx}", PackOptions(shards=1))
    one, other = (by_identity(shards.open(tmp_path / f"set{idx}")) for idx in (True, False))
    assert one == other and one["1"] == {encoded(1), encoded(2)}


def test_joined_by_offset_and_by_name(faces, tmp_path):
    rec = write_rec(tmp_path / "rec", [0, 1, 1], range(3))
    more = write_rec(tmp_path / "more", [1, 3], range(10, 12))
    paths = [faces, rec, more]
    pack(Sources(paths), tmp_path / "offset", PackOptions(shards=2))
    found = by_identity(shards.open(tmp_path / "offset"))
    assert list(found) == [
        "faces/p00", "faces/p01", "faces/p02", "rec/0", "rec/1", "more/1", "more/3"
    ]  # fmt: skip
    assert found["rec/1"] == {encoded(1), encoded(2)}
    pack(Sources(paths, join="name"), tmp_path / "name", PackOptions(shards=2), workers=2)
    found = by_identity(shards.open(tmp_path / "name"))
    assert list(found) == ["p00", "p01", "p02", "0", "1", "3"]
    assert found["1"] == {encoded(1), encoded(2), encoded(10)}


def test_joined_sources_of_one_name_are_refused(faces, tmp_path, capsys):
    other = folder(tmp_path / "x" / "faces", [1, 1])
    assert main(["pack", str(faces), str(other), str(tmp_path / "set")]) == 1
    assert "have the same name" in capsys.readouterr().err


@pytest.mark.long
def test_ten_million_entries_in_bounded_memory(tmp_path):
    """The listing of 10 M images costs its letters and columns: < 130 bytes an image, resident."""
    import subprocess
    import sys

    path = tmp_path / "big.lst"
    with open(path, "w") as file:
        for n in range(10_000_000):
            file.write(f"{n}\t{n // 20}\tp{n // 20:07d}/{n % 20:04d}.jpg\n")
    program = (
        "import resource, sys, numpy as np\n"
        "from data_tools.sources.source.source import open_source\n"
        "from data_tools.pack.pack.split import Choice, choose\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"s = open_source({str(path)!r})\n"
        "parts = choose(s.labels, len(s.identities), Choice(max_images=10, hold_out=100))\n"
        "print(len(s), len(parts.images), s.select(parts.images[:100000]).name(3),\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    number, kept, _, kilobytes = done.stdout.split()
    assert (int(number), int(kept)) == (10_000_000, (500_000 - 100) * 10)
    print(f"{int(kilobytes) * 1024 / 1e7:.0f} bytes an image")
    assert int(kilobytes) * 1024 < 130 * 10_000_000
    os.unlink(path)
