"""The page holds what was measured, asks nothing of the network, and is whole or not there."""

import html.parser
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from eval import __main__ as cli
from eval import roc, verification
from eval.report import figures, page_style, results, slider
from eval.report import page as report
from eval.report.headline import headline
from tests.eval import official
from tests.eval.embedders.test_embed import channel_means, make_run
from tests.eval.made import run_directory
from tests.real import ROOT

FACTS = {"path": "runs/<demo>", "network": "mbf_tiny", "sha256": "ab" * 32, "runtime": "torch"}
CONTRACT = {"input": "RGB, 112 x 112", "flip": results.ALONE, "far_rules": results.RULES}


def result(name="lfw", num_pairs=400, noise=1.5, missing=(), seed=0, facts=FACTS):
    """Of drawn embeddings, with two pictures of noise for each hard pair."""
    rng = np.random.default_rng(seed)
    issame = np.arange(num_pairs) % 2 == 0
    first = rng.normal(size=(num_pairs, 32))
    second = np.where(issame[:, None], first, rng.normal(size=(num_pairs, 32)))
    second = second + noise * rng.normal(size=second.shape)
    distance = verification.distances(np.stack([first, second], axis=1).reshape(-1, 32))
    cosine = 1 - distance / 2
    points = roc.curve(cosine, issame)
    metrics = {
        "pairs": num_pairs,
        "missing": len(missing),
        "missing_pairs": list(missing),
        **verification.evaluate_distances(distance, issame),
        **results.pair_metrics(points),
        "balanced_accuracy": verification.balanced_accuracy(distance, issame),
        "xnorm": 5.25,
    }
    hard = results.hardest(cosine, issame, 3)
    arrays = results.pair_arrays(points, cosine, issame, rng.random(num_pairs)) | {
        "hard_scores": cosine[hard],
        "hard_same": issame[hard],
        "pictures": rng.integers(0, 256, (len(hard), 2, 112, 112, 3), dtype=np.uint8),
        "picture_names": np.array([[f"{i}/<a>.jpg", f"{i}/b.jpg"] for i in hard]),
    }
    return results.make("lfw", name, facts, CONTRACT, metrics, arrays)


def searched(name="IJBC", facts=FACTS):
    from eval import identification
    from eval.protocols.identify_command import plain

    rng = np.random.default_rng(0)
    gallery, probes = rng.normal(size=(20, 8)), rng.normal(size=(100, 8))
    found = identification.search(gallery, np.arange(20), probes, np.arange(100) % 40)
    metrics = {"galleries": plain({"G1": identification.summarise(found),
                                   "G2": identification.summarise(found)}),
               "all": plain(identification.mean_of([found, found]))}  # fmt: skip
    arrays = {"cmc": identification.cmc([found]), "edges": np.linspace(-1, 1, 11),
              "same": np.arange(10), "different": np.arange(10),
              "fpir": np.geomspace(0.01, 1, 5), "tpir": np.linspace(0, 1, 5)}  # fmt: skip
    return results.make("ijb 1:N", name, facts, CONTRACT, metrics, arrays)


