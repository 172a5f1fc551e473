"""Several sets read as one: ids and classes one after the other, shares of the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import shards
from data_tools.load import order
from data_tools.load.dali import Dali
from data_tools.load.loader import Loader
from data_tools.load.order import Order, ShuffleBlocks
from data_tools.load.read_ahead import ReadAhead, file_stretches
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.union import open_all
from tests.data_tools.samples import folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("sets")
    for name, people in (("a", [5, 2, 7]), ("b", [9, 4]), ("c", [3, 3, 3, 3])):
        pack(folder(root / f"faces-{name}", people), root / name, PackOptions(shards=2))
    return [str(root / name) for name in "abc"]


def test_images_and_classes_follow_one_another(paths):
    data, sets = open_all(paths), [shards.open(path) for path in paths]
    assert (data.num_images, data.num_classes, data.sizes) == (39, 9, (14, 13, 12))
    want = [(label + first, encoded) for one, first in zip(sets, (0, 3, 5), strict=True)
            for label, encoded in one]  # fmt: skip
    assert [data[i] for i in range(39)] == want
    assert data.labels.tolist() == [label for label, _ in want]
    assert data.where(14) == sets[1].where(0) and data.where(38) == sets[2].where(11)
    for beyond in (39, -1):
        with pytest.raises(IndexError, match=f"image {beyond} of 39"):
            data[beyond]
    assert isinstance(open_all(paths[0]), shards.Shards)


def test_the_same_set_twice_is_refused(paths):
    with pytest.raises(ValueError, match="names .*a twice"):
        open_all([paths[0], paths[1], paths[0] + "/"])


@pytest.mark.parametrize("source", [Loader, Dali])
def test_a_batch_has_the_share_of_each_set(paths, source):
    data = open_all(paths)
    seen = []
    with source(data, seed=2, global_batch=12, shares=(3, 2, 1)) as loader:
        for _ in range(4):
            batch = next(loader)
            assert np.bincount(np.searchsorted([14, 27], batch.ids, "right")).tolist() == [6, 4, 2]
            assert batch.labels.tolist() == data.labels[batch.ids].tolist()
            seen.append(batch.ids)
    first = np.concatenate(seen)
    first = first[first < 14]
    assert np.array_equal(first, order.ids(14, 2, 0, 24))  # each image before any comes again


def test_without_shares_the_sets_are_one_stream(paths):
    with Loader(open_all(paths), seed=2, global_batch=39) as loader:
        assert np.array_equal(next(loader).ids, order.ids(39, 2, 0, 39))


@pytest.mark.parametrize("shares", [(1, 1), (1, 0, 2), (1, 1, -1)])
def test_shares_that_make_no_sense_are_refused(paths, shares):
    with pytest.raises(ValueError, match="for 3 data sets: a positive whole number"):
        Loader(open_all(paths), seed=0, global_batch=12, shares=shares)


def test_a_label_beyond_its_set_is_not_taken_for_one_of_the_next(paths):
    data = open_all(paths)
    data.sets[0].__dict__["labels"] = np.where(np.arange(14) == 4, 3, data.sets[0].labels)
    with pytest.raises(ValueError, match=r"the label 3 of image 4 is outside \[0, 3\)"):
        Loader(data, seed=0, global_batch=12)


def test_stretches_of_files_hold_the_records(paths):
    data = open_all(paths)
    for start, stop in [(0, 39), (3, 20), (26, 28), (13, 14)]:
        found = file_stretches(data, start, stop)
        for image in range(39):
            one, number = next(
                (s, image - f) for s, f in zip(data.sets[::-1], (27, 14, 0), strict=True)
                if image >= f
            )  # fmt: skip
            shard, offset = one.locate(number)
            path = str(one.files[shard].path)
            inside = any(p == path and a <= offset < a + n for p, a, n in found)
            assert inside is (start <= image < stop)


def test_each_window_is_asked_for_once_and_before_it_is_read(paths, monkeypatch):
    data = open_all(paths)
    ahead = ReadAhead(data, Order((39,), 1, blocks=ShuffleBlocks(3, 2)))
    asked: list = []
    monkeypatch.setattr(ahead, "_advise", lambda windows: asked.extend(key for key, _ in windows))
    for start in range(0, 80, 2):
        ahead.ask([(start, start + 2)])
        window = (0, start // 39, start % 39 // 6)
        assert window in asked
    assert len(asked) == len(set(asked)) and asked == sorted(asked)


def test_advice_reaches_the_kernel(paths):
    data = open_all(paths)
    ReadAhead(data, Order((39,), 1, blocks=ShuffleBlocks(3, 2)))._advise([((0, 0, 0), 0)])
    assert Path(data.sets[0].files[0].path).exists()
    with Loader(data, seed=1, global_batch=10, blocks=ShuffleBlocks(3, 2)) as loader:
        ids = np.concatenate([next(loader).ids for _ in range(8)])
    assert np.array_equal(ids, order.ids(39, 1, 0, 80, ShuffleBlocks(3, 2)))
