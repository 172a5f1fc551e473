"""Generated identities: drawn faces for the demo, for tests and benchmarks, at any number.

Picture i of identity k is a pure function of (seed, k, i): a counter-based generator (Philox,
keyed by seed and identity) gives the person at counter 0 and everything that picture i changes at
counter i + 1. So any picture can be made alone, in any order, by any number of processes.
"""

import argparse
import json
import os
import time
from dataclasses import MISSING, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools.common import cli, files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, run_tasks
from data_tools.common.partial_directory import PartialDirectory
from data_tools.common.schema import add_flags, check, from_flags, option
from data_tools.images.image_file import SYNTHETIC
from data_tools.synthetic.canvas import SIZE
from data_tools.synthetic.people import Drawn, Person, Pose, span
from data_tools.synthetic.portrait import paint

VERSION = 1  # of the drawing: another version draws other pictures
_PER_TASK = 8  # identities


@dataclass(frozen=True, slots=True)
class Photo(Drawn):
    """How a picture is taken: light, lens and compression."""

    gain: float = span(0.55, 1.25)
    side_light: float = span(-0.45, 0.45)  # share of the light gained from the middle to the right
    top_light: float = span(-0.35, 0.35)
    red: float = span(-0.16, 0.16)  # colour temperature
    green: float = span(-0.06, 0.06)
    blue: float = span(-0.2, 0.2)
    tinted_side: float = span(-0.25, 0.25)  # red light from one side, blue from the other
    haze: float = span(-30, 30)
    blur: float = span(-0.8, 1.5)  # standard deviation in pixels
    small: float = span(-0.6, 1.0)  # above 0.75: taken at a low resolution
    noise: float = span(-4, 14)  # standard deviation in grey levels
    quality: float = span(35, 98)  # of the JPEG
    covered: float = span(0.0, 1.0)  # below 0.35: something is before the face


def render(seed: int, identity: int, image: int) -> np.ndarray:
    """uint8 [112, 112, 3] RGB: the picture before compression."""
    return _take(seed, identity, image)[0]


