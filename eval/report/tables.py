"""The numbers of results as tables for people: the terminal, the page and the Markdown share them.

A table is (title, headings, rows), all text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table as RichTable

from eval.report.results import Result, is_uneven

Table = tuple[str, list[str], list[list[str]]]

PAIR_HEADS = ["set", "pairs", "accuracy", "TAR at FAR 0.001", "EER", "AUC", "XNorm"]
NOTES = {
    "*": "Too few different pairs for this FAR: not one false accept is allowed.",
    "†": "Far more pairs of one kind: the same answer to all of them scores well.",
}


def percent(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{100 * value:.{digits}f} %"


def tar_at(metrics: Mapping[str, Any], far: float) -> dict[str, Any]:
    return next(x for x in metrics["operating_points"] if x["far_target"] == far)


def pair_row(name: str, n: Mapping[str, Any]) -> list[str]:
    """The cells of a set of pairs under PAIR_HEADS."""
    point = tar_at(n, 1e-3)
    uneven = "†" if is_uneven(n["same"], n["different"]) else ""
    return [
        name,
        f"{n['pairs']}",
        f"{100 * n['accuracy_mean']:.2f} ± {100 * n['accuracy_std']:.2f} %{uneven}",
        percent(point["tar"]) + ("" if point["resolved"] else "*"),
        percent(n["eer"]),
        f"{n['auc']:.5f}",
        f"{n['xnorm']:.2f}",
    ]


def pair_notes(sets: Mapping[str, Mapping[str, Any]], rows: Sequence[Sequence[str]]) -> list[str]:
    """What the marks in `rows` mean; sets: name -> metrics."""
    cells = [cell for row in rows for cell in row[1:]]
    found = [f"{mark} {text}" for mark, text in NOTES.items() if any(mark in x for x in cells)]
    if any("±" in cell for cell in cells):
        pairs = ", ".join(f"{name} {n['pairs']}" for name, n in sets.items())
        found.append(
            f"± the standard deviation of the accuracies of the ten folds, of all pairs ({pairs})."
        )
    if any("†" in cell for cell in cells):
        found += [
            f"{name}: {n['same']} same and {n['different']} different pairs, balanced accuracy "
            f"{percent(n['balanced_accuracy'])}"
            for name, n in sets.items()
            if is_uneven(n["same"], n["different"])
        ]
    return found


def far_table(result: Result) -> Table:
    """TAR at each FAR by both rules."""
    n = result.metrics
    rows = [
        [
            f"{point['far_target']:g}" + ("" if point["resolved"] else "*"),
            percent(point["tar_insightface"]),
            percent(point["tar"]),
            f"{point['far']:.3g}",
            "none" if point["threshold"] is None else f"{point['threshold']:.4f}",
        ]
        for point in n["operating_points"]
    ]
    title = (
        f"{result.name}: {n['same']} same and {n['different']} different pairs, "
        f"EER {percent(n['eer'])}, AUC {n['auc']:.5f}"
    )
    return title, ["FAR", "TAR insightface", "TAR strict", "FAR reached", "threshold"], rows


def far_comparison(found: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """TAR of several models at each FAR, by both rules."""
    rules = {"insightface": "tar_insightface", "strict": "tar"}
    heads = ["FAR", *(f"{model}, {rule}" for model in found for rule in rules)]
    first = next(iter(found.values()))
    rows = []
    for point in first.metrics["operating_points"]:
        x = point["far_target"]
        cells = [
            percent(tar_at(r.metrics, x)[key]) for r in found.values() for key in rules.values()
        ]
        rows.append([f"{x:g}" + ("" if point["resolved"] else "*"), *cells])
    return heads, rows


def search_table(result: Result) -> Table:
    """Ranks and TPIR of each gallery, then of all."""
    n = result.metrics
    first = next(iter(n["galleries"].values()))
    ranks = [key for key in first if key.startswith("rank")]
    fpirs = list(first["tpir_at_fpir"])
    rows = [
        [
            name,
            f"{part['counts']['gallery']}" if "counts" in part else "",
            f"{part['counts']['mated']}" if "counts" in part else "",
            f"{part['counts']['nonmated']}" if "counts" in part else "",
            *(_plain(part[key]) for key in ranks),
            *(_plain(part["tpir_at_fpir"][x]) for x in fpirs),
        ]
        for name, part in ({**n["galleries"], "all": n["all"]}).items()
        if name != "all" or len(n["galleries"]) > 1
    ]
    heads = ["gallery", "templates", "mated", "strangers"]
    heads += [f"rank {key[4:]}" for key in ranks] + [f"TPIR at {x}" for x in fpirs]
    return f"{result.name}, identification: ranks, and TPIR at FPIR, in %", heads, rows


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f}"


def as_rich(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([title, "", line(heads), line(["---"] * len(heads)), *map(line, rows), ""])


def interval_table(result: Result) -> Table:
    """The bootstrap intervals of a set of pairs."""
    n = result.metrics["intervals"]
    values = {
        "accuracy": (result.metrics["accuracy_mean"], n["accuracy"]),
        **{
            f"TAR at FAR {x}": (tar_at(result.metrics, float(x))["tar"], pair)
            for x, pair in n["tar_at_far"].items()
        },
        "EER": (result.metrics["eer"], n["eer"]),
        "AUC": (result.metrics["auc"], n["auc"]),
    }
    rows = [
        [name, percent(value), percent(low), percent(high)]
        for name, (value, (low, high)) in values.items()
    ]
    return f"{result.name}: {n['level']:.0%} intervals", ["", "value", "low", "high"], rows


def fairness_table(result: Result) -> Table:
    """Each group at its own best threshold and at the shared one."""
    n = result.metrics
    rows = [
        [
            name,
            f"{part['pairs']}",
            f"{100 * part['accuracy_mean']:.2f} ± {100 * part['accuracy_std']:.2f} %",
            percent(part["fmr"], 3),
            percent(part["fnmr"]),
        ]
        for name, part in n["groups"].items()
    ]
    rows.append(
        [
            "all",
            f"{n['pairs']}",
            percent(n["accuracy_mean"]),
            percent(n["fmr"], 3),
            percent(n["fnmr"]),
        ]
    )
    title = f"{result.name}: shared threshold {n['threshold']:.4f} at FMR {n['fmr_target']:g}"
    return title, ["group", "pairs", "accuracy", "FMR", "FNMR"], rows
