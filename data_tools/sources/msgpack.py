"""The image and the label in msgpack of [image, ..., label]; no other value is made of it.

https://github.com/msgpack/msgpack/blob/master/spec.md: the few types that such a value has.
"""

from collections.abc import Callable

_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SIGNED = {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LONGEST = 9  # bytes of the type and number of a value
_MOST = 16  # values of the array


def labelled_image(
    head: bytes, read: Callable[[int, int], bytes] | None = None
) -> tuple[int, int, object] | None:
    """Place and size of the image, and the label: the first and the last value of the array.

    head: the first bytes. read: of a place and a size; without it only the head is looked at,
    and the label is None. The label is a number or text. None: it is no such value.
    """
    if not head or not 0x92 <= head[0] <= 0x90 + _MOST - 1:
        return None
    block = _block(head[1 : 1 + _LONGEST])
    if block is None:
        return None
    start, size = 1 + block[0], block[1]
    if read is None:
        return start, size, None
    at = start + size
    for left in range(head[0] - 0x90 - 1, 0, -1):
        part = read(at, _LONGEST)
        if left == 1:
            label = _label(part, at, read)
            return None if label is None else (start, size, label)
        block = _block(part)
        if block is None:
            return None
        at += block[0] + block[1]
    return None


def _block(data: bytes) -> tuple[int, int] | None:
    """The length of the head of bytes or text, and of what follows it."""
    if not data:
        return None
    if 0xA0 <= data[0] <= 0xBF:
        return 1, data[0] - 0xA0
    wide = _SIZES.get(data[0], 0)
    if not wide or len(data) < 1 + wide:
        return None
    return 1 + wide, int.from_bytes(data[1 : 1 + wide], "big")


def _label(data: bytes, at: int, read: Callable[[int, int], bytes]) -> object:
    if not data:
        return None
    first = data[0]
    if first <= 0x7F or first >= 0xE0:
        return first if first <= 0x7F else first - 0x100
    wide = _UNSIGNED.get(first) or _SIGNED.get(first) or 0
    if wide:
        if len(data) < 1 + wide:
            return None
        return int.from_bytes(data[1 : 1 + wide], "big", signed=first in _SIGNED)
    block = _block(data)
    return (
        None if block is None else read(at + block[0], min(block[1], 80)).decode("utf-8", "replace")
    )
