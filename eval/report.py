"""What an evaluation found: a summary for programs, and one HTML page that needs nothing else."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval import figures, verification

FARS = (1e-4, 1e-3, 1e-2, 1e-1)

CONTRACT = {
    "alignment": "Faces are expected aligned to the ArcFace five-point template, 112 x 112; the "
    "evaluation does not align and cannot tell.",
    "embedding": "e(image) + e(mirrored image), summed in float64, then L2-normalised.",
    "accuracy": "Ten contiguous folds. 'Same' where the squared distance is strictly below the "
    "threshold; of 0.00, 0.01 .. 3.99 the first with the highest accuracy on the other nine folds. "
    "Mean and population standard deviation over the folds.",
    "TAR at FAR": "The largest TAR whose FAR does not exceed the target, over all pairs of the "
    "set; a pair is accepted where its cosine is at least the threshold.",
    "VAL": "In the JSON only. Per fold, at the largest of the thresholds 0.000, 0.001 .. 3.999 "
    "whose FAR on the other nine folds is at most 0.001.",
    "EER": "Where FAR = 1 - TAR, on straight lines between the points of the exact ROC.",
    "XNorm": "Mean norm of the embeddings before normalisation, plain and mirrored.",
}

UNEVEN = 1.5  # same to different pairs, or the reverse: beyond it the accuracy misleads
THRESHOLD_UNIT = "squared L2 distance of unit embeddings, 0 to 4; accept where it is below"
NOTES = {
    "*": "Too few different pairs for this FAR: not one false accept is allowed.",
    "†": "Far more pairs of one kind: the same answer to all of them scores well.",
}


class Result(NamedTuple):
    name: str
    metrics: dict  # of lfw.score
    distance: NDArray[np.float64]  # [P] squared, of unit vectors
    issame: NDArray[np.bool_]  # [P]
    missing: tuple[str, ...]  # pairs left out

    @property
    def cosine(self) -> NDArray[np.float64]:
        return 1 - self.distance / 2  # [P]


def summary(result: Result) -> dict:
    """The numbers of one set, ready for JSON."""
    tar, far, threshold = verification.operating_points(result.cosine, result.issame, FARS)
    points = [
        {
            "far_target": FARS[i],
            "far": float(far[i]),
            "tar": float(tar[i]),
            "cosine_threshold": float(threshold[i]) if math.isfinite(threshold[i]) else None,
        }
        for i in range(len(FARS))
    ]
    num_same = int(np.count_nonzero(result.issame))
    return {
        "pairs": len(result.issame),
        "same": num_same,
        "different": len(result.issame) - num_same,
        "missing": len(result.missing),
        **result.metrics,
        "threshold_unit": THRESHOLD_UNIT,  # of best_thresholds and val_thresholds
        "balanced_accuracy": verification.balanced_accuracy(result.distance, result.issame),
        "operating_points": points,
    }


def write(
    path: str | Path,
    facts: Mapping[str, object],
    results: Sequence[Result],
    run_dir: str | Path | None = None,
) -> None:
    """Write the page to `path` (.html) and the numbers beside it (.json).

    facts: what the embedder says of its network. run_dir: its metrics.jsonl gives the training
    curves, its config.json is shown.

    Raises:
        ValueError: `path` does not end in .html, or metrics.jsonl holds a damaged line.
        OSError: a file cannot be read or written; no half-written file stays.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"a report is an .html file, not {path}")
    records, config = [], None
    if run_dir is not None:
        records = read_metrics(Path(run_dir) / "metrics.jsonl")
        if (Path(run_dir) / "config.json").is_file():
            config = json.loads((Path(run_dir) / "config.json").read_text())
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    content = {
        "written": when,
        "model": dict(facts),
        "contract": CONTRACT,
        "sets": {r.name: summary(r) | {"missing_pairs": list(r.missing)} for r in results},
    }
    page = "\n".join(_page(content, results, records, config))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path.with_suffix(".json"), json.dumps(content, indent=1, allow_nan=False) + "\n")
    _write(path, page + "\n")


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed run left unfinished is no record.

    Raises:
        ValueError: a damaged line, by its number.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if i == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{i}: not a JSON object: {line[:80]!r}") from error
    return records


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _page(
    content: dict, results: Sequence[Result], records: list[dict], config: dict | None
) -> Iterator[str]:
    model, sets = content["model"], content["sets"]
    title = str(model.get("network") or Path(str(model["path"])).name)
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_HEAD}'
    yield f"<title>{escape(title)}: verification</title>\n<style>{_CSS}</style>\n</head>\n<body>"
    yield f"<header><h1>Verification of {escape(title)}</h1>"
    yield f"<p>{escape(str(model['path']))}<br>{escape(str(model['runtime']))}, "
    yield f"{content['written']}</p></header>"
    yield "<h2>Sets</h2>"
    yield _table(
        ["set", "pairs", "accuracy", "TAR at FAR 0.1 %", "EER", "AUC", "XNorm"],
        [row(name, numbers) for name, numbers in sets.items()],
        sets,
    )
    yield '<div class="wide">'
    yield figures.roc({r.name: verification.roc(r.cosine, r.issame)[:2] for r in results})
    yield "</div><h2>Scores</h2>"
    yield "<p>The dashed line is the mean of the folds' thresholds.</p>"
    yield '<div class="grid">'
    for r in results:
        threshold = 1 - float(np.mean(r.metrics["best_thresholds"])) / 2
        yield figures.histogram(r.name, r.cosine, r.issame, threshold)
    yield "</div><h2>Thresholds</h2>"
    yield "<p>Accept a pair where the cosine of its embeddings is at least the threshold.</p>"
    yield _table(
        ["set", "FAR asked", "threshold", "TAR", "FAR reached"],
        [_point_row(name, n, point) for name, n in sets.items() for point in n["operating_points"]],
        sets,
    )
    training = list(_training(records))
    if training:
        yield '<h2>Training</h2><div class="grid">' + "\n".join(training) + "</div>"
    yield "<h2>How it was measured</h2><dl>"
    yield f"<dt>input</dt><dd>{escape(_input(model['input']))}</dd>"
    for what, how in CONTRACT.items():
        yield f"<dt>{escape(what)}</dt><dd>{escape(how)}</dd>"
    yield "</dl>"
    for name, numbers in sets.items():
        if missing := numbers["missing_pairs"]:
            yield f"<details><summary>{escape(name)}: {len(missing)} pairs left out</summary>"
            yield f"<pre>{escape(chr(10).join(missing))}</pre></details>"
    if config is not None:
        yield "<details><summary>Configuration of the run</summary>"
        yield f"<pre>{escape(json.dumps(config, indent=1))}</pre></details>"
    yield "</body>\n</html>"


