"""The relabel index: honoured wherever a set is opened, refused for another; and the split."""

import pickle

import numpy as np
import pytest

from data_tools import relabel, shards
from data_tools.__main__ import main
from data_tools.common.errors import UserError
from data_tools.decisions import write_decision
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.pack.split import HoldOut, choose
from data_tools.shards import check_labels
from tests.data_tools.pack.test_pack import by_identity
from tests.data_tools.samples import folder
from tests.data_tools.sources.test_sources import write_rec


@pytest.fixture
def data(tmp_path):
    pack(folder(tmp_path / "faces", [5, 2, 7, 1, 4]), tmp_path / "set", PackOptions(shards=3))
    return shards.open(tmp_path / "set")


def test_drop_and_relabel_without_touching_the_shards(data, tmp_path):
    before = {path.name: path.read_bytes() for path in data.path.iterdir()}
    new = data.labels.copy()
    new[data.labels == 3] = relabel.DROP  # a whole person
    gone = np.flatnonzero(data.labels == 2)[:3]
    new[gone] = relabel.DROP
    moved = np.flatnonzero(data.labels == 0)[0]
    new[moved] = 4
    split = np.flatnonzero(data.labels == 0)[1]
    new[split] = data.num_classes  # a new class
    write_decision(tmp_path / "index.txt", data, new)
    assert main(["relabel", str(data.path), str(tmp_path / "index.txt")]) == 0
    cleaned = shards.open(data.path)
    assert {p.name: p.read_bytes() for p in data.path.iterdir() if p.name in before} == before
    assert (len(cleaned), cleaned.num_classes) == (15, 5)
    assert cleaned.identities == ["p00", "p01", "p02", "p04", "5"]
    old = [data[i] for i in range(len(data))]
    kept = [i for i in range(len(data)) if new[i] != relabel.DROP]
    dense = {0: 0, 1: 1, 2: 2, 4: 3, 5: 4}
    assert list(cleaned) == [(dense[int(new[i])], old[i][1]) for i in kept]
    assert [cleaned.where(j) for j in range(15)] == [data.where(i) for i in kept]
    check_labels(cleaned)
    copy = pickle.loads(pickle.dumps(cleaned))
    assert list(copy) == list(cleaned)
    assert cleaned.fingerprint == data.fingerprint
    assert len(shards.open(data.path, shards.NO_RELABEL)) == 19
    # a second decision on the cleaned set keeps the first
    again = cleaned.labels.copy()
    again[0] = relabel.DROP
    again[1] = cleaned.num_classes
    write_decision(tmp_path / "second.txt", cleaned, again)
    twice = shards.open(data.path, tmp_path / "second.txt")
    assert [image for _, image in twice] == [old[i][1] for i in kept[1:]]
    assert twice.num_classes == len(np.unique(again[1:]))
    assert twice.labels[0] == twice.num_classes - 1 and twice.identities[-1] == "6"
    assert main(["relabel", str(data.path), "--remove"]) == 0
    assert len(shards.open(data.path)) == 19


def test_an_index_as_an_editor_saves_it(data, tmp_path):
    new = data.labels.copy()
    new[0], new[1] = relabel.DROP, data.num_classes
    write_decision(tmp_path / "index.txt", data, new)
    plain = relabel.read(tmp_path / "index.txt")
    content = (tmp_path / "index.txt").read_bytes()
    saved = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n"
    (tmp_path / "saved.txt").write_bytes(saved)
    for one, other in zip(relabel.read(tmp_path / "saved.txt"), plain, strict=True):
        np.testing.assert_array_equal(one, other)
    (tmp_path / "utf16.txt").write_text(content.decode(), encoding="utf-16")
    with pytest.raises(UserError, match="utf16.txt is UTF-16 text: save it as UTF-8"):
        relabel.read(tmp_path / "utf16.txt")


