"""The cleaning tools: their decisions against plain loops, and the commands one after the other."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data_tools import relabel, shards
from data_tools.__main__ import main
from data_tools.clean import features, purify
from data_tools.clean.merge import halves, lowest_of_chain, same_pairs
from data_tools.clean.overlap import near_pairs, perceptual_hash, pixel_hash
from data_tools.clean.purify import dominant_cosines
from data_tools.common import files
from data_tools.decisions import write_decision
from data_tools.images.decode import decode
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.shards import Shards
from recognition.weights.centres import Centres
from tests.data_tools.samples import encoded, folder
from tests.real import ROOT

SIZES = [6, 4, 9, 5, 1]


@pytest.fixture
def data(tmp_path):
    pack(folder(tmp_path / "faces", SIZES), tmp_path / "set", PackOptions(shards=2))
    return shards.open(tmp_path / "set")


def write_features(directory, of, x, block=7):
    files.make_private(directory)  # as embed does
    index = {"of": of, "images": len(x), "size": x.shape[1], "block": block, "network": {}}
    features.write_index(directory, index)
    for start, stop in features.blocks(len(x), block):
        features.write_block(directory, start, stop, x[start:stop])
    return directory


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


class _DrawnCentres:
    """Centres of 300 classes by their numbers, for processes that get them by pickle."""

    def rows(self, start, stop):
        return unit(np.random.default_rng(1).normal(size=(300, 3, 8)))[start:stop]


class _Labelled:
    """A set of 2400 images of which only the labels are asked for."""

    labels = np.random.default_rng(0).integers(0, 300, 2400)
    num_classes, cleaned = 300, None
    by_class = Shards.by_class

    def __len__(self):
        return len(self.labels)


def test_purify_by_processes_finds_what_one_finds(tmp_path, monkeypatch):
    data = _Labelled()
    x = np.random.default_rng(2).normal(size=(2400, 8)).astype(np.float32)
    write_features(tmp_path / "features", "x", x, block=700)
    monkeypatch.setattr(purify, "_CLASSES", 70)
    one = purify.cosines(data, features.FeatureStore(tmp_path / "features"), _DrawnCentres(), 1)
    two = purify.cosines(data, features.FeatureStore(tmp_path / "features"), _DrawnCentres(), 2)
    found, votes = dominant_cosines(unit(x), data.labels, _DrawnCentres().rows(0, 300))
    for way in (one, two):
        np.testing.assert_allclose(way[0], found, atol=1e-6)  # float32, sums of 8
        np.testing.assert_array_equal(way[1], votes.max(1))


def test_dominant_centre_as_drop_py_has_it():
    """Class by class and image by image, as the official steps are written."""
    random = np.random.default_rng(0)
    centres = unit(random.standard_normal((7, 3, 16)))
    labels = random.integers(0, 7, 200)
    labels[labels == 5] = 4  # a class without images
    x = unit(centres[labels, random.integers(0, 3, 200)] + 0.3 * random.standard_normal((200, 16)))
    cos, votes = dominant_cosines(x, labels, centres)
    for c in range(7):
        counted = [0, 0, 0]
        for i in np.flatnonzero(labels == c):
            counted[int(np.argmax(centres[c] @ x[i]))] += 1
        assert votes[c].tolist() == counted
        best = counted.index(max(counted))  # ties: the lowest
        for i in np.flatnonzero(labels == c):
            assert cos[i] == pytest.approx(float(centres[c, best] @ x[i]), abs=1e-6)


def test_a_tie_of_votes_goes_to_the_lowest_centre():
    centres = unit(np.eye(4)[None, :3])
    cos, votes = dominant_cosines(unit(np.eye(4)[[2, 1]]), np.array([0, 0]), centres)
    assert votes.tolist() == [[0, 1, 1]] and cos.tolist() == [0.0, 1.0]


def test_from_training_to_a_cleaned_set(data, tmp_path, capsys):
    """train with three sub-centres, embed, purify, relabel: the real commands."""
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "launch/train.py", "launch/configs/demo.py", f"rec={data.path}",
            f"output={run}", "max_steps=3", "num_subcenters=3", "global_batch_size=8",
            "num_workers=1", "checkpoint_every=3", "verify_every=100",
        ],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "features"
    words = ["embed", str(data.path), str(run), str(out), "--block", "10"]
    assert main([*words, "--part", "1/2", "--json"]) == 0
    assert last_json(capsys) == {"path": str(out), "images": 25, "made": 1, "missing": 2}
    index = tmp_path / "index.txt"
    purify = ["purify", str(data.path), str(run), str(out), str(index)]
    assert main(purify) == 1 and "is missing: run embed again" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    assert last_json(capsys)["made"] == 2
    stamps = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    assert main([*words, "--json"]) == 0 and last_json(capsys)["made"] == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == stamps
    words = [*purify, "--threshold", "90", "--report", str(tmp_path / "report"), "--json"]
    assert main(words) == 0
    report = last_json(capsys)
    centres = Centres(run)
    x = features.FeatureStore(out).unit(np.arange(25))
    np.testing.assert_array_equal(
        np.concatenate([centres.rows(0, 2), centres.rows(2, 5)]), centres.rows(0, 5)
    )
    cos, _ = dominant_cosines(x, data.labels, centres.rows(0, 5))
    keep = cos > np.cos(np.radians(90))
    assert report["dropped"] == int((~keep).sum()) and report["num_subcenters"] == 3
    assert sum(report["angle_histogram_5_degrees"]) == 25
    assert (tmp_path / "report" / "angles.png").stat().st_size > 1000
    assert main(["relabel", str(data.path), str(index)]) == 0
    cleaned = shards.open(data.path)
    assert [image for _, image in cleaned] == [data[i][1] for i in np.flatnonzero(keep)]
    assert cleaned.num_classes == report["classes_left"]
    capsys.readouterr()
    pack(folder(tmp_path / "others", [2, 2]), tmp_path / "other", PackOptions(shards=1))
    assert main(["purify", str(tmp_path / "other"), *purify[2:4], str(tmp_path / "x.txt")]) == 1
    assert (
        "was computed for the set" in capsys.readouterr().err and not (tmp_path / "x.txt").exists()
    )


def test_embed_is_refused_where_something_else_lies(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert main(["embed", str(data.path), str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "no run directory, backbone file or .onnx file" in capsys.readouterr().err


def test_flipped_bytes_of_features_are_noticed(data, tmp_path):
    write_features(tmp_path / "f", data.fingerprint, np.eye(25, 8, dtype=np.float32) + 1)
    found = sorted((tmp_path / "f").iterdir())
    assert not [path for path in [tmp_path / "f", *found] if path.stat().st_mode & 0o077]
    block = next(path for path in found if path.suffix == ".npy")
    content = bytearray(block.read_bytes())
    content[200] ^= 0x20
    block.write_bytes(content)
    with pytest.raises(ValueError, match=f"{block.name}: .* run embed again"):
        features.FeatureStore(tmp_path / "f", data.fingerprint)


# --- merge ---


def test_merge_proposes_what_was_planted(data, tmp_path, capsys):
    random = np.random.default_rng(1)
    people = unit(random.standard_normal((6, 64)))
    person = np.array([0, 1, 2, 0, 4])[data.labels]  # 0 and 3 are one person
    person[np.flatnonzero(data.labels == 2)[:4]] = 5  # label 2 holds two
    x = people[person] + 0.03 * random.standard_normal((len(data), 64))
    write_features(tmp_path / "f", data.fingerprint, x.astype(np.float32))
    words = ["merge", str(data.path), str(tmp_path / "f"), str(tmp_path / "index.txt"), "--json"]
    assert main(words) == 0
    report = last_json(capsys)
    assert [row["labels"] for row in report["merge"]] == [["p00", "p03"]]
    assert [(row["label"], row["images"]) for row in report["split"]] == [("p02", [4, 5])]
    found = shards.open(data.path, tmp_path / "index.txt")
    groups = {frozenset(np.flatnonzero(found.labels == c).tolist()) for c in range(5)}
    assert groups == {frozenset(np.flatnonzero(person == p).tolist()) for p in set(person)}
    assert len(shards.open(data.path)) == 25 and not (data.path / relabel.NAME).exists()
    assert main(words) == 1 and "exists: choose another name" in capsys.readouterr().err


def test_pairs_of_centres_and_chains():
    random = np.random.default_rng(2)
    centres = unit(random.standard_normal((40, 8)))
    cos = centres @ centres.T
    found = same_pairs(centres, 0.6)
    assert [(a, b) for a, b, _ in found] == [
        (a, b) for a in range(40) for b in range(a + 1, 40) if cos[a, b] >= 0.6
    ]
    assert lowest_of_chain([(4, 7, 1.0), (2, 4, 1.0), (5, 6, 1.0)], 8).tolist() == [
        0, 1, 2, 3, 2, 5, 5, 2
    ]  # fmt: skip
    part, cosine = halves(unit(np.ones((5, 4))))  # all alike: no two parts
    assert not part.any() and cosine == 1.0


# --- overlap ---


def textured(seed):
    """uint8 [112, 112, 3] with energy in all the frequencies that pHash looks at, as a face has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), np.uint8)
    return cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)


