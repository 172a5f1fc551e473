"""What a report says of one protocol and set, of one model or of several beside one another."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import cv2
import numpy as np

from eval.report import figures, tables
from eval.report.headline import operating_point
from eval.report.results import REJECT_FAR, Result
from eval.report.slider import slider

TITLES = {
    "lfw": "Pairs, ten folds",
    "pairs": "Your pairs",
    "templates": "Your templates",
    "identify": "Your galleries",
    "ijb 1:1": "1:1 verification",
    "ijb 1:N": "1:N identification",
    "tinyface": "TinyFace",
    "ijb-s": "IJB-S",
    "rfw": "RFW",
}


class Group(NamedTuple):
    """One set under one protocol."""

    protocol: str
    name: str
    results: dict[str, Result]  # by model


def grouped(models: Mapping[str, Sequence[Result]]) -> list[Group]:
    """The sets in the order of their first appearance, each with the models that have it."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for model, results in models.items():
        for result in results:
            found.setdefault((result.facts["protocol"], result.name), {})[model] = result
    return [Group(protocol, name, results) for (protocol, name), results in found.items()]


def tables_of(group: Group) -> list[tables.Table]:
    """The tables of a group; with several models, each row or column says whose it is."""
    some = next(iter(group.results.values()))
    title = f"{TITLES.get(group.protocol, group.protocol)}: {group.name}"
    several = len(group.results) > 1
    if "groups" in some.metrics or "galleries" in some.metrics:
        of_one = tables.fairness_table if "groups" in some.metrics else tables.search_table
        if not several:
            return [(title, *of_one(some)[1:])]
        parts = {model: of_one(result) for model, result in group.results.items()}
        rows = [[model, *row] for model, (_, _, body) in parts.items() for row in body]
        return [(title, ["model", *of_one(some)[1]], rows)]
    found: list[tables.Table] = []
    if "fold_accuracy" in some.metrics:
        heads = ["model", *tables.PAIR_HEADS[1:]] if several else tables.PAIR_HEADS
        pairs = [
            tables.pair_row(model if several else group.name, result.metrics)
            for model, result in group.results.items()
        ]
        found.append((title, heads, pairs))
    if several:
        found.append((f"{group.name}: TAR at FAR", *tables.far_comparison(group.results)))
    for model, result in group.results.items():
        name = f"{group.name}, {model}" if several else group.name
        found.append((f"{name}: TAR and thresholds", *tables.far_table(result)[1:]))
        if result.metrics.get("intervals"):
            found.append((f"{name}: intervals", *tables.interval_table(result)[1:]))
    return found


def notes_of(group: Group) -> list[str]:
    """What the marks in the group's tables mean."""
    metrics = {model: result.metrics for model, result in group.results.items()}
    rows = [row for _, _, body in tables_of(group) for row in body]
    return tables.pair_notes(metrics, [["", *row] for row in rows])


def section(group: Group, number: int) -> Iterator[str]:
    """The part of the page on a group. number: of the group in the page."""
    heading = f"{TITLES.get(group.protocol, group.protocol)}: {group.name}"
    yield f"<h2>{escape(heading)}</h2>"
    for title, heads, rows in tables_of(group):
        yield f"<h3>{escape(title)}</h3>"
        yield _table(heads, rows)
    for note in notes_of(group):
        yield f"<p>{escape(note)}</p>"
    yield from _curves(group)
    for i, (model, result) in enumerate(group.results.items()):
        name = model if len(group.results) > 1 else ""
        yield from _pictures(name, result, f"{number}-{i}")
    for model, result in group.results.items():
        yield f"<details open><summary>Contract of {escape(model)}</summary><dl>"
        for what, how in _flat(result.facts["contract"]):
            yield f"<dt>{escape(what)}</dt><dd>{escape(how)}</dd>"
        yield "</dl></details>"
        if missing := result.metrics.get("missing_pairs"):
            yield f"<details><summary>{len(missing)} pairs left out</summary>"
            yield f"<pre>{escape(chr(10).join(missing))}</pre></details>"


