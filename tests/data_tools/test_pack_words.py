"""What pack counts and says: people of folders, faces, pairs, shards, too large pictures."""

import json
import shutil
import zipfile

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from data_tools import shards
from data_tools.__main__ import main
from data_tools.images.decode import MAX_PIXELS, decode_any_size
from data_tools.images.image_file import judge
from data_tools.pack.pack import pack
from data_tools.pack.pack_job import plan
from data_tools.pack.pack_options import PackOptions
from data_tools.sources.source import open_source
from tests.data_tools.samples import encoded, folder
from tests.real import real

SUFFIXES = (".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm")


def done_of(capsys, *arguments):
    """The result of a command, its lines and its errors."""
    assert main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines()
    return json.loads(last), lines, captured.err


# --- whose folders ---


@pytest.fixture
def cfp(tmp_path):
    """Four people in CFP's layout: NNN/frontal and NNN/profile."""
    root = tmp_path / "cfp"
    for person in range(4):
        for k, view in enumerate(("frontal", "profile")):
            for image in range(3 - k):
                path = root / f"{person:03d}" / view / f"{image:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(100 * person + 10 * k + image))
    return root


def test_folders_of_one_person_are_joined_at_their_level(cfp, tmp_path, capsys):
    done, _, error = done_of(capsys, "pack", cfp, tmp_path / "one", "--identity-level", "1")
    assert (done["images"], done["classes"]) == (20, 4) and "look like" not in error
    assert shards.open(tmp_path / "one").identities == ["000", "001", "002", "003"]
    done, _, error = done_of(capsys, "pack", cfp, tmp_path / "two", "--nested")
    assert done["classes"] == 8
    assert "000/frontal and 000/profile look like folders of one person" in error
    assert "--identity-level 1 makes 4 people of the 8" in error
    two = open_source(cfp, level=2)
    assert two.identities[:2] == ["000/frontal", "000/profile"]


def test_names_of_people_in_several_parts_are_no_reason_for_a_warning(tmp_path, capsys):
    for part in range(2):
        folder(tmp_path / "faces" / f"part{part}", [2, 2])
        (tmp_path / "faces" / f"part{part}" / "p00").rename(
            tmp_path / "faces" / f"part{part}" / f"m{part}"
        )
        (tmp_path / "faces" / f"part{part}" / "p01").rename(
            tmp_path / "faces" / f"part{part}" / f"n{part}"
        )
    _, _, error = done_of(capsys, "pack", tmp_path / "faces", tmp_path / "set", "--nested")
    assert "look like" not in error


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--identity-level", "-1"], "must be 1 or more"),
        (["--identity-level", "1", "--nested"], "choose one"),
        ([], "--identity-level N says at which depth"),
    ],
)
def test_levels_that_are_refused(cfp, tmp_path, capsys, arguments, fault):
    assert main(["pack", str(cfp), str(tmp_path / "set"), *arguments]) == 1
    assert fault in capsys.readouterr().err


def test_the_people_of_cfp():
    root = real("cfp/Data/Images/train")
    people = len(list(root.iterdir()))
    assert len(open_source(root, level=1).identities) == people
    assert len(open_source(root, nested=True).identities) == 2 * people


# --- counts ---


def test_faces_and_pairs_are_counted(tmp_path, capsys):
    """A detector that finds two faces where the picture is bright, one in grey, none in black."""
    source = tmp_path / "faces"
    detector = bright_detector(tmp_path / "scrfd.onnx")
    for person in range(6):
        for image, level in enumerate((255, 120, 120, 255, 0)):
            path = source / f"p{person}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(flat(level, person, image))
    words = ["--align", "--detector", detector, "--hold-out", 3, "--pairs", 20]
    for status in ("packed", "reused"):
        done, lines, _ = done_of(capsys, "pack", source, tmp_path / "set", *words)
        assert (done["status"], done["without_face"], done["several_faces"]) == (status, 6, 12)
        assert lines[0] == (
            "faces: 6 pictures without a face (skipped), 12 pictures with several (the large "
            "central one is packed)"
        )
        assert lines[1] == f"heldout.bin: {done['pairs_made']} pairs of 3 people held out"


