"""Packing: every image once, the same bytes at any number of workers."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.common import parallel
from data_tools.images.decode import decode
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.recordio import Header, Writer
from tests.data_tools.packs import by_identity, contents
from tests.data_tools.samples import encoded, folder
from tests.real import real


def test_every_image_once_and_untouched(source, tmp_path):
    done = pack(source, tmp_path / "set", PackOptions(shards=3))
    assert (done["status"], done["images"], done["classes"], done["skipped"]) == (
        "packed",
        31,
        7,
        0,
    )
    data = shards.open(tmp_path / "set")
    assert data.identities == [f"p{k:02d}" for k in range(7)]  # class ids: lexicographic order
    for name, images in by_identity(data).items():
        assert images == {path.read_bytes() for path in (source / name).iterdir()}
    assert [shard["images"] for shard in data.index["shards"]] == [11, 10, 10]
    assert np.bincount(data.labels).tolist() == [5, 2, 7, 1, 4, 9, 3]
    assert data.image_size == (112, 112)


def test_the_shuffle_is_global_and_of_the_seed(source, tmp_path):
    orders = {}
    for seed in (0, 1):
        pack(source, tmp_path / f"{seed}", PackOptions(shards=2, seed=seed))
        orders[seed] = shards.open(tmp_path / f"{seed}").labels.tolist()
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    first_shard = orders[0][:16]
    assert first_shard != sorted(first_shard) and len(set(first_shard)) > 3


def test_the_bytes_do_not_depend_on_the_workers(source, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "ITEMS_PER_WORKER", 1)
    (source / "p02" / "3.jpg").write_bytes(b"")
    options = PackOptions(shards=4, hold_out=3, pairs=20, seed=4)
    for workers in (1, 3):
        pack(source, tmp_path / f"{workers}", options, workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_other_formats_and_sizes_become_jpegs(tmp_path):
    source = folder(tmp_path / "faces", [1, 1])
    (source / "p00" / "a.PNG").write_bytes(encoded(1, suffix=".png"))
    (source / "p00" / "b.jpeg").write_bytes(encoded(2, 200))
    pack(source, tmp_path / "set", PackOptions(shards=1, resize=True))
    kept = (source / "p00" / "0.jpg").read_bytes()
    for image in by_identity(shards.open(tmp_path / "set"))["p00"] - {kept}:
        assert image.startswith(b"\xff\xd8")
        difference = min(
            np.abs(decode(image).astype(int) - decode(encoded(*made), resize=True)).mean()
            for made in ((1, 112), (2, 200))
        )
        assert difference < 2  # grey levels: what JPEG loses at quality 95
    pack(source, tmp_path / "small", PackOptions(shards=1, size=64, resize=True))
    data = shards.open(tmp_path / "small")
    assert data.image_size == (64, 64)
    assert all(decode(image, 64).shape == (64, 64, 3) and len(image) < 9000 for _, image in data)


def test_nothing_is_skipped_in_silence(tmp_path, capsys):
    source = folder(tmp_path / "faces", [3, 2, 1, 2])
    one = source / "p00"
    (one / "zero.jpg").write_bytes(b"")
    (one / "cut.jpg").write_bytes(encoded(1)[:-50])
    (one / "text.png").write_text("not an image")
    (one / "wide.jpg").write_bytes(encoded(2, 80, 90))
    (one / "broken.jpg").symlink_to("nowhere")
    (one / "linked.jpg").symlink_to(source / "p01" / "0.jpg")
    os.mkfifo(one / "pipe.jpg")
    (one / "deeper").mkdir()
    (one / "deeper" / "4.jpg").write_bytes(encoded(4))
    (one / "notes.txt").write_text("ignored")
    (one / ".hidden.jpg").write_bytes(encoded(5))
    (source / ".git").mkdir()
    (source / "stray.jpg").write_bytes(encoded(6))
    (source / "p02" / "0.jpg").write_bytes(b"")  # now without a readable image
    (source / "p04").mkdir()  # empty from the start
    (source / "p05").symlink_to(source / "p03", target_is_directory=True)
    code = main(["pack", str(source), str(tmp_path / "set"), "--shards", "1", "--workers", "1"])
    assert code == 0
    error = capsys.readouterr().err
    assert "warning: 9 images or folders skipped" in error and "2 identities without" in error
    lines = (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    expected = {
        "stray.jpg": "outside any identity folder",
        "p00/deeper": "a folder inside an identity folder",
        "p00/zero.jpg": "zero bytes",
        "p00/cut.jpg": "truncated",
        "p00/text.png": "not a JPEG",
        "p00/wide.jpg": "90x80 pixels, not 112x112",
        "p00/broken.jpg": "No such file",
        "p00/pipe.jpg": "not a regular file",
        "p02/0.jpg": "zero bytes",
    }
    assert reasons.keys() == expected.keys() and len(lines) == len(expected)
    for where, reason in expected.items():
        assert reason in reasons[where]
    data = shards.open(tmp_path / "set")
    assert data.identities == ["p00", "p01", "p03", "p05"]  # no class for p02 and p04
    assert np.bincount(data.labels).tolist() == [4, 2, 2, 2]
    assert data.index["empty_identities"] == ["p02", "p04"]
    assert data.index["skipped"] == {"count": 9, "file": "skipped.txt", "other_size": 1}
    assert data.index["ignored_files"] == 3


def test_a_name_with_a_line_break_keeps_its_line(tmp_path):
    source = folder(tmp_path / "faces", [3, 2])
    (source / "p00" / "two\nlines\tand a tab.jpg").write_bytes(b"")
    (source / "stray\r.jpg").write_bytes(encoded(1))
    (source / "p01" / "kept\n.jpg").write_bytes(encoded(2))
    assert pack(source, tmp_path / "set", PackOptions(shards=1))["images"] == 6
    assert (tmp_path / "set" / "skipped.txt").read_bytes() == (
        b"stray\\r.jpg\tlies outside any identity folder\n"
        b"p00/two\\nlines\\tand a tab.jpg\tno image: zero bytes\n"
    )


def test_an_identity_whose_images_all_fail_leaves_no_gap(tmp_path):
    source = folder(tmp_path / "faces", [3, 2, 4, 2])
    for path in (source / "p01").iterdir():
        path.write_bytes(b"\xff\xd8 no picture")
    pack(source, tmp_path / "set", PackOptions(shards=2))
    shutil.rmtree(source / "p01")
    data = shards.open(tmp_path / "set")
    assert data.identities == ["p00", "p02", "p03"]
    assert by_identity(data) == {
        path.name: {image.read_bytes() for image in path.iterdir()} for path in source.iterdir()
    }
    assert main(["verify", str(tmp_path / "set"), "--deep"]) == 0


# --- what is there already ---


def test_the_same_again_is_reused_and_anything_else_refused(source, tmp_path):
    out = tmp_path / "set"
    pack(source, out, PackOptions(shards=2))
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = pack(source, out, PackOptions(shards=2), workers=2)
    assert (done["status"], done["images"]) == ("reused", 31)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    with pytest.raises(FileExistsError, match=r"seed 0 -> 1\); --overwrite replaces it"):
        pack(source, out, PackOptions(shards=2, seed=1))
    (source / "p00" / "0.jpg").write_bytes(encoded(77))
    with pytest.raises(FileExistsError, match=r"sha256 .*--overwrite"):
        pack(source, out, PackOptions(shards=2))
    assert pack(source, out, PackOptions(shards=2), overwrite=True)["status"] == "packed"
    assert encoded(77) in by_identity(shards.open(out))["p00"]
    next(out.glob("*.rec")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="7 bytes, but index.json says"):
        pack(source, out, PackOptions(shards=2))
    assert pack(source, out, PackOptions(shards=2), overwrite=True)["status"] == "packed"


def test_a_directory_of_something_else_is_never_replaced(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            pack(source, home, PackOptions(shards=2), overwrite=overwrite)
    assert contents(home) == {"thesis.tex": b"years of work"}


# --- held-out identities ---


def test_held_out_people_are_in_the_pairs_only(source, tmp_path):
    out = tmp_path / "set"
    options = PackOptions(shards=2, hold_out=3, pairs=20, seed=4)
    done = pack(source, out, options)
    assert (done["held_out_identities"], done["verification"]) == (3, ["heldout.bin"])
    held = (out / "heldout.txt").read_text().split()
    data = shards.open(out)
    assert len(held) == 3 and sorted(held + data.identities) == [f"p{k:02d}" for k in range(7)]
    bins, issame = pickle.loads(data.bin_path("heldout").read_bytes())
    name_of = {path.read_bytes(): path.parent.name for path in source.glob("*/*.jpg")}
    people = [name_of[image] for image in bins]
    assert set(people) <= set(held)
    assert [a == b for a, b in zip(people[::2], people[1::2], strict=True)] == issame
    assert {name_of[image] for _, image in data} == set(data.identities)
    pack(source, tmp_path / "other", PackOptions(shards=2, hold_out=3, pairs=20, seed=5))
    assert (tmp_path / "other" / "heldout.txt").read_text().split() != held


def test_as_many_pairs_as_there_are(source, tmp_path, capsys):
    """However many are asked for, and the same again is reused."""
    out = tmp_path / "set"
    words = ["pack", str(source), str(out), "--shards", "2", "--hold-out", "4", "--seed", "1"]
    for status in ("packed", "reused"):
        assert main([*words, "--json"]) == 0
        captured = capsys.readouterr()
        done = json.loads(captured.out.splitlines()[-1])
        bins, issame = pickle.loads((out / "heldout.bin").read_bytes())
        sizes = [
            len(list((source / k).iterdir())) for k in (out / "heldout.txt").read_text().split()
        ]
        same = sum(n * (n - 1) // 2 for n in sizes)
        different = sum(sizes) * (sum(sizes) - 1) // 2 - same
        made = 2 * min(same, different) // 20 * 20
        assert (done["status"], done["pairs_asked"], done["pairs_made"]) == (status, 3000, made)
        assert len(issame) == made >= 20 and sum(issame) == made // 2
        lines = [
            line for line in captured.err.splitlines() if f"{made} pairs made, not 3000" in line
        ]
        assert len(lines) == 1 and "4 people held out" in lines[0]
    assert shards.open(out).index["held_out"]["pairs"] == made


def test_resized_images_are_counted(tmp_path, capsys):
    source = folder(tmp_path / "faces", [6, 6, 6])
    for k in range(3):  # of each person, so also of the one who is not in the shards
        (source / f"p{k:02d}" / "big.png").write_bytes(encoded(50 + k, 130, suffix=".png"))
        (source / f"p{k:02d}" / "fits.png").write_bytes(encoded(60 + k, suffix=".png"))
    words = ["pack", str(source), str(tmp_path / "set"), "--shards", "1", "--json", "--resize"]
    for _ in ("packed", "reused"):
        assert main(words) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out.splitlines()[-1])["resized"] == {"count": 3, "of": 24}
        assert "3 of 24 images were not 112x112 and were resized (--resize)" in captured.err
    for k in range(3, 5):
        (source / f"p{k:02d}").mkdir()
        (source / f"p{k:02d}" / "0.jpg").write_bytes(encoded(90 + k, 90))
    options = PackOptions(shards=1, hold_out=3, pairs=20, seed=1, resize=True)
    held = pack(source, tmp_path / "held", options)
    assert held["resized"] == {"count": 5, "of": 26}


# --- InsightFace directories ---


def test_an_insightface_directory_keeps_its_images_and_bins(tmp_path):
    labels = [0, 0, 1, 3, 3, 3]  # nobody has class 2
    rec = tmp_path / "rec"
    rec.mkdir()
    images = [encoded(i) for i in range(6)]
    with Writer(rec / "train.idx", rec / "train.rec") as writer:
        for key in (3, 1, 5, 0, 2, 4):
            writer.write(key, Header(0, labels[key], key, 0), images[key])
    (rec / "property").write_text("4,112,112")
    (rec / "lfw.bin").write_bytes(b"pairs of lfw")
    done = pack(rec, tmp_path / "set", PackOptions(shards=2))
    assert (done["images"], done["classes"], done["empty_identities"]) == (6, 3, 1)
    data = shards.open(tmp_path / "set")
    assert data.identities == ["0", "1", "3"]
    assert data.index["empty_identities"] == ["2"]
    assert by_identity(data) == {"0": set(images[:2]), "1": {images[2]}, "3": set(images[3:])}
    assert data.bin_path("lfw").read_bytes() == b"pairs of lfw"
    assert data.index["verification"][0]["file"] == "lfw.bin"


def test_layouts_of_the_same_images_give_the_same_shards(tmp_path):
    packed = []
    for name in ("recbuilder", "face2rec2", "seq"):
        pack(real(f"recordio/london/{name}"), tmp_path / name, PackOptions(shards=2))
        packed.append({k: v for k, v in contents(tmp_path / name).items() if k != "index.json"})
    assert packed[0] == packed[1] == packed[2]
    data = shards.open(tmp_path / "seq")
    names = sorted(path.name for path in real("london112").iterdir())
    expected = {
        str(c): {path.read_bytes() for path in (real("london112") / name).iterdir()}
        for c, name in enumerate(names)
    }
    # MXNet encoded the images again: the same people, other bytes.
    assert {k: len(v) for k, v in by_identity(data).items()} == {k: 2 for k in expected}


def test_shards_can_be_packed_again(source, tmp_path):
    pack(source, tmp_path / "one", PackOptions(shards=4))
    pack(tmp_path / "one", tmp_path / "two", PackOptions(shards=1, seed=9))
    one, two = shards.open(tmp_path / "one"), shards.open(tmp_path / "two")
    assert by_identity(one) == by_identity(two)
    assert one.identities == two.identities and len(two.index["shards"]) == 1


def test_an_image_without_pixels_is_listed_by_its_byte(tmp_path):
    rec = tmp_path / "rec"
    rec.mkdir()
    with Writer(rec / "train.idx", rec / "train.rec") as writer:
        for key, image in enumerate([encoded(0), b"", encoded(1), encoded(2)]):
            writer.write(key, Header(0, key % 2, key, 0), image)
    done = pack(rec, tmp_path / "set", PackOptions(shards=1))
    assert (done["images"], done["skipped"]) == (3, 1)
    line = (tmp_path / "set" / "skipped.txt").read_text()
    assert line == f"{shards.open(rec).where(1)}\tno image: zero bytes\n"


def test_real_faces(tmp_path):
    source = real("lfw112")
    done = pack(
        source, tmp_path / "set", PackOptions(shards=4, hold_out=284, pairs=1000), workers=2
    )
    assert (done["images"] > 3500, done["classes"], done["skipped"]) == (True, 900, 0)
    data = shards.open(tmp_path / "set")
    for i in range(0, len(data), 97):
        label, image = data[i]
        folder_of = source / data.identities[label]
        assert image in {path.read_bytes() for path in folder_of.iterdir()}