def _curves(group: Group) -> Iterator[str]:
    arrays = {model: result.arrays for model, result in group.results.items()}
    title = group.name if group.protocol == "lfw" else f"{group.protocol} {group.name}"
    roc = {m: (a["far"], a["tar"]) for m, a in arrays.items() if "far" in a}
    for model, result in group.results.items():
        groups = result.metrics.get("groups", {})
        by_group = {g: (result.arrays[f"far {g}"], result.arrays[f"tar {g}"]) for g in groups}
        if by_group:
            yield f'<div class="grid">{figures.roc(by_group, f"ROC of the groups, {model}")}</div>'
    yield '<div class="grid">'
    if roc:
        yield figures.roc(roc, f"ROC, {title}")
        yield figures.det(roc, f"DET, {title}")
    for model, result in group.results.items():
        if "edges" in result.arrays:
            name = f"{title}, {model}" if len(arrays) > 1 else title
            kinds = ("strangers", "mated") if "cmc" in result.arrays else ("different", "same")
            edges, same, different = (result.arrays[k] for k in ("edges", "same", "different"))
            threshold = _threshold(result.metrics)
            yield figures.histogram(name, edges, same, different, threshold, kinds)
    folds = {
        m: r.metrics["fold_accuracy"]
        for m, r in group.results.items()
        if "fold_accuracy" in r.metrics
    }
    if folds:
        names = folds if len(folds) > 1 else {group.name: next(iter(folds.values()))}
        yield figures.folds(f"Folds, {title}", names)
    cmc = {m: a["cmc"] for m, a in arrays.items() if "cmc" in a}
    if cmc:
        yield figures.cmc(cmc, f"CMC, {title}")
    searched = {m: (a["fpir"], a["tpir"]) for m, a in arrays.items() if "fpir" in a}
    if searched:
        text = ("FPIR: strangers identified", "TPIR: mated probes identified")
        yield figures.lines(f"Open-set search, {title}", searched, text, "x")
    rejected = {m: (a["rejected"], a["fnmr"]) for m, a in arrays.items() if "rejected" in a}
    if rejected:
        text = (
            "share of pairs rejected, lowest feature norm first",
            f"1 - TAR at the threshold of FAR {REJECT_FAR:g}",
        )
        yield figures.lines(f"Error versus reject, {title}", rejected, text)
    yield "</div>"


def _threshold(metrics: Mapping[str, Any]) -> float | None:
    """The score at which the folds decide, where there are folds."""
    if "best_thresholds" not in metrics:
        return None
    return 1 - float(np.mean(metrics["best_thresholds"])) / 2


def decision_threshold(metrics: Mapping[str, Any]) -> float | None:
    """The score from which the report takes a pair as one person's: the folds' mean, else that of
    the operating point in the headline; None: no score keeps that FAR."""
    found = _threshold(metrics)
    return found if found is not None else operating_point(metrics)["threshold"]


def _pictures(model: str, result: Result, place: str) -> Iterator[str]:
    """The slider, and the pairs that are decided wrongly at the report's threshold."""
    if "operating_points" not in result.metrics or "threshold" not in result.arrays:
        return
    threshold = decision_threshold(result.metrics)
    if threshold is None:
        return
    about = f", {model}" if model else ""
    yield f"<h3>Another threshold, {escape(result.name + about)}</h3>"
    yield slider(result, place, threshold)
    if "pictures" not in result.arrays:
        return
    pictures, scores, same = (result.arrays[x] for x in ("pictures", "hard_scores", "hard_same"))
    names = result.arrays.get("picture_names", np.full(pictures.shape[:2], ""))
    for kind, title in ((False, "Hardest false accepts"), (True, "Hardest false rejects")):
        wrong = np.flatnonzero((same == kind) & ((scores < threshold) == kind))
        yield f"<h3>{title}, {escape(result.name + about)} (threshold {threshold:.4f})</h3>"
        if not len(wrong):
            yield "<p>None.</p>"
        yield '<div class="faces">'
        for i in wrong:
            faces = "".join(f'<img alt="" src="{_jpeg(face)}">' for face in pictures[i])
            words = "<br>".join(escape(str(name)) for name in names[i] if name)
            yield (
                f'<figure data-set="{place}" data-score="{scores[i]:.9g}">{faces}<figcaption>'
                f'{scores[i]:.4f}, <span class="side">{"rejected" if kind else "accepted"}</span>'
                f"{'<br>' if words else ''}{words}</figcaption></figure>"
            )
        yield "</div>"


def _jpeg(face: np.ndarray) -> str:
    content = cv2.imencode(".jpg", face[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


def _flat(contract: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in contract.items():
        if isinstance(value, Mapping):
            for name, text in value.items():
                yield f"{key}, {name}", str(text)
        else:
            yield key, str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(x)}</th>" for x in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
