"""Real faces: a network trained on some people verifies the others, and both ways of naming the
pairs, a .bin and LFW's list, give one number. Minutes: the network is trained here."""

import json
import pickle

import numpy as np
import pytest

from data_tools.pack.pairs import draw_pairs
from tests.conftest import command
from tests.real import real

HELD_OUT = 284  # the last of the people in alphabetical order


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_bin_and_pair_list_of_held_out_people_give_one_number(tmp_path):
    people = sorted(path for path in real("lfw112").iterdir() if path.is_dir())
    for name, some in (("train", people[:-HELD_OUT]), ("held", people[-HELD_OUT:])):
        (tmp_path / name).mkdir()
        for path in some:
            (tmp_path / name / path.name).symlink_to(path)
    command("-m", "data_tools", "pack", tmp_path / "train", tmp_path / "shards", "--shards", 4)
    command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "launch/train.py",
        "launch/configs/demo.py", f"rec={tmp_path / 'shards'}", f"output={tmp_path / 'run'}",
        timeout=1500,
    )  # fmt: skip
    images = sorted((tmp_path / "held").glob("*/*.jpg"))
    labels = np.unique([path.parent.name for path in images], return_inverse=True)[1]
    pairs, issame = draw_pairs(labels, 1200, 0)
    content = [images[i].read_bytes() for pair in pairs for i in pair]
    (tmp_path / "bin.bin").write_bytes(pickle.dumps((content, [bool(x) for x in issame])))
    rows = ["10 60"]
    for (a, b), same in zip(pairs, issame, strict=True):
        one, other = (images[i].stem.rsplit("_", 1) for i in (a, b))
        tail = [str(int(other[1]))] if same else [other[0], str(int(other[1]))]
        rows.append("\t".join([one[0], str(int(one[1])), *tail]))
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    official = real("lfw_pairsDevTrain.txt")
    done = command(
        "-m", "eval", "lfw", tmp_path / "run", tmp_path / "bin.bin",
        f"{tmp_path / 'list.txt'}:{tmp_path / 'held'}", f"{official}:{tmp_path / 'held'}", "--json",
    )  # fmt: skip
    sets = json.loads(done.stdout.splitlines()[-1])["sets"]
    of_bin, of_list = sets["bin"], sets["list"]
    assert of_bin["accuracy_mean"] > 0.75  # 0.84 on 2026-11-24
    for key in ("accuracy_mean", "accuracy_std", "fold_accuracy", "best_thresholds"):
        assert of_bin[key] == of_list[key], key
    for key in ("auc", "eer", "xnorm"):
        assert of_bin[key] == pytest.approx(of_list[key], abs=1e-5)
    assert of_list["images"] < of_bin["images"]  # each image of the list once
    # The official list names mostly people that are not held out: they are listed and counted.
    dev = sets["lfw_pairsDevTrain"]
    assert dev["missing"] + dev["pairs"] == 2200 and len(dev["missing_pairs"]) == dev["missing"]
    assert f"{dev['missing']} of 2200 pairs left out" in done.stderr
