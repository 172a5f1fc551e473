"""`inspect`: what a data set is."""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools import shards
from data_tools.clean.contact_sheet import face, write_sheet
from data_tools.common.errors import UserError
from data_tools.common.messages import count, file_size
from data_tools.common.schema import check_number
from data_tools.images.decode import decode_any_size

_BAR = 40  # characters of the longest bar
_SHARDS_SHOWN = 4
_SHOWN = 100  # faces on the sheet
_FORMATS = {
    shards.FORMAT: "shards with index.json",
    "insightface-A": "layout A: header and identity records",
    "insightface-plain": "plain records: im2rec and others",
}

_KINDS = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}


def describe(path: Path, walk: bool = False) -> dict[str, Any]:
    """The facts of a data set directory; reads no image. walk: as of shards.open()."""
    data = shards.open(path, walk=walk, tolerant=True)
    sizes = np.bincount(data.labels, minlength=data.num_classes)  # [C] images of each class
    facts = {
        "path": str(path),
        "format": data.index["format"],
        "images": data.num_images,
        "classes": data.num_classes,
        "image_size": data.image_size,
        "images_per_class": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
        "histogram": _histogram(sizes),
        "shards": data.index["shards"],
        "bytes": sum(shard["bytes"] for shard in data.index["shards"]),
        "verification": [
            {"file": file.name, "bytes": file.stat().st_size} for file in data.bin_paths()
        ],
        "fingerprint": data.fingerprint,
    }
    if data.unlisted:
        facts["unlisted_records"] = data.unlisted
        facts["notes"] = [data.unlisted_note()]
    if data.damaged:
        facts["damaged_records"] = data.damaged
    if data.cleaned is not None:
        whole = shards.open(path, shards.NO_RELABEL)
        facts["cleaned"] = {
            "index": str(data.cleaned.place),
            "images_before": whole.num_images,
            "classes_before": whole.num_classes,
        }
    for key in ("source", "options", "skipped", "resized", "empty_identities", "held_out"):
        if key in data.index:
            facts[key] = data.index[key]
    return facts


def sampled(data: shards.Shards, number: int) -> list[int]:
    """Images spread evenly over the set (which is shuffled), at most `number`, ascending."""
    if number < 1:
        raise UserError(f"a sample of {number} images: must be 1 or more")
    return np.unique(np.linspace(0, len(data) - 1, min(number, len(data))).astype(int)).tolist()


def statistics(data: shards.Shards, images: list[int]) -> dict[str, Any]:
    """Percentiles 5, 50, 95 of bytes, width, brightness, contrast, sharpness; kinds; grey share.

    Brightness and contrast: mean and standard deviation of the grey image, 0..255. Sharpness: the
    variance of its Laplacian (low: blurred, or enlarged from less).
    """
    values: dict[str, list[float]] = {
        key: [] for key in ("bytes", "width", "brightness", "contrast", "sharpness")
    }
    kinds: dict[str, int] = {}
    grey = unreadable = 0
    for i in images:
        encoded = data[i][1]
        kind = _KINDS.get(encoded[:2], "other")
        kinds[kind] = kinds.get(kind, 0) + 1
        try:
            image = decode_any_size(encoded, data.where(i))
        except ValueError:
            unreadable += 1
            continue
        light = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        grey += bool((np.ptp(image, axis=2) == 0).all())
        own = (
            len(encoded),
            image.shape[1],
            light.mean(),
            light.std(),
            cv2.Laplacian(light, cv2.CV_64F).var(),
        )
        for row, value in zip(values.values(), own, strict=True):
            row.append(float(value))
    facts: dict[str, Any] = {"sampled": len(images), "unreadable": unreadable, "kinds": kinds}
    facts["grey_share"] = grey / max(1, len(images) - unreadable)
    for key, row in values.items():
        if row:
            percentiles = np.percentile(row, [5, 50, 95]).round(2).tolist()
            facts[key] = dict(zip(("p5", "p50", "p95"), percentiles, strict=True))
    return facts


