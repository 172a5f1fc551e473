"""`verify`: is every record of a data set what it should be? Names each one that is not."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools import insightface, shards
from data_tools.common import cli, files
from data_tools.common.errors import UserError
from data_tools.common.files import is_file
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, Tasks, run_tasks
from data_tools.images.decode import decode
from data_tools.recordio import Header, RecordFile, read_idx, unpack_record

_BLOCK = 1 << 16  # records of an InsightFace .rec that make a task


class Finding(NamedTuple):
    """Something bad; key and byte are None where it concerns the whole file."""

    file: str
    key: int | None
    byte: int | None
    problem: str


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """m consecutive records to check, in file order."""

    file: RecordFile
    keys: np.ndarray  # int64 [m]
    offsets: np.ndarray  # int64 [m]
    end: int  # byte where the record after the last one starts
    labels: np.ndarray | None  # int64 [m] that the records should have; None: any class
    num_classes: int | None
    has_header: bool  # InsightFace's layout A: records without pixels are no fault
    size: int | None  # decode each image to this size; None: leave them encoded


def check_block(block: BlockCheck, advance: Advance) -> list[Finding]:
    findings = []
    ends = np.append(block.offsets[1:], block.end).tolist()
    for i, (key, offset) in enumerate(
        zip(block.keys.tolist(), block.offsets.tolist(), strict=True)
    ):
        where = block.file.where(offset)
        try:
            record, end = block.file.read(offset)
            header, image = unpack_record(record, where)
            _check_record(block, i, header, image, where)
            if end != ends[i]:
                problem = f"ends at byte {end}, but the next record starts at {ends[i]}"
                if end < ends[i] and block.labels is None:  # an .idx that others wrote
                    problem += ": the .idx lists nothing between the two, and --walk of pack and "
                    problem += "inspect reads the .rec without it"
                raise UserError(problem)
        except ValueError as error:
            problem = str(error).removeprefix(f"{where}: ")
            findings.append(Finding(block.file.path.name, key, offset, problem))
        advance(1)
    return findings


def _check_record(block: BlockCheck, i: int, header: Header, image: bytes, where: str) -> None:
    if block.has_header and header.flag == 2 and not image:
        return
    if block.labels is None:
        insightface.class_label(header, block.num_classes, where)
    else:
        fault = shards.record_fault(header, int(block.keys[i]), int(block.labels[i]))
        if fault:
            raise UserError(fault)
    if block.size is not None:
        decode(image, block.size, where, resize=True)


def verify_packed(path: Path, deep: bool, workers: int) -> tuple[int, list[Finding]]:
    """Number of images, and all that contradicts index.json."""
    index = shards.read_index(path)
    findings = _check_listed_files(path, index)
    columns = {}
    for name in ("labels", "offsets"):
        try:
            columns[name] = shards.load_column(path / index[name]["file"], index["images"])
        except (FileNotFoundError, ValueError) as error:
            findings.append(Finding(index[name]["file"], None, None, str(error)))
    if "labels" in columns:
        findings += _check_classes(path, index, columns["labels"])

    def blocks() -> Iterator[BlockCheck]:  # one at a time: each holds a file open
        start = 0
        for shard in index["shards"]:
            stop = start + shard["images"]
            own = {name: column[start:stop] for name, column in columns.items()}
            start = stop
            try:
                block = _packed_block(path, index, shard, own, deep, findings)
            except (FileNotFoundError, ValueError) as error:
                findings.append(Finding(shard["name"], None, None, str(error)))
                block = None
            if block is not None:
                yield block

    found = _check_blocks(Tasks(len(index["shards"]), blocks()), index["images"], workers)
    return index["images"], findings + found


def _check_listed_files(path: Path, index: dict[str, Any]) -> list[Finding]:
    listed = [index[key] for key in ("labels", "offsets", "identities")]
    listed += index["verification"]
    for shard in index["shards"]:
        for suffix, sha256 in shard["sha256"].items():
            listed.append({"file": f"{shard['name']}.{suffix}", "sha256": sha256})
    findings = []
    for entry in listed:
        if not files.is_file(path / entry["file"]):
            findings.append(Finding(entry["file"], None, None, "missing"))
            continue
        sha256 = files.sha256(path / entry["file"])
        if sha256 != entry["sha256"]:
            problem = f"its sha256 is {sha256}, but {shards.INDEX} says {entry['sha256']}"
            findings.append(Finding(entry["file"], None, None, problem))
    return findings


def _packed_block(
    path: Path,
    index: dict[str, Any],
    shard: dict[str, Any],
    columns: dict[str, np.ndarray],
    deep: bool,
    findings: list[Finding],
) -> BlockCheck:
    name = shard["name"]
    file = RecordFile(path / f"{name}.rec")
    keys, offsets = read_idx(path / f"{name}.idx")
    images = shard["images"]
    if not np.array_equal(keys, np.arange(images)):
        findings.append(Finding(f"{name}.idx", None, None, f"its keys are not 0 .. {images - 1}"))
    if "offsets" in columns:
        if len(offsets) == images and len(differ := np.flatnonzero(offsets != columns["offsets"])):
            problem = f"{count(len(differ), 'offset')} not as in offsets.npy"
            findings.append(Finding(f"{name}.idx", int(differ[0]), None, problem))
        offsets = columns["offsets"]
    labels = columns.get("labels")
    if len(offsets) != images:
        raise UserError(
            f"{name}.idx has {count(len(offsets), 'line')}, {shards.INDEX} says {images}"
        )
    size = index["image_size"][0] if deep else None
    return BlockCheck(
        file, np.arange(images), offsets, file.size, labels, index["classes"], False, size
    )


def _check_classes(path: Path, index: dict[str, Any], labels: np.ndarray) -> list[Finding]:
    findings = []
    classes = index["classes"]
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    name = index["labels"]["file"]
    if len(outside):
        i = int(outside[0])
        problem = (
            f"{count(len(outside), 'label')} outside [0, {classes}), the first is {labels[i]}, of "
            f"image {i}"
        )
        findings.append(Finding(name, None, None, problem))
    else:
        sizes, counts = np.unique(np.bincount(labels, minlength=classes), return_counts=True)
        if index["class_sizes"] != dict(zip(map(str, sizes), counts.tolist(), strict=True)):
            problem = f"the class sizes are not those in {shards.INDEX}"
            findings.append(Finding(name, None, None, problem))
    names = path / index["identities"]["file"]
    if files.is_file(names) and (lines := files.read_bytes(names).count(b"\n")) != classes:
        problem = f"{count(lines, 'name')} for {count(classes, 'class', 'classes')}"
        findings.append(Finding(names.name, None, None, problem))
    return findings


def verify_insightface(
    path: Path, rec: Path, deep: bool, workers: int
) -> tuple[int, list[Finding]]:
    """Number of records, and all that is wrong with them."""
    findings = []
    try:
        insightface.open_directory(path, rec)
    except ValueError as error:
        findings.append(Finding(rec.name, None, None, str(error)))
    file = RecordFile(rec)
    idx = rec.with_suffix(".idx")
    keys, offsets = read_idx(idx) if files.exists(idx) else _scan(file)
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    stated = insightface.read_property(path / "property")
    ends = [] if files.exists(idx) or not len(keys) else [0, -1]  # where a walked file may have it
    header_at = np.append(offsets[keys == 0], offsets[ends])
    has_header = _has_header(file, header_at)
    blocks = []
    for start in range(0, len(keys), _BLOCK):
        stop = min(start + _BLOCK, len(keys))
        end = int(offsets[stop]) if stop < len(keys) else file.size
        blocks.append(
            BlockCheck(
                file,
                keys[start:stop],
                offsets[start:stop],
                end,
                None,
                stated[0] if stated else None,
                has_header,
                (stated[1] if stated else 112) if deep else None,
            )
        )
    return len(keys), findings + _check_blocks(blocks, len(keys), workers)


def _scan(file: RecordFile) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets of all records; checking those that cannot be read will name their fault."""
    damaged: list[int] = []
    offsets = sorted([*file.scan(damaged=damaged), *damaged])
    return np.arange(len(offsets)), np.array(offsets, np.int64)


