"""Images and folders made for the tests of this package."""

from pathlib import Path

import cv2
import numpy as np

from data_tools.pack import conversion


def pixels(seed: int, height: int = 112, width: int | None = None) -> np.ndarray:
    """uint8 [h, w, 3]: smooth colours, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return cv2.resize(coarse, (width or height, height), interpolation=cv2.INTER_LINEAR)


def encoded(seed: int, height: int = 112, width: int | None = None, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, pixels(seed, height, width))[1].tobytes()


def folder(root: Path, sizes: list[int]) -> Path:
    """`root`/p00/0.jpg ...: identity k with sizes[k] images, all different."""
    for k, size in enumerate(sizes):
        (root / f"p{k:02d}").mkdir(parents=True)
        for j in range(size):
            (root / f"p{k:02d}" / f"{j}.jpg").write_bytes(encoded(1000 * k + j))
    return root


def convert(encoded: bytes, how: conversion.Conversion, where: str = "") -> tuple[bytes, bool]:
    """What pack makes of an image, and whether it was of another size."""
    return conversion.convert(encoded, how, where)[:2]
