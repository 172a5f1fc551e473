"""Alignment to the ArcFace template: the similarity of five points, and the image warped by it."""

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError

# Left eye, right eye, nose, left and right corner of the mouth, as seen in the image; x and y in
# pixels of 112 x 112. The last x is 62.7299 + 8 added in float32, as InsightFace's scripts have it.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.729904, 92.2041],
    ],
    dtype=np.float32,
)


def similarity(points: ArrayLike, size: int = 112) -> NDArray[np.float64]:
    """[2, 3]: the least-squares similarity that takes five points [5, 2] to the template.

    Umeyama (PAMI 1991, eq. 38 to 43) with scale and without reflection. The singular values and
    means are computed in float32, as scikit-image computes them from float32 points and hence as
    the published IJB numbers were made: float64 would move the translation by about 1e-5 pixels.

    Raises:
        ValueError: not five finite points, all of them at one place, or nothing like a face.
    """
    source = np.asarray(points, dtype=np.float32)  # [5, 2]
    if source.shape != (5, 2) or not np.isfinite(source).all():
        raise UserError(f"five finite points [5, 2] are needed, not {np.asarray(points).tolist()}")
    target = TEMPLATE * np.float32(size / 112)
    if np.ptp(source, axis=0).max() == 0:
        raise UserError(f"five points at one place, {source[0].tolist()}, cannot be aligned")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - source_mean
    variance = centred.var(axis=0).sum()
    covariance = (target - target_mean).T @ centred / 5  # [2, 2]
    u, singular, vt = np.linalg.svd(covariance)
    sign = np.array([1.0, -1.0 if np.linalg.det(u) * np.linalg.det(vt) < 0 else 1.0])
    rotation = (u @ np.diag(sign) @ vt).astype(np.float64)
    scale = 1.0 / variance * (singular @ sign)
    if not 0 < scale < np.inf:
        raise UserError(f"no similarity takes the points {source.tolist()} to a face")
    translation = target_mean - scale * (rotation @ source_mean)
    return np.column_stack([scale * rotation, translation])


def warp(image: NDArray[np.uint8], points: ArrayLike, size: int = 112) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]: the face of image [h, w, 3] aligned by its five points.

    Bilinear, black beyond the image's border; the channels keep their order.

    Raises:
        ValueError: as `similarity`, or an image that is not uint8 [h, w, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UserError(f"a uint8 [h, w, 3] image is needed, not {image.dtype} {image.shape}")
    matrix = similarity(points, size)
    warped = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
    return warped.astype(np.uint8, copy=False)