def _has_header(file: RecordFile, offsets: np.ndarray) -> bool:
    """Whether a header of layout A stands at one of these places."""
    for offset in offsets.tolist():
        try:
            header, image = file.read_image(offset)
        except ValueError:
            return True  # damaged: its own check names the fault
        if header.flag == 2 and not image:
            return True
    return False


def _check_blocks(blocks: Iterable[BlockCheck], total: int, workers: int) -> list[Finding]:
    results = run_tasks(check_block, blocks, workers, total, "records")
    return [finding for findings in results for finding in findings]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, help="a data set directory, an InsightFace one or a .rec"
    )
    parser.add_argument("--deep", action="store_true", help="decode every image as well")
    cli.add_workers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if files.is_file(args.path / shards.INDEX):
        records, findings = verify_packed(args.path, args.deep, args.workers)
    elif args.path.suffix == ".rec" and is_file(args.path):
        records, findings = verify_insightface(args.path.parent, args.path, args.deep, args.workers)
    elif rec := insightface.find_rec(args.path):
        records, findings = verify_insightface(args.path, rec, args.deep, args.workers)
    else:
        insightface.check_directory(args.path)
        raise FileNotFoundError(f"{args.path}: neither {shards.INDEX} nor train.rec: no data set")
    for finding in findings:
        key = "" if finding.key is None else f" key {finding.key}"
        byte = "" if finding.byte is None else f" byte {finding.byte}"
        print(f"bad: {finding.file}{key}{byte}: {finding.problem}")
    print(f"{args.path}: {count(records, 'record')}, {count(len(findings), 'fault')}")
    return {
        "ok": not findings,
        "path": str(args.path),
        "records": records,
        "deep": args.deep,
        "bad": [finding._asdict() for finding in findings],
    }