def test_the_last_line_counts_all_that_was_left_out(tmp_path, capsys):
    source = folder(tmp_path / "faces", [5, 4, 3, 1, 1, 6])
    (source / "p00" / "notes.txt").write_text("x")
    (source / "p00" / ".hidden.jpg").write_bytes(b"x")
    (source / "p00" / "zero.jpg").write_bytes(b"")
    words = ["--min-images", 2, "--max-images", 3, "--seed", 1]
    for status in ("packed", "reused"):
        done, lines, _ = done_of(capsys, "pack", source, tmp_path / "set", *words)
        assert done["status"] == status and lines[-1].startswith(f"{status} {tmp_path / 'set'}: ")
        assert (done["too_few_images"], done["ignored_files"]) == (2, 2)
        skipped = done["skipped"]  # the empty file, if it is among the three of its person
        assert done["images"] + skipped == 12 and done["beyond_max_images"] == 7
        counted = ["2 files ignored", "2 identities with fewer than 2 images",
                   "7 images beyond --max-images"]  # fmt: skip
        counted = [f"{skipped} skipped"] * bool(skipped) + counted
        assert lines[-1].endswith(f" s; left out: {', '.join(counted)}")


def test_a_reason_is_given_once(tmp_path, capsys):
    source = folder(tmp_path / "faces", [5, 5])
    for path in source.glob("*/*.jpg"):
        path.write_bytes(b"")
    (source / "p00" / "0.jpg").write_bytes(b"GIF89a" + bytes(60))
    assert main(["pack", str(source), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert error.count("zero bytes") == 1 and " and 8 more: " in error and "p00/0.jpg: " in error


def test_other_sizes_are_one_reason(tmp_path, capsys):
    source = folder(tmp_path / "faces", [2, 2])
    for k, path in enumerate(sorted(source.glob("*/*.jpg"))):
        path.write_bytes(encoded(k, 20 + k, 40))
    assert main(["pack", str(source), str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert error.count("--resize, in a recipe") == 1 and " and 3 more: " in error


def test_what_synthesize_wrote_is_packed_without_a_warning(tmp_path, capsys):
    done_of(capsys, "synthesize", tmp_path / "faces", "--identities", 3, "--images", 2)
    done, lines, error = done_of(capsys, "pack", tmp_path / "faces", tmp_path / "set")
    assert done["ignored_files"] == 0 and "warning" not in error and "left out" not in lines[-1]
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted((tmp_path / "faces").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "faces"))
    done, _, error = done_of(capsys, "pack", tmp_path / "faces.zip", tmp_path / "zipped")
    assert (done["images"], done["ignored_files"]) == (6, 0) and "warning" not in error


def test_a_last_line_without_anything_left_out(tmp_path, capsys):
    _, lines, _ = done_of(capsys, "pack", folder(tmp_path / "faces", [2, 2]), tmp_path / "set")
    assert lines[-1].startswith("packed ") and "left out" not in lines[-1]


def test_a_directory_of_landmarks_is_refused_with_the_form_that_is_taken(tmp_path, capsys):
    source = folder(tmp_path / "faces", [2, 2])
    words = ["--align", "--landmarks", str(source)]
    assert main(["pack", str(source), str(tmp_path / "set"), *words]) == 1
    assert "is a directory: pack takes one file with a line for each" in capsys.readouterr().err


def flat(level, person, image):
    pixels = np.full((320, 320, 3), level, np.uint8)
    pixels[0, 0] = person, image, 0  # no two files are equal
    return cv2.imencode(".png", pixels)[1].tobytes()


def bright_detector(path):
    """SCRFD's nine outputs: scores of two places from the picture's mean brightness."""
    face = np.array([-1, -1, 1, -1, 0, 0, -1, 1, 1, 1], np.float32)
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)]
    tensors, outputs = [], []

    def constant(name, value):
        tensors.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    for level, side in enumerate((40, 20, 10)):
        n = 2 * side * side
        first, second = np.zeros((n, 1)), np.zeros((n, 1))
        if level == 0:
            first[2 * (10 * side + 10)], second[2 * (30 * side + 30)] = 1, 1
        # A face from a mean of -0.5 on, another from 0.5 on; grey 120 gives -0.06.
        for name, mask, least in (("first", first, -0.5), ("second", second, 0.5)):
            at = constant(f"least_{name}{level}", least)
            nodes.append(helper.make_node("Greater", ["mean", at], [f"is_{name}{level}"]))
            nodes.append(
                helper.make_node("Cast", [f"is_{name}{level}"], [f"as_{name}{level}"], to=1)
            )
            of = constant(f"mask_{name}{level}", mask)
            nodes.append(helper.make_node("Mul", [f"as_{name}{level}", of], [f"{name}{level}"]))
        nodes.append(helper.make_node("Add", [f"first{level}", f"second{level}"], [f"s{level}"]))
        outputs.append((f"s{level}", [n, 1]))
    for kind, value, width in (("b", np.ones(4), 4), ("p", face, 10)):
        for level, side in enumerate((40, 20, 10)):
            n = 2 * side * side
            of = constant(f"c{kind}{level}", np.broadcast_to(value, (n, width)))
            nodes.append(helper.make_node("Identity", [of], [f"{kind}{level}"]))
            outputs.append((f"{kind}{level}", [n, width]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 320, 320))]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in outputs]
    graph = helper.make_graph(nodes, "scrfd", inputs, infos, tensors)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("images", "made"), [(10, 1), (1999, 1), (2000, 2), (7999, 7), (100_000, 8)]
)
def test_shards_fit_the_images(images, made):
    class Listing:
        """As much of a source as a plan needs."""

        labels = np.arange(images) % 2
        identities = ("a", "b")
        path, skipped = "listing", ()

    assert plan(Listing(), PackOptions())[0].shards == made
    assert plan(Listing(), PackOptions(shards=3))[0].shards == 3


