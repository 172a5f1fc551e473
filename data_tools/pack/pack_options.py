"""What `pack` is asked for: where the images come from, and what is done with them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.schema import check, default_of, option
from data_tools.pack.alignment import Aligner
from data_tools.pack.conversion import Conversion
from data_tools.pack.detectors import detector_sha256
from data_tools.pack.pairs import MAX_SIZE, check_num_pairs
from data_tools.pack.split import HoldOut
from data_tools.sources.labels import Fields
from data_tools.sources.source import Join, JoinedSource, Source, open_source

HELD_OUT = "heldout"
SPLIT = "split"  # the second set, a directory in the first


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What the bytes of the shards depend on, besides the source."""

    shards: int | None = option(
        None,
        "files to cut the images into",
        note="default: one for each 1000 images, 1 to 8",
        low=1,
    )
    seed: int = option(0, "seed of every random draw", low=0)
    size: int = option(112, "side of the images", low=1, high=MAX_SIZE, unit="pixels")
    quality: int = option(
        95,
        "JPEG quality of images that are encoded again; a JPEG of the right size is kept as it is",
        low=1,
    )
    hold_out: int = option(
        0,
        f"leave N identities out of training and make {HELD_OUT}.bin of them",
        low=0,
        metavar="N",
    )
    pairs: int = option(
        3000,
        "verification pairs of the identities held out, a multiple of 20; fewer where these people "
        "do not have so many",
        low=0,
    )
    split: str = option(
        "",
        "set images=SHARE of each identity, or identities=SHARE, aside as the set OUT/split",
        metavar="WHAT=SHARE",
    )
    min_images: int = option(1, "leave out identities with fewer", low=1, metavar="N")
    max_images: int = option(
        0, "keep N drawn images of each identity", note="0: all", low=0, metavar="N"
    )
    pass_through: bool = option(
        False,
        "keep the bytes of every image and do not decode it: damaged pixels show only in "
        "`verify --deep`",
    )
    exif: Literal["ignore", "follow"] | None = option(
        None,
        "what becomes of an orientation that an image states",
        note="default: ignored, but followed with --align",
    )
    align: bool = option(
        False,
        "warp each face to the template by five points: of --landmarks, of the .lst, or found",
    )
    landmarks: Path | None = option(None, "lines: path [score] x1 y1 .. x5 y5", metavar="FILE")
    detector: Path | None = option(
        None, "an ONNX file of YuNet or SCRFD that finds the five points", metavar="FILE"
    )
    skip_missing_landmarks: bool = option(
        False, "skip and count images that --landmarks or the .lst has no points of"
    )
    resize: bool = option(
        False,
        "the faces are aligned at another size: resize square images (with --pass-through keep "
        "them, and train with resize=true); without it an image of another size than --size is "
        "skipped",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.quality > 100:
            raise UserError(f"--quality {self.quality}: a JPEG's quality is at most 100")
        if self.hold_out:
            check_num_pairs(self.pairs)
        elif self.pairs != default_of(PackOptions, "pairs"):
            raise UserError(f"--pairs {self.pairs} are of --hold-out N: say that too")
        if self.landmarks and files.is_dir(self.landmarks):
            raise UserError(
                f"--landmarks {self.landmarks} is a directory: pack takes one file with a line for "
                "each image, path [score] x1 y1 .. x5 y5"
            )
        if (self.landmarks or self.detector) and not self.align:
            raise UserError("--landmarks and --detector need --align: give it too")
        if self.skip_missing_landmarks and (not self.align or self.detector):
            why = "--detector finds the points that are missing" if self.align else "give it too"
            raise UserError(f"--skip-missing-landmarks needs --align with known points: {why}")
        if self.align and self.pass_through:
            raise UserError("--align makes new images: it cannot keep old ones (--pass-through)")
        if self.align and self.resize:
            raise UserError(
                "--align warps every face to --size: leave out --resize, which is for aligned faces"
            )
        self.choice().share()

    def choice(self) -> HoldOut:
        return HoldOut(self.seed, self.hold_out, self.split, self.min_images, self.max_images)

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
    join: Join = option(
        "offset",
        "several sources: nobody of one is in another (offset), or the same name is the same "
        "person (name)",
    )
    nested: bool = option(
        False, "folders: look for identities at any depth; every folder with images is one"
    )
    root: Path | None = option(
        None, "where the paths of a .lst start", note="default: beside it", metavar="DIR"
    )
    relabel: Path | None = option(
        None, "follow this relabel index of a record source", metavar="FILE"
    )
    identity_level: int = option(
        0,
        "folders: the first N folders of an image's path name its identity; 1 joins CFP's frontal/ "
        "and profile/ of each person",
        metavar="N",
    )
    walk: bool = option(False, "read an InsightFace .rec without its .idx")
    image_column: str = option(
        "",
        "the column of the images or their paths (parquet, CSV), or a WebDataset image's ending",
        note="default: image",
        metavar="NAME",
    )
    label_column: str = option(
        "",
        "the column of the labels (parquet, CSV), or of a WebDataset sample: cls, or a key of its "
        ".json",
        note="default: label",
        metavar="NAME",
    )
    labels: Path | None = option(
        None,
        "the labels of an LMDB database, lines of key<TAB>label",
        note="default: the keys or values, or a .tsv or .txt beside it",
        metavar="FILE",
    )

    def open(self) -> Source:
        check(self)
        if self.relabel and len(self.paths) > 1:
            raise UserError("--relabel applies to one set: pack the others separately")
        if self.identity_level < 0:
            raise UserError(f"--identity-level {self.identity_level}: must be 1 or more")
        if self.identity_level and self.nested:
            raise UserError(
                "--nested and --identity-level N each define what an identity is: choose one"
            )
        if self.labels and len(self.paths) > 1:
            raise UserError("--labels applies to one database: pack the others separately")
        fields = Fields(self.image_column, self.label_column)
        opened = [
            open_source(
                path,
                self.nested,
                self.root,
                self.relabel,
                self.identity_level,
                self.walk,
                fields,
                self.labels,
            )
            for path in self.paths
        ]
        return opened[0] if len(opened) == 1 else JoinedSource(opened, self.join)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))