def as_jpeg(image, quality=95):
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def test_overlap_finds_copies_and_people(tmp_path, capsys):
    faces = folder(tmp_path / "faces", SIZES)
    for k, size in enumerate(SIZES):
        for j in range(size):
            (faces / f"p{k:02d}" / f"{j}.jpg").write_bytes(as_jpeg(textured(1000 * k + j)))
    pack(faces, tmp_path / "set", PackOptions(shards=2))
    data = shards.open(tmp_path / "set")
    shared = folder(tmp_path / "test", [3, 3])
    images = sorted(shared.glob("*/*"))
    images[0].write_bytes(as_jpeg(textured(2003)))  # the very bytes of p02/3
    again = as_jpeg(textured(5), 50)
    images[1].write_bytes(cv2.imencode(".png", textured(2004))[1].tobytes())  # never a JPEG
    for n, path in enumerate(images[2:]):
        path.write_bytes(as_jpeg(textured(9000 + n)) if n else again)
    words = ["overlap", str(data.path), str(shared), str(tmp_path / "index.txt"), "--workers", "1"]
    assert main([*words, "--pairs", str(tmp_path / "pairs.txt"), "--json"]) == 0
    report = last_json(capsys)
    by_bytes = {image: i for i, (_, image) in enumerate(data)}
    want = sorted(by_bytes[as_jpeg(textured(seed))] for seed in (5, 2003, 2004))
    assert relabel.read(tmp_path / "index.txt").images.tolist() == want
    assert report["found"] == {"pixels": 1, "perceptual": 3} and report["identities"] == 2
    assert "pixels\t" in (tmp_path / "pairs.txt").read_text()
    words[3] = str(tmp_path / "whole.txt")
    assert main([*words, "--identities", "--json"]) == 0
    assert last_json(capsys)["dropped"] == SIZES[0] + SIZES[2]
    random = np.random.default_rng(3)
    x = random.standard_normal((25, 32)).astype(np.float32)
    y = random.standard_normal((6, 32)).astype(np.float32)
    y[4] = x[11] * 3
    write_features(tmp_path / "a", data.fingerprint, x)
    write_features(tmp_path / "b", "another", y)
    words[3] = str(tmp_path / "features.txt")
    more = ["--features", str(tmp_path / "a"), str(tmp_path / "b"), "--cosine", "0.9", "--json"]
    assert main([*words, *more]) == 0
    assert last_json(capsys)["found"]["cosine"] == 1
    assert 11 in relabel.read(tmp_path / "features.txt").images