def encode(seed: int, identity: int, image: int) -> bytes:
    """The same picture as a JPEG file, at a quality of its own."""
    pixels, photo = _take(seed, identity, image)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(photo.quality)]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def _generator(seed: int, identity: int, counter: int) -> np.random.Generator:
    key = np.array([seed, identity], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


def _take(seed: int, identity: int, image: int) -> tuple[np.ndarray, Photo]:
    random = _generator(seed, identity, 0)
    person, marks = Person.draw(random), random.random((32, 2))
    random = _generator(seed, identity, image + 1)
    pose, photo = Pose.draw(random), Photo.draw(random)
    pixels = _background(random)
    paint(pixels, person, pose, marks)
    if photo.covered < 0.35:
        _cover(pixels, random)
    return _expose(pixels, photo, random), photo


def _background(random: np.random.Generator) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: soft random colours and two patches."""
    coarse = (random.random((4, 4, 3)) * 255).astype(np.uint8)
    pixels = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    corners = (random.random((2, 4, 2)) * SIZE).astype(np.int32)
    for patch, colour in zip(corners, random.random((2, 3)) * 255, strict=True):
        cv2.fillConvexPoly(pixels, patch, colour.tolist())
    return pixels


def _cover(pixels: np.ndarray, random: np.random.Generator) -> None:
    """Puts a tilted bar or an ellipse of one colour before the face, mostly from its edge."""
    colour = (random.random(3) * 255).tolist()
    angle, x, y, long, short = random.random(5) * (2 * np.pi, 1, 1, 30, 14) + (0, 0, 0, 18, 8)
    away = np.array([x - 0.5, y - 0.5])
    away *= (40 + 0.86 * short) / (np.hypot(*away) + 1e-6)  # the middle of the face stays free
    centre = (SIZE / 2 + away[0], SIZE / 2 + away[1])
    box = (centre, (2 * long, 2 * short), np.degrees(angle))
    if random.random() < 0.5:
        cv2.ellipse(pixels, box, colour, -1, cv2.LINE_AA)
    else:
        cv2.fillConvexPoly(pixels, cv2.boxPoints(box).astype(np.int32), colour, cv2.LINE_AA)


@cache
def _plane() -> np.ndarray:
    """float32 [SIZE * SIZE, 3]: 1, x and y in [-1, 1] at every pixel."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3).astype(np.float32)


@cache
def _grain() -> np.ndarray:
    """int16 [256, 256, 3]: fixed noise, 64 times a standard normal; pictures take windows of it."""
    normal = np.random.Generator(np.random.Philox(key=0)).standard_normal((256, 256, 3))
    return (normal * 64).astype(np.int16)


def _expose(pixels: np.ndarray, photo: Photo, random: np.random.Generator) -> np.ndarray:
    """The drawing under this photo's light, through its lens and on its sensor."""
    tint = np.array([photo.red, photo.green, photo.blue])
    slope = photo.side_light + photo.tinted_side * np.array([1, 0, -1])
    light = photo.gain * np.stack([1 + tint, slope, np.full(3, photo.top_light)])  # [1 x y, RGB]
    field = (_plane() @ light.astype(np.float32)).reshape(SIZE, SIZE, 3)
    pixels = cv2.multiply(pixels, field, dtype=cv2.CV_8U)
    if photo.small > 0.75:
        side = int(SIZE * (1.3 - photo.small))
        little = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
        pixels = cv2.resize(little, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    elif photo.blur > 0.3:
        pixels = cv2.GaussianBlur(pixels, (7, 7), photo.blur)
    x, y = (random.random(2) * (256 - SIZE)).astype(int)
    window = _grain()[y : y + SIZE, x : x + SIZE]
    strength = max(photo.noise, 0.0) / 64
    return cv2.addWeighted(pixels, 1.0, window, strength, photo.haze, dtype=cv2.CV_8U)


@dataclass(frozen=True, slots=True)
class FaceOptions:
    """What the pictures depend on."""

    identities: int = option(MISSING, "people to draw", low=1, metavar="N")
    images: int = option(MISSING, "pictures of each", low=1, metavar="M")
    seed: int = option(0, "another seed draws other people", low=0)

    def __post_init__(self) -> None:
        check(self)
        if self.seed >= 2**64:
            raise UserError(f"--seed {self.seed}: must be below 2^64")


def synthesize(out: Path, options: FaceOptions, workers: int = 1) -> dict[str, Any]:
    """Writes OUT/<identity>/<image>.jpg and OUT/synthetic.json, all of it or nothing.

    An `out` with the same parameters is left as it is (`status` is then "reused").

    Raises: FileExistsError if `out` holds something else, or another process is writing it;
    OSError if the disk is full or fails.
    """
    started = time.monotonic()
    out = Path(os.path.abspath(out))
    parameters = {"version": VERSION, **asdict(options)}
    total = options.identities * options.images
    status = "reused"
    if not _is_made(out, parameters):
        status = "made"
        with PartialDirectory(out) as aside:
            tasks = [
                (aside.path, first, min(first + _PER_TASK, options.identities), options)
                for first in range(0, options.identities, _PER_TASK)
            ]
            run_tasks(_write, tasks, workers, total, "faces")
            text = json.dumps(parameters) + "\n"
            files.write_text(aside.path / SYNTHETIC, text)
            aside.rename()
    seconds = round(time.monotonic() - started, 3)
    return {"status": status, "path": str(out), "total": total, **parameters, "seconds": seconds}


def _is_made(out: Path, parameters: dict[str, Any]) -> bool:
    """Whether `out` holds these pictures; False if it is free. Raises: FileExistsError."""
    if files.is_free(out):
        return False
    try:
        was = json.loads(files.read_bytes(out / SYNTHETIC))
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(f"{out} exists and holds no {SYNTHETIC}: choose another") from error
    if was != parameters:
        raise FileExistsError(f"{out} was made with {was}, not {parameters}: choose another")
    left, total = len(list(out.glob("*/*.jpg"))), parameters["identities"] * parameters["images"]
    if left != total:
        raise FileExistsError(f"{out} holds {left} of its {total} images: choose another")
    return True


def _write(task: tuple[Path, int, int, FaceOptions], advance: Advance) -> None:
    """Writes the pictures of identities first .. stop - 1."""
    out, first, stop, options = task
    for identity in range(first, stop):
        directory = out / f"{identity:06d}"
        directory.mkdir()
        for image in range(options.images):
            path = directory / f"{image:04d}.jpg"
            with files.naming(path):
                path.write_bytes(encode(options.seed, identity, image))
        advance(options.images)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="directory to make: OUT/<identity>/<image>.jpg")
    add_flags(parser, FaceOptions)
    cli.add_workers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    done = synthesize(args.out, from_flags(FaceOptions, args), args.workers)
    print(
        f"{done['status']} {done['path']}: {count(done['total'], 'image')} of "
        f"{count(done['identities'], 'identity', 'identities')}, {done['seconds']:.1f} s"
    )
    return done
