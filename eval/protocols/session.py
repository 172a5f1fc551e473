"""What all evaluation commands share: arguments, the network, progress, where results are saved."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.common import files
from data_tools.common.networks import networks

if TYPE_CHECKING:  # torch is loaded by Session: --help and mistakes answer at once
    from eval.embedders.embedder import Embedder
    from eval.embedders.extract import EmbeddingStore
    from eval.embedders.images import ImageSet
    from eval.report.results import Result

NOWHERE = "none"  # of --cache and --results
MODEL_HELP = (
    "run directory, one of its checkpoint directories, a backbone file (.pt, .pth, .safetensors), "
    "or a recognition .onnx"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images that the network processes at once; default %(default)s",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=0,
        metavar="N",
        help="threads that decode images ahead of the network; default: half the cores, at most 16",
    )
    parser.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="embed the image alone; default: e(image) + e(mirror image)",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="resize aligned faces (images without landmarks) that do not have the network's input "
        "size, and report how many; default: such an image is an error",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR|none",
        default=None,
        help="where embeddings are cached, by model, images and input contract; default: "
        "$ARCLINE_CACHE or ~/.cache/arcline/embeddings",
    )
    parser.add_argument(
        "--results",
        metavar="DIR|none",
        type=Path,
        help="where to save the result for `report`; default: eval/ in the run directory that "
        "contains the model; results of other models are not saved",
    )
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="do not save images of the hardest pairs with the result",
    )
    group = parser.add_argument_group("the input contract of a foreign network (a run's is fixed)")
    group.add_argument("--color-order", choices=["RGB", "BGR"])
    group.add_argument(
        "--mean", type=float, metavar="X", help="(pixel - mean) / std, pixels 0..255"
    )
    group.add_argument("--std", type=float, metavar="X")
    group.add_argument(
        "--contract",
        metavar="FILE.json",
        type=Path,
        help='{"color_order": "BGR", "mean": 127.5, "std": 128}; default: NAME.contract.json '
        "beside the model, else its metadata, else InsightFace's RGB, 127.5, 127.5",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run_dir(model: Path) -> Path | None:
    """The run directory that is `model`, or that contains its ONNX file or checkpoint."""
    around = (model, *model.resolve().parents[:2])
    return next((path for path in around if files.is_file(path / "metrics.jsonl")), None)


def results_dir(model: Path, given: Path | None) -> Path | None:
    if given is not None and str(given) == NOWHERE:
        return None
    around = run_dir(model)
    return given or (around / "eval" if around else None)


class Session:
    """A command's network, its embedding cache, its warnings and its results.

    Raises:
        UserError, OSError: the model cannot be opened, or its input contract is impossible.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from eval.embedders.extract import ImagePlace

        self.args = args
        self.place = ImagePlace.of_environment()
        changes = {
            name: getattr(args, name)
            for name in ("color_order", "mean", "std")
            if getattr(args, name) is not None
        }
        self.embedder: Embedder = networks().open_embedder(
            args.model, args.batch_size, changes, args.contract
        )
        self.cache = _cache_dir(args.cache)
        self.console = Console(stderr=args.json)
        self.saved: list[str] = []
        self.warnings: list[str] = []
        if note := self.embedder.facts.get("note"):
            self.warn(f"{args.model}: {note}")
        self.resized: dict[str, dict[str, int]] = {}  # by set: how many images of how many

    @property
    def is_first(self) -> bool:
        """Whether this process scores the embeddings; the others only help to compute them."""
        return self.place.rank == 0

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if self.is_first:
            print(f"warning: {text}", file=sys.stderr)

    def features(
        self,
        images: "ImageSet",
        flip: bool | None = None,
        embedder: "Embedder | None" = None,
        alone: bool = False,
    ) -> "EmbeddingStore | None":
        """The embeddings of a set, with a progress bar; None in every process but the first.

        embedder: replaces the session's. alone: this process computes all embeddings itself.
        """
        from eval.embedders.extract import ImagePlace, extract

        count = 0 if alone else images.num_resized()  # first: it refuses images of another size
        if self.args.resize and not alone:
            self.resized[images.name] = {"count": count, "of": len(images)}
            if count:
                self.warn(
                    f"{images.name}: {count} of {len(images)} images were not 112x112 and "
                    "were resized (--resize)"
                )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not self.is_first) as progress:
            task = progress.add_task(images.name, total=len(images))
            return extract(
                embedder or self.embedder,
                images,
                self.args.flip if flip is None else flip,
                self.cache,
                self.args.batch_size,
                self.args.threads,
                ImagePlace() if alone else self.place,
                lambda n: progress.advance(task, n),
            )

    def contract(self, images: "ImageSet", **more: object) -> dict[str, object]:
        """The conditions under which the numbers hold; every result records them."""
        from eval.report.results import ALONE, FLIP_SUM

        return {
            "input": self.embedder.contract.text(),
            "alignment": images.alignment,
            "flip": FLIP_SUM if self.args.flip or self.adds_mirror() else ALONE,
            **more,
        }

    def adds_mirror(self) -> bool:
        """Whether the network itself adds the mirror image, as an export with --flip-sum does."""
        from eval.report.results import FLIP_SUM

        metadata = self.embedder.facts.get("metadata")
        return isinstance(metadata, dict) and FLIP_SUM in str(metadata.get("embedding", ""))

    def save(self, result: "Result") -> None:
        from eval.report.results import save

        result.facts["warnings"] = list(self.warnings)
        if self.resized:
            result.facts["resized"] = dict(self.resized)
        directory = results_dir(Path(self.args.model), self.args.results)
        if directory is not None:
            self.saved.append(str(save(directory, result)))

    def pictures(self, images: "ImageSet", numbers: NDArray) -> dict[str, NDArray]:
        """{"pictures": uint8 [.., 112, 112, 3], "picture_names": str [..]} of the images; {} under
        --no-pictures."""
        import numpy as np

        if not self.args.pictures:
            return {}
        flat = np.stack([images[int(i)] for i in numbers.ravel()])
        names = np.array([images.name_of(int(i)) for i in numbers.ravel()])
        return {
            "pictures": flat.reshape(*numbers.shape, *flat.shape[1:]),
            "picture_names": names.reshape(numbers.shape),
        }

    def output(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What --json prints."""
        whole = {"model": self.embedder.facts, **results, "warnings": self.warnings}
        whole |= {"resized": self.resized} if self.resized else {}
        return whole | ({"saved": self.saved} if self.saved else {})


def _cache_dir(given: str | None) -> Path | None:
    if given == NOWHERE:
        return None
    default = os.environ.get("ARCLINE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "arcline", "embeddings"
    )
    return Path(given or default)
