"""The report on one model or several: one HTML page that needs nothing else, JSON, Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from data_tools.common import files, text
from data_tools.common.errors import UserError
from data_tools.common.text import read_json, read_text
from eval.report import figures, sections, tables
from eval.report.headline import headline
from eval.report.page_style import HEAD, STYLE
from eval.report.results import Result
from eval.report.slider import SCRIPT


def write(
    path: str | Path,
    models: Mapping[str, Sequence[Result]],
    run_dir: str | Path | None = None,
) -> None:
    """Write the page to `path` (.html), the numbers (.json) and the tables (.md) beside it.

    models: name -> its results. run_dir: its metrics.jsonl gives the training curves, its
    config.json is shown.

    Raises:
        ValueError: `path` does not end in .html, or metrics.jsonl holds a damaged line.
        OSError: a file cannot be read or written; no half-written file stays.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise UserError(f"a report is an .html file, not {path}")
    records, config = [], None
    if run_dir is not None:
        records = read_metrics(Path(run_dir) / "metrics.jsonl")
        if files.is_file(Path(run_dir) / "config.json"):
            config = read_json(Path(run_dir) / "config.json")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    content = {
        "written": when,
        "models": {name: [r.facts for r in results] for name, results in models.items()},
    }
    found = sections.grouped(models)
    page = "\n".join(_page(when, models, found, records, config))
    text = "\n".join(_markdown(when, models, found))
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(content, indent=1, allow_nan=False) + "\n"
    for place, written in (
        (path.with_suffix(".json"), numbers),
        (path.with_suffix(".md"), text + "\n"),
        (path, page + "\n"),  # each says when it was written
    ):
        files.write_text(place, written, files.PRIVATE_FILE)  # the page shows faces


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed run left unfinished is skipped.

    Raises:
        ValueError: a damaged line, by its number.
    """
    lines = read_text(path).splitlines(keepends=True)
    records = []
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if i == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path}:{i}: not a JSON object: {line[:80]!r}") from error
    return records


def _config(path: Path) -> Any:
    """What a run was asked. Raises: ValueError, naming the file."""
    try:
        return json.loads(text.read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _title(models: Mapping[str, Sequence[Result]]) -> str:
    names = []
    for name, results in models.items():
        network = results[0].facts["model"].get("network") if results else None
        names.append(str(network or Path(name).name) if len(models) == 1 else name)
    return ", ".join(names)


def _page(
    when: str,
    models: Mapping[str, Sequence[Result]],
    found: Sequence[sections.Group],
    records: list[dict],
    config: dict | None,
) -> Iterator[str]:
    title = _title(models)
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{HEAD}'
    yield f"<title>{escape(title)}: evaluation</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<header><h1>Evaluation of {escape(title)}</h1>"
    for name, results in models.items():
        facts = results[0].facts["model"] if results else {}
        about = f"{name}: {facts.get('runtime', '')}, weights {str(facts.get('sha256', ''))[:12]}"
        yield f"<p>{escape(about)}</p>"
    yield f"<p>{when}</p>"
    if (first := headline(models)) is not None:
        yield f'<p class="lead">{escape(first.sentence)}</p><dl class="numbers">'
        for value, what in first.numbers:
            yield f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>"
        yield "</dl>"
    yield "</header>"
    for warning in dict.fromkeys(
        w for r in models.values() for x in r for w in x.facts.get("warnings", [])
    ):
        yield f'<p class="warning">warning: {escape(warning)}</p>'
    for number, group in enumerate(found):
        yield from sections.section(group, number)
    training = list(_training(records))
    if training:
        yield '<h2>Training</h2><div class="grid">' + "\n".join(training) + "</div>"
    if config is not None:
        yield "<details><summary>Configuration of the run</summary>"
        yield f"<pre>{escape(json.dumps(config, indent=1))}</pre></details>"
    yield f"<script>{SCRIPT}</script></body>\n</html>"


def _markdown(
    when: str, models: Mapping[str, Sequence[Result]], found: Sequence[sections.Group]
) -> Iterator[str]:
    yield f"## Evaluation of {_title(models)}\n\n{when}\n"
    if (first := headline(models)) is not None:
        yield f"{first.sentence}\n"
    for group in found:
        for title, heads, rows in sections.tables_of(group):
            yield tables.as_markdown(f"**{title}**", heads, rows)
        for note in sections.notes_of(group):
            yield f"{note}\n".replace("*", "\\*")
        for name, result in group.results.items():
            contract = result.facts["contract"]
            listed = "; ".join(
                f"{key}: {value}" for key, value in contract.items() if isinstance(value, str)
            )
            yield f"Contract of {name}: {listed}.\n"


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
            yield figures.curves(title, {title: _over_steps(logged, key)})
    if verified:
        yield figures.curves("Accuracy during training", verified, percent=True)
    logged = [record for record in records if "images_per_second" in record]
    if logged:
        speed = {"images/s": _over_steps(logged, "images_per_second")}
        yield figures.curves("Images per second", speed, from_zero=True)


def _over_steps(records: list[dict[str, Any]], key: str) -> figures.Curve:
    return [r["step"] for r in records], [r[key] for r in records]