def _histogram(sizes: np.ndarray) -> list[dict[str, int]]:
    """Classes by size, in steps that double: 0, 1, 2, 3-4, 5-8, 9-16 ..."""
    steps = np.ceil(np.log2(np.maximum(sizes, 1))).astype(int) + (sizes > 0)
    return [
        {
            "from": 0 if step == 0 else 1 if step == 1 else 2 ** (step - 2) + 1,
            "to": 0 if step == 0 else 2 ** (step - 1),
            "classes": classes,
        }
        for step, classes in enumerate(np.bincount(steps).tolist())
        if classes
    ]


def _print(facts: dict[str, Any]) -> None:
    size = "x".join(map(str, facts["image_size"])) if facts["image_size"] else "not stated"
    per_class = facts["images_per_class"]
    print(f"{facts['path']}")
    print(f"  format       {facts['format']} ({_FORMATS[facts['format']]})")
    print(f"  images       {facts['images']}")
    print(f"  classes      {facts['classes']}")
    print(f"  image size   {size}")
    print(f"  fingerprint  {facts['fingerprint']}")
    for note in facts.get("notes", ()):
        print(f"  warning      {note}")
    if damaged := facts.get("damaged_records"):
        print(f"  warning      {count(len(damaged), 'record')} cannot be read, first {damaged[0]}")
    if "cleaned" in facts:
        before = facts["cleaned"]
        print(
            f"  cleaned      {before['index']}: before, {before['images_before']} images and "
            f"{before['classes_before']} classes"
        )
    if "source" in facts:
        print(f"  packed from  {facts['source']['path']} ({facts['source']['kind']})")
        print(f"  options      {', '.join(f'{k}={v}' for k, v in facts['options'].items())}")
        print(
            f"  left out     {facts['skipped']['count']} skipped, "
            f"{count(len(facts['empty_identities']), 'identity', 'identities')} without an image, "
            f"{facts.get('held_out', {}).get('identities', 0)} held out"
        )
    print(
        f"  per class    {per_class['min']} to {count(per_class['max'], 'image')}, "
        f"median {per_class['median']:g}"
    )
    most = max(row["classes"] for row in facts["histogram"])
    for row in facts["histogram"]:
        span = f"{row['from']}" if row["from"] == row["to"] else f"{row['from']}-{row['to']}"
        bar = "#" * max(1, round(_BAR * row["classes"] / most))
        print(f"    {span:>15} {bar} {row['classes']}")
    print(f"  shards       {len(facts['shards'])}, {file_size(facts['bytes'])}")
    for shard in facts["shards"][:_SHARDS_SHOWN]:
        print(
            f"    {shard['name']}  {count(shard['images'], 'image')}, {file_size(shard['bytes'])}"
        )
    if len(facts["shards"]) > _SHARDS_SHOWN:
        print(f"    ... and {len(facts['shards']) - _SHARDS_SHOWN} more")
    for file in facts["verification"]:
        print(f"  pairs        {file['file']}, {file_size(file['bytes'])}")


def _print_quality(quality: dict[str, Any]) -> None:
    print(f"  of {count(quality['sampled'], 'image')}, {quality['unreadable']} unreadable")
    for name in ("bytes", "width", "brightness", "contrast", "sharpness"):
        if name in quality:
            row = quality[name]
            print(f"    {name:<12} 5 % {row['p5']:g}, median {row['p50']:g}, 95 % {row['p95']:g}")
    print(f"    {'grey':<12} {100 * quality['grey_share']:.1f} %, kinds {quality['kinds']}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory, or an InsightFace one")
    parser.add_argument(
        "--quality", type=int, default=0, metavar="N", help="decode N images, spread evenly"
    )
    parser.add_argument(
        "--walk", action="store_true", help="read an InsightFace .rec without its .idx"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="show 100 of them")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_number("--quality", args.quality, 0)
    facts = describe(args.path, args.walk)
    _print(facts)
    data = shards.open(args.path, walk=args.walk, tolerant=True)
    if args.quality:
        facts["quality"] = statistics(data, sampled(data, args.quality))
        _print_quality(facts["quality"])
    if args.sheet:
        chosen = sampled(data, _SHOWN)
        titles = [f"{i} {data.identities[data.labels[i]]}" for i in chosen]
        write_sheet(args.sheet, [face(data, i) for i in chosen], titles)
    return facts
