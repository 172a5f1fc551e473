"""Runs of inversions: their files, their reports, and resuming after a kill."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_tools import shards
from recognition.backbones import BACKBONES
from recognition.checkpoint import load_backbone
from recognition.distributed.runtime import Runtime
from recognition.inversion import __main__ as program
from recognition.inversion import faces, measure, metrics, pictures, plan, work
from recognition.inversion.descent import InversionBatch
from recognition.inversion.identity import ClosedSet, centres
from recognition.inversion.settings import Request, Settings
from tests import ranks
from tests.recognition import runs  # noqa: F401  the pool's processes learn the tests' network from it
from tests.recognition.inversion.cases import CPU, FEW, images_of, same


def test_a_run_says_what_it_made(trained, tmp_path, shards_dir, capsys):
    out = tmp_path / "out"
    line = [trained[3], "--out", str(out), "--count", "5", *FEW]
    assert program.main([*line, "--other", trained[4], "--fid", trained[4]]) == 0
    told = capsys.readouterr()
    assert "chance 6.2 %" in told.out and "step 4/4" in told.err
    report = json.loads((out / "report.json").read_text())
    assert report["under_itself"]["gallery"] == report["under_others"][0]["gallery"] == 16
    assert report["bn_distance"]["batch_size"] == 3 and report["bn_distance"]["real"] > 0
    assert report["fid"]["distance"] > 0 and "rank 4" in report["fid"]["note"]
    assert len(images_of(out)) == 5 and not list((out / "state").glob("*.safetensors"))
    assert (out / "progress" / "batch-00000.png").is_file() and (out / "grid.png").is_file()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"]["steps"] == 4 and len(settings["ids"]) == 5

    # The numbers are those of the PNG files, computed anew.
    module, _ = load_backbone(trained[3])
    x = np.stack([cv2.imread(str(p))[..., ::-1] for p in sorted((out / "images").iterdir())])
    with torch.no_grad():
        e = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1)
    cos = metrics.unit(e.numpy()) @ metrics.unit(np.concatenate(list(centres(trained[3])))).T
    ids = [int(p.stem) for p in sorted((out / "images").iterdir())]
    assert report["under_itself"]["cosine_mean"] == pytest.approx(
        cos[np.arange(5), ids].mean(), abs=1e-5
    )
    assert report["under_itself"]["identity_rate"] == (cos.argmax(1) == ids).mean()

    # The same line again makes nothing; another line is refused.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert program.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    capsys.readouterr()
    assert program.main([*line, "--lr", "0.1"]) == 1
    assert "lr 0.25 there, 0.1 now" in capsys.readouterr().err

    # What was taken away is made again, to the bit; what is damaged is told by name.
    face = min(before)
    content = face.read_bytes()
    face.unlink()
    assert program.main(line) == 0 and face.read_bytes() == content
    for wrong in ("{", "[]"):
        (out / "settings.json").write_text(wrong)
        assert program.main(line) == 1
        assert f"{out / 'settings.json'} is damaged" in capsys.readouterr().err
    for wrong in ("{", "[]", "{}"):
        (out / "state" / "batch-00000.json").write_text(wrong)
        with pytest.raises(ValueError, match="batch-00000.json is damaged"):
            work.terms_of(out, 1)


def test_a_class_row_that_has_changed_is_told(trained, tmp_path):
    shutil.copytree(trained[3], tmp_path / "run")
    (rows, *_) = sorted(tmp_path.glob("run/checkpoints/*/rows-*.safetensors"))
    content = bytearray(rows.read_bytes())
    content[-40] ^= 64
    rows.write_bytes(content)
    with pytest.raises(AssertionError, match="rows-.* is damaged: its sha256"):
        ranks.run(2, closed_set_of, str(tmp_path / "run"))


def closed_set_of(run):
    return ClosedSet(run, dist.group.WORLD, CPU, 0).in_step


def test_a_state_file_of_another_step_is_refused(tmp_path):
    settings = Settings(batch_size=2)
    batch = InversionBatch.start(settings, 0, np.arange(2), CPU)
    batch.step = 7
    path = str(tmp_path / "x.safetensors")
    batch.save(path)
    InversionBatch.start(settings, 0, np.arange(2), CPU).load(path, 7)
    for told, change in (("it is of step 7", None), ("damaged", b""), ("damaged", b"x" * 50)):
        if change is not None:
            (tmp_path / "x.safetensors").write_bytes(change)
        with pytest.raises(ValueError, match=told):
            InversionBatch.start(settings, 0, np.arange(2), CPU).load(path, 500)


def test_embeddings_that_are_not_finite_are_told(tmp_path):
    for i in range(2):
        pictures.write(tmp_path / f"{i}.png", np.full((112, 112, 3), 90 * i, np.uint8))
    folder = faces.open_faces(tmp_path)

    def broken(pixels):
        return np.where(pixels.mean((1, 2, 3))[:, None] > 50, np.nan, 1.0) * np.ones((1, 4))

    with pytest.raises(ValueError, match=r"embedding of image 1 of .* is not finite \(1 of 2\)"):
        folder.embed(broken, [0, 1])
    with pytest.raises(ValueError, match="no image"):
        folder.embed(broken, [])


def test_classes_without_images_are_left_out_and_counted(trained, shards_dir):
    """Under another network; and images of other labels are not taken for the training set's."""
    everyone = faces.open_faces(shards_dir)
    few = faces.Faces("few", np.where(everyone.labels == 1, -1, everyone.labels), everyone._get)
    ids, size = np.array([0, 1, 5]), int(everyone.labels.max()) + 1
    made = SimpleNamespace(embed=lambda embed: embed(everyone.pixels(everyone.of_each(1)[ids])))
    asked = SimpleNamespace(
        faces=few, numbers=None, ids=ids, gallery=lambda: iter([np.zeros((size, 32))])
    )
    found = measure.under_other_network(asked, made, trained[4])
    assert found["without_images"] == 1 and found["images"] == 2 and found["gallery"] == size - 1
    assert "1 classes have no image" in measure._likeness("", found)
    asked.ids = ids[1:2]
    assert "no image" in measure.under_other_network(asked, made, trained[4])["not_measured"]


