"""IJB-B and -C from a generated directory in the official format, end to end, against the field's
own algorithms; and what the lists may not say."""

import functools
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from data_tools.common.errors import UserError
from eval import __main__ as cli
from eval.protocols import ijb
from eval.report import results
from launch.bench import plain_metrics as baseline
from recognition.export.to_onnx import export_onnx
from tests.eval import official
from tests.eval.embedders.test_embed import make_run
from tests.real import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ijb")
    official.ijb(root, "IJBC")
    official.ijb(root, "IJBB", people=12, seed=1)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(module, run directory, its ONNX file)."""
    run = tmp_path_factory.mktemp("model") / "run"
    module = make_run(run)
    export_onnx(module, run.parent / "model.onnx", metadata={"network": "mbf_tiny"})
    return module, run, run.parent / "model.onnx"


def evaluate(capsys, *words):
    code = cli.main(["ijb", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@functools.cache
def embedded(module, root, name):
    """The embeddings of every face and of its mirror image, with scikit-image's alignment."""
    import torch

    marks = [x.split() for x in marks_of(root, name).read_text().splitlines()]
    src = np.array([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366],
                    [33.5493, 92.3655], [62.7299, 92.2041]], dtype=np.float32)  # fmt: skip
    src[:, 0] += 8.0
    features = []
    for fields in marks:
        image = cv2.imread(str(root / name / "loose_crop" / fields[0]))
        points = np.array(fields[1:-1], dtype=np.float32).reshape(5, 2)
        transform = SimilarityTransform.from_estimate(points, src)
        face = cv2.warpAffine(image, transform.params[:2], (112, 112), borderValue=0.0)
        face = cv2.cvtColor(face, cv2.COLOR_BGR2RGB)
        both = np.stack([face, np.fliplr(face)]).transpose(0, 3, 1, 2)
        with torch.no_grad():
            x = torch.from_numpy(both.copy()).float().div_(255).sub_(0.5).div_(0.5)
            features.append(module(x).numpy())
    return np.array(features)


def marks_of(root, name):
    return root / name / "meta" / f"{name.lower()}_name_5pts_score.txt"


def plain(module, root, name="IJBC", norm=True, detector=True, flip=True):
    """The whole evaluation as the field's scripts do it."""
    prefix = name.lower()
    meta = root / name / "meta"
    rows = [x.split() for x in (meta / f"{prefix}_face_tid_mid.txt").read_text().splitlines()]
    marks = [x.split() for x in marks_of(root, name).read_text().splitlines()]
    template = np.array([int(x[1]) for x in rows])
    media = np.array([int(x[2]) for x in rows])
    score = np.array([float(x[-1]) for x in marks])
    both = embedded(module, root, name)
    features = both[:, 0] + both[:, 1] if flip else both[:, 0]
    if not norm:
        features = features / np.sqrt(np.sum(features**2, -1, keepdims=True))
    if detector:
        features = features * score[:, None]
    ids, pooled = baseline.pool(features, template, media)
    listed = np.loadtxt(meta / f"{prefix}_template_pair_label.txt", dtype=int)
    values = baseline.scores(ids, pooled, listed[:, 0], listed[:, 1])
    sides = []
    for file in (*(f"gallery_{x}" for x in ijb.GALLERIES[name]), "probe_mixed"):
        lines = (meta / f"{prefix}_1N_{file}.csv").read_text().splitlines()[1:]
        pairs = dict(reversed([tuple(map(int, x.split(",")[:2])) for x in lines]))
        known = np.array(sorted(pairs))
        sides.append((pooled[np.searchsorted(ids, known)], np.array([pairs[x] for x in known])))
    searches = [baseline.search(*gallery, *sides[-1]) for gallery in sides[:2]]
    return baseline.tars(listed[:, 2], values, results.FARS), searches


