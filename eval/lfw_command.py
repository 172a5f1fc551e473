"""Verify the pairs of each SET by InsightFace's protocol: ten-fold accuracy, TAR at FAR, EER, AUC
and the mean embedding norm. Faces must be aligned to 112 x 112."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval import lfw, verification

if TYPE_CHECKING:  # torch and matplotlib are loaded by run(): --help and mistakes answer at once
    from eval.embed import Embedder
    from eval.report import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m eval lfw runs/a lfw.bin calfw.bin --report runs/a/report.html\n\n"
        "In the JSON, best_thresholds and val_thresholds are squared L2 distances of unit\n"
        "embeddings (0 to 4, accept below); those of operating_points are cosines (accept at or\n"
        "above). Accuracies and rates are shares, 0 to 1."
    )
    parser.add_argument(
        "model",
        metavar="RUN_OR_ONNX",
        help="run directory, one of its checkpoint directories, or a recognition .onnx",
    )
    parser.add_argument(
        "sets",
        metavar="SET",
        nargs="+",
        help="a .bin of pairs, or PAIRS.TXT:IMAGE_DIR with a list in LFW's own format",
    )
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="also write a page with the curves, and FILE.json; training curves are added where "
        "the model lies in a run directory",
    )


def run(args: argparse.Namespace) -> dict:
    """Print a table of the sets; return the model's facts and the numbers of each set.

    Raises:
        ValueError, OSError: a set, the model or the report's place is not what it must be.
    """
    if args.report is not None and not args.report.endswith(".html"):
        raise ValueError(f"--report takes an .html file, not {args.report}")
    sets = [_load(name) for name in args.sets]
    names = [pairs.name for pairs in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"two sets of one name among {', '.join(names)}; rename a file")
    from eval import report
    from eval.embed import open_embedder

    for pairs in sets:
        if text := _warning(pairs, report.is_uneven):
            print(f"warning: {pairs.name}: {text}", file=sys.stderr)
    embedder = open_embedder(args.model, args.batch_size)
    results = _evaluate(embedder, sets, args.batch_size)
    console = Console(stderr=args.json)
    numbers = {result.name: report.summary(result) for result in results}
    rows = [report.row(name, n) for name, n in numbers.items()]
    console.print(_table(rows))
    for note in report.notes(numbers, rows):
        console.print(note, highlight=False)
    output = {"model": embedder.facts, "sets": numbers}
    if args.report is not None:
        report.write(args.report, embedder.facts, results, run_dir(Path(args.model)))
        console.print(f"report: {args.report}", soft_wrap=True)
        output["report"] = args.report
    return output


def run_dir(model: Path) -> Path | None:
    """The run directory around a model: itself, that of its ONNX file or of its checkpoint."""
    around = (model, *model.resolve().parents[:2])
    return next((path for path in around if (path / "metrics.jsonl").is_file()), None)


def _load(name: str) -> lfw.PairSet:
    pairs_txt, colon, image_dir = name.rpartition(":")
    is_list = colon and not name.endswith(".bin")
    pairs = lfw.load_pairs(pairs_txt, image_dir) if is_list else lfw.load_bin(name)
    if pairs.issame.all() or not pairs.issame.any():
        raise ValueError(f"{name} holds pairs of one kind only: there is nothing to tell apart")
    return pairs


def _warning(pairs: lfw.PairSet, is_uneven: Callable[[int, int], bool]) -> str:
    """What makes the accuracy of this set another than it seems, in one line; empty if nothing."""
    num_same = int(pairs.issame.sum())
    num_different = len(pairs.issame) - num_same
    counts = f"{num_same} same and {num_different} different pairs"
    parts = []
    if pairs.missing:
        parts.append(
            f"{len(pairs.missing)} of {len(pairs.missing) + len(pairs.issame)} pairs left out; the "
            f"{counts} that remain make other folds than the protocol's, so the accuracy compares "
            "with no published one"
        )
    if is_uneven(num_same, num_different):
        about = "they are uneven" if pairs.missing else counts
        parts.append(f"{about}: the accuracy favours one answer, see the balanced accuracy")
    if pairs.missing:
        parts.append(f"the first left out: {pairs.missing[0]}")
    return "; ".join(parts)


def _evaluate(embedder: "Embedder", sets: list[lfw.PairSet], batch_size: int) -> list["Result"]:
    from eval.report import Result

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    results = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for pairs in sets:
            task = progress.add_task(pairs.name, total=len(pairs.encoded))

            def forward(images, task=task):
                embeddings = embedder(images)
                progress.advance(task, len(images) / 2)  # each comes plain and mirrored
                return embeddings

            flip_sum, norms = lfw.embed(forward, pairs.encoded, batch_size, where=pairs.name)
            metrics = lfw.score(flip_sum, norms, pairs.issame)
            distance = verification.distances(flip_sum)
            results.append(Result(pairs.name, metrics, distance, pairs.issame, pairs.missing))
    return results


def _table(rows: list[list[str]]) -> Table:
    """Within 80 columns: only a long name of a set is broken into lines, no number."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("set", overflow="fold")
    for heading in ("pairs", "accuracy", "TAR at\nFAR 0.1 %", "EER", "AUC", "XNorm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
