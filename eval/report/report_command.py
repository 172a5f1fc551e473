"""One page on everything that was evaluated of a run, or of several runs side by side: tables with
their contract, ROC, DET and CMC curves, score histograms, folds, the hardest pairs. It opens
offline; the same numbers stand beside it as JSON and as Markdown tables."""

import argparse
from pathlib import Path

from rich.console import Console

from data_tools.common import files
from data_tools.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "`lfw`, `ijb`, `pairs`, `identify` and the others save their results in RUN/eval, or in\n"
        "their --results directory; the report does not need the network.\n\n"
        "example: python -m eval report runs/a runs/b --out a-and-b.html"
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run directory, or directory of results"
    )
    parser.add_argument(
        "--out", metavar="FILE.html", type=Path, help="default: report.html in the first RUN"
    )


def run(args: argparse.Namespace) -> dict:
    """Read the results and write the page.

    Raises:
        ValueError, OSError: no results, a damaged one, or the page cannot be written.
    """
    out = args.out or args.runs[0] / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out takes an .html file, not {out}")
    from eval.report import page, results

    names = _labels(args.runs)
    models = {
        name: results.load_all(results_of(path))
        for name, path in zip(names, args.runs, strict=True)
    }
    around = args.runs[0] if files.is_file(args.runs[0] / "metrics.jsonl") else None
    page.write(out, models, around if len(models) == 1 else None)
    Console(stderr=args.json).print(f"report: {out}", soft_wrap=True)
    return {
        "report": str(out),
        "models": {
            name: [f"{r.facts['protocol']}: {r.name}" for r in found]
            for name, found in models.items()
        },
    }


def results_of(path: Path) -> Path:
    """Where the results of a run lie, or the directory of results itself."""
    if not files.is_dir(path):
        raise FileNotFoundError(f"{path}: no such run directory")
    return path / "eval" if files.is_dir(path / "eval") else path


def _labels(runs: list[Path]) -> list[str]:
    """A name for each run, as short as tells them apart."""
    if len({path.resolve() for path in runs}) < len(runs):
        raise UserError(f"one run twice among {', '.join(map(str, runs))}")
    short = [path.resolve().name for path in runs]
    return short if len(set(short)) == len(short) else [str(path) for path in runs]
