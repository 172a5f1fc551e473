"""What the tests of inversion share."""

from __future__ import annotations

import sys

import cv2
import torch

CPU = torch.device("cpu")
FEW = ["--steps", "4", "--batch-size", "3", "--save-every", "2", "--picture-every", "2"]


def images_of(out):
    return {path.name: cv2.imread(str(path)) for path in sorted((out / "images").iterdir())}


def same(one, other):
    one, other = images_of(one), images_of(other)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


def command_line(*arguments):
    return [sys.executable, "-m", "recognition.inversion", *map(str, arguments)]