def test_pack_follows_an_index_and_verify_still_passes(data, tmp_path):
    new = np.where(data.labels == 2, relabel.DROP, data.labels)
    write_decision(tmp_path / "index.txt", data, new)
    words = ["pack", str(data.path), str(tmp_path / "two"), "--shards", "1"]
    assert main([*words, "--relabel", str(tmp_path / "index.txt")]) == 0
    found = by_identity(shards.open(tmp_path / "two"))
    want = by_identity(data)
    del want["p02"]
    assert found == want
    assert main(["relabel", str(data.path), str(tmp_path / "index.txt")]) == 0
    assert main(["verify", str(data.path), "--deep"]) == 0
    assert main(["inspect", str(data.path)]) == 0


def test_an_insightface_directory_is_cleaned_in_place(tmp_path):
    rec = write_rec(tmp_path / "rec", [0, 1, 1, 2], range(4))
    data = shards.open(rec)
    write_decision(rec / relabel.NAME, data, np.array([relabel.DROP, 1, 2, 2]))
    cleaned = shards.open(rec)
    assert [label for label, _ in cleaned] == [0, 1, 1] and cleaned.identities == ["1", "2"]
    assert [image for _, image in cleaned] == [data[i][1] for i in (1, 2, 3)]
    assert pickle.loads(pickle.dumps(cleaned)).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.replace("of=", "of=0"), "was made for a set 0"),
        (lambda t: t.replace("images=19", "images=20"), "not for this one"),
        (lambda t: "17\tdrop\n", "line 1 is not"),
        (lambda t: t + "3\tx\n", "line 3: '3"),
        (lambda t: t + "-3\tdrop\n", "line 3"),
        (lambda t: t + "19\tdrop\n", "image 19 of a set of 19"),
        (lambda t: t + "0\tdrop\n", "two lines name image 0"),
        (lambda t: t + "".join(f"{i}\tdrop\n" for i in range(1, 19)), "drops every image"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, change, fault, capsys):
    new = data.labels.copy()
    new[0] = relabel.DROP
    write_decision(tmp_path / "index.txt", data, new)
    (tmp_path / "index.txt").write_text(change((tmp_path / "index.txt").read_text()))
    assert main(["relabel", str(data.path), str(tmp_path / "index.txt")]) == 1
    error = capsys.readouterr().err
    assert fault in error and error.startswith("error: ")
    assert not (data.path / relabel.NAME).exists()


# --- what of a source is packed ---


def test_split_min_and_max(tmp_path):
    source = folder(tmp_path / "faces", [10, 2, 20, 1, 5, 10])
    options = PackOptions(shards=2, split="images=0.2", min_images=2, max_images=7)
    done = pack(source, tmp_path / "set", options, workers=2)
    data, aside = shards.open(tmp_path / "set"), shards.open(tmp_path / "set" / "split")
    assert data.identities == aside.identities == ["p00", "p01", "p02", "p04", "p05"]
    assert np.bincount(aside.labels, minlength=5).tolist() == [2, 0, 4, 1, 2]
    assert np.bincount(data.labels).tolist() == [7, 2, 7, 4, 7]
    assert data.index["too_few_images"] == {"identities": 1}
    assert data.index["beyond_max_images"] == (8 - 7) + (16 - 7) + (8 - 7)
    assert done["split"]["images"] == 9
    assert not {image for _, image in data} & {image for _, image in aside}
    assert main(["verify", str(tmp_path / "set" / "split")]) == 0


def test_split_identities(tmp_path):
    source = folder(tmp_path / "faces", [2] * 10)
    pack(source, tmp_path / "set", PackOptions(shards=1, split="identities=0.3", hold_out=0))
    data, aside = shards.open(tmp_path / "set"), shards.open(tmp_path / "set" / "split")
    assert (data.num_classes, aside.num_classes) == (7, 3)
    assert sorted(data.identities + aside.identities) == [f"p{k:02d}" for k in range(10)]


def test_the_choice_is_of_the_seed_alone():
    labels = np.random.default_rng(0).integers(0, 40, 1000)
    one, same, other = (
        choose(labels, 50, HoldOut(seed, 5, "images=0.1", 3, 20)) for seed in (1, 1, 2)
    )
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.held, other.held)
    everything = np.concatenate([one.images, one.aside_images])
    assert len(np.unique(everything)) == len(everything)
    assert len(one.without) == 10
