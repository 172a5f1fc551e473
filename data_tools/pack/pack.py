"""Images -> shards. The same source and options give the same bytes, at any number of workers.

pack_command.py lists the steps in order.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.images.image_table import Names
from data_tools.images.landmarks import LandmarkFile
from data_tools.pack import several_machines
from data_tools.pack.pack_job import Packing, num_split_shards, plan, shard_names
from data_tools.pack.pack_options import HELD_OUT, SPLIT, PackOptions, Sources
from data_tools.pack.several_machines import Part
from data_tools.pack.split import SplitParts
from data_tools.shard_writer import ShardWriter, tidy
from data_tools.sources.folders import same_person_text
from data_tools.sources.lst import ListSource
from data_tools.sources.source import Source

_SHOWN = 3  # images in a message


def pack(
    paths: Path | Sources,
    out: Path,
    options: PackOptions,
    workers: int = 1,
    overwrite: bool = False,
    part: Part | None = None,
    finish: bool = False,
) -> dict[str, Any]:
    """Pack a source into the data set directory `out` and describe it.

    An `out` packed before from the same, unchanged source with the same options is left as it is
    (`status` is then "reused"); one whose pack was killed is continued ("resumed").

    part: write the shards of this part of several into OUT.partial alone ("part"). finish: join the
    parts that are finished, and write no shard.

    Raises: ValueError, FileNotFoundError for a source that cannot be packed; FileExistsError if
    `out` holds something else; OSError if a disk is full or fails. `out` is then as it was.
    """
    started = time.monotonic()
    if (part or finish) and options.shards is None:
        raise UserError("--part and --finish need --shards S, the same for all parts")
    asked = paths if isinstance(paths, Sources) else Sources([paths])
    for path in asked.paths:
        _check_apart(path, out)
    source = asked.open()
    if asked.nested and (text := same_person_text(source.identities)):
        print(f"warning: {text}", file=sys.stderr)
    options, parts = plan(source, options)
    recorded = options.recorded()
    if part is None and not overwrite and _is_packed(source, out, recorded):
        tidy(out)
        return _summary(out, shards.read_index(out), "reused", time.monotonic() - started)
    if options.hold_out and any(path.stem == HELD_OUT for path in source.bins):
        raise UserError(f"{asked} already holds {HELD_OUT}.bin: pack without --hold-out")
    points, unused = _points(source, options, parts)
    assert options.shards is not None
    num_shards = options.shards + num_split_shards(options, parts)
    todo = {**_describe(source), **recorded}
    if part is not None:
        if part.of > num_shards:
            raise UserError(
                f"--part {part}: {count(num_shards, 'shard')} cannot fill {part.of} parts: ask for "
                f"more --shards"
            )
        with several_machines.writing(out, part, todo) as (partial, journal):
            packing = Packing(source, points, options, parts, partial, journal, workers)
            packing.run_part(part)
        return _part_summary(part, partial, packing, time.monotonic() - started)
    if finish:
        several_machines.check_begun(out, todo, shard_names(options, parts))
    with ShardWriter(out, overwrite, todo, num_shards) as writer:
        packing = Packing(
            source, points, options, parts, writer.partial, writer.journal, workers, finish
        )
        about = packing.run()
        about["source"] = {"path": str(_where(asked)), **_describe(source)}
        about["options"] = recorded
        if unused:
            about["landmarks_unused"] = unused
        names = [source.identities[k] for k in packing.trained]
        several_machines.forget(writer.partial)
        index = writer.finish(packing.written, names, (options.size, options.size), about)
    status = "packed" if finish or not packing.reused else "resumed"
    return _summary(out, index, status, time.monotonic() - started)


def _part_summary(part: Part, partial: Path, packing: Packing, seconds: float) -> dict[str, Any]:
    return {
        "status": "part",
        "part": str(part),
        "path": str(partial),
        "images": packing.readable,
        "shards": len(packing.written),
        "reused": packing.reused,
        "bytes": sum(shard.entry["bytes"] for shard in packing.written),
        "skipped": len(packing.skipped) - len(packing.source.skipped),
        "seconds": round(seconds, 3),
    }


def _points(
    source: Source, options: PackOptions, parts: SplitParts
) -> tuple[np.ndarray | None, int]:
    """Landmarks float32 [N, 5, 2] to align by, NaN where unknown; lines of the file without use.

    Raises: UserError if images that are to be packed have none, unless that is asked for.
    """
    unaligned = isinstance(source, ListSource) and bool(source.unaligned.any())
    if not options.align:
        if unaligned and isinstance(source, ListSource):
            raise UserError(
                f"{source.path}: {int(source.unaligned.sum())} of its images are not aligned yet "
                f"(0 in the first column): use --align"
            )
        return None, 0
    if options.landmarks:
        names = Names.of(source.name(i) for i in range(len(source)))
        points, unused = LandmarkFile(options.landmarks).points_of(names)
        if np.isnan(points).all():
            raise UserError(
                f"--landmarks {options.landmarks}: names no image of {source.path}, whose first is "
                f"{os.fsdecode(source.name(0))!r}"
            )
        _check_missing(source, points, options, parts, f"--landmarks {options.landmarks}")
        return points, unused
    if isinstance(source, ListSource) and source.landmarks is not None:
        own = np.ascontiguousarray(source.landmarks.reshape(-1, 2, 5).transpose(0, 2, 1))
        _check_missing(source, own, options, parts, str(source.path))
        return own, 0
    if not options.detector:
        raise UserError("--align needs five points: give --landmarks FILE or --detector FILE.onnx")
    return None, 0


def _check_missing(
    source: Source, points: np.ndarray, options: PackOptions, parts: SplitParts, file: str
) -> None:
    """Raises: UserError if images of `parts` have no points and nothing else finds them."""
    if options.detector or options.skip_missing_landmarks:
        return
    packed = np.isin(source.labels, parts.held)
    packed[parts.images] = packed[parts.aside_images] = True
    missing = np.flatnonzero(packed & np.isnan(points).any((1, 2)))
    if len(missing):
        first = ", ".join(repr(source.where(i)) for i in missing[:_SHOWN].tolist())
        raise UserError(
            f"{file}: no landmarks of {len(missing)} of {count(int(packed.sum()), 'image')} to "
            f"pack, {'the first ' if len(missing) > _SHOWN else ''}{first}: add their lines, find "
            f"their points by --detector FILE.onnx, or leave these images out by "
            f"--skip-missing-landmarks"
        )


def _where(asked: Sources) -> str:
    return ", ".join(str(path.resolve()) for path in asked.paths)


def _check_apart(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f"{source} and {out} contain one another: keep source and output apart")


def _is_packed(source: Source, out: Path, recorded: dict[str, Any]) -> bool:
    """Whether `out` is this source packed with these options.

    Raises: FileExistsError saying in what it differs; ValueError if it is damaged.
    """
    if not files.is_file(out / shards.INDEX):
        return False
    index = shards.read_index(out)
    was = {**index["source"], **index["options"]}
    now = {**_describe(source), **recorded}
    changed = [
        f"{key} {was.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | was.keys() - {"path"})
        if was.get(key) != now.get(key)
    ]
    if changed:
        raise FileExistsError(
            f"{out} was packed from another source or with other options ({', '.join(changed)}); "
            f"--overwrite replaces it"
        )
    shards.open(out)  # whole, as far as a look can tell
    return True


def _describe(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "images": len(source),
        "identities": len(source.identities),
        "sha256": source.sha256,
    }


def _summary(out: Path, index: dict[str, Any], status: str, seconds: float) -> dict[str, Any]:
    held_out = index.get("held_out", {})
    optional = {
        **{key: index["skipped"].get(key) for key in ("without_face", "other_size")},
        **{key: index.get(key) for key in ("several_faces", SPLIT, "landmarks_unused", "notes")},
    }
    return {
        "status": status,
        "path": str(out),
        "images": index["images"],
        "classes": index["classes"],
        "shards": len(index["shards"]),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
        "skipped": index["skipped"]["count"],
        "empty_identities": len(index["empty_identities"]),
        "resized": index["resized"],
        "held_out_identities": held_out.get("identities", 0),
        "pairs_asked": held_out.get("pairs_asked", 0),
        "pairs_made": held_out.get("pairs", 0),
        "verification": [entry["file"] for entry in index["verification"]],
        "left_out": index.get("left_out", {}),
        "ignored_files": index.get("ignored_files", 0),
        "too_few_images": index.get("too_few_images", {}).get("identities", 0),
        "beyond_max_images": index.get("beyond_max_images", 0),
        **{key: value for key, value in optional.items() if value is not None},
        "seconds": round(seconds, 3),
    }