def test_overlap_with_a_verification_bin(tmp_path, capsys):
    pack(folder(tmp_path / "faces", SIZES), tmp_path / "held", PackOptions(1, hold_out=3, pairs=20))
    pack(tmp_path / "faces", tmp_path / "all", PackOptions(shards=1))
    held, whole = shards.open(tmp_path / "held"), shards.open(tmp_path / "all")
    words = ["overlap", str(whole.path), str(held.bin_path("heldout")), str(tmp_path / "index.txt")]
    assert main([*words, "--identities", "--json", "--workers", "1"]) == 0
    last_json(capsys)
    left = shards.open(whole.path, tmp_path / "index.txt")
    assert left.identities == held.identities


def test_near_hashes_are_those_of_a_plain_loop():
    random = np.random.default_rng(4)
    one = random.integers(0, 2**63, 60, np.uint64)
    other = np.concatenate([one[:30], random.integers(0, 2**63, 30, np.uint64)])
    for j in range(30):
        for bit in random.choice(64, j % 6, replace=False).tolist():
            other[j] ^= np.uint64(1 << bit)
    for most in range(4):
        want = [
            [i, j]
            for i in range(60)
            for j in range(60)
            if bin(int(one[i] ^ other[j])).count("1") <= most
        ]
        assert near_pairs(one, other, most).tolist() == want