def is_uneven(num_same: int, num_different: int) -> bool:
    return max(num_same, num_different) > UNEVEN * min(num_same, num_different)


def notes(sets: Mapping[str, dict], rows: Sequence[Sequence[str]]) -> list[str]:
    """What the marks in `rows` mean; sets: name -> `summary`."""
    cells = [cell for row in rows for cell in row[1:]]
    found = [f"{mark} {text}" for mark, text in NOTES.items() if any(mark in x for x in cells)]
    if any("†" in cell for cell in cells):
        found += [
            f"{name}: {n['same']} same and {n['different']} different pairs, balanced accuracy "
            f"{100 * n['balanced_accuracy']:.2f} %"
            for name, n in sets.items()
            if is_uneven(n["same"], n["different"])
        ]
    return found


def row(name: str, n: dict) -> list[str]:
    """The cells of a set, from its `summary`, in tables for people."""
    tar = next(p["tar"] for p in n["operating_points"] if p["far_target"] == 1e-3)
    mark = "*" if n["different"] < 1000 else ""
    uneven = "†" if is_uneven(n["same"], n["different"]) else ""
    return [
        name,
        f"{n['pairs']}",
        f"{100 * n['accuracy_mean']:.2f} ± {100 * n['accuracy_std']:.2f} %{uneven}",
        f"{100 * tar:.2f} %{mark}",
        f"{100 * n['eer']:.2f} %",
        f"{n['auc']:.5f}",
        f"{n['xnorm']:.2f}",
    ]


def _point_row(name: str, n: dict, point: dict) -> list[str]:
    threshold = point["cosine_threshold"]
    mark = "*" if point["far_target"] * n["different"] < 1 else ""
    return [
        name,
        f"{100 * point['far_target']:g} %{mark}",
        "none" if threshold is None else f"{threshold:.4f}",
        f"{100 * point['tar']:.2f} %",
        f"{100 * point['far']:.3g} % ({round(point['far'] * n['different'])} of {n['different']})",
    ]


def _training(records: list[dict]) -> Iterator[str]:
    verified: dict[str, tuple[list, list]] = {}
    for record in records:
        for name, metrics in record.get("verification", {}).items():
            steps, values = verified.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(metrics["accuracy_mean"])
    for key, title in (("loss", "Loss"), ("lr", "Learning rate")):
        logged = [record for record in records if key in record]
        if logged:
            line = [r["step"] for r in logged], [r[key] for r in logged]
            yield figures.curves(title, {title: line})
    if verified:
        yield figures.curves("Accuracy during training", verified, percent=True)
    logged = [record for record in records if "images_per_second" in record]
    if logged:
        line = [r["step"] for r in logged], [r["images_per_second"] for r in logged]
        yield figures.curves("Images per second", {"images/s": line}, from_zero=True)


def _input(contract: Mapping[str, object]) -> str:
    return (
        f"{contract['color_order']}, {contract['size']} x {contract['size']}, "
        f"(pixel - {contract['mean']:g}) / {contract['std']:g}"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], sets: Mapping[str, dict]) -> str:
    head = "".join(f"<th>{escape(x)}</th>" for x in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows
    )
    note = "".join(f"<p>{escape(text)}</p>" for text in notes(sets, rows))
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>{note}'


_HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8;
  --s1: #0b62b0; --s2: #c2571a; --s3: #17805c; --s4: #9a3a80; --s5: #8a6d00; --s6: #3f7f93;
  --s7: #b03a3a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #98a2ad; --line: #323a42;
    --s1: #6cb2f5; --s2: #f2a065; --s3: #5cc9a0; --s4: #df8fc8; --s5: #d9bd55; --s6: #85c4d6;
    --s7: #ef8d8d; } }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; }
h2 { margin: 2.5rem 0 0.75rem; font-size: 1.1rem; font-weight: 600; }
p, dd { color: var(--soft); max-width: 44rem; margin: 0.25rem 0 0.75rem; }
header p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.5rem 0.35rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 400; font-size: 0.875rem; }
td { border-top: 1px solid var(--line); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; }
.grid svg { max-width: 31rem; }
.wide { max-width: 44rem; margin-top: 1.5rem; }
svg { width: 100%; height: auto; }
svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; }
dd { margin-left: 0; margin-top: 0; }
summary { cursor: pointer; margin-top: 1rem; }
pre { overflow-x: auto; font-size: 0.8rem; color: var(--soft); }
"""
