"""The plan of an inversion from a command line: the network, the targets, their batches.

Letters: n targets to invert, out of N; D embedding size, C classes.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import files, schema
from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.distributed.runtime import Runtime
from recognition.inversion import work
from recognition.inversion.faces import (
    Faces,
    finite,
    images_of_each,
    load_embeddings,
    open_faces,
)
from recognition.inversion.identity import ClosedSet, Identity, OpenSet, centres, head_facts
from recognition.inversion.settings import Request, Settings
from recognition.weights.networks import TorchEmbedder, open_embedder

# Seconds that a process waits for the others, which may have one batch more.
TIMEOUT = 7 * 24 * 3600.0


@dataclass
class InversionPlan:
    """What to invert and what to compare with; every process makes the same plan."""

    embedder: TorchEmbedder
    identity: Callable[[Runtime], Identity]
    ids: np.ndarray  # int64 [n] classes, or rows of `targets`
    batches: list[np.ndarray]
    gallery: Callable[[], Iterator[np.ndarray]]  # blocks of [N, (K,) D]; an id is a row's number
    settings: Settings
    facts: dict[str, Any]  # settings.json
    faces: Faces | None = None  # real ones to compare with
    numbers: np.ndarray | None = None  # int64 [N] the image of each target; None: closed set
    labels: np.ndarray | None = None  # int64 [N] of the targets; None: closed set

    @property
    def names(self) -> dict[int, str]:
        """The name of each id's PNG file: its class, row of a file of embeddings, or image."""
        numbers = self.ids if self.numbers is None else self.numbers[self.ids]
        return {int(i): f"{n:08d}" for i, n in zip(self.ids, numbers, strict=True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both commands take."""
    schema.add_flags(parser, Request)
    schema.add_flags(parser.add_argument_group("settings"), Settings)


def check_networks(args: argparse.Namespace) -> None:
    """Check --other and --fid now, because they are used only after hours of work.

    Raises: ValueError, OSError: one of them is not a network.
    """
    for flag, paths in (("--other", args.other), ("--fid", [args.fid] if args.fid else [])):
        for path in paths:
            try:
                embedder = open_embedder(path)
                finite(embedder(np.zeros((1, 112, 112, 3), np.uint8)), "of {}", [path])
            except (ValueError, OSError) as error:
                raise UserError(f"{flag} {path}: {error}") from error


def network_of(run: str) -> TorchEmbedder:
    """The network to invert, frozen. Raises: ValueError if it cannot be differentiated."""
    embedder = open_embedder(run)
    if not isinstance(embedder, TorchEmbedder):
        raise UserError(f"{run}: an ONNX file gives no gradients; a run or a backbone file does")
    if embedder.contract.color_order != "RGB" or embedder.contract[3:] != (127.5, 127.5):
        raise UserError(f"{run}: only networks of RGB, (pixel - 127.5) / 127.5 can be inverted")
    embedder.module.requires_grad_(False)
    return embedder


def closed_set(args: argparse.Namespace, settings: Settings) -> InversionPlan:
    """Classes of the trained head.

    Raises:
        ValueError: no head, an unknown class, or data with other labels.
    """
    embedder = network_of(args.run)
    if not files.is_dir(Path(args.run)):
        raise UserError(f"{args.run} has no head: invert embeddings (--embeddings, --images)")
    head = head_facts(args.run, args.head)
    ids = choose(args.ids, args.count, np.arange(head["num_classes"]), settings.seed, "class")
    return InversionPlan(
        embedder,
        lambda here: ClosedSet(args.run, here.group, here.device, args.head),
        ids,
        work.batches(ids, settings.batch_size),
        lambda: centres(args.run, args.head),
        settings,
        _facts("closed set", embedder, ids, settings) | {"head": args.head},
        _reference(args.data, args.run, args.head, head["num_classes"], args.resize),
    )


def open_set(
    args: argparse.Namespace,
    settings: Settings,
    images: str | None,
) -> InversionPlan:
    """Embeddings of a file, or of images; one of each identity.

    images: shards, a .bin or a folder. With --embeddings, row i belongs to image i.

    Raises:
        ValueError: nothing to invert, or the embeddings and images do not match.
    """
    embedder = network_of(args.run)
    size = int(embedder(np.zeros((1, 112, 112, 3), np.uint8)).shape[1])
    faces = open_faces(images, args.resize) if images else None
    if args.embeddings:
        targets, labels = load_embeddings(args.embeddings, size)
        numbers = np.arange(len(targets))
        if faces is not None and len(faces) != len(targets):
            raise UserError(
                f"{args.embeddings} holds {len(targets)} embeddings, {images} {len(faces)} images: "
                "give one image for each embedding; row i belongs to image i"
            )
        known = images_of_each(labels if faces is None else faces.labels, 1)
    elif faces is not None:
        numbers = faces.of_each(1)
        known = np.arange(len(numbers))
    else:
        raise UserError("nothing to invert: give --embeddings FILE or images")
    if not len(known):
        raise UserError(f"{args.embeddings or images} has no labelled person to invert")
    ids = choose(args.ids, args.count, known, settings.seed, "row")
    if not args.embeddings:
        assert faces is not None
        numbers, ids = numbers[ids], np.arange(len(ids))
        labels, targets = faces.labels[numbers], faces.embed(embedder, numbers)
    digest = zlib.crc32(np.ascontiguousarray(targets).view(np.uint8).data)
    return InversionPlan(
        embedder,
        lambda here: OpenSet(targets, settings.feature, here.device),
        ids,
        work.batches(ids, settings.batch_size),
        lambda: iter([targets]),
        settings,
        _facts("open set", embedder, ids, settings) | {"targets_crc32": digest},
        faces,
        numbers,
        labels,
    )


def choose(
    text: str | None, count: int, known: np.ndarray, seed: int, what: str
) -> np.ndarray:  # int64 [n]
    """The ids that `text` lists, or `count` of `known` drawn by the seed, in the order of `known`.

    Raises:
        ValueError: not a list of ranges, an unknown id, or a repeated one.
    """
    if text is None:
        if count >= len(known):
            return known
        return known[np.sort(np.random.default_rng(seed).choice(len(known), count, replace=False))]
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--ids {text}: {part!r} is neither a number nor a range such as 0-9")
        if int(last) > int(known.max()):
            raise UserError(f"--ids {text}: no {what} {last}: the last is {known.max()}")
        ids.extend(range(int(first), int(last) + 1))
    if len(set(ids)) < len(ids):
        raise UserError(f"--ids {text}: an id appears twice; a batch holds different identities")
    if absent := sorted(set(ids) - set(known.tolist())):
        raise UserError(f"--ids {text}: no {what} {absent[0]}")
    return np.array(ids, dtype=np.int64)


def _facts(
    kind: str, embedder: TorchEmbedder, ids: np.ndarray, settings: Settings
) -> dict[str, Any]:
    return {
        "kind": kind,
        "network": {key: embedder.facts.get(key) for key in ("path", "network", "step", "sha256")},
        "ids_crc32": zlib.crc32(np.ascontiguousarray(ids, dtype=np.int64).data),
        "ids": ids.tolist() if len(ids) <= 1024 else len(ids),
        "settings": {**settings.__dict__},
    }


def _reference(
    data: str | None, run: str, number: int, num_classes: int, resize: bool = False
) -> Faces | None:
    """The images that the head was trained on, from --data or else from where its run says; None
    if the latter are no longer there."""
    config = checkpoint.read_manifest(checkpoint.find(run))["config"]
    known = None if config.get("rec_heads") else config.get("labels_crc32")

    def misfit(faces: Faces) -> str:
        if int(faces.labels.max(initial=-1)) >= num_classes:
            return f"has the label {faces.labels.max()}, the head {num_classes} classes"
        labels = zlib.crc32(np.ascontiguousarray(faces.labels).data)
        return "" if known in (None, labels) else f"its labels are not those of the data of {run}"

    if data is not None:
        faces = open_faces(data, resize)
        if why := misfit(faces):
            raise UserError(f"--data {data}: {why}: give the data that it was trained on")
        return faces
    recs = [config["rec"]] if isinstance(config["rec"], str) else config["rec"]
    if len(recs) > 1 and not config.get("rec_heads"):
        return None  # joined sets: only --data can name the directory where they are packed as one
    try:
        faces = open_faces(recs[number], resize or bool(config.get("resize")))
    except (OSError, ValueError, IndexError):
        return None
    return None if misfit(faces) else faces
