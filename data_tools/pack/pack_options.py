"""What `pack` is asked for: where the images come from, and what is done with them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.pack.alignment import Aligner
from data_tools.pack.conversion import Conversion
from data_tools.pack.detectors import detector_sha256
from data_tools.pack.pairs import check_num_pairs
from data_tools.pack.split import Choice
from data_tools.sources.source import JOINS, JoinedSource, Source, open_source

HELD_OUT = "heldout"
SPLIT = "split"  # the second set, a directory in the first
MAX_SIZE = 1024  # pixels: a slip of the finger beyond it would run for hours and fill the disk


@dataclass(frozen=True, slots=True)
class Options:
    """What the bytes of the shards depend on, besides the source."""

    shards: int | None = None  # None: as many as fit the images, see packing.plan()
    seed: int = 0
    size: int = 112  # pixels
    quality: int = 95  # of images that have to be encoded again
    hold_out: int = 0  # identities
    pairs: int = 3000  # of the held-out identities, at most; nothing without them
    split: str = ""  # "images=SHARE" or "identities=SHARE": set aside as a second set
    min_images: int = 1  # of an identity
    max_images: int = 0  # of an identity; 0: all
    pass_through: bool = False
    exif: str = ""  # "ignore" | "follow"; default: ignored, followed when aligning
    align: bool = False
    landmarks: Path | None = None
    detector: Path | None = None
    resize: bool = False  # the faces are aligned at another size

    def __post_init__(self) -> None:
        lowest = {
            "shards": 1, "seed": 0, "size": 1, "quality": 1, "hold_out": 0, "pairs": 0,
            "min_images": 1, "max_images": 0,
        }  # fmt: skip
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {low} or more")
        if self.size > MAX_SIZE:
            raise UserError(f"--size {self.size}: must be {MAX_SIZE} or less")
        if self.quality > 100:
            raise UserError(f"--quality {self.quality}: a JPEG's quality is at most 100")
        if self.hold_out:
            check_num_pairs(self.pairs)
        if self.landmarks and files.is_dir(self.landmarks):
            raise UserError(
                f"--landmarks {self.landmarks} is a directory: pack takes one file with a line for "
                "each image, path [score] x1 y1 .. x5 y5"
            )
        if (self.landmarks or self.detector) and not self.align:
            raise UserError("--landmarks and --detector are of --align: say that too")
        if self.align and self.pass_through:
            raise UserError("--align makes new images: it cannot --pass-through old ones")
        if self.align and self.resize:
            raise UserError("--align warps every face to --size: --resize is for aligned faces")
        self.choice().share()

    def choice(self) -> Choice:
        return Choice(self.seed, self.hold_out, self.split, self.min_images, self.max_images)

    def conversion(self) -> Conversion:
        aligner = None
        if self.align:
            aligner = Aligner(self.size, str(self.detector) if self.detector else None)
        exif = self.exif or ("follow" if self.align else "ignore")
        return Conversion(self.size, self.quality, self.pass_through, exif, aligner, self.resize)

    def recorded(self) -> dict[str, Any]:
        """As index.json keeps them: what was left at its default is not there."""
        recorded = dataclasses.asdict(self)
        optional = {field.name: field.default for field in dataclasses.fields(self)[6:]}
        for name, default in optional.items():
            if recorded[name] == default:
                del recorded[name]
        if not self.hold_out:
            del recorded["pairs"]
        if self.landmarks:
            recorded["landmarks"] = files.sha256(self.landmarks)
        if self.detector:
            recorded["detector"] = detector_sha256(str(self.detector))
        return recorded


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the images come from."""

    paths: Sequence[Path]
    join: str = "offset"  # or "name"
    nested: bool = False
    root: Path | None = None
    relabel: Path | None = None
    level: int = 0  # folders: the first `level` parts of a path name the identity
    walk: bool = False

    def open(self) -> Source:
        if self.join not in JOINS:
            raise UserError(f"--join {self.join}: must be one of {', '.join(JOINS)}")
        if self.relabel and len(self.paths) > 1:
            raise UserError("--relabel is of one set: pack the others by themselves")
        if self.level < 0:
            raise UserError(f"--identity-level {self.level}: must be 1 or more")
        if self.level and self.nested:
            raise UserError(
                "--nested and --identity-level N each say what an identity is: take one"
            )
        opened = [
            open_source(path, self.nested, self.root, self.relabel, self.level, self.walk)
            for path in self.paths
        ]
        return opened[0] if len(opened) == 1 else JoinedSource(opened, self.join)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))
