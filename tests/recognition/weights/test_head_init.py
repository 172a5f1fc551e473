"""Starts of a head from elsewhere, at any number of ranks."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_tools import shards
from data_tools.images.decode import decode
from recognition import checkpoint, config
from recognition.backbones import BACKBONES
from recognition.checkpoint.manifest import write_manifest
from recognition.export.to_onnx import export_onnx
from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.run import build
from recognition.weights import head_init, saved_rows
from tests import ranks
from tests.recognition import runs

C, D = 21, 32


def arcface_shards(root, classes, world=8, kind="softmax_fc"):
    """What `world` ranks of arcface_torch would have saved."""
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(classes, D))).float()
    start = 0
    for rank in range(world):
        part = rows[start : (start := start + classes // world + (rank < classes % world))].clone()
        content = {
            "tensor": part, "softmax_fc": {"weight": part},
            "checkpoint": {"epoch": 1, "state_dict_softmax_fc": {"weight": part}},
        }[kind]  # fmt: skip
        stem = "checkpoint" if kind == "checkpoint" else "softmax_fc"
        torch.save(content, root / f"{stem}_gpu_{rank}.pt")
    return rows


def all_rows(source):
    there = saved_rows.open_rows(source)
    return there[np.arange(len(there))]


@pytest.mark.parametrize("kind", ["tensor", "softmax_fc", "checkpoint"])
def test_shards_of_eight_ranks_are_one_head(kind, tmp_path):
    rows = arcface_shards(tmp_path, 21, kind=kind)
    there = saved_rows.open_rows(str(tmp_path))
    assert torch.equal(there[np.arange(21)], rows)
    assert torch.equal(there[np.array([20, 3, 3, 9])], rows[[20, 3, 3, 9]])


def test_shards_that_are_not_whole(tmp_path):
    arcface_shards(tmp_path, 21)
    (tmp_path / "softmax_fc_gpu_3.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks \[3\]"):
        saved_rows.open_rows(str(tmp_path))
    far = tmp_path / f"softmax_fc_gpu_{10**19}.pt"
    torch.save({"weight": torch.zeros(9, D)}, far)
    with pytest.raises(ValueError, match=rf"ranks \[3, 8, 9, 10\] are missing, .* up to {10**19}"):
        saved_rows.open_rows(str(tmp_path))
    far.unlink()
    torch.save({"weight": torch.zeros(9, D).to_sparse()}, tmp_path / "softmax_fc_gpu_3.pt")
    with pytest.raises(ValueError, match="softmax_fc_gpu_3.pt is sparse"):
        saved_rows.open_rows(str(tmp_path))
    torch.save({"weight": torch.zeros(9, D)}, tmp_path / "softmax_fc_gpu_3.pt")
    with pytest.raises(ValueError, match="not the shards of one head"):
        saved_rows.open_rows(str(tmp_path))
    torch.save({"kernel": torch.zeros(9, D)}, tmp_path / "softmax_fc_gpu_3.pt")
    with pytest.raises(ValueError, match="no class rows"):
        saved_rows.open_rows(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="softmax_fc_gpu_"):
        saved_rows.open_rows(str(tmp_path / "nothing"))


def start(keys):
    """Every tensor of a run before its first step."""
    return runs.tensors(build.build(config.make(runs.BASE | keys), runs.here()))


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=-1)


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "output": str(tmp_path / "run")}


@pytest.mark.parametrize("world", [1, 2])
def test_head_of_other_identities_by_a_label_map(world, keys, shards_dir, tmp_path):
    classes = shards.open(shards_dir).num_classes
    rows = arcface_shards(tmp_path, 21)
    chosen = [(5 * i) % 21 if i % 3 else -1 for i in range(classes)]
    (tmp_path / "map.txt").write_text("\n".join(map(str, chosen)))
    plain = ranks.run(world, start, keys)[0]["rows"]
    more = {"init_head": str(tmp_path), "init_label_map": str(tmp_path / "map.txt")}
    found = ranks.run(world, start, keys | more)[0]["rows"]
    for here, there in enumerate(chosen):
        if there < 0:
            assert torch.equal(found[here], plain[here])
        else:
            assert (unit(found[here]) @ unit(rows[there])).item() == pytest.approx(1)
            assert found[here].norm().item() == pytest.approx(plain[here].norm().item())


def test_mistakes_in_a_head_and_its_map(keys, shards_dir, tmp_path):
    arcface_shards(tmp_path, 21)
    classes = shards.open(shards_dir).num_classes
    for lines, words in [
        (None, "init_label_map=FILE"),
        ([0] * (classes - 1), "expected"),
        ([21] + [0] * (classes - 1), "from -1 to 20"),
        (["0", "", "x"] + ["0"] * (classes - 2), "line 3 is not one class id"),
        ([10**20] + [0] * (classes - 1), "init_label_map=.*too large"),
    ]:
        more = {"init_head": str(tmp_path)}
        if lines is not None:
            (tmp_path / "map.txt").write_text("\n".join(map(str, lines)))
            more["init_label_map"] = str(tmp_path / "map.txt")
        with pytest.raises(Exception, match=words):
            ranks.run(1, start, keys | more)


def test_a_map_without_a_head_of_others_is_refused(keys):
    with pytest.raises(ValueError, match="give that too"):
        config.make(keys | {"init_label_map": "map.txt"})
    with pytest.raises(ValueError, match="leave the map out"):
        head = PartialFC(MARGINS["arcface"](), D, 1)
        head_init.start_centres(head, "features", "map.txt", None, lambda pixels: pixels)


def is_mean_direction(rows, module, data):
    """Each row is the mean direction of the images of its class."""
    labels = np.asarray(data.labels)
    for c in range(data.num_classes):
        places = np.flatnonzero(labels == c)[:16]
        pixels = np.stack([decode(data[int(i)][1]) for i in places]).astype(np.float32)
        x = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        with torch.no_grad():
            mean = unit(module(x)).sum(0)
        assert (unit(mean) @ unit(rows[c])).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_centres_from_the_features_of_the_new_set(world, keys, shards_dir):
    """Under the backbone of the start."""
    found = ranks.run(world, start, keys | {"init_head": "features"})[0]
    module = BACKBONES[runs.BASE["network"]](embedding_size=32)
    module.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in found.items() if k.startswith("backbone.")}
    )
    is_mean_direction(found["rows"], module.eval(), shards.open(shards_dir))


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_centres_from_the_features_under_an_onnx(world, keys, shards_dir, tmp_path):
    torch.manual_seed(5)
    module = BACKBONES[runs.BASE["network"]](embedding_size=32).eval()
    export_onnx(module, tmp_path / "x.onnx", metadata={})
    found = ranks.run(world, start, keys | {"init_head": str(tmp_path / "x.onnx")})[0]
    is_mean_direction(found["rows"], module, shards.open(shards_dir))
    with pytest.raises(Exception, match=r"rows are \[32\], this head's \[16\]"):
        ranks.run(world, start, keys | {"init_head": str(tmp_path / "x.onnx"),
                                        "embedding_size": 16})  # fmt: skip


def test_a_network_cannot_start_from_an_onnx(keys, tmp_path):
    """The error says what to do with it instead."""
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(Exception, match="init_from: .*x.onnx: .* teacher=, init_head= and"):
        ranks.run(1, start, keys | {"init_from": str(tmp_path / "x.onnx")})


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_rows_without_a_direction_are_refused(value, keys, tmp_path):
    arcface_shards(tmp_path, 21)
    torch.save({"weight": torch.full((2, D), value)}, tmp_path / "softmax_fc_gpu_7.pt")
    with pytest.raises(Exception, match="row for class 19 is zero or not finite"):
        ranks.run(1, start_centres_of, 21, str(tmp_path))


def start_centres_of(classes, source):
    head = head_init.PartialFC(MARGINS["cosface"](), D, classes, group=dist.group.WORLD)
    return head_init.start_centres(head, source, None, Few(), lambda pixels: pixels)


def test_a_rank_without_images_keeps_its_centres(tmp_path):
    """Classes 3 and 4 are the second rank's, and no image is of them."""
    torch.manual_seed(0)
    module = BACKBONES[runs.BASE["network"]](embedding_size=D).eval()
    export_onnx(module, tmp_path / "x.onnx", metadata={})
    assert ranks.run(2, count_of_few, str(tmp_path / "x.onnx")) == [3, 0]


