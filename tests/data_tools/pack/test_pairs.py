"""Verification pairs: folds like LFW's, no pair twice, the same for the same seed."""

import itertools
import pickle

import numpy as np
import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.images.decode import decode
from data_tools.pack import pairs
from data_tools.pack.pairs import draw_pairs, most_pairs, write_bin
from tests.data_tools.samples import encoded, folder

LABELS = np.repeat(np.arange(12), [5, 1, 9, 2, 4, 30, 3, 3, 2, 1, 6, 8])


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_what_they_say(seed):
    found, issame = draw_pairs(LABELS, 100, seed)
    assert found.shape == (100, 2) and issame.shape == (100,)
    np.testing.assert_array_equal(LABELS[found[:, 0]] == LABELS[found[:, 1]], issame)
    assert (found[:, 0] != found[:, 1]).all()
    assert len({tuple(sorted(pair)) for pair in found.tolist()}) == 100
    for fold in np.split(issame, 10):
        assert fold.tolist() == [True] * 5 + [False] * 5


def test_pairs_depend_on_the_seed_alone():
    one, other = draw_pairs(LABELS, 100, 7)[0], draw_pairs(LABELS.copy(), 100, 7)[0]
    np.testing.assert_array_equal(one, other)
    assert (draw_pairs(LABELS, 100, 8)[0] != one).any()


def test_large_identities_do_not_fill_the_set():
    found, issame = draw_pairs(LABELS, 40, 0)
    people = LABELS[found[issame][:, 0]]
    # Ten identities have a pair to give: two rounds give each its second, where it has one.
    assert np.bincount(people, minlength=12).max() <= 3
    assert set(people) == {0, 2, 3, 4, 5, 6, 7, 8, 10, 11}


def test_all_there_are_can_be_drawn():
    labels = np.repeat([0, 1, 2], [4, 3, 2])  # 6 + 3 + 1 pairs of one person, 26 of two
    found, issame = draw_pairs(labels, 20, 3)
    assert {tuple(sorted(pair)) for pair in found[issame].tolist()} == {
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6), (7, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "count", "fault"),
    [
        (LABELS, 30, "multiple of 20"),
        (LABELS, 0, "multiple of 20"),
        ([0, 0, 0, 0, 0, 1], 40, "20 of one person, but 6 images of 2 identities make only 10"),
        ([0] * 9, 20, "10 of two people, but 9 images of 1 identity make only 0"),
        (list(range(9)), 20, "10 of one person.* make only 0: more images or people are needed"),
        (LABELS, 2000, "make only 538: ask for at most 1060 pairs"),
    ],
)
def test_impossible_requests_say_what_is_possible(labels, count, fault):
    with pytest.raises(ValueError, match=fault):
        draw_pairs(np.array(labels), count, 0)


