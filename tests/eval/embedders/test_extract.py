"""Extraction: the same numbers however it is cut, resumed, cached or shared among processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest

from eval.embedders import extract
from eval.embedders.contract import InputContract
from eval.embedders.extract import ImagePlace
from eval.embedders.images import Encoded, Files, Subset
from recognition.weights import networks
from tests.eval import official
from tests.real import ROOT


@pytest.fixture(scope="module")
def images():
    return Encoded("set", [official.jpeg(official.face(k, 0)) for k in range(23)])


class Network:
    """Two numbers of an image, and a count of what it was asked."""

    digest, contract = "abc", InputContract()

    def __init__(self):
        self.seen = 0

    def prepare(self, pixels):
        return pixels

    def forward(self, pixels):
        self.seen += len(pixels)
        return np.stack([pixels[:, :, :56].mean((1, 2, 3)), pixels.mean((1, 2, 3))], 1).astype("f4")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(extract, "BLOCK", 8)


def run(images, network=None, **options):
    network = network or Network()
    options = {"batch_size": 3, "place": ImagePlace()} | options
    return extract.extract(network, images, **options), network


def test_a_row_is_the_image_and_its_mirror(images):
    found, _ = run(images)
    pixels = np.stack([images[i] for i in range(23)])
    views = np.stack([Network().forward(pixels), Network().forward(pixels[:, :, ::-1])], 1)
    np.testing.assert_array_equal(np.concatenate(list(found.blocks())), views)
    np.testing.assert_array_equal(found.matrix(), views.sum(axis=1))
    np.testing.assert_allclose(found.norms(), np.linalg.norm(views.astype(float), axis=2))
    plain, _ = run(images, flip=False)
    np.testing.assert_array_equal(plain.matrix(np.float64), views[:, 0].astype(float))


@pytest.mark.parametrize("batch_size, threads", [(1, 1), (5, 3), (8, 2), (64, 0)])
def test_batches_and_threads_change_nothing(images, tmp_path, batch_size, threads):
    expected = run(images)[0].matrix()
    found, _ = run(images, cache=tmp_path, batch_size=batch_size, threads=threads)
    np.testing.assert_array_equal(found.matrix(), expected)


def test_a_second_protocol_costs_nothing(images, tmp_path):
    first, network = run(images, cache=tmp_path)
    assert network.seen == 46
    again, network = run(images, cache=tmp_path)
    assert network.seen == 0
    np.testing.assert_array_equal(again.matrix(), first.matrix())
    plain, network = run(images, cache=tmp_path, flip=False)  # from the blocks with mirrors
    assert network.seen == 0 and plain.norms().shape == (23, 1)
    np.testing.assert_array_equal(plain.matrix(), run(images, flip=False)[0].matrix())


def test_another_model_contract_or_set_is_another_entry(images, tmp_path):
    run(images, cache=tmp_path)
    other, bgr = Network(), Network()
    other.digest, bgr.contract = "xyz", InputContract(color_order="BGR")
    fewer = Subset(images, list(range(22)), "set")
    for network, some in ((other, images), (bgr, images), (Network(), fewer)):
        run(some, network, cache=tmp_path)
        assert network.seen == 2 * len(some)
    facts = [json.loads(p.read_text()) for p in tmp_path.glob("*/facts.json")]
    assert len(facts) == 4 and {x["model"] for x in facts} == {"abc", "xyz"}


def test_a_killed_run_goes_on_at_its_block(images, tmp_path):
    class Dies(Network):
        def forward(self, pixels):
            if self.seen > 20:
                raise KeyboardInterrupt
            return super().forward(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(images, Dies(), cache=tmp_path)
    kept = list(tmp_path.glob("*/block-*.npy"))
    assert len(kept) == 1 and not list(tmp_path.glob("*/*.partial"))
    found, network = run(images, cache=tmp_path)
    assert network.seen == 2 * (23 - 8)
    np.testing.assert_array_equal(found.matrix(), run(images)[0].matrix())


def test_a_damaged_block_is_named_and_computed_again(images, tmp_path, capsys):
    expected = run(images, cache=tmp_path)[0].matrix()
    (block,) = tmp_path.glob("*/block-0000001.npy")
    for content in (b"", block.read_bytes()[:100], b"junk" * 50):
        block.write_bytes(content)
        found, network = run(images, cache=tmp_path)
        assert network.seen == 16 and "is damaged and will be recomputed" in capsys.readouterr().err
        np.testing.assert_array_equal(found.matrix(), expected)


def test_flipped_bits_of_a_block_are_noticed(images, tmp_path, capsys):
    """They are finite numbers of the right shape: only the hash tells."""
    expected = run(images, cache=tmp_path)[0].matrix()
    (block,) = tmp_path.glob("*/block-0000001.npy")
    whole = block.read_bytes()
    for at in (130, 200, len(whole) - 1):  # a number, another, the hash itself
        block.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        found, network = run(images, cache=tmp_path)
        assert network.seen == 16 and "is damaged and will be recomputed" in capsys.readouterr().err
        np.testing.assert_array_equal(found.matrix(), expected)
    block.write_bytes(whole[:130] + bytes([whole[130] ^ 0x10]) + whole[131:])
    with pytest.raises(ValueError, match="block-0000001.npy: its content contradicts its hash"):
        found.matrix()  # damaged after it was found whole


def test_other_pixels_under_the_same_name_size_and_time_are_another_entry(tmp_path):
    path, cache = tmp_path / "a.png", tmp_path / "cache"
    pixels = np.zeros((112, 112, 3), np.uint8)
    found = []
    for value in (10, 20):
        pixels[40, 40] = value
        content = cv2.imencode(".bmp", pixels)[1].tobytes()
        path.write_bytes(content)
        os.utime(path, (1, 1))
        found.append(run(Files("one", tmp_path, [path.name]), cache=cache)[0].matrix())
    assert (found[0] != found[1]).any()


def test_the_cache_is_its_owners_alone(images, tmp_path):
    run(images, cache=tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("made", [0, 1])
def test_blocks_of_a_process_that_died_are_computed_by_the_first(
    images, tmp_path, capsys, monkeypatch, made
):
    """Before: it waited for ever. Process 1 of 2 dies after `made` of its blocks."""
    monkeypatch.setattr(extract, "PATIENCE", 0.3)
    monkeypatch.setattr(extract, "BLOCK", 4)  # 6 blocks, 3 of them of process 1

    class Dies(Network):
        def forward(self, pixels):
            if self.seen >= 8 * made:
                raise KeyboardInterrupt
            return super().forward(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(images, Dies(), cache=tmp_path, place=ImagePlace(1, 2))
    done: list[int] = []
    found, network = run(images, cache=tmp_path, place=ImagePlace(0, 2), advance=done.append)
    assert network.seen == 46 - 8 * made and sum(done) == 23
    assert f"the remaining {3 - made}" in capsys.readouterr().err
    np.testing.assert_array_equal(found.matrix(), run(images)[0].matrix())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_blocks(images, tmp_path, world):
    networks = [Network() for _ in range(world)]
    found = {}

    def work(rank):
        place = ImagePlace(rank, world)
        found[rank] = run(images, networks[rank], cache=tmp_path, place=place)[0]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(network.seen for network in networks) == 46
    assert [rank for rank in found if found[rank] is not None] == [0]
    np.testing.assert_array_equal(found[0].matrix(), run(images)[0].matrix())


def test_several_processes_need_a_cache(images):
    with pytest.raises(ValueError, match="give --cache DIR"):
        run(images, place=ImagePlace(0, 2))


def test_a_broken_image_and_an_embedding_that_is_none(images, tmp_path):
    broken = Encoded("set", [*images.encoded[:9], images.encoded[9][:-40]])
    with pytest.raises(ValueError, match="set image 9: truncated"):
        run(broken, cache=tmp_path)

    class Bad(Network):
        def forward(self, pixels):
            return super().forward(pixels) * np.where(self.seen > 24, np.nan, 1)

    with pytest.raises(ValueError, match="the embedding of image 1[0-9] is not finite"):
        run(images, Bad())
    with pytest.raises(ValueError, match="no images"):
        run(Encoded("none", []))


def test_progress_adds_up(images, tmp_path):
    done = []
    run(images, cache=tmp_path, advance=done.append)
    assert sum(done) == 23
    done.clear()
    (tmp_path / next(tmp_path.glob("*/block-0000000.npy"))).unlink()
    run(images, cache=tmp_path, advance=done.append)
    assert sum(done) == 23


def test_large_matrices_lie_in_a_file(images, monkeypatch):
    expected = run(images)[0].matrix()
    monkeypatch.setattr(extract, "IN_MEMORY", 10)
    found = run(images)[0].matrix()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)


def test_a_killed_process_leaves_whole_blocks(tmp_path):
    """SIGKILL in the middle of the real thing; then it goes on."""
    code = (
        "import sys, pathlib; from eval.embedders import extract; "
        "from recognition.weights import networks\n"
        "from eval.embedders.images import Encoded\n"
        "from tests.eval import official\n"
        "from tests.eval.embedders.test_embed import make_run\n"
        "root = pathlib.Path(sys.argv[1]); extract.BLOCK = 4\n"
        "if not (root / 'run').exists(): make_run(root / 'run')\n"
        "faces = [official.jpeg(official.face(k % 5, k)) for k in range(60)]\n"
        "embedder = networks.open_embedder(root / 'run')\n"
        "for _ in range(2):\n"
        "    found = extract.extract(embedder, Encoded('x', faces), cache=root / 'cache',\n"
        "        batch_size=4)\n"
        "    print('SUM', repr(float(abs(found.matrix()).sum())))\n"
        "    for block in root.glob('cache/*/block-*.npy'): block.unlink()\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.time() + 100
    while len(list(tmp_path.glob("cache/*/block-*.npy"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for block in tmp_path.glob("cache/*/block-*.npy"):
        assert np.load(block).shape[0] == 4
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    resumed, anew = [line for line in done.stdout.splitlines() if line.startswith("SUM")]
    assert resumed == anew


def test_the_real_network_through_the_pipeline(tmp_path, images):
    from tests.eval.embedders.test_embed import make_run

    make_run(tmp_path)
    embedder = networks.open_embedder(tmp_path, 4)
    found = extract.extract(embedder, images, batch_size=4, place=ImagePlace())
    pixels = np.stack([images[i] for i in range(23)])
    expected = embedder(pixels) + embedder(np.ascontiguousarray(pixels[:, :, ::-1]))
    np.testing.assert_allclose(found.matrix(), expected, atol=1e-5 * abs(expected).max())
