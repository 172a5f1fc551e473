"""Verify the pairs of each SET by InsightFace's protocol: ten-fold accuracy, TAR at FAR, EER, AUC
and the mean embedding norm, with bootstrap intervals. LFW, CFP-FP, CFP-FF, AgeDB-30, CALFW, CPLFW,
VGG2-FP and any other .bin or list of pairs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from data_tools.common.errors import UserError
from eval.protocols import pair_lists, session
from eval.protocols.pair_lists import ListedPairs

if TYPE_CHECKING:  # torch and matplotlib are loaded by run(): --help and mistakes answer at once
    from eval.report.results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "a SET is X.bin (InsightFace's pickle of pairs, faces aligned to 112 x 112), or\n"
        "LIST:IMAGE_DIR, or LIST:IMAGE_DIR:LANDMARKS for images that are not aligned. LIST is\n"
        "LFW's pairs.txt, pairs_CALFW.txt, pairs_CPLFW.txt, CFP's Protocol/Split/FP or FF, the\n"
        ".mat of AgeDB-30, or lines of 'image1 image2 label'. LANDMARKS is a file (a line per\n"
        "image: name, score or label if any, x1 y1 .. x5 y5) or a directory of\n"
        "NAME_5loc_attri.txt or NAME.pts.\n\n"
        "example: python -m eval lfw runs/a lfw.bin calfw.bin --report runs/a/report.html\n\n"
        "In the JSON, best_thresholds and val_thresholds are squared L2 distances of unit\n"
        "embeddings (0 to 4, accept below); those of operating_points are cosines (accept at or\n"
        "above). Accuracies and rates are shares, 0 to 1."
    )
    session.add_arguments(parser)
    parser.add_argument("sets", metavar="SET", nargs="+", help="see below")
    parser.add_argument(
        "--no-contract-check",
        dest="check",
        action="store_false",
        help="do not check whether a foreign network does better with another input contract",
    )
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="also write a report of these sets, with FILE.json and FILE.md beside it; it shows "
        "the training curves if the model is in a run directory",
    )


def run(args: argparse.Namespace) -> dict | None:
    """Print a table of the sets; return the model's facts and the numbers of each set.

    Raises:
        UserError, OSError: a set or the model cannot be read, or the report cannot be written.
    """
    if args.report is not None and not args.report.endswith(".html"):
        raise UserError(f"--report takes an .html file, not {args.report}")
    sets = [_load(name, args.resize) for name in args.sets]
    names = [pairs.name for pairs in sets]
    if len(set(names)) < len(names):
        raise UserError(f"two sets have the same name, in {', '.join(names)}; rename a file")
    from eval.protocols import score_pairs

    work = session.Session(args)
    for pairs in sets:
        if text := score_pairs.set_warning(pairs):
            work.warn(text)
    found = []
    for pairs in sets:
        features = work.features(pairs.images)
        if features is not None:
            found.append(score_pairs.verify(work, pairs, features, "lfw"))
    if not work.is_first:
        return None
    if args.check and not score_pairs.contract_is_known(work):
        if text := score_pairs.contract_warning(work, sets[0]):
            work.warn(text)
    for result in found:
        work.save(result)
    return finish(work, found, args.report)


def finish(work: session.Session, found: "list[Result]", report_path: str | None) -> dict:
    """Print the table and write the report that was asked for; returns what --json prints."""
    from eval.report import page, tables

    rows = [tables.pair_row(result.name, result.metrics) for result in found]
    work.console.print(table(rows))
    for note in tables.pair_notes({r.name: r.metrics for r in found}, rows):
        work.console.print(note, highlight=False)
    output = work.output({"sets": {result.name: result.metrics for result in found}})
    if report_path is not None:
        around = session.run_dir(Path(work.args.model))
        page.write(report_path, {str(work.args.model): found}, around)
        work.console.print(f"report: {report_path}", soft_wrap=True)
        output["report"] = report_path
    return output


def _load(name: str, resize: bool) -> ListedPairs:
    pairs = pair_lists.open_set(name, resize)
    if pairs.issame.all() or not pairs.issame.any():
        raise UserError(f"{name} holds only same or only different pairs: verification needs both")
    return pairs


def table(rows: list[list[str]]) -> Table:
    """A table within 80 columns: only the names of sets wrap, never a number."""
    content = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    content.add_column("set", overflow="fold")
    for heading in ("pairs", "accuracy", "TAR at\nFAR 0.001", "EER", "AUC", "XNorm"):
        content.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        content.add_row(*row)
    return content