def test_data_of_other_labels_are_not_measured_with(trained, shards_dir, monkeypatch):
    everyone = faces.open_faces(shards_dir)
    assert plan._reference(None, trained[3], 0, 16) is not None
    everyone.labels = everyone.labels[::-1]
    monkeypatch.setattr(plan, "open_faces", lambda path, resize: everyone)
    assert plan._reference(None, trained[3], 0, 16) is None
    with pytest.raises(ValueError, match="labels are not those"):
        plan._reference(str(shards_dir), trained[3], 0, 16)


def test_thresholds_of_many_embeddings_are_drawn_from_some(trained, tmp_path):
    """Without images: all pairs of 20 000 embeddings would take 3 GB."""
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(20000, 32)).astype("f4"))
    out = tmp_path / "out"
    line = ["privacy", trained[3], "--out", str(out), "--embeddings", str(tmp_path / "e.npy")]
    assert program.main([*line, "--count", "2", "--steps", "1", "--batch-size", "2"]) == 0
    (found,) = json.loads((out / "report.json").read_text())["under"]
    assert found["impostor_pairs"] == 3000 * 2999 // 2 and found["gallery"] == 20000


def synthesise_here(run, out, stop_at, options):
    """As the command, in the group of the pool; `stop_at`: end there, as a kill would."""
    settings = Settings(**options)
    here = Runtime(CPU, dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    torch.use_deterministic_algorithms(True)
    network = load_backbone(run)[0].requires_grad_(False).double()
    identity = ClosedSet(run, here.group, CPU, 0)
    identity.head.double()
    ids = np.array([1, 9, 15])
    parts = work.batches(ids, settings.batch_size)
    names = {int(i): f"{i:08d}" for i in ids}
    start, saving = InversionBatch.start, InversionBatch.save

    def in_fp64(*arguments):
        batch = start(*arguments)
        batch.images = batch.images.double()
        batch.moments = {name: moment.double() for name, moment in batch.moments.items()}
        return batch

    def then_stop(batch, path):
        saving(batch, path)
        os.makedirs(out / "kept", exist_ok=True)
        shutil.copy(path, out / "kept")
        if stop_at == (here.rank, batch.step):
            raise KeyboardInterrupt

    InversionBatch.start, InversionBatch.save = in_fp64, then_stop
    try:
        with work.directory(out, {"settings": options}, here):
            request = Request(out=out, save_every=2, picture_every=10)
            work.synthesise(network, identity, parts, names, settings, request, here)
    except KeyboardInterrupt:
        if here.world > 1:
            raise
    finally:
        InversionBatch.start, InversionBatch.save = start, saving
        torch.use_deterministic_algorithms(False)


OPTIONS = {"steps": 5, "batch_size": 2, "flip": True, "jitter": 4, "seed": 5}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """{processes: an unbroken run}"""
    made = {world: tmp_path_factory.mktemp("whole") / str(world) for world in (1, 2)}
    for world, out in made.items():
        ranks.run(world, synthesise_here, trained[3], out, None, OPTIONS)
    return made


def test_two_processes_make_what_one_makes(whole):
    """Two batches of unequal size, in fp64: the common loss differs in roundings of 1e-16."""
    assert same(whole[1], whole[2]) and len(images_of(whole[1])) == 3
    terms = [work.terms_of(whole[world], 2) for world in (1, 2)]
    for name in ("bn", "tv", "length"):
        assert terms[0][name] == pytest.approx(terms[1][name], rel=1e-9)


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained, whole, tmp_path):
    broken = tmp_path / "broken"
    ranks.run(1, synthesise_here, trained[3], broken, (0, 4), OPTIONS)
    assert [path.name for path in sorted((broken / "state").iterdir())] == [
        "batch-00000-step-2.safetensors", "batch-00000-step-4.safetensors",
    ]  # fmt: skip
    assert not images_of(broken)
    ranks.run(1, synthesise_here, trained[3], broken, None, OPTIONS)
    assert same(whole[1], broken)
    assert work.terms_of(whole[1], 2) == work.terms_of(broken, 2)