@pytest.mark.parametrize("name", ["IJBC", "IJBB"])
def test_both_protocols_equal_the_plain_scripts(capsys, root, models, name):
    module, run, _ = models
    found = evaluate(capsys, run, root, "--benchmark", name, "--protocol", "1:1", "1:N")
    (nearest, strict), searches = plain(module, root, name)
    points = found["ijb 1:1"]["operating_points"]
    np.testing.assert_allclose([x["tar_insightface"] for x in points], nearest, rtol=0, atol=1e-6)
    np.testing.assert_allclose([x["tar"] for x in points], strict, rtol=0, atol=1e-6)
    for key, expected in zip(ijb.GALLERIES[name], searches, strict=True):
        gallery = found["ijb 1:N"]["galleries"][key]
        for rank in ("rank1", "rank5", "rank10"):
            assert gallery[rank] == pytest.approx(expected[rank], abs=1e-6)
        for x in (0.01, 0.1):
            assert gallery["tpir_at_fpir"][f"{x:g}"] == pytest.approx(expected[x], abs=1e-6)
    mean = found["ijb 1:N"]["all"]["tpir_at_fpir"]["0.1"]
    assert mean == pytest.approx(np.mean([x[0.1] for x in searches]), abs=1e-6)
    assert nearest[-1] > 0.2  # the faces do tell people apart


def scored(root, to, scores):
    """A copy of the benchmark in which faces have these detector scores, by row."""
    shutil.copytree(root, to)
    path = to / "IJBC" / "meta" / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    for row, score in scores.items():
        lines[row] = lines[row].rpartition(" ")[0] + f" {score}"
    path.write_text("\n".join(lines) + "\n")
    return to


def test_a_detector_score_of_zero_or_less_does_not_count_and_is_counted(
    capsys, root, models, tmp_path
):
    """Before: a negative score turned its template round, without a word."""
    run = models[1]
    faces = (root / "IJBC/meta/ijbc_face_tid_mid.txt").read_text().splitlines()
    templates = [line.split()[1] for line in faces]
    several = [i for i, t in enumerate(templates) if templates.count(t) > 1][0]
    minus, zero = (
        evaluate(capsys, run, scored(root, tmp_path / name, {several: score}))
        for name, score in (("minus", -1.0), ("zero", 0.0))
    )
    assert minus["ijb 1:1"] == zero["ijb 1:1"]
    (warning,) = [x for x in minus["warnings"] if "score of 0 or less" in x]
    assert (
        warning.startswith("IJBC: 1 image with a detector score of 0")
        and "--no-detector" in warning
    )
    alone = {i: -1.0 for i, t in enumerate(templates) if t == templates[several]}
    where = scored(root, tmp_path / "alone", alone)
    assert cli.main(["ijb", str(run), str(where)]) == 1
    assert f"no image of template {templates[several]} has a" in capsys.readouterr().err
    evaluate(capsys, run, where, "--no-detector")


@pytest.mark.parametrize("flags", [(), ("--no-norm",), ("--no-detector",), ("--no-flip",),
                                   ("--no-norm", "--no-detector", "--no-flip")])  # fmt: skip
def test_the_flags_do_what_they_say(capsys, root, models, tmp_path, flags):
    module, run, _ = models
    options = {key: f"--no-{key}" not in flags for key in ("norm", "detector", "flip")}
    found = evaluate(capsys, run, root, *flags, "--results", tmp_path)
    (nearest, _), _ = plain(module, root, **options)
    points = found["ijb 1:1"]["operating_points"]
    np.testing.assert_allclose([x["tar_insightface"] for x in points], nearest, rtol=0, atol=1e-6)
    contract = json.loads((tmp_path / "ijb_1_1-IJBC.json").read_text())["contract"]
    assert contract["flags"] == "N{norm:d}D{detector:d}F{flip:d}".format(**options)
    assert "similarity by Umeyama" in contract["alignment"]
    assert set(contract["far_rules"]) == {"insightface", "strict"}