class Page(html.parser.HTMLParser):
    """Tags in balance, every reference to anything outside, and the tables' cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.rows, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data") and not value.startswith(
                "#"
            ):
                self.outside.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "img", "input"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        self.words.append(data.strip())


def test_results_come_back_as_they_were_saved(tmp_path):
    first = result()
    path = results.save(tmp_path, first)
    assert path.name == "lfw-lfw.json"
    results.save(tmp_path, searched())
    results.save(tmp_path, result(num_pairs=40))
    results.save(tmp_path, first)  # the arrays of those before are gone
    names = [re.sub("[0-9a-f]{16}", "HASH", x.name) for x in tmp_path.iterdir()]
    assert sorted(names) == [
        "ijb_1_N-IJBC.HASH.npz", "ijb_1_N-IJBC.json", "lfw-lfw.HASH.npz", "lfw-lfw.json",
    ]  # fmt: skip
    assert not [x for x in tmp_path.iterdir() if x.stat().st_mode & 0o077]  # they show people
    (tmp_path / "report.json").write_text('{"models": {}}')  # no result
    again = {x.facts["protocol"]: x for x in results.load_all(tmp_path)}
    assert again["lfw"].facts == json.loads(json.dumps(first.facts))
    for key, value in first.arrays.items():
        np.testing.assert_array_equal(again["lfw"].arrays[key], value)


@pytest.mark.parametrize(
    "renames",
    [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long)],
)
def test_a_kill_between_the_files_of_a_result_leaves_one_evaluation(tmp_path, renames):
    """Before: one model's figures over another's curves."""
    first, second = result(), result(num_pairs=40)
    results.save(tmp_path, first)
    code = (
        "import os, signal, sys\n"
        "from eval.report import results\n"
        "from tests.eval.report.test_page import result\n"
        "left, replace = int(sys.argv[2]), os.replace\n"
        "def dying(*names):\n"
        "    global left\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left -= 1\n"
        "    replace(*names)\n"
        "os.replace = dying\n"
        "results.save(sys.argv[1], result(num_pairs=40))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path), str(renames)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert done.returncode == (0 if renames == 2 else -signal.SIGKILL), done.stderr
    (there,) = results.load_all(tmp_path)
    expected = second if renames == 2 else first
    assert there.metrics["pairs"] == expected.metrics["pairs"]
    np.testing.assert_array_equal(there.arrays["same"], expected.arrays["same"])


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results; evaluate first"):
        results.load_all(tmp_path)
    results.save(tmp_path, result())
    (arrays,) = tmp_path.glob("lfw-lfw.*.npz")
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="npz is not what lfw-lfw.json was written with; eval"):
        results.load_all(tmp_path)
    arrays.unlink()
    with pytest.raises(ValueError, match="npz is absent, lfw-lfw.json needs it; evaluate again"):
        results.load_all(tmp_path)
    arrays.write_bytes(whole)
    (tmp_path / "lfw-lfw.json").write_text("{")
    with pytest.raises(ValueError, match="lfw-lfw.json is damaged"):
        results.load_all(tmp_path)
    (tmp_path / "lfw-lfw.json").write_text('{"protocol": "lfw", "format": 99}')
    with pytest.raises(ValueError, match="format 99, not 1"):
        results.load_all(tmp_path)


def test_operating_points_hold_on_the_scores():
    rng = np.random.default_rng(1)
    issame = rng.random(5000) < 0.3
    scores = np.round(rng.normal(size=5000) + 2 * issame, 2)
    numbers = results.pair_metrics(roc.curve(scores, issame))
    assert numbers["same"] == issame.sum() and numbers["different"] == (~issame).sum()
    for point in numbers["operating_points"]:
        if point["threshold"] is None:
            assert point["tar"] == point["far"] == 0
            continue
        accepted = scores >= point["threshold"]
        assert point["tar"] == np.mean(accepted[issame])
        assert point["far"] == np.mean(accepted[~issame]) <= point["far_target"]
        assert point["resolved"] == (point["far_target"] * (~issame).sum() >= 1)
    json.dumps(numbers, allow_nan=False)


def test_a_threshold_that_accepts_nobody_is_null():
    issame = np.array([False, True] * 10)
    numbers = results.pair_metrics(roc.curve(np.where(issame, 0.0, 1.0), issame))
    assert numbers["operating_points"][0]["threshold"] is None
    json.dumps(numbers, allow_nan=False)


def test_hardest_pairs():
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.5, 0.4])
    issame = np.array([True, True, False, False, True, False])
    assert results.hardest(scores, issame, 2).tolist() == [2, 5, 1, 4]
    assert results.hardest(scores, issame, 12).tolist() == [2, 5, 3, 1, 4, 0]


def test_rejection_drops_the_lowest_quality_first():
    scores = np.array([0.1, 0.9, 0.9, 0.9, 0.2, 0.2])
    issame = np.array([True, True, True, True, False, False])
    share, fnmr, fmr = results.rejection(scores, issame, np.arange(6.0), 0.5, steps=5)
    assert share[0] == 0 and fnmr[0] == 0.25 and fnmr[-1] == 0 and (fmr == 0).all()


def test_a_thinned_curve_keeps_its_shape():
    rng = np.random.default_rng(0)
    issame = rng.random(200_000) < 0.02
    points = roc.curve(rng.normal(size=200_000) + 3 * issame, issame)
    far, tar, threshold = results.thinned(points)
    assert len(far) <= results.CURVE_POINTS and (np.diff(far) >= 0).all()
    whole_far, whole_tar = points.fp / points.num_different, points.tp / points.num_same
    for x in np.geomspace(1e-5, 1, 50):
        exact = whole_tar[np.searchsorted(whole_far, x, side="right") - 1]
        assert tar[max(np.searchsorted(far, x, side="right") - 1, 0)] == pytest.approx(
            exact, abs=0.01
        )


def wrong_pairs(found):
    """How many of the hard pairs are decided wrongly at the report's threshold."""
    threshold = 1 - np.mean(found.metrics["best_thresholds"]) / 2
    accepted = found.arrays["hard_scores"] >= threshold
    return int((accepted != found.arrays["hard_same"]).sum())