def count_of_few(source):
    head = head_init.PartialFC(MARGINS["cosface"](), D, 5, group=dist.group.WORLD)
    image = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (112, 112, 3)))[1]
    data = Few([(c, image.tobytes()) for c in range(3)])
    return head_init.start_centres(head, source, None, data, lambda pixels: pixels)


def test_centres_of_sub_centres_by_a_map(keys, tmp_path):
    """Of K centres each, some classes without a source."""
    torch.manual_seed(1)
    source = keys | {"num_subcenters": 2, "max_steps": 1}
    ranks.run(1, runs.run, source)
    rows = all_rows(source["output"])
    chosen = [i - 1 for i in range(len(rows))]
    (tmp_path / "map.txt").write_text("\n".join(map(str, chosen)))
    more = {"init_head": source["output"], "init_label_map": str(tmp_path / "map.txt")}
    found = ranks.run(1, start, source | more | {"output": str(tmp_path / "b")})[0]["rows"]
    assert (unit(found[1:]) * unit(rows[:-1])).sum(-1).min().item() == pytest.approx(1)


class Few(list):
    labels = np.arange(3)


@pytest.mark.parametrize("legacy", [False, True])
def test_each_rank_reads_its_own_rows_alone(legacy, tmp_path, monkeypatch):
    """A rank of four takes its quarter of the classes; whole files are not held."""
    arcface_shards(tmp_path, 21)
    if legacy:  # as torch wrote before 1.6
        for path in tmp_path.iterdir():
            content = torch.load(path)
            torch.save(content, path, _use_new_zipfile_serialization=False)
    there = saved_rows.open_rows(str(tmp_path))
    monkeypatch.setattr(saved_rows, "_BLOCK", 2)
    sizes = []
    counted = [
        piece._replace(read=lambda a, b, read=piece.read: sizes.append(b - a) or read(a, b))
        for piece in there._pieces
    ]
    there._pieces = counted
    assert there[np.arange(5, 10)].shape == (5, D)
    assert sum(sizes) == 5 and max(sizes) <= 2