def test_the_shards_that_were_chosen_are_recorded_and_reused(source, tmp_path):
    assert pack(source, tmp_path / "set", PackOptions())["shards"] == 1
    assert pack(source, tmp_path / "set", PackOptions())["status"] == "reused"
    assert shards.open(tmp_path / "set").index["options"]["shards"] == 1


# --- another hold-out of a packed set ---


def test_pairs_hold_out_people_of_a_packed_set(tmp_path, capsys):
    source = folder(tmp_path / "faces", [6] * 9)
    packed, out = tmp_path / "set", tmp_path / "more.bin"
    pack(source, packed, PackOptions(hold_out=2, pairs=20, seed=4))
    before = shards.open(packed)
    shutil.rmtree(source)  # nothing of the source is needed: the faces are in the set
    words = ["pairs", packed, out, "--hold-out", 2, "--pairs", 20, "--seed", 1]
    done, lines, _ = done_of(capsys, *words)
    names = (tmp_path / "more.txt").read_text().splitlines()
    assert len(names) == 2 and set(names) < set(before.identities)
    relabel = tmp_path / "more.relabel.txt"
    assert done["relabel"] == str(relabel) and str(relabel) in lines[-1]
    assert main(["relabel", str(packed), str(relabel)]) == 0
    after = shards.open(packed)
    assert set(after.identities) == set(before.identities) - set(names)
    again = tmp_path / "third.bin"  # on top of what is in force
    capsys.readouterr()
    done_of(capsys, "pairs", packed, again, "--hold-out", 2, "--pairs", 20, "--seed", 3)
    assert main(["relabel", str(packed), str(tmp_path / "third.relabel.txt")]) == 0
    third = set((tmp_path / "third.txt").read_text().splitlines())
    assert set(shards.open(packed).identities) == set(after.identities) - third


def test_hold_outs_that_are_refused(source, tmp_path, capsys):
    pack(source, tmp_path / "set", PackOptions())
    for path, words, fault in (
        (source, ["--hold-out", "2"], "use `pack --hold-out`"),
        (tmp_path / "set", ["--hold-out", "6"], "2 must be left to train on"),
        (tmp_path / "set", ["--hold-out", "-1"], "2 must be left to train on"),
    ):
        assert main(["pairs", str(path), str(tmp_path / "x.bin"), *words]) == 1
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "x.bin").exists()


# --- pictures that are too large ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_stated_size(suffix):
    image = encoded(1, 37, 61, suffix)
    assert judge(image).size == (61, 37)
    for length in range(0, 40):
        judge(image[:length])  # cut short: no size, and no error
    assert judge(b"").size is None and judge(b"what is this").size is None


def test_a_picture_that_is_too_large_is_not_decoded(tmp_path, capsys):
    """Its header alone states the size: decoding it would find the file cut short instead."""
    source = folder(tmp_path / "faces", [3, 3])
    png = bytearray(encoded(1, suffix=".png"))
    png[16:24] = (16000).to_bytes(4, "big") * 2
    (source / "p00" / "huge.png").write_bytes(png)
    with pytest.raises(ValueError, match=r"16000x16000 pixels are more than the 128,000,000"):
        decode_any_size(bytes(png), "x")
    for words in ([], ["--pass-through"]):
        out = tmp_path / f"set{len(words)}"
        done, _, error = done_of(capsys, "pack", source, out, *words)
        assert (done["images"], done["skipped"]) == (6, 1) and "1 image or folder skipped" in error
        assert "p00/huge.png\t16000x16000 pixels" in (out / "skipped.txt").read_text()
    assert 16000 * 16000 > MAX_PIXELS