def test_the_page_its_json_and_its_markdown(tmp_path):
    run = run_directory(tmp_path)
    found = [result(), result("age & <b>", 4000, 2.0, missing=("pairs.txt:3: no image A_0001",)),
             searched()]  # fmt: skip
    report.write(run / "report.html", {"runs/<demo>": found}, run)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.outside)
    wrong = sum(map(wrong_pairs, found[:2]))
    assert wrong and len(page.outside) == 2 * wrong  # two faces of each
    assert text.count("/&lt;a&gt;.jpg<br>") == wrong
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)
    content = json.loads((run / "report.json").read_text())
    facts = {x["name"]: x for x in content["models"]["runs/<demo>"]}
    assert facts["age & <b>"]["metrics"]["missing_pairs"] == ["pairs.txt:3: no image A_0001"]
    lfw = facts["lfw"]["metrics"]
    accuracy = f"{100 * lfw['accuracy_mean']:.2f} ± {100 * lfw['accuracy_std']:.2f} %"
    first = next(row for row in page.rows if row and row[0] == "lfw")
    assert first[1:3] == ["400", accuracy]
    assert first[3].endswith("*")  # 200 different pairs cannot show a FAR of 0.001
    for title in (
        "ROC, lfw", "DET, lfw", "Histogram of scores, lfw", "Folds, lfw",
        "Error versus reject, lfw", "ROC, age &amp; &lt;b&gt;", "CMC, ijb 1:N IJBC",
        "Open-set search, ijb 1:N IJBC", "Loss", "Learning rate", "Accuracy during training",
        "Images per second",
    ):  # fmt: skip
        assert f'aria-label="{title}"' in text, title
    assert text.count("<svg") == 2 * 5 + 3 + 4
    assert "Hardest false accepts, lfw" in text and "Hardest false rejects, lfw" in text
    assert "collinear points are dropped" in text  # the contract
    assert "0.1 %" not in text.split("<svg")[0]  # a FAR is a share everywhere
    sentence = f"right on {accuracy} of the 400 pairs of lfw"
    assert sentence in " ".join(page.words)
    assert '"margin": "arcface"' in " ".join(page.words)
    markdown = (run / "report.md").read_text()
    assert f"| lfw | 400 | {accuracy} |" in markdown.replace("†", "")
    assert "Contract of runs/<demo>: input: RGB, 112 x 112; flip: e(image) alone." in markdown


def test_the_headline_is_the_best_models_and_of_a_far_that_its_pairs_can_show():
    good, bad = result(noise=0.5, num_pairs=4000), result(noise=3.0)
    first = headline({"bad": [bad], "good": [good]})
    assert first.sentence.startswith("good is right on ")
    assert [what for _, what in first.numbers] == [
        "accuracy", "TAR at FAR 0.001", "threshold of FAR 0.001"
    ]  # fmt: skip
    assert headline({"bad": [bad]}).numbers[1][1] == "TAR at FAR 0.01"  # 200 different pairs
    found = headline({"m": [searched()]})
    assert "finds the right person first for" in found.sentence and len(found.numbers) == 3
    assert headline({}) is None and headline({"m": []}) is None


def test_the_slider_has_points_of_the_roc_and_finds_pairs_that_change_sides(tmp_path):
    found = result(num_pairs=4000, noise=1.2)
    curve = slider.points(found)
    assert 2 < len(curve) <= slider.POINTS and (np.diff(curve[:, 0]) > 0).all()
    whole = {tuple(row) for row in zip(found.arrays["threshold"], found.arrays["far"],
                                       1 - found.arrays["tar"], strict=True)}  # fmt: skip
    assert {tuple(row) for row in curve} <= whole
    assert (np.diff(curve[:, 1]) <= 0).all() and (np.diff(curve[:, 2]) >= 0).all()
    report.write(tmp_path / "page.html", {"m": [found]})
    text = (tmp_path / "page.html").read_text()
    box = re.search(r'<div class="slider" data-set="0-0" data-threshold="([^"]+)"', text)
    scores = [float(x) for x in re.findall(r'data-set="0-0" data-score="([^"]+)"', text)]
    sides = re.findall(r'<span class="side">(\w+)</span>', text)
    assert len(scores) == wrong_pairs(found) > 0
    right = result(noise=0.5)  # whose hardest pairs are all right
    report.write(tmp_path / "right.html", {"m": [right]})
    assert wrong_pairs(right) == 0 and "<img" not in (tmp_path / "right.html").read_text()
    assert sides == ["accepted" if x >= float(box[1]) else "rejected" for x in scores]


