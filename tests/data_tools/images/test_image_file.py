"""The judge of image files: kind, size, whole."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data_tools.common import content
from data_tools.images.image_file import HEAD, ending, is_image_name, is_plain, judge, kind_of
from tests.data_tools.samples import encoded, pixels
from tests.real import real

KINDS = {
    ".jpg": "jpeg", ".png": "png", ".bmp": "bmp", ".webp": "webp", ".tif": "tiff", ".ppm": "ppm",
}  # fmt: skip


def saved(mode, form, **options):
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels(3, 40, 60)[:, :, ::-1]))
    picture.convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", KINDS)
def test_kind_and_size_without_decoding(suffix):
    whole = encoded(1, 40, 60, suffix)
    assert judge(whole) == (KINDS[suffix], (60, 40), None)
    assert kind_of(whole[:HEAD]) == KINDS[suffix]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("tail", [b"\0", b"\r\n", b"trailer" * 100, b"\xff\xd8\xff\xe0"])
def test_bytes_after_the_end_are_whole(suffix, tail):
    assert judge(encoded(2, suffix=suffix) + tail).fault is None


@pytest.mark.parametrize("suffix", KINDS)
def test_every_cut_is_noticed_and_none_of_the_whole(suffix):
    whole = encoded(3, 20, 30, suffix)
    for length in range(len(whole) - 1):
        assert judge(whole[:length]).fault, length


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}),
        ("1", "PNG", {}), ("P", "PNG", {}), ("RGBA", "PNG", {}), ("LA", "PNG", {}),
        ("1", "BMP", {}), ("L", "BMP", {}), ("P", "BMP", {}), ("RGBA", "BMP", {}),
        ("RGB", "WEBP", {"lossless": True}), ("RGBA", "WEBP", {}), ("RGB", "WEBP", {"exif": b"x"}),
        ("RGB", "TIFF", {}), ("L", "TIFF", {"compression": "tiff_lzw"}), ("1", "PPM", {}),
        ("L", "PPM", {}), ("RGB", "TIFF", {"compression": "jpeg"}),
    ],
)  # fmt: skip
def test_what_others_write_is_whole(mode, form, options):
    file = saved(mode, form, **options)
    found = judge(file)
    assert (found.size, found.fault) == ((60, 40), None)
    assert judge(file[: len(file) // 2]).fault


def test_the_judge_agrees_with_the_decoder():
    """Damaged pixels are for the decoder: what the judge refuses, it refuses too."""
    random = np.random.default_rng(0)
    for suffix in KINDS:
        whole = np.frombuffer(encoded(4, suffix=suffix), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[random.integers(700, len(whole) - 2, 5)] = random.integers(0, 256, 5)
            found = judge(damaged.tobytes())
            if suffix in (".png", ".tif") and found.fault:
                assert cv2.imdecode(damaged, cv2.IMREAD_COLOR) is None
            else:
                assert found.fault is None


def test_what_is_no_image_says_what_it_is():
    for head, what in (
        (b"<!DOCTYPE html>\n<html>", "an HTML page.*download the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer.*lfs pull"),
        (b"\x1f\x8b\x08\0", "gzip.*gunzip"),
        (b"PK\3\4" + b"\0" * 60, "a zip archive"),
        (b"GIF89a" + b"\0" * 60, "a GIF image"),
        (b"\0" * 60, "nothing but zeros"),
        (b"", "zero bytes"),
        (b"P6 not a picture at all", "starts with b'P6 not a'"),
    ):
        found = judge(head)
        assert found.kind is None and found.size is None
        with pytest.raises(ValueError, match=what):
            raise ValueError(found.fault)


@pytest.mark.parametrize("length", range(0, 70, 3))
@pytest.mark.parametrize("suffix", KINDS)
def test_heads_that_end_anywhere_and_rubbish_never_fail(suffix, length):
    random = np.random.default_rng(length)
    judge(encoded(5, 20, 30, suffix)[:length] + random.bytes(40))
    content.described(random.bytes(length))


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_the_shortest_files_are_described_or_not_but_never_fail(length):
    for first in range(256):
        content.described(bytes([first, 8, 18])[:length])


def test_names():
    for name in ("a.jpg", "A.JFIF", "a.jpe", "a.tif", "a.b.ppm", "a.TIFF"):
        assert is_image_name(name)
    for name in (".a.jpg", "._0001.jpg", "a.txt", "jpg", "a.jpg.part"):
        assert not is_image_name(name)
    assert [ending(n) for n in ("a.JPG", "a", "Dr. Who_01", "a.tar.gz")] == [".jpg", "", "", ".gz"]


def test_plain_are_the_kinds_on_which_decoders_agree():
    plain = [saved("L", "JPEG"), saved("RGB", "JPEG"), saved("RGB", "PNG"), saved("L", "PNG")]
    assert all(map(is_plain, plain))
    deep = cv2.imencode(".png", pixels(1).astype(np.uint16) * 256)[1].tobytes()
    others = [
        deep, saved("CMYK", "JPEG"), saved("RGB", "JPEG", keep_rgb=True), saved("RGBA", "PNG"),
        saved("P", "PNG"), saved("1", "PNG"), saved("RGB", "WEBP"), saved("RGB", "TIFF"),
    ]  # fmt: skip
    assert not any(map(is_plain, others))


def test_real_images_are_whole():
    for folder in ("london112", "orl112"):
        for path in sorted(real(folder).glob("*/*"))[:40]:
            found = judge(path.read_bytes())
            assert found.fault is None and found.size is not None
