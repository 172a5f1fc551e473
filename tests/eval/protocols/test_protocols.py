"""TinyFace, IJB-S, RFW and lists of your own, each end to end on generated data."""

import json

import numpy as np
import pytest
from scipy.io import loadmat

from eval import __main__ as cli
from eval.embedders.images import Files
from eval.protocols import ijbs
from launch.bench import plain_metrics as baseline
from recognition.weights import networks
from tests.eval import official
from tests.eval.embedders.test_embed import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    make_run(directory)
    return directory


def evaluate(capsys, *words, code=0):
    found = cli.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out) if code == 0 else captured.err


def features(run, root, paths):
    """Unit flip sums [n, D] of files, straight from the network."""
    embedder, images = networks.open_embedder(run), Files("x", root, paths)
    pixels = np.stack([images[i] for i in range(len(paths))])
    both = embedder(pixels) + embedder(np.ascontiguousarray(pixels[:, :, ::-1]))
    return both.astype(np.float64)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_tinyface(capsys, run, tmp_path):
    root = official.tinyface(tmp_path)
    found = evaluate(capsys, "tinyface", run, root)["sets"]["TinyFace"]
    testing = root / "Testing_Set"
    lists = {kind: loadmat(testing / f"{stem}_img_ID_pairs.mat")
             for kind, stem in (("gallery", "gallery_match"), ("probe", "probe"))}  # fmt: skip
    paths, ids = {}, {}
    for kind, folder in (("gallery", "Gallery_Match"), ("probe", "Probe")):
        names = [x[0].item() for x in lists[kind][f"{kind}_set"]]
        paths[kind] = [f"{folder}/{name}" for name in names]
        ids[kind] = lists[kind][f"{kind}_ids"].ravel()
    distractors = [
        f"Gallery_Distractor/{x.name}" for x in (testing / "Gallery_Distractor").iterdir()
    ]
    gallery = unit(features(run, testing, paths["gallery"] + distractors))
    labels = np.concatenate([ids["gallery"].astype(int), -100 * np.ones(len(distractors))])
    similarity = unit(features(run, testing, paths["probe"])) @ gallery.T
    for k in (1, 5, 20):
        top = labels[np.argsort(-similarity, axis=1)[:, :k]]
        expected = np.mean((top == ids["probe"][:, None]).any(axis=1))
        assert found["galleries"]["gallery"][f"rank{k}"] == expected
    assert found["galleries"]["gallery"]["counts"]["gallery"] == 36


def test_tinyface_refuses(capsys, run, tmp_path):
    err = evaluate(capsys, "tinyface", run, tmp_path, code=1)
    assert "no Testing_Set/probe_img_ID_pairs.mat" in err and "qmul-tinyface" in err
    root = official.tinyface(tmp_path)
    (root / "Testing_Set" / "Probe" / "0_1.jpg").unlink()
    assert "1 of 52 images are absent" in evaluate(capsys, "tinyface", run, root, code=1)
    (root / "Testing_Set" / "probe_img_ID_pairs.mat").write_bytes(b"MATLAB 5.0" + bytes(200))
    assert "not TinyFace's list of probe" in evaluate(capsys, "tinyface", run, root, code=1)


def test_ijbs(capsys, run, tmp_path):
    lists, faces = official.ijbs(tmp_path)
    found = evaluate(capsys, "ijbs", run, lists, "--faces", faces)["sets"]
    assert list(found) == [f"surveillance to {x}" for x in ("single", "booking", "surveillance")]
    sides = ijbs.read_protocol(lists, "booking")
    vectors = {}
    for key, side in sides.items():
        rows = []
        for subject, files in side:
            stems = [x.rpartition(".")[0].replace("/", "_") for x in files]
            names = [
                f"{subject}/{p.name}"
                for p in sorted((faces / subject).iterdir())
                if any(p.stem == s or p.stem.rpartition("_")[0] == s for s in stems)
            ]
            rows.append(features(run, faces, names).sum(axis=0))
        vectors[key] = unit(np.array(rows)), np.array([t.subject for t in side])
    for key in ("g1", "g2"):
        expected = baseline.search(*vectors[key], *vectors["probes"])
        assert found["surveillance to booking"]["galleries"][key]["rank1"] == expected["rank1"]
        tpir = found["surveillance to booking"]["galleries"][key]["tpir_at_fpir"]
        assert tpir["0.01"] == expected[0.01]
    joined = [np.concatenate([vectors["g1"][i], vectors["g2"][i]]) for i in (0, 1)]
    similarity = vectors["probes"][0] @ joined[0].T
    right = joined[1][similarity.argmax(axis=1)] == vectors["probes"][1]
    assert found["surveillance to booking"]["all"]["rank1"] == np.mean(right)


