"""Decoding: the pixels of MXNet, and every cut-off image noticed."""

import struct

import cv2
import numpy as np
import pytest

from data_tools.images.decode import check_jpeg, decode, decode_any_size
from data_tools.pack.conversion import Conversion
from tests.data_tools.samples import convert, encoded, pixels
from tests.real import real


def exif(orientation: int) -> bytes:
    """An APP1 segment that holds the orientation, and a picture end inside like a thumbnail's."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff + b"\xff\xd8thumbnail\xff\xd9"
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def test_lossless_pixels_come_back_as_rgb():
    bgr = pixels(1)
    image = decode(cv2.imencode(".png", bgr)[1].tobytes())
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, bgr[:, :, ::-1])


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".jpg"])
def test_grey_becomes_three_equal_channels(suffix):
    image = decode(cv2.imencode(suffix, pixels(2)[:, :, 0])[1].tobytes())
    assert image.shape == (112, 112, 3)
    np.testing.assert_array_equal(image[:, :, 0], image[:, :, 2])


def test_transparency_is_dropped_and_16_bits_become_8():
    bgr = pixels(3)
    with_alpha = np.dstack([bgr, np.full((112, 112), 7, np.uint8)])
    deep = bgr.astype(np.uint16) * 257
    for image in (with_alpha, deep):
        found = decode(cv2.imencode(".png", image)[1].tobytes())
        np.testing.assert_array_equal(found, bgr[:, :, ::-1])


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_ignored(orientation):
    plain = encoded(4)
    rotated = plain[:2] + exif(orientation) + plain[2:]
    np.testing.assert_array_equal(decode(rotated), decode(plain))
    honoured = cv2.imdecode(np.frombuffer(rotated, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert (honoured != decode(plain)).any()  # the tag is one that OpenCV would follow


def test_a_square_of_another_size_is_resized_if_that_is_asked_for():
    with pytest.raises(ValueError, match=r"x: 250x250 pixels, not 112x112: faces must be aligned"):
        decode(encoded(5, 250, suffix=".png"), 112, "x")
    image = decode(encoded(5, 250, suffix=".png"), 112, resize=True)
    expected = cv2.resize(pixels(5, 250), (112, 112), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(image, expected[:, :, ::-1])
    assert decode(encoded(5), 64, resize=True).shape == (64, 64, 3)
    assert decode_any_size(encoded(5, 40, 60)).shape == (40, 60, 3)


def test_another_aspect_is_an_error_that_names_the_image():
    with pytest.raises(ValueError, match=r"a/b\.jpg: 60x40 pixels, not 112x112"):
        decode(encoded(6, 40, 60), where="a/b.jpg")
    with pytest.raises(ValueError, match=r"a/b\.jpg: 60x40 .* not square"):
        decode(encoded(6, 40, 60), where="a/b.jpg", resize=True)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_every_cut_is_noticed(suffix):
    whole = encoded(7, suffix=suffix)
    decode(whole)
    step = 1 if len(whole) < 4000 else 37
    for length in range(0, len(whole) - 1, step):
        with pytest.raises(ValueError, match=r"x: "):
            decode(whole[:length], where="x")


def test_a_cut_jpeg_with_a_thumbnail_is_noticed():
    whole = encoded(8)
    whole = whole[:2] + exif(1) + whole[2:]
    decode(whole)
    with pytest.raises(ValueError, match="truncated"):
        decode(whole[:-40])


@pytest.mark.parametrize("tail", [b"\0", b"\x5a"])
def test_a_jpeg_whose_end_never_arrived_is_noticed(tail):
    """A download that allocated the file first: the right length, the wrong end."""
    for seed in range(5):
        whole = encoded(seed)
        for missing in (2, 10, 100, 1000):
            with pytest.raises(ValueError, match="truncated"):
                decode(whole[:-missing] + tail * missing)


def test_bytes_after_the_end_are_no_fault():
    for suffix in (".jpg", ".png"):
        whole = encoded(9, suffix=suffix)
        np.testing.assert_array_equal(decode(whole + b"\0" * 7), decode(whole))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "zero bytes"),
        (b"\0" * 500, "not a JPEG, PNG, BMP, WebP, TIFF or PPM image"),
        (b"<html>404</html>", "not a JPEG.* it is an HTML page"),
        (b"GIF89a" + b"\0" * 50, "not a JPEG"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (b"\xff\xd8\xff\xda\0\2\xff\xd9", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"IEND\xae\x42\x60\x82", "no IHDR"),
    ],
)
def test_what_is_no_image_is_said(content, fault):
    with pytest.raises(ValueError, match=rf"the place: .*{fault}"):
        decode(content, where="the place")


def test_convert_keeps_the_bytes_that_fit():
    jpeg = encoded(10)
    assert convert(jpeg, Conversion()) == (jpeg, False)
    for other, is_resized in ((encoded(10, suffix=".png"), False), (encoded(10, 200), True)):
        made, resized = convert(other, Conversion(resize=is_resized))
        assert resized == is_resized
        assert made != other and made.startswith(b"\xff\xd8")
        difference = decode(made).astype(int) - decode(other, resize=True)
        assert np.abs(difference).mean() < 2  # grey levels: what JPEG loses at quality 95
    with pytest.raises(ValueError, match="x: truncated"):
        convert(jpeg[:-9], Conversion(), "x")


def test_real_faces_decode_as_opencv_decodes_them():
    for path in sorted(real("london112").glob("*/*.jpg"))[:20]:
        content = path.read_bytes()
        bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(decode(content, where=str(path)), bgr[:, :, ::-1])


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_jpeg_is_checked_as_it_would_be_decoded(progressive):
    """Files cut, overwritten or with another end: refused by both, or by neither."""
    random = np.random.default_rng(0)
    refused = 0
    for seed in range(40):
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
        whole = cv2.imencode(".jpg", random.integers(0, 256, (112, 112, 3), np.uint8), quality)[1]
        for _ in range(10):
            damaged = whole.copy()
            at = random.integers(0, len(damaged) if seed % 2 else 700, random.integers(1, 20))
            damaged[at] = random.integers(0, 256, len(at))
            cut = damaged[: random.integers(2, len(damaged))] if seed % 3 == 0 else damaged
            file = cut.tobytes() + b"\xff\xd9" * (seed % 4 == 0)
            outcomes = []
            for way in (check_jpeg, decode_any_size):
                try:
                    way(file, "x")
                    outcomes.append(None)
                except ValueError as error:
                    outcomes.append(str(error).split(":")[1])
            assert outcomes[0] == outcomes[1]
            refused += outcomes[0] is not None
    assert 40 < refused < 360