def test_hashes_tell_images_apart_and_copies_together():
    image = textured(1)
    brighter = np.clip(image.astype(int) + 8, 0, 255).astype(np.uint8)
    assert pixel_hash(image) != pixel_hash(brighter) and pixel_hash(image) == pixel_hash(+image)
    assert (perceptual_hash(image) ^ perceptual_hash(brighter)).bit_count() <= 3
    hashes = [perceptual_hash(textured(seed)) for seed in range(30)]
    assert min((a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]) > 8


# --- unpack, view, inspect ---


def test_unpacked_and_packed_again(data, tmp_path, capsys):
    out = tmp_path / "folder"
    assert main(["unpack", str(data.path), str(out), "--json"]) == 0
    assert last_json(capsys)["images"] == 25
    found = {p.name: {f.read_bytes() for f in p.iterdir()} for p in out.iterdir()}
    source = tmp_path / "faces"
    assert found == {p.name: {f.read_bytes() for f in p.iterdir()} for p in source.iterdir()}
    assert main(["unpack", str(data.path), str(out)]) == 1
    assert "exists: choose another" in capsys.readouterr().err


def test_the_classic_layout_is_read_back(data, tmp_path):
    new = np.where(data.labels == 1, relabel.DROP, data.labels)
    write_decision(data.path / relabel.NAME, data, new)
    words = ["unpack", str(data.path), str(tmp_path / "rec"), "--layout", "insightface"]
    assert main(words) == 0
    rec = shards.open(tmp_path / "rec")
    assert rec.index["format"] == "insightface-A" and rec.num_classes == 4
    cleaned = shards.open(data.path)
    assert sorted(rec) == sorted(cleaned)
    assert (tmp_path / "rec" / "property").read_text() == "4,112,112\n"
    assert main(["verify", str(tmp_path / "rec"), "--deep"]) == 0


def test_an_identity_that_is_no_folder_is_refused(tmp_path, capsys):
    from data_tools.shard_writer import ShardWriter, write_shard

    with ShardWriter(tmp_path / "set") as writer:
        shard = write_shard(writer.partial, "train-00000-of-00001", [(0, encoded(0)), (1, b"x")])
        writer.finish([shard], ["../../etc", "b"], (112, 112), {})
    assert main(["unpack", str(tmp_path / "set"), str(tmp_path / "out")]) == 1
    assert "'../../etc' cannot be the name of a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_sheets(data, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["view", str(data.path), str(sheet), "--identity", "p02", "--json"]) == 0
    shown = last_json(capsys)["shown"]
    assert shown == np.flatnonzero(data.labels == 2).tolist()
    image = cv2.imread(str(sheet))[:, :, ::-1]
    assert image.shape == (126, 9 * 112, 3)
    np.testing.assert_array_equal(image[:112, 112:224], decode(data[shown[1]][1]))
    x = np.eye(25, dtype=np.float32) + 0.1
    x[7, 3] += 2
    write_features(tmp_path / "f", data.fingerprint, x)
    words = ["view", str(data.path), str(sheet), "--features", str(tmp_path / "f"), "--json"]
    assert main([*words, "--like", "3", "--most", "2"]) == 0
    assert last_json(capsys)["shown"] == [3, 7]
    for wrong in (["--like", "25"], ["--images", "-1"], ["--identity", "x"], ["--label", "9"]):
        assert main([*words, *wrong]) == 1
    capsys.readouterr()
    words = ["inspect", str(data.path), "--quality", "10", "--sheet", str(sheet), "--json"]
    assert main(words) == 0
    quality = last_json(capsys)["quality"]
    assert quality["sampled"] == 10 and quality["kinds"] == {"jpeg": 10}
    assert quality["width"] == {"p5": 112, "p50": 112, "p95": 112}
    assert cv2.imread(str(sheet)).shape == (3 * 126, 10 * 112, 3)