def test_the_log_says_where_the_centres_come_from(keys, tmp_path):
    arcface_shards(tmp_path, 16, world=4)
    lines = ranks.run(2, said_at_start, keys | {"init_head": str(tmp_path)})[0]
    assert f"16 class centres start from 4 shards of arcface_torch in {tmp_path}" in lines
    lines = ranks.run(1, said_at_start, keys | {"output": str(tmp_path / "new")})[0]
    assert "all 16 class centres start at random" in lines


def said_at_start(keys):
    return "\n".join(build.build(config.make(runs.BASE | keys), runs.here()).messages)


@pytest.mark.parametrize("damage", ["gap", "bit"])
def test_a_damaged_run_gives_no_centres(damage, keys, tmp_path):
    ranks.run(2, runs.run, keys, 1)
    path = checkpoint.newest(keys["output"])
    if damage == "gap":  # under a manifest that is whole
        manifest = json.loads(open(f"{path}/manifest.json").read())
        del manifest["sha256"], manifest["files"]["rows-0-8.safetensors"]
        write_manifest(path, manifest)
    else:
        with open(f"{path}/rows-8-16.safetensors", "rb+") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
    words = "where the classes from 0 on are expected" if damage == "gap" else "8-16.* is damaged"
    new = keys | {"init_head": keys["output"], "output": str(tmp_path / "new")}
    with pytest.raises(Exception, match=words):
        ranks.run(2, start, new)