def test_ranks_that_ended_at_different_steps_go_on_from_the_common_one(trained, whole, tmp_path):
    broken = tmp_path / "broken"
    # As if rank 0 had saved step 4 and rank 1 had not, and the run had ended there.
    (broken / "state").mkdir(parents=True)
    shutil.copy(whole[2] / "settings.json", broken)
    for number, step in ((0, 2), (0, 4), (1, 2)):
        name = f"batch-{number:05d}-step-{step}.safetensors"
        shutil.copy(whole[2] / "kept" / name, broken / "state" / name)
    ranks.run(2, synthesise_here, trained[3], broken, None, OPTIONS)
    assert same(whole[2], broken)
    assert work.terms_of(whole[2], 2) == work.terms_of(broken, 2)
    # Rank 1 had written that its batch is done, rank 0 had not: both do it again, together.
    (broken / "state" / "batch-00000.json").unlink()
    (broken / "images" / "00000001.png").unlink()
    ranks.run(2, synthesise_here, trained[3], broken, None, OPTIONS)
    assert work.terms_of(whole[2], 2) == work.terms_of(broken, 2)


def test_a_network_without_batchnorm_goes_without_the_prior(tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "vit.pt"
    network = BACKBONES["vit_t"](embedding_size=64)
    torch.save(network.state_dict(), path)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32))
    line = [str(path), "--out", str(tmp_path / "out"), "--embeddings", str(tmp_path / "e.npy")]
    assert program.main([*line, "--steps", "1"]) == 0
    told = capsys.readouterr()
    assert "no BatchNorm over images: the prior is off" in told.err
    assert "the network has no BatchNorm" in told.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bn_distance"] is None and report["loss"]["bn"] == 0


def test_the_privacy_report(trained, tmp_path, shards_dir, capsys):
    out = tmp_path / "out"
    line = ["privacy", trained[3], "--out", str(out), "--data", str(shards_dir), "--count", "4"]
    assert program.main([*line, *FEW, "--other", trained[4]]) == 0
    labels = np.asarray(shards.open(shards_dir).labels)
    people = [labels[int(name.removesuffix(".png"))] for name in images_of(out)]
    assert len(set(people)) == 4  # a face each of four people, by the image's number
    capsys.readouterr()
    assert program.main([*line, *FEW, "--other", trained[4], "--remove-images", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((out / "report.json").read_text())
    assert printed["under"] == report["under"] and not (out / "images").exists()
    own, other = report["under"]
    assert (own["role"], other["role"]) == ("itself", "another")
    assert own["gallery"] == 4 and own["with_another_image"] == 4
    points = {point["far"]: point for point in other["points"]}
    assert 0 <= points[0.01]["same_image"] <= 1 and "real_photographs" in points[0.01]
    assert "not_measured" in points[0.001]  # 32 images have too few pairs for it
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    line = ["privacy", trained[3], "--out", str(tmp_path / "two"), "--other", trained[4]]
    assert program.main([*line, *FEW, "--embeddings", str(tmp_path / "e.npy")]) == 0
    told = capsys.readouterr().out
    assert "it needs the images" in told and "3 pairs of different people" in told


def test_a_network_is_known_by_its_weights_not_by_how_it_was_typed(tmp_path):
    """A run directory names another checkpoint once the run has gone on; the old one has a name."""
    facts = {"network": {"path": "runs/a", "step": 200, "sha256": "a0"}, "settings": {"steps": 9}}
    (tmp_path / "settings.json").write_text(json.dumps(facts))
    there = facts | {
        "network": {"path": "runs/a/checkpoints/step-200", "step": 200, "sha256": "a0"}
    }
    work.check_settings(tmp_path, there)
    newer = facts | {"network": {"path": "runs/a", "step": 400, "sha256": "b1"}}
    with pytest.raises(ValueError, match=r"network.step 200 there, 400 now.*checkpoints/step-N"):
        work.check_settings(tmp_path, newer)
    with pytest.raises(ValueError, match="steps 9 there, 8 now"):
        work.check_settings(tmp_path, there | {"settings": {"steps": 8}})
