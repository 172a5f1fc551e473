"""Sets of pairs from .bin and pairs.txt; embedding and scoring against InsightFace's rule."""

import pickle

import cv2
import numpy as np
import pytest
from sklearn.preprocessing import normalize

from data_tools.verification_bin import load_bin
from eval.embedders import extract, images
from eval.protocols import lfw


def face(seed, size=112, quality=95):
    """A smooth random JPEG [size, size]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@pytest.fixture(scope="module")
def faces():
    return [face(i) for i in range(44)]


def write(tmp_path, content, protocol=4):
    path = tmp_path / "agedb_30.bin"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def projection(width=16, seed=0):
    """A stand-in for a network: a fixed random projection of the normalised pixels."""
    matrix = np.random.default_rng(seed).normal(size=(112 * 112 * 3, width)).astype(np.float32)

    def forward(images):
        assert images.dtype == np.uint8 and images.shape[1:] == (112, 112, 3)
        assert images.flags.c_contiguous
        return ((images.astype(np.float32) / 255 - 0.5) / 0.5).reshape(len(images), -1) @ matrix

    return forward


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", [bytes, lambda b: np.frombuffer(b, np.uint8)])
def test_load_bin(tmp_path, faces, protocol, kind):
    labels = [True, False] * 11
    path = write(tmp_path, ([kind(x) for x in faces], labels), protocol)
    pairs = load_bin(path)
    assert pairs.name == "agedb_30"
    assert pairs.encoded == faces
    assert pairs.issame.dtype == bool and pairs.issame.tolist() == labels


def test_load_bin_takes_labels_of_numpy(tmp_path, faces):
    labels = [True, False] * 11
    scalars = [[kind(x) for x in labels] for kind in (np.bool_, int, np.int64, np.int8)]
    arrays = [np.array(labels, kind) for kind in (bool, np.int64, np.uint8, ">i8", np.int32)]
    for given in (*scalars, *arrays, arrays[1][:, None]):
        assert load_bin(write(tmp_path, (faces, given))).issame.tolist() == labels


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("shape", [(-1, 1), (1, -1), (1, -1, 1)])
def test_load_bin_takes_columns_and_rows_of_older_imencode(tmp_path, faces, protocol, shape):
    images = [np.frombuffer(x, np.uint8).reshape(shape) for x in faces]
    assert load_bin(write(tmp_path, (images, [True] * 22), protocol)).encoded == faces


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0\0", "compressed by gzip"),
        (b"PK\3\4\x14\0\0\0", "a zip archive: unpack it"),
        (b"\x0a\x23\xd7\xce\0\0\0\0", "a RecordIO file"),
    ],
)  # fmt: skip
def test_another_file_under_this_name_is_named(tmp_path, content, what):
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"lfw.bin: .*; it is {what}"):
        load_bin(tmp_path / "lfw.bin")


@pytest.mark.parametrize(
    "content, message",
    [
        ([b"x"], "\\(images, issame\\)"),
        (([b"x"] * 3, [True]), "3 images for 1 pairs"),
        (([b"x"] * 2, [True, False]), "2 images for 2 pairs"),
        (([], []), "0 images for 0 pairs"),
        ((b"xx", [True]), "must be lists"),
        (([b"x", "y"], [True]), "image 1 is neither bytes"),
        (([b"x", np.zeros((2, 2), np.uint8)], [True]), "image 1 is neither bytes"),
        (([b"x", b"y"], [2]), "issame\\[0\\] \\(int\\) is neither"),
        (([b"x", b"y"], [None]), "issame\\[0\\] \\(NoneType\\) is neither"),
        (([b"x", b"y"], np.array([2])), "issame\\[0\\] \\(int\\) is neither"),
        (([b"x", np.zeros((1, 2), np.int64)], [True]), "image 1 is neither bytes"),
    ],
)
def test_load_bin_refuses(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"agedb_30.bin: .*{message}"):
        load_bin(write(tmp_path, content))


def test_a_label_of_endless_text_is_not_printed(tmp_path):
    bomb = []
    for _ in range(18):  # 60 levels make as small a file, and a text that no memory holds
        bomb = [bomb, bomb]
    path = write(tmp_path, ([b"x", b"y"], [bomb]))
    assert path.stat().st_size < 300
    with pytest.raises(ValueError, match=r"issame\[0\] \(list\) is neither a boo") as caught:
        load_bin(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("batch_size", [1, 10, 43, 44, 100])
def test_embed_adds_the_mirrored_image(faces, batch_size):
    forward = projection()
    flip_sum, norms = lfw.embed(forward, faces, batch_size)
    pixels = [cv2.imdecode(np.frombuffer(x, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1] for x in faces]
    plain = forward(np.stack(pixels)).astype(np.float64)
    mirrored = forward(np.stack([cv2.flip(x, 1) for x in pixels])).astype(np.float64)
    assert flip_sum.dtype == norms.dtype == np.float64
    np.testing.assert_allclose(flip_sum, plain + mirrored, rtol=0, atol=2e-3 * abs(plain).mean())
    np.testing.assert_allclose(norms[:, 0], np.sqrt((plain**2).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(norms[:, 1], np.sqrt((mirrored**2).sum(1)), rtol=1e-5)


def test_slices_of_ranks_add_up_to_the_whole(faces):
    # Each rank embeds its slice; one rank of a small set may hold nothing.
    forward = projection()
    whole, norms = lfw.embed(forward, faces, 8)
    bounds = [0, 16, 32, 44, 44]
    parts = [lfw.embed(forward, faces[a:b], 8) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert parts[3][0].shape == (0, 16) and parts[3][1].shape == (0, 2)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), norms)


def test_score_is_insightfaces_arithmetic(faces):
    # arcface_torch: normalise the sum, squared distance, best threshold of nine folds; XNorm is the
    # mean norm over all embeddings and all mirrored embeddings.
    rng = np.random.default_rng(0)
    plain, mirrored = rng.normal(size=(2, 200, 8)).astype(np.float32).astype(np.float64)
    plain[1::4] = plain[0::4] + 0.5 * rng.normal(size=(50, 8))
    issame = np.arange(100) % 2 == 0
    norms = np.stack([np.linalg.norm(plain, axis=1), np.linalg.norm(mirrored, axis=1)], axis=1)
    result = lfw.score(plain + mirrored, norms, issame)
    total, count = 0.0, 0
    for rows in (plain, mirrored):
        for row in rows:
            total, count = total + np.linalg.norm(row), count + 1
    assert result["xnorm"] == pytest.approx(total / count, rel=1e-12)
    unit = normalize(plain + mirrored)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    accuracies = []
    for fold in range(10):
        test = np.arange(100) // 10 == fold
        right = [np.mean((distance[~test] < i * 0.01) == issame[~test]) for i in range(400)]
        accuracies.append(np.mean((distance[test] < np.argmax(right) * 0.01) == issame[test]))
    assert result["fold_accuracy"] == pytest.approx(accuracies, abs=1e-15)
    assert result["accuracy_mean"] == pytest.approx(np.mean(accuracies), abs=1e-15)


def test_images_of_another_size_are_resized_like_insightface_if_that_is_asked_for(faces):
    # resize_short with OpenCV's bicubic interpolation, before the network sees them.
    large = face(5, size=160)
    seen = []
    network = lambda x: seen.append(x) or np.ones((len(x), 2), np.float32)  # noqa: E731
    with pytest.raises(ValueError, match="set image 0: 160x160 pixels, not 112x112"):
        lfw.embed(network, [large], 4, "set")
    assert not seen
    lfw.embed(network, [large], 4, "set", resize=True)
    image = cv2.imdecode(np.frombuffer(large, np.uint8), cv2.IMREAD_COLOR)
    expected = cv2.resize(image, (112, 112), interpolation=cv2.INTER_CUBIC)[:, :, ::-1]
    np.testing.assert_array_equal(seen[0][0], expected)


@pytest.mark.parametrize("broken", [b"", b"not an image"])
def test_an_unreadable_image_is_named(faces, broken):
    encoded = [*faces[:9], broken, *faces[9:]]
    with pytest.raises(ValueError, match="agedb_30 image 9"):
        lfw.embed(projection(), encoded, 4, where="agedb_30")


def test_few_batches_are_decoded_ahead(faces, monkeypatch):
    alive, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *x: alive.append(0) or decode(*x))
    in_use = []

    def forward(batch):
        in_use.append(len(alive))
        return np.ones((len(batch), 2), np.float32)

    lfw.embed(forward, faces, 4)
    assert len(alive) == 44
    for i in range(0, len(in_use), 2):  # two calls a batch: plain and mirrored
        assert in_use[i] <= 4 * (i // 2 + 2 + extract.AHEAD)