def test_ijbs_counts_templates_without_a_face(capsys, run, tmp_path):
    lists, faces = official.ijbs(tmp_path)
    for path in (faces / "2").glob("videos_2002_*"):
        path.unlink()
    out = evaluate(capsys, "ijbs", run, lists, "--faces", faces, "--protocol", "single")
    found = out["sets"]["surveillance to single"]
    assert found["empty_templates"] == {"probes": 1, "g1": 0, "g2": 0}
    assert "some templates have no face" in out["warnings"][0]
    probe = lists / "cs6_surveillance_to_single-booking_probe.csv"
    probe.write_text(probe.read_text() + "videos/9.mp4\n")
    err = evaluate(capsys, "ijbs", run, lists, "--faces", faces, code=1)
    assert "probe.csv:8: videos/9.mp4 is not in cs6_metadata.csv" in err
    probe.unlink()
    err = evaluate(capsys, "ijbs", run, lists, "--faces", faces, code=1)
    assert "is missing; request IJB-S" in err


def test_rfw(capsys, run, tmp_path):
    root = official.rfw(tmp_path)
    found = evaluate(capsys, "rfw", run, root, "--fmr", "0.2")["sets"]["RFW"]
    assert set(found["groups"]) == {"African", "Asian", "Caucasian", "Indian"}
    different = np.array([part["fmr"] for part in found["groups"].values()])
    assert found["fmr"] == pytest.approx(different.mean()) and found["fmr"] <= 0.2
    missed = np.array([part["fnmr"] for part in found["groups"].values()])
    assert found["fnmr"] == pytest.approx(missed.mean())
    accuracy = np.array([part["accuracy_mean"] for part in found["groups"].values()])
    assert found["accuracy_spread"] == pytest.approx(accuracy.std())
    assert found["skewed_error_ratio"] == pytest.approx((1 - accuracy).max() / (1 - accuracy).min())
    (root / "test" / "txts" / "Asian" / "Asian_lmk.txt").unlink()
    err = evaluate(capsys, "rfw", run, root, code=1)
    assert "Asian_lmk.txt is missing; request RFW from" in err
    assert "--fmr 2: it must be between 0 and 1" in evaluate(
        capsys, "rfw", run, root, "--fmr", "2", code=1
    )


@pytest.fixture
def people(tmp_path):
    """Files P/i.jpg of 8 people x 4 faces."""
    for person in range(8):
        (tmp_path / f"{person}").mkdir()
        for i in range(4):
            content = official.jpeg(official.face(person, i))
            (tmp_path / f"{person}" / f"{i}.jpg").write_bytes(content)
    return tmp_path


def test_own_pairs_in_any_separator(capsys, run, people):
    rows = [(f"{p}/0.jpg", f"{(p + d) % 8}/1.jpg", int(d == 0)) for p in range(8) for d in (0, 3)]
    texts = {
        "a.csv": "first,second,same\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows),
        "b.tsv": "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows),
        "c.txt": "same second first\n" + "".join(f"{c} {b} {a}\n" for a, b, c in rows),
    }
    found = []
    for name, text in texts.items():
        (people / name).write_text(text)
        out = evaluate(capsys, "pairs", run, people / name)
        found.append(out["sets"][name[0]])
    assert found[0] == found[1] and found[0]["pairs"] == 16 and found[0]["images"] == 16
    assert found[2]["auc"] == found[0]["auc"]
    x = unit(features(run, people, [r[0] for r in rows] + [r[1] for r in rows]))
    cosine = (x[:16] * x[16:]).sum(axis=1)
    same = np.array([r[2] for r in rows]) == 1
    expected = np.mean(cosine[same][:, None] > cosine[~same])
    assert found[0]["auc"] == pytest.approx(expected)


