"""What the images of a set are like, measured on a sample."""

from typing import Any

import cv2
import numpy as np

from data_tools.common.errors import UserError
from data_tools.images.decode import decode_any_size
from data_tools.shards import Shards

_KINDS = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}


def sampled(data: Shards, number: int) -> list[int]:
    """Images spread evenly over the set (which is shuffled), at most `number`, ascending."""
    if number < 1:
        raise UserError(f"a sample of {number} images: must be 1 or more")
    return np.unique(np.linspace(0, len(data) - 1, min(number, len(data))).astype(int)).tolist()


def statistics(data: Shards, images: list[int]) -> dict[str, Any]:
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
            len(encoded), image.shape[1], light.mean(), light.std(),
            cv2.Laplacian(light, cv2.CV_64F).var(),
        )  # fmt: skip
        for row, value in zip(values.values(), own, strict=True):
            row.append(float(value))
    facts: dict[str, Any] = {"sampled": len(images), "unreadable": unreadable, "kinds": kinds}
    facts["grey_share"] = grey / max(1, len(images) - unreadable)
    for key, row in values.items():
        if row:
            percentiles = np.percentile(row, [5, 50, 95]).round(2).tolist()
            facts[key] = dict(zip(("p5", "p50", "p95"), percentiles, strict=True))
    return facts
