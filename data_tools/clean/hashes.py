"""Hashes of images: of their exact pixels, and perceptual ones that survive another encoding.

The perceptual hash is pHash: the image in grey at 32 x 32, its cosine transform (DCT-II), of the
8 x 8 lowest frequencies a bit each, set where it is above their median (without the mean). 64 bits;
near copies differ in few of them.
"""

import hashlib

import cv2
import numpy as np

_BANDS = 4  # of 16 bits: hashes that differ in fewer bits than bands are equal in one of them


def pixel_hash(image: np.ndarray) -> int:
    """64 bits of the BLAKE2 of the shape and pixels, uint8 [h, w, 3]."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest(), "little")


def perceptual_hash(image: np.ndarray) -> int:
    """pHash of RGB uint8 [h, w, 3], 64 bits."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "little")


def near_pairs(one: np.ndarray, other: np.ndarray, most: int) -> np.ndarray:
    """All (i, j) whose hashes uint64 one[i] and other[j] differ in at most `most` < 4 bits.

    int64 [p, 2], sorted. Exact: hashes that differ in so few bits have one of four bands in common.
    """
    assert 0 <= most < _BANDS
    found = [np.empty((0, 2), np.int64)]
    for band in range(_BANDS):
        a = (one >> np.uint64(16 * band)).astype(np.uint16)
        b = (other >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(b, kind="stable")
        low = np.searchsorted(b[order], a, side="left")
        high = np.searchsorted(b[order], a, side="right")
        for i in np.flatnonzero(high > low).tolist():
            js = order[low[i] : high[i]]
            js = js[np.bitwise_count(other[js] ^ one[i]) <= most]
            found.append(np.column_stack([np.full(len(js), i), js]))
    return np.unique(np.concatenate(found), axis=0)