def test_own_templates_and_galleries(capsys, run, people):
    table = "".join(f"{p}/{i}.jpg,{p}{'ab'[i // 2]},{p}{i // 2}\n" for p in range(8)
                    for i in range(4))  # fmt: skip
    (people / "t.csv").write_text("image,template,media\n" + table)
    pairs = "".join(f"{p}a,{(p + d) % 8}b,{int(d == 0)}\n" for p in range(8) for d in (0, 1))
    (people / "p.csv").write_text(pairs)
    out = evaluate(capsys, "pairs", run, people / "p.csv", "--templates", people / "t.csv")
    sums = features(run, people, [f"{p}/{i}.jpg" for p in range(8) for i in range(4)])
    pooled = unit(sums.reshape(16, 2, -1).mean(axis=1))  # media means: two images a template
    first = np.repeat(np.arange(8) * 2, 2)
    second = np.array([(p + d) % 8 * 2 + 1 for p in range(8) for d in (0, 1)])
    scores = (pooled[first] * pooled[second]).sum(axis=1)
    same = np.tile([True, False], 8)
    expected = np.mean(scores[same][:, None] > scores[~same])
    assert out["sets"]["p"]["auc"] == pytest.approx(expected)

    gallery = "".join(f"{p}/0.jpg,{p}\n" for p in range(5))
    probes = "".join(f"{p}/{i}.jpg,{p}\n" for p in range(8) for i in (1, 2))
    (people / "g.csv").write_text("image,subject\n" + gallery)
    (people / "q.csv").write_text("image,subject\n" + probes)
    out = evaluate(capsys, "identify", run, "--gallery", people / "g.csv",
                   "--probes", people / "q.csv")  # fmt: skip
    found = out["sets"]["q"]["galleries"]["g"]
    one = unit(sums)
    expected = baseline.search(
        one[[4 * p for p in range(5)]], np.arange(5),
        one[[4 * p + i for p in range(8) for i in (1, 2)]], np.repeat(np.arange(8), 2),
    )  # fmt: skip
    for key in ("rank1", "rank5"):
        assert found[key] == expected[key]
    assert found["tpir_at_fpir"]["0.1"] == expected[0.1]
    assert found["counts"] == {"gallery": 5, "probes": 16, "mated": 10, "nonmated": 6}


def test_images_that_meet_themselves_are_counted(capsys, run, people):
    """Their score is 1 with any network, so that a number may look like a good one."""
    (people / "g.csv").write_text("image,subject\n0/0.jpg,0\n1/0.jpg,1\n2/0.jpg,2\n")
    (people / "q.csv").write_text("image,subject\n0/0.jpg,0\n./1/0.jpg,1\n1/1.jpg,1\n3/0.jpg,3\n")
    words = ["identify", str(run), "--gallery", people / "g.csv", "--probes", people / "q.csv"]
    assert cli.main([*map(str, words)]) == 0
    assert "g: 2 images of the probes are in this gallery too" in capsys.readouterr().err
    lines = [f"{p}/0.jpg,{q}/{i}.jpg,{int(p == q)}\n" for p in range(6) for q in (p, p + 1)
             for i in ((0,) if p == q == 0 else (1,))]  # fmt: skip
    (people / "p.csv").write_text("first,second,same\n" + "".join(lines))
    assert cli.main(["pairs", str(run), str(people / "p.csv")]) == 0
    assert "p: 1 pair of one image with itself" in capsys.readouterr().err
    (people / "t.csv").write_text(
        "image,template\n" + "".join(f"{p}/{i}.jpg,{p}{i}\n" for p in range(4) for i in range(2))
    )
    (people / "tp.csv").write_text(
        "first,second,same\n00,00,1\n10,11,1\n20,21,1\n00,10,0\n10,20,0\n20,30,0\n"
    )
    words = ["pairs", run, people / "tp.csv", "--templates", people / "t.csv"]
    assert cli.main([*map(str, words)]) == 0
    assert "tp: 1 pair of one template with itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, text, message",
    [
        ("pairs", "first,second,same\n0/0.jpg,0/1.jpg,2\n", "x.csv:2: same is '2'"),
        ("pairs", "first,second,same\n0/0.jpg,0/1.jpg\n", "x.csv:2: 2 fields where the first"),
        ("pairs", "first,second,alike\n", "columns"),
        ("pairs", "first,second\n", "no column same"),
        ("pairs", "0/0.jpg,0/1.jpg,1\n0/0.jpg,7/9.jpg,0\n" * 5, "x.csv:2: no image .*; 1 of"),
        ("pairs", "0/0.jpg,0/1.jpg,1\n" * 12, "only same or only different pairs"),
        ("pairs", "0/0.jpg,0/1.jpg,1\n0/0.jpg,1/1.jpg,0\n", "2 pairs; at least 10"),
        ("pairs", "", "no rows"),
        ("identify", "image,subject\n0/0.jpg,0\n0/9.jpg,0\n", "x.csv:3: no image"),
        ("identify", "image,subject,template\n0/0.jpg,0,t\n1/0.jpg,1,t\n", "template t is of subj"),
        ("identify", "image,subject,score\n0/0.jpg,0,high\n", "x.csv:2: score 'high'"),
        ("identify", "image,subject,x1\n0/0.jpg,0,1\n", "landmarks need all of"),
    ],
)  # fmt: skip
def test_own_lists_that_cannot_be_followed(capsys, run, people, command, text, message):
    import re

    path = people / "x.csv"
    path.write_text(text)
    words = [path] if command == "pairs" else ["--gallery", path, "--probes", path]
    err = evaluate(capsys, command, run, *words, code=1)
    assert re.search(message, err) and "Traceback" not in err, err
