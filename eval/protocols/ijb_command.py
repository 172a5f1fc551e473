"""IJB-B and IJB-C, 1:1 and 1:N, as InsightFace's scripts compute them: aligned by the listed
points, features weighed by norm and detector score, pooled by media, compared by dot product."""

import argparse

import numpy as np

from eval import identification, roc, templates
from eval.protocols import identify_command, ijb, pairs_command, session
from eval.report import results
from eval.report.results import Result

PROTOCOLS = ("1:1", "1:N")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "DIR contains IJBB/ or IJBC/ with loose_crop/ and meta/. TAR at FAR is reported by both\n"
        "rules: insightface, which the published tables use, and strict.\n\n"
        "example: python -m eval ijb runs/a /data/ijb --benchmark IJBC --protocol 1:1 1:N\n"
        "         torchrun --nproc-per-node 8 -m eval ijb runs/a /data/ijb --benchmark IJBC"
    )
    session.add_arguments(parser)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--benchmark", choices=list(ijb.OFFICIAL), default="IJBC")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=["1:1"])
    parser.add_argument(
        "--no-norm",
        dest="norm",
        action="store_false",
        help="N0: L2-normalise each image's embedding; default N1: its norm weights it",
    )
    parser.add_argument(
        "--no-detector",
        dest="detector",
        action="store_false",
        help="D0: ignore the detector's score; default D1: it weights each image",
    )
    parser.add_argument(
        "--old-1n-rule",
        dest="old_rule",
        action="store_true",
        help="for 1:N also give the numbers of ijb_1n.py, whose 'FPIR' is not an FPIR (InsightFace "
        "issue 1386)",
    )


def run(args: argparse.Namespace) -> dict | None:
    """Pool the templates once, then score the requested protocols.

    Raises:
        UserError, OSError: a list, an image or the model cannot be read.
    """
    benchmark = ijb.open_benchmark(args.directory, args.benchmark)
    faces = ijb.read_faces(benchmark)
    known = np.unique(faces.template)
    pairs = ijb.read_pairs(benchmark, known) if "1:1" in args.protocol else None
    sides = _sides(benchmark, known) if "1:N" in args.protocol else None
    work = session.Session(args)
    counts = (len(faces.images), len(known), len(pairs.first) if pairs else None)
    official = ijb.OFFICIAL[benchmark.name]
    if any(a is not None and a != b for a, b in zip(counts, official, strict=True)):
        work.warn(
            f"{benchmark.name} has {official[0]} faces, {official[1]} templates and {official[2]} "
            f"pairs; this copy has {', '.join(str(x) for x in counts if x is not None)}: its "
            "numbers are not comparable with published ones"
        )
    detector = "not used"
    if args.detector:
        _, zero = templates.detector_weights(faces.score, faces.template)
        detector = pairs_command.detector_rule(work, benchmark.name, zero, "--no-detector")
    features = work.features(faces.images)
    if features is None:
        return None
    ids, pooled = ijb.pool(features.matrix(), faces, args.norm, args.detector)
    unit = templates.normalised(pooled)
    contract = work.contract(
        faces.images,
        flags=f"N{args.norm:d}D{args.detector:d}F{args.flip:d}",
        norm="kept: a weight" if args.norm else "each image feature L2-normalised, then weighed",
        detector=detector,
        template="sum over media of the mean over a medium's faces, float64, then L2-normalised",
        score="dot product, float64",
    )
    found = []
    if pairs is not None:
        found.append(_verify(work, benchmark, faces, pairs, ids, pooled, unit, contract))
        if features.flip and not work.adds_mirror():
            _, alone = ijb.pool(features.alone().matrix(), faces, args.norm, args.detector)
            found[-1].metrics["alone"] = results.alone_metrics(
                _curve(pairs, ids, templates.normalised(alone))
            )
    if sides is not None:
        found.append(_search(work, benchmark, sides, ids, unit, contract))
    for result in found:
        work.save(result)
    _show(work, found)
    return work.output({result.facts["protocol"]: result.metrics for result in found})


def _sides(benchmark: ijb.Benchmark, known: np.ndarray) -> dict[str, ijb.Subjects]:
    files = {x: f"1N_gallery_{x}.csv" for x in ijb.GALLERIES[benchmark.name]}
    files["probes"] = "1N_probe_mixed.csv"
    return {key: ijb.read_subjects(benchmark.meta(file), known) for key, file in files.items()}


def _verify(
    work: session.Session,
    benchmark: ijb.Benchmark,
    faces: ijb.TemplateFaces,
    pairs: ijb.TemplatePairs,
    ids: np.ndarray,
    pooled: np.ndarray,
    unit: np.ndarray,
    contract: dict[str, object],
) -> Result:
    first, second = _rows(pairs, ids)
    scores = templates.pair_scores(unit, first, second)
    points = roc.curve(scores, pairs.issame)
    norms = np.linalg.norm(pooled, axis=1)
    metrics = {
        "faces": len(faces.images),
        "templates": len(ids),
        "pairs": len(scores),
        **results.pair_metrics(points),
    }
    hard = results.hardest(scores, pairs.issame)
    # The face with the highest detector score represents its template.
    order = np.lexsort((-faces.score, faces.template))
    best = order[np.searchsorted(faces.template[order], ids)]
    arrays = results.pair_arrays(
        points, scores, pairs.issame, np.minimum(norms[first], norms[second])
    ) | {
        "hard_scores": scores[hard],
        "hard_same": pairs.issame[hard],
        **work.pictures(faces.images, best[np.stack([first[hard], second[hard]], axis=1)]),
    }
    return results.make(
        "ijb 1:1",
        benchmark.name,
        work.embedder.facts,
        contract | {"far_rules": results.RULES},
        metrics,
        arrays,
    )


def _rows(pairs: ijb.TemplatePairs, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ijb.rows_of(pairs.first, ids), ijb.rows_of(pairs.second, ids)


def _curve(pairs: ijb.TemplatePairs, ids: np.ndarray, unit: np.ndarray) -> roc.Curve:
    return roc.curve(templates.pair_scores(unit, *_rows(pairs, ids)), pairs.issame)


def _search(
    work: session.Session,
    benchmark: ijb.Benchmark,
    sides: dict[str, ijb.Subjects],
    ids: np.ndarray,
    unit: np.ndarray,
    contract: dict[str, object],
) -> Result:
    probes = sides["probes"]
    probe = unit[ijb.rows_of(probes.template, ids)]
    galleries = {key: side for key, side in sides.items() if key != "probes"}
    gallery = {key: unit[ijb.rows_of(side.template, ids)] for key, side in galleries.items()}
    result = identify_command.make_result(
        "ijb 1:N",
        benchmark.name,
        work,
        contract | {"tpir": identify_command.TPIR, "rank": identify_command.RANK},
        {
            key: identification.search(gallery[key], side.subject, probe, probes.subject)
            for key, side in galleries.items()
        },
    )
    if work.args.old_rule:
        joined = np.concatenate([side.subject for side in galleries.values()])
        old = identification.legacy(
            np.concatenate(list(gallery.values())), joined, probe, probes.subject
        )
        result.metrics["old_rule"] = identify_command.plain(old)
        result.facts["contract"]["old_rule"] = (
            "galleries joined; threshold: the ceil(x Q)-th largest of all scores of different "
            "subjects; recall: share of probes whose own score is above it. Not a FPIR."
        )
    return result


def _show(work: session.Session, found: list[Result]) -> None:
    from eval.report import tables

    for result in found:
        build = tables.far_table if result.facts["protocol"] == "ijb 1:1" else tables.search_table
        work.console.print(tables.as_rich(*build(result)))
