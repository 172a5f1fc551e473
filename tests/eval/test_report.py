"""The page holds what was measured, asks nothing of the network, and is whole or not there."""

import html.parser
import json
import re

import numpy as np
import pytest

from eval import figures, report, verification

FACTS = {
    "path": "runs/<demo>",
    "network": "mbf_tiny",
    "input": {"size": 112, "color_order": "RGB", "mean": 127.5, "std": 127.5},
    "runtime": "torch on cpu",
}


def result(name="lfw", num_pairs=400, noise=1.5, missing=(), seed=0):
    rng = np.random.default_rng(seed)
    issame = np.arange(num_pairs) % 2 == 0
    first = rng.normal(size=(num_pairs, 32))
    second = np.where(issame[:, None], first, rng.normal(size=(num_pairs, 32)))
    second = second + noise * rng.normal(size=second.shape)
    embeddings = np.stack([first, second], axis=1).reshape(-1, 32)
    metrics = verification.evaluate(embeddings, issame) | {"xnorm": 5.25}
    return report.Result(name, metrics, verification.distances(embeddings), issame, missing)


def run_directory(path, unfinished=""):
    lines = [json.dumps({"step": 0, "verification": {"lfw": {"accuracy_mean": 0.5}}})]
    for step in range(10, 60, 10):
        record = {"step": step, "epoch": 0, "loss": 30.0 / step, "lr": 0.1, "images_per_second": 9}
        lines.append(json.dumps(record))
    lines.append(json.dumps({"step": 50, "verification": {"lfw": {"accuracy_mean": 0.9}}}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + unfinished)
    (path / "config.json").write_text('{"margin": "arcface"}')
    return path


class Page(html.parser.HTMLParser):
    """Tags in balance, every reference to anything outside, and the tables' cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.rows, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
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
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        self.words.append(data.strip())


def test_summary_counts_and_rates():
    data = result(num_pairs=4000, noise=1.2, missing=("a", "b"))
    numbers = report.summary(data)
    assert (numbers["pairs"], numbers["same"], numbers["different"]) == (4000, 2000, 2000)
    assert numbers["missing"] == 2 and numbers["xnorm"] == 5.25
    for point in numbers["operating_points"]:
        accepted = 1 - data.distance / 2 >= point["cosine_threshold"]
        assert point["tar"] == np.mean(accepted[data.issame])
        assert point["far"] == np.mean(accepted[~data.issame]) <= point["far_target"]
    json.dumps(numbers, allow_nan=False)


def test_a_threshold_that_accepts_nobody_is_null():
    data = result(num_pairs=20)
    swapped = data._replace(issame=~data.issame)  # the best scores are impostors'
    point = report.summary(swapped)["operating_points"][0]
    assert point["cosine_threshold"] is None and point["tar"] == 0
    json.dumps(report.summary(swapped), allow_nan=False)


def test_the_page_and_its_json(tmp_path):
    run = run_directory(tmp_path)
    results = [result(), result("age & <b>", 4000, 2.0, missing=("pairs.txt:3: no image A_0001",))]
    report.write(run / "report.html", FACTS, results, run)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.outside == []
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert "prefers-color-scheme: dark" in text

    content = json.loads((run / "report.json").read_text())
    assert list(content["sets"]) == ["lfw", "age & <b>"]
    assert content["contract"] == report.CONTRACT and content["model"]["network"] == "mbf_tiny"
    assert content["sets"]["age & <b>"]["missing_pairs"] == ["pairs.txt:3: no image A_0001"]
    lfw = content["sets"]["lfw"]
    accuracy = f"{100 * lfw['accuracy_mean']:.2f} ± {100 * lfw['accuracy_std']:.2f} %"
    first = next(row for row in page.rows if row and row[0] == "lfw")
    assert first[1:3] == ["400", accuracy]
    assert first[3].endswith("*")  # 200 different pairs cannot show a FAR of 0.001
    assert any("not one false accept is allowed" in word for word in page.words)
    other = [row for row in page.rows if row and row[0] == "age & <b>"]
    assert not other[0][3].endswith("*") and len(other) == 1 + len(report.FARS)

    for title in ("Loss", "Learning rate", "Accuracy during training", "Images per second"):
        assert f'aria-label="{title}"' in text
    assert text.count("<svg") == 1 + 2 + 4  # ROC, two histograms, four curves of the training
    assert '"margin": "arcface"' in " ".join(page.words)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
        "report.json",
    ]


def test_a_model_without_a_run_has_no_training_section(tmp_path):
    report.write(tmp_path / "new" / "page.html", FACTS, [result()])
    text = (tmp_path / "new" / "page.html").read_text()
    assert "Training" not in text and text.count("<svg") == 2
    assert (tmp_path / "new" / "page.json").is_file()


def test_metrics_of_a_killed_run(tmp_path):
    run_directory(tmp_path, unfinished='{"step": 60, "lo')
    assert report.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 50
    run_directory(tmp_path, unfinished='{"step": 60, "lo\n{"step": 70}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:8: not a JSON object"):
        report.write(tmp_path / "report.html", FACTS, [result()], tmp_path)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.json").exists()


def test_only_html_is_written(tmp_path):
    with pytest.raises(ValueError, match="an .html file, not"):
        report.write(tmp_path / "report.json", FACTS, [result()])
    assert list(tmp_path.iterdir()) == []


def test_figures_take_the_colours_of_the_page():
    data = result("a$b$c")
    far, tar, _ = verification.roc(data.cosine, data.issame)
    many = {f"set {i}": (far, tar) for i in range(9)}
    for svg in (
        figures.roc(many),
        figures.histogram(data.name, data.cosine, data.issame, 0.3),
        figures.curves("Loss", {"Loss": ([1, 2], [3.0, 2.0])}),
    ):
        colors = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) - {"none"}
        assert colors and all(re.fullmatch(r"var\(--\w+\)", color) for color in colors), colors
        assert {x.split("--")[1][:-1] for x in colors} <= set(re.findall(r"--(\w+):", report._CSS))
    assert "a$b$c" in figures.histogram(data.name, data.cosine, data.issame, 0.3)


def test_letters_are_of_one_size_in_all_figures():
    """CSS pixels to a point of the figure, where the page is as wide as it gets: 62 rem."""
    data = result()
    far, tar, _ = verification.roc(data.cosine, data.issame)

    def scale(svg, rem):
        return 16 * rem / float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])

    wide = float(re.search(r"\.wide \{ max-width: (\d+)rem", report._CSS)[1])
    narrow = float(re.search(r"\.grid svg \{ max-width: (\d+)rem", report._CSS)[1])
    of_roc = scale(figures.roc({"lfw": (far, tar)}), wide)
    for svg in (
        figures.histogram(data.name, data.cosine, data.issame, 0.3),
        figures.curves("Loss", {"Loss": ([1, 2], [3.0, 2.0])}),
    ):
        assert scale(svg, narrow) == pytest.approx(of_roc, rel=0.05)
    assert "auto-fill" in report._CSS  # auto-fit gives a lone histogram the width of the page


def test_figures_are_reproducible():
    data = result()
    once = figures.histogram("lfw", data.cosine, data.issame, 0.3)
    assert once == figures.histogram("lfw", data.cosine, data.issame, 0.3)