def test_models_side_by_side(tmp_path):
    models = {f"run{i}": [result(noise=1 + i, seed=i), searched()] for i in range(3)}
    report.write(tmp_path / "page.html", models)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [row[0] for row in page.rows if row and row[0].startswith("run")] == [
        "run0", "run1", "run2", *(f"run{i}" for i in range(3) for _ in ("G1", "G2", "all")),
    ]  # fmt: skip
    heads = next(row for row in page.rows if row and row[0] == "FAR" and len(row) == 7)
    assert heads[1:3] == ["run0, insightface", "run0, strict"]
    assert text.count('aria-label="ROC, lfw"') == 1  # one figure, three curves
    assert text.count('aria-label="Histogram of scores, lfw, run') == 3
    assert "Training" not in text


def test_metrics_of_a_killed_run(tmp_path):
    run_directory(tmp_path, unfinished='{"step": 60, "lo')
    assert report.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 50
    run_directory(tmp_path, unfinished='{"step": 60, "lo\n{"step": 70}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:8: not a JSON object"):
        report.write(tmp_path / "report.html", {"a": [result()]}, tmp_path)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.json").exists()


def test_only_html_is_written(tmp_path):
    with pytest.raises(ValueError, match="an .html file, not"):
        report.write(tmp_path / "report.json", {"a": [result()]})
    assert list(tmp_path.iterdir()) == []


def test_figures_take_the_colours_of_the_page():
    arrays = result("a$b$c").arrays
    curve = (arrays["far"], arrays["tar"])
    parts = [arrays[key] for key in ("edges", "same", "different")]
    for svg in (
        figures.roc({f"set {i}": curve for i in range(9)}),
        figures.det({"a$b": curve}),
        figures.cmc({"a": [0.5, 0.75, 1]}),
        figures.folds("Folds", {"a": [0.9, 0.8], "b": [0.7, 0.9]}),
        figures.histogram("a$b$c", *parts, 0.3),
        figures.curves("Loss", {"Loss": ([1, 2], [3.0, 2.0])}),
    ):
        colors = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) - {"none"}
        assert colors and all(re.fullmatch(r"var\(--\w+\)", color) for color in colors), colors
        known = set(re.findall(r"--(\w+):", page_style.STYLE))
        assert {x.split("--")[1][:-1] for x in colors} <= known
    assert "a$b$c" in figures.histogram("a$b$c", *parts, 0.3)


@pytest.mark.parametrize(
    "far, tar",
    [
        ([0.0, 0.0, 1.0], [0.5, 1.0, 1.0]),  # no error at any FAR above zero
        ([1.0], [1.0]),  # one point
        ([0.0, 0.5, 1.0], [0.0, 0.0, 1.0]),
    ],
)
def test_curves_of_extremes_can_be_drawn(far, tar):
    for draw in (figures.roc, figures.det):
        assert "<svg" in draw({"a": (np.array(far), np.array(tar))})


def test_figures_are_reproducible():
    arrays = result().arrays
    parts = [arrays[key] for key in ("edges", "same", "different")]
    assert figures.histogram("lfw", *parts, 0.3) == figures.histogram("lfw", *parts, 0.3)