def test_onnx_gives_the_numbers_of_torch(capsys, root, models):
    _, run, onnx = models
    words = (root, "--protocol", "1:1", "1:N", "--old-1n-rule")
    torch_found, onnx_found = (evaluate(capsys, model, *words) for model in (run, onnx))
    for key in ("ijb 1:1", "ijb 1:N"):
        of_torch, of_onnx = (json.dumps(x[key]) for x in (torch_found, onnx_found))
        if key == "ijb 1:N":
            for found in (torch_found, onnx_found):
                for gallery in found[key]["galleries"].values():
                    del gallery["threshold_at_fpir"]
            assert torch_found[key] == onnx_found[key]
            assert 0 <= torch_found[key]["old_rule"]["recall_at_far"]["0.1"] <= 1
        else:
            rates = [[(p["tar"], p["tar_insightface"], p["far"]) for p in x[key]
                      ["operating_points"]] for x in (torch_found, onnx_found)]  # fmt: skip
            assert rates[0] == rates[1]
        assert of_torch and of_onnx


@pytest.mark.parametrize("kind", [1, pytest.param(2, marks=pytest.mark.long)], ids=["run", "onnx"])
def test_two_processes_give_the_numbers_of_one(capsys, root, models, tmp_path, kind):
    model = models[kind]
    words = (root, "--protocol", "1:1", "1:N", "--cache")
    one = evaluate(capsys, model, *words, tmp_path / "1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "eval", "ijb", str(model), *map(str, words), str(tmp_path / "2"), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("{")]
    two = json.loads(line)
    for key in ("ijb 1:1", "ijb 1:N"):
        assert one[key] == two[key]


@pytest.fixture
def damaged(root, tmp_path):
    """A copy whose list is changed: (suffix, function of its lines) -> the benchmark."""

    def change(suffix, function):
        for part in ("meta", "loose_crop"):
            (tmp_path / "IJBC" / part).mkdir(parents=True, exist_ok=True)
            for path in (root / "IJBC" / part).iterdir():
                target = tmp_path / "IJBC" / part / path.name
                if not target.exists():
                    target.write_bytes(path.read_bytes())
        path = tmp_path / "IJBC" / "meta" / f"ijbc_{suffix}"
        path.write_text("\n".join(function(path.read_text().splitlines())) + "\n")
        return tmp_path

    return change


@pytest.mark.parametrize(
    "suffix, function, message",
    [
        ("face_tid_mid.txt", lambda x: [*x[:4], "a b", *x[5:]], r"mid.txt:5: 'a b' is not 'name t"),
        ("face_tid_mid.txt", lambda x: x[:-1], r"score.txt:\d+: a row more than"),
        ("name_5pts_score.txt", lambda x: x[:-1], r"score.txt: \d+ rows for the \d+ of"),
        ("name_5pts_score.txt", lambda x: [x[1], x[0], *x[2:]], r"score.txt:1: .* the same rows"),
        ("name_5pts_score.txt", lambda x: [*x[:2], x[2].rpartition(" ")[0] + " nan", *x[3:]],
         r"score.txt:3: the detector score 'nan'"),
        ("name_5pts_score.txt", lambda x: [" ".join(x[0].split()[:8]), *x[1:]],
         r"score.txt:1: 6 numbers are neither five points"),
        ("template_pair_label.txt", lambda x: [*x[:9], "7 8 1", *x[10:]],
         r"label.txt:10: '7 8 1' names a template without a face"),
        ("template_pair_label.txt", lambda x: [x[0][:-1] + "2", *x[1:]], r"label.txt:1: .*label"),
        ("template_pair_label.txt", lambda x: [*x[:3], "1 2", *x[4:]], r"label.txt:4: '1 2' is no"),
        ("template_pair_label.txt", lambda x: [*x[:2], "1 2", "3 4 5 6", *x[4:]], r"label.txt:3:"),
        ("template_pair_label.txt", lambda x: [*x[:3], "1 a 0", *x[4:]], r"label.txt:4: '1 a 0'"),
        ("template_pair_label.txt", lambda x: [y for y in x if y.endswith("0")],
         "only same or only different pairs"),
        ("1N_probe_mixed.csv", lambda x: [*x[:3], "9999,1,x", *x[4:]],
         r"probe_mixed.csv:4: template 9999 has no face"),
        ("1N_gallery_G2.csv", lambda x: [*x[:2], "x,y", *x[3:]], r"G2.csv:3: 'x,y' is not"),
        ("1N_gallery_G1.csv", lambda x: x[:1], "no templates"),
    ],
)  # fmt: skip
def test_lists_that_do_not_agree_are_named_by_line(capsys, damaged, models, suffix, function,
                                                    message):  # fmt: skip
    import re

    directory = damaged(suffix, function)
    code = cli.main(["ijb", str(models[1]), str(directory), "--protocol", "1:1", "1:N"])
    err = capsys.readouterr().err
    assert code == 1 and re.search(message, err), err
    assert "Traceback" not in err and err.count("error:") == 1


def test_absent_files_say_what_to_do(capsys, root, models, tmp_path, damaged):
    run = str(models[1])
    assert cli.main(["ijb", run, str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "no folder IJBC/meta in it. Request IJBC from NIST" in err
    assert "loose_crop" in err
    directory = damaged("1N_gallery_G1.csv", lambda x: x)
    (directory / "IJBC" / "meta" / "ijbc_1N_gallery_G1.csv").unlink()
    assert cli.main(["ijb", run, str(directory), "--protocol", "1:N"]) == 1
    assert "ijbc_1N_gallery_G1.csv: not there" in capsys.readouterr().err
    (directory / "IJBC" / "loose_crop" / "1.jpg").unlink()
    assert cli.main(["ijb", run, str(directory)]) == 1
    assert "1 of 212 faces are absent, the first 1.jpg" in capsys.readouterr().err


def test_a_small_set_says_that_it_is_not_the_benchmark(capsys, root, models):
    found = evaluate(capsys, models[1], root)
    (warning,) = found["warnings"]
    assert "IJBC has 469375 faces, 23124 templates and 15658489 pairs; this copy has 212" in warning


def test_the_list_of_pairs_is_read_in_pieces(root, monkeypatch):
    benchmark = ijb.open_benchmark(root, "IJBC")
    known = np.unique(ijb.read_faces(benchmark).template)
    whole = ijb.read_pairs(benchmark, known)
    listed = np.loadtxt(benchmark.meta("template_pair_label.txt"), dtype=int)
    np.testing.assert_array_equal(np.stack([whole.first, whole.second, whole.issame], 1), listed)
    monkeypatch.setattr(ijb, "_CHUNK", 50)
    for one, other in zip(whole, ijb.read_pairs(benchmark, known), strict=True):
        np.testing.assert_array_equal(one, other)


def tables_of(root):
    """All that is read of a benchmark, as arrays and texts."""
    benchmark = ijb.open_benchmark(root, "IJBC")
    faces = ijb.read_faces(benchmark)
    known = np.unique(faces.template)
    pairs = ijb.read_pairs(benchmark, known)
    names = ("1N_gallery_G1.csv", "1N_gallery_G2.csv", "1N_probe_mixed.csv")
    subjects = [ijb.read_subjects(benchmark.meta(name), known) for name in names]
    return [faces.template, faces.media, faces.score, *pairs, *(x for s in subjects for x in s)]


def test_lists_as_an_editor_saves_them(root, tmp_path):
    shutil.copytree(root / "IJBC", tmp_path / "IJBC")
    for path in (tmp_path / "IJBC" / "meta").iterdir():
        content = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content)
    for one, other in zip(tables_of(root), tables_of(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_list_in_utf16_is_named(root, tmp_path):
    shutil.copytree(root / "IJBC", tmp_path / "IJBC")
    for path in sorted((tmp_path / "IJBC" / "meta").iterdir()):
        content = path.read_bytes()
        path.write_text(content.decode(), encoding="utf-16")
        with pytest.raises(UserError, match=f"{path.name}.* UTF-16 text: save it as UTF-8"):
            tables_of(tmp_path)
        path.write_bytes(content)


def test_68_points_are_averaged_to_five():
    from data_tools.images.landmarks import five_points

    points = np.random.default_rng(0).normal(size=(68, 2)).astype(np.float32)
    five = five_points([str(x) for x in points.ravel()])
    np.testing.assert_allclose(five[0], (points[36] + points[39]) / 2, rtol=1e-6)
    np.testing.assert_allclose(five[1], (points[42] + points[45]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(five[2:], points[[30, 48, 54]])
