"""Choose a model's operating points from its evaluation results. They are written to
RUN/thresholds.json, and launch/export.py copies them into the metadata of the ONNX file."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import read_json
from eval.report.report_command import results_of

if TYPE_CHECKING:
    from eval.report.results import Result

FILE = "thresholds.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Only FARs that the set can measure are kept: at least one false accept among its\n"
        "different pairs. Scores come from e(image) alone, as an exported file computes it. The\n"
        "accuracy of `eval lfw` comes from e(image) + e(mirror image), whose scores differ.\n"
        "launch/export.py accepts only thresholds for the embedding that its file computes.\n\n"
        "example: python -m eval thresholds runs/a --set IJBC && \\\n"
        "         python launch/export.py runs/a model.onnx"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory with results")
    parser.add_argument(
        "--set", metavar="NAME", help="default: the set with the most different pairs"
    )
    parser.add_argument(
        "--flip-sum",
        action="store_true",
        help="use scores of e(image) + e(mirror image), for launch/export.py --flip-sum",
    )
    parser.add_argument(
        "--far",
        metavar="X",
        nargs="+",
        type=float,
        help="default: every FAR that the set can measure",
    )


def run(args: argparse.Namespace) -> dict:
    """Write and print the operating points.

    Raises:
        ValueError, OSError: no results, no set of that name, or a FAR that it cannot show.
    """
    from eval.report import results, tables

    found = [r for r in results.load_all(results_of(args.run)) if "operating_points" in r.metrics]
    if args.set is not None:
        found = [result for result in found if result.name == args.set]
    if not found:
        raise UserError(f"{args.run}: no results of pairs{f' of {args.set}' if args.set else ''}")
    chosen = max(found, key=lambda result: result.metrics["different"])
    chosen = _of_embedding(chosen, args.flip_sum)
    points = [
        x
        for x in chosen.metrics["operating_points"]
        if x["resolved"] and x["threshold"] is not None
    ]
    if args.far is not None:
        known = [point["far_target"] for point in points]
        absent = [x for x in args.far if x not in known]
        if absent:
            raise UserError(
                f"{chosen.name} cannot show FAR {absent[0]:g}; it can "
                f"{', '.join(f'{x:g}' for x in known) or 'none'}"
            )
        points = [point for point in points if point["far_target"] in args.far]
    if not points:
        raise UserError(f"{chosen.name}: {chosen.metrics['different']} different pairs show no FAR")
    content = {
        "set": f"{chosen.facts['protocol']}: {chosen.name}",
        "weights_sha256": weights_of(chosen.facts["model"]),
        "accept": "score >= threshold",
        "contract": {
            key: value for key, value in chosen.facts["contract"].items() if isinstance(value, str)
        },
        "points": [
            {key: point[key] for key in ("far_target", "threshold", "far", "tar")}
            for point in points
        ],
    }
    path = args.run / FILE
    files.write_text(path, json.dumps(content, indent=1) + "\n")
    console = Console(stderr=args.json)
    title, heads, rows = tables.far_table(chosen)
    kept = {f"{point['far_target']:g}" for point in points}
    console.print(tables.as_rich(title, heads, [row for row in rows if row[0] in kept]))
    console.print(f"written: {path}", soft_wrap=True)
    return {**content, "path": str(path)}


def _of_embedding(result: "Result", flip_sum: bool) -> "Result":
    """The result with the operating points of what an exported file gives.

    Raises:
        ValueError: it was evaluated without them.
    """
    from eval.report.results import ALONE, FLIP_SUM

    wanted = FLIP_SUM if flip_sum else ALONE
    contract = dict(result.facts["contract"])
    if contract["flip"] == wanted:
        return result
    alone = result.metrics.get("alone")
    if flip_sum or alone is None:
        again = "without --no-flip" if flip_sum else "again"
        raise UserError(
            f"{result.name} was evaluated with {contract['flip']}: for thresholds of "
            f"{wanted} evaluate it {again}"
        )
    metrics = result.metrics | {"operating_points": alone["operating_points"]}
    contract |= {"flip": ALONE}
    if "flags" in contract:  # IJB's, such as N1D1F1
        contract["flags"] = str(contract["flags"]).replace("F1", "F0")
    changed = {"metrics": metrics, "contract": contract}
    return result._replace(facts=result.facts | changed)


def weights_of(model: Mapping[str, Any]) -> str:
    """sha256 of the weights: an exported file names those it was made from."""
    return str(model.get("metadata", {}).get("weights_sha256") or model["sha256"])


def of_run(run_dir: Path) -> dict[str, Any] | None:
    """The chosen operating points of a run, None where there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / FILE
    if not files.is_file(path):
        return None
    try:
        content = read_json(path)
        content["points"], content["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}; run `eval thresholds` again") from error
    return content