def test_report_and_thresholds_of_a_run(capsys, tmp_path, bin_file):
    from launch import export

    run = tmp_path / "run"
    make_run(run)
    run_directory(run)
    official.ijb(tmp_path, "IJBC", people=8)
    assert cli.main(["lfw", str(run), str(bin_file)]) == 0
    assert cli.main(["ijb", str(run), str(tmp_path), "--protocol", "1:1", "1:N"]) == 0
    assert sorted(x.name for x in (run / "eval").glob("*.json")) == [
        "ijb_1_1-IJBC.json", "ijb_1_N-IJBC.json", "lfw-colors.json",
    ]  # fmt: skip
    capsys.readouterr()
    assert cli.main(["report", str(run), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["report"] == str(run / "report.html")
    assert done["models"] == {"run": ["ijb 1:1: IJBC", "ijb 1:N: IJBC", "lfw: colors"]}
    assert cli.main(["thresholds", str(run), "--far", "0.1", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["set"] == "ijb 1:1: IJBC" and len(chosen["points"]) == 1
    assert chosen["contract"]["flags"] == "N1D1F0"  # of the exported graph: no mirror image
    assert chosen["contract"]["flip"] == "e(image) alone"
    assert cli.main(["thresholds", str(run), "--far", "0.1", "--json", "--flip-sum"]) == 0
    with_mirror = json.loads(capsys.readouterr().out)
    assert with_mirror["contract"]["flags"] == "N1D1F1"
    assert with_mirror["points"][0]["threshold"] != chosen["points"][0]["threshold"]
    assert cli.main(["thresholds", str(run), "--far", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == chosen

    onnx_path = tmp_path / "model.onnx"
    config = {"network": "mbf_tiny", "embedding_size": 32, "margin": "arcface", "commit": None,
              "rec": str(tmp_path / "none")}  # fmt: skip
    amend_config(run, config)
    assert export.main([str(run), str(onnx_path)]) == 0
    from recognition.weights.networks import open_embedder

    metadata = open_embedder(onnx_path).facts["metadata"]
    assert json.loads(metadata["thresholds"])["points"] == chosen["points"]
    # The exported file is known as those weights: its results choose for the run as well.
    assert metadata["weights_sha256"] == chosen["weights_sha256"]

    stale = json.loads((run / "thresholds.json").read_text()) | {"weights_sha256": "0" * 64}
    (run / "thresholds.json").write_text(json.dumps(stale))
    assert export.main([str(run), str(onnx_path)]) == 0
    said = capsys.readouterr().err
    assert "thresholds.json is of other weights and left out" in said
    assert f"the run's data, {tmp_path / 'none'}, are not here: no image and no pair" in said
    assert "thresholds" not in open_embedder(onnx_path).facts["metadata"]


def amend_config(run, config):
    """The manifest of a made run with more of a config; it knows its own hash."""
    import hashlib

    path = run / "checkpoints" / "step-7" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"config": config}
    del manifest["sha256"]
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": own}))


def test_thresholds_refuse(capsys, tmp_path):
    results.save(tmp_path / "eval", result(num_pairs=40))
    for words, message in (
        (["--far", "1e-3"], "lfw cannot show FAR 0.001; it can 0.1"),
        (["--set", "IJBC"], "no results of pairs of IJBC"),
    ):
        assert cli.main(["thresholds", str(tmp_path), *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "thresholds.json").exists()
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "no such run directory" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) == 1
    assert "one run twice" in capsys.readouterr().err


def test_in_headless_chromium(tmp_path, bin_file, capsys):
    """No error on the console, and every figure and table as the browser has them."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    for name in ("a", "b"):
        model = channel_means(tmp_path / f"{name}.onnx")
        words = ["lfw", str(model), str(bin_file), "--results", str(tmp_path / name)]
        assert cli.main([*words, *(["--no-flip"] if name == "b" else [])]) == 0
        results.save(tmp_path / name, searched())
    results.save(tmp_path / "a", result())  # with pairs that are decided wrongly
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page)]) == 0
    text = page.read_text()
    # The browser itself counts what it laid out, and says so in the title.
    probe = """<script>addEventListener('load', () => {
      const drawn = [...document.querySelectorAll('svg')].filter(x => x.getBBox().width > 50);
      const shown = [...document.images].filter(x => x.complete && x.naturalWidth === 112);
      const wide = document.documentElement.scrollWidth > innerWidth;
      const before = document.querySelectorAll('.changed').length;
      for (const range of document.querySelectorAll('.slider input')) {
        range.value = 0;  // everything is accepted
        range.dispatchEvent(new Event('input'));
      }
      const all = document.querySelectorAll('.side');
      const sides = [...all].filter(x => x.textContent === 'accepted').length - all.length;
      const lines = new Set([...document.querySelectorAll('.grid svg')].slice(0, 2).map(
        x => Math.round(x.getBoundingClientRect().top))).size;
      document.title = JSON.stringify([drawn.length, document.querySelectorAll('table').length,
        shown.length, document.images.length, wide, before, sides, lines,
        [...document.querySelectorAll('.slider output')].map(x => x.textContent).join(' | ')]);
    })</script>"""
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,900",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert title, done.stderr[-2000:]
    svgs, num_tables, shown, images, wide, before, sides, lines, words = json.loads(title[1])
    assert svgs == text.count("<svg") == 2 + 2 + 1 + 1 + (2 + 1 + 1) + 5
    assert num_tables == text.count("<table") == (1 + 1 + 2 * 2) + 1 + 2
    assert shown == images == text.count("<img") > 0
    assert not wide and lines == 1  # two figures beside each other
    # At the report's threshold no pair has changed sides; at the lowest, all are accepted.
    assert before == sides == 0 and "FAR 1.00, FRR 0.00" in words and "change sides" in words
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
