"""Images of another size than the network's, without landmarks: an error at every door."""

import json
import pickle

import cv2
import numpy as np
import pytest

from data_tools import __main__ as data_tools
from data_tools import shards, verification_bin
from data_tools.load.loader import Loader
from data_tools.recordio import Header, Writer
from eval import __main__ as cli
from eval.embedders.images import Encoded, Files
from eval.protocols import drop, lfw
from recognition.inversion.faces import open_faces
from tests.eval.embedders.test_embed import channel_means
from tests.eval.made import tinted

PHOTOGRAPH = 250  # pixels: LFW's own
FAULT = "250x250 pixels, not 112x112"


def sized(person, image, height=PHOTOGRAPH, width=PHOTOGRAPH):
    pixels = cv2.imdecode(np.frombuffer(tinted(person, image), np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode(".jpg", cv2.resize(pixels, (width, height)))[1].tobytes()


def encoded(num_pairs=20, make=sized):
    """(images, issame): two of each person, then each person with the next."""
    half = num_pairs // 2
    pairs = [((k, 0), (k, 1)) for k in range(half)]
    pairs += [((k, 0), ((k + 1) % half, 1)) for k in range(half)]
    return [make(*x) for pair in pairs for x in pair], [True] * half + [False] * half


@pytest.fixture
def people(tmp_path):
    """A folder of ten people with two photographs each that nobody aligned, and lists of them."""
    for k in range(10):
        folder = tmp_path / "faces" / f"P{k}"
        folder.mkdir(parents=True)
        for n in (1, 2):
            (folder / f"P{k}_{n:04d}.jpg").write_bytes(sized(k, n))
    same = [f"P{k} 1 2" for k in range(10)]
    different = [f"P{k} 1 P{(k + 1) % 10} 2" for k in range(10)]
    (tmp_path / "pairs.txt").write_text("\n".join(["10", *same, *different]))
    rows = [f"P{k}/P{k}_0001.jpg,P{j}/P{j}_0002.jpg,{int(j == k)}"
            for k in range(10) for j in (k, (k + 1) % 10)]  # fmt: skip
    (tmp_path / "pairs.csv").write_text("first,second,same\n" + "\n".join(rows))
    for name, n, count in (("gallery", 1, 8), ("probes", 2, 10)):
        rows = [f"P{k}/P{k}_000{n}.jpg,{k}" for k in range(count)]
        (tmp_path / f"{name}.csv").write_text("image,subject\n" + "\n".join(rows))
    (tmp_path / "set.bin").write_bytes(pickle.dumps(encoded()))
    channel_means(tmp_path / "model.onnx")
    return tmp_path


def words_of(door, where):
    model, faces = where / "model.onnx", where / "faces"
    return {
        "bin": ["lfw", model, where / "set.bin"],
        "list": ["lfw", model, f"{where / 'pairs.txt'}:{faces}"],
        "pairs": ["pairs", model, where / "pairs.csv", "--images", faces],
        "identify": ["identify", model, "--gallery", where / "gallery.csv",
                     "--probes", where / "probes.csv", "--images", faces],
    }[door]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--no-contract-check"]])
@pytest.mark.parametrize("door", ["bin", "list", "pairs", "identify"])
def test_a_photograph_that_nobody_aligned_is_an_error(people, capsys, door, more):
    """Before: 76 % in place of 99 %, exit code 0 and not a word."""
    words = [str(x) for x in words_of(door, people)]
    more = more if words[0] == "lfw" else []
    results = people / "results"
    assert cli.main([*words, *more, "--cache", "none", "--results", str(results)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert FAULT in error and "--resize" in error and "landmarks" in error
    assert not results.exists()


@pytest.mark.parametrize("door", ["bin", "list", "pairs", "identify"])
def test_resize_takes_aligned_faces_of_another_size_and_counts_them(people, capsys, door):
    words = [str(x) for x in words_of(door, people)]
    results = people / "results"
    more = ["--cache", "none", "--results", str(results), "--resize", "--json"]
    assert cli.main([*words, *more]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out.splitlines()[-1])["resized"]
    assert counts and all(x["count"] == x["of"] > 0 for x in counts.values())
    assert "images were not 112x112 and were resized" in captured.err
    (saved,) = results.glob("*.json")
    facts = json.loads(saved.read_text())
    assert facts["resized"] == counts and "resized" in facts["contract"]["alignment"]


def test_resize_is_another_entry_of_the_cache(people, capsys):
    """What --resize has computed does not let the same images pass without it."""
    words = [str(x) for x in words_of("list", people)]
    words += ["--cache", str(people / "cache"), "--results", "none"]
    assert cli.main([*words, "--resize"]) == 0
    assert cli.main(words) == 1 and FAULT in capsys.readouterr().err
    assert not (people / "none").exists()


def test_a_wide_image_is_not_resized(tmp_path):
    wide = Encoded("set", [sized(0, 0, 100, 120)], resize=True)
    with pytest.raises(ValueError, match="120x100 pixels, not 112x112: it is not square"):
        wide.num_resized()
    with pytest.raises(ValueError, match="not square"):
        wide[0]


def test_the_files_of_a_set_are_judged_before_the_work(people):
    names = sorted(str(p.relative_to(people / "faces")) for p in people.rglob("*.jpg"))
    with pytest.raises(ValueError, match=f"P0_0001.jpg: {FAULT}"):
        Files("set", people / "faces", names).num_resized()
    points = np.tile(np.float32([[90, 110], [160, 110], [125, 150], [95, 190], [155, 190]]),
                     (len(names), 1, 1))  # fmt: skip
    aligned = Files("set", people / "faces", names, points)  # with landmarks any size is right
    assert aligned.num_resized() == 0 and aligned[0].shape == (112, 112, 3)


def test_val_targets_and_export_and_inversion(tmp_path):
    images, issame = encoded()
    pairs = verification_bin.PairSet("val", images, np.array(issame))
    with pytest.raises(ValueError, match=f"val.bin image 0: {FAULT}"):
        lfw.count_resized(pairs, False)
    assert lfw.count_resized(pairs, True) == 40
    means = lambda x: x.mean((1, 2))  # noqa: E731
    with pytest.raises(ValueError, match=FAULT):
        lfw.embed(means, images, 8, "val.bin")
    with pytest.raises(ValueError, match=FAULT):
        drop.compare(means, means, pairs)
    (tmp_path / "val.bin").write_bytes(pickle.dumps((images, issame)))
    with pytest.raises(ValueError, match=FAULT):
        open_faces(tmp_path / "val.bin").pixels([0])
    faces = open_faces(tmp_path / "val.bin", resize=True)
    assert faces.pixels([0, 1]).shape == (2, 112, 112, 3)
    assert faces.facts() == {"resized_images": 2}


def test_pack_skips_what_nobody_aligned(people, capsys):
    """A set of such photographs alone is an error; some of them are left out, counted."""
    faces, out = people / "faces", people / "packed"
    assert data_tools.main(["pack", str(faces), str(out), "--shards", "1"]) == 1
    assert FAULT in capsys.readouterr().err and not out.exists()
    for k in range(3):
        (faces / f"P{k}" / "aligned.jpg").write_bytes(tinted(k, 1))
    assert data_tools.main(["pack", str(faces), str(out), "--shards", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["images"] == 3
    assert "20 are of another size than 112x112: align them" in captured.err
    both = ["pack", str(faces), str(people / "all"), "--shards", "1", "--resize", "--json"]
    assert data_tools.main(both) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["images"] == 23 and done["resized"] == {"count": 20, "of": 23}


def test_records_in_place_are_judged_in_training(tmp_path):
    with Writer(str(tmp_path / "train.idx"), str(tmp_path / "train.rec")) as writer:
        for key in range(4):
            writer.write(key, Header(0, float(key % 2), key, 0), sized(key % 2, key))
    data = shards.open(tmp_path)
    options = {"seed": 0, "global_batch": 4, "workers": 1}
    with Loader(data, **options) as loader, pytest.raises(ValueError, match=FAULT) as raised:
        next(loader)
    assert "train.rec" in str(raised.value) and "resize=true" in str(raised.value)
    with Loader(data, resize=True, **options) as loader:
        assert next(loader).images.shape == (4, 3, 112, 112)