@pytest.mark.parametrize("sizes", [[5, 1], [9], [1] * 9, [6, 6], [3] * 7, [30, 1, 1]])
def test_the_most_pairs_can_be_drawn_and_no_more(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    kinds = [a == b for a, b in itertools.combinations(labels.tolist(), 2)]
    most = 2 * min(sum(kinds), len(kinds) - sum(kinds)) // 20 * 20
    assert most_pairs(labels) == most
    if most:
        assert len(draw_pairs(labels, most, 0)[1]) == most
    with pytest.raises(ValueError, match="make only"):
        draw_pairs(labels, most + 20, 0)


def test_the_file_is_plain(tmp_path):
    images = [encoded(i) for i in range(40)]
    found, issame = draw_pairs(np.arange(40) // 4, 20, 0)
    write_bin(tmp_path / "x.bin", images, found, issame)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]

    class OnlyPlain(pickle.Unpickler):
        def find_class(self, module, name):
            raise AssertionError(f"{module}.{name}: nothing but bytes and booleans is needed")

    with open(tmp_path / "x.bin", "rb") as file:
        bins, flags = OnlyPlain(file).load()
    assert bins == [images[i] for i in found.ravel()]
    assert flags == issame.tolist()
    assert {type(image) for image in bins} == {bytes} and {type(flag) for flag in flags} == {bool}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "x.bin").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs.pickle, "dump", full)
    with pytest.raises(OSError, match=r"No space left.*x\.bin"):
        write_bin(tmp_path / "x.bin", [b"a", b"b"], np.array([[0, 1]]), np.array([True]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_bytes() == b"old"


def test_the_command_on_a_folder(tmp_path, capsys):
    source = folder(tmp_path / "faces", [5] * 8)
    (source / "p00" / "0.jpg").write_bytes(b"")
    (source / "p01" / "0.jpg").write_bytes(encoded(5, 60))  # resized
    names = tmp_path / "names.txt"
    names.write_text("".join(f"p{k:02d}\n" for k in range(6)))
    arguments = ["pairs", str(source), str(tmp_path / "x.bin"), "--pairs", "60", "--resize"]
    assert main([*arguments, "--identities", str(names), "--seed", "3", "--json"]) == 0
    captured = capsys.readouterr()
    assert "warning: 1 of 29 images was not 112x112 and was resized" in captured.err
    assert '"skipped": 1' in captured.out.splitlines()[-1]
    assert "skipped p00/0.jpg: no image: zero bytes" in captured.err
    bins, issame = pickle.loads((tmp_path / "x.bin").read_bytes())
    assert len(bins) == 120 and sum(issame) == 30
    assert all(decode(image).shape == (112, 112, 3) for image in bins)
    allowed = {p.read_bytes() for k in range(6) for p in (source / f"p{k:02d}").iterdir()}
    assert sum(image not in allowed for image in set(bins)) <= 1  # the resized one
    assert main(arguments) == 1  # it exists
    assert "--overwrite" in capsys.readouterr().err
    first = (tmp_path / "x.bin").read_bytes()
    assert main([*arguments, "--identities", str(names), "--seed", "3", "--overwrite"]) == 0
    assert (tmp_path / "x.bin").read_bytes() == first


def test_the_command_on_shards(tmp_path, capsys):
    source = folder(tmp_path / "faces", [4] * 6)
    assert main(["pack", str(source), str(tmp_path / "set"), "--workers", "1"]) == 0
    out = tmp_path / "set" / "mine.bin"
    names = tmp_path / "names.txt"
    names.write_text("p01\np02\np05\n")
    arguments = ["pairs", str(tmp_path / "set"), str(out), "--pairs", "20"]
    assert main([*arguments, "--identities", str(names)]) == 0
    assert shards.open(tmp_path / "set").bin_path("mine") == out
    bins, issame = pickle.loads(out.read_bytes())
    name_of = {p.read_bytes(): p.parent.name for p in source.glob("*/*.jpg")}
    people = [name_of[image] for image in bins]
    assert set(people) == {"p01", "p02", "p05"}
    assert [a == b for a, b in zip(people[::2], people[1::2], strict=True)] == issame
    names.write_text("p01\nnobody\n")
    assert main([*arguments, "--identities", str(names), "--overwrite"]) == 1
    assert "1 of 2 names are no identities" in capsys.readouterr().err


def test_mistakes_of_the_command(tmp_path, capsys):
    source = folder(tmp_path / "faces", [2, 2])
    for arguments, fault in [
        ([str(source), "x.pkl"], "ends in .bin"),
        ([str(tmp_path / "absent"), "x.bin"], "no such directory"),
        ([str(source), str(tmp_path / "x.bin"), "--pairs", "20"], "make only 2"),
        ([str(source), str(tmp_path / "x.bin"), "--seed", "-1"], "--seed -1: must be 0 or more"),
        ([str(source), str(tmp_path / "x.bin"), "--size", "0"], "--size 0: must be 1 or more"),
        ([str(source), str(tmp_path / "x.bin"), "--size", "9999"], "must be 1024 or less"),
        ([str(source), str(tmp_path / "no" / "x.bin"), "--pairs", "20"], "make only 2"),
    ]:
        assert main(["pairs", *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and fault in error
    assert list(tmp_path.glob("*.bin*")) == []
