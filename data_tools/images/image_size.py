"""The one rule on the size of an image that has no landmarks: it is the network's, or an error.

A face must be aligned before a network sees it. Whether it is cannot be seen from its size, but an
image of another size than the network's is most often a photograph that nobody has aligned, and
its score would be low without a word. So every door (pack, training, verification, evaluation,
export, inversion) refuses it, unless the user says that the faces are aligned at another size.
"""

import numpy as np

from data_tools.common.errors import UserError


def check_size(width: int, height: int, size: int, where: str = "", resize: bool = False) -> bool:
    """Whether an image of width x height pixels has to be resized to size x size.

    resize: the faces are aligned at another size, so a square image may be resized.

    Raises:
        UserError: the image is neither of that size nor allowed to be resized; it names `where`,
            the size and the ways on.
    """
    if (width, height) == (size, size):
        return False
    if resize and width == height:
        return True
    found = f"{where or 'image'}: {width}x{height} pixels, not {size}x{size}"
    if resize:
        raise UserError(
            f"{found}: it is not square, so resizing would distort the face. Align it by its "
            "landmarks or by a detector (pack --align)"
        )
    raise UserError(
        f"{found}: faces must be aligned to that size. Give their landmarks or a detector (pack "
        "--align); if they are aligned at another size, allow resizing: --resize, in a recipe "
        "resize=true"
    )


def is_size_fault(message: str) -> bool:
    """Whether a message is one of check_size()."""
    return " pixels, not " in message


def count_other_sizes(sizes: list[tuple[int, int]], size: int) -> int:
    """How many of these (width, height) are not size x size."""
    return int(np.count_nonzero((np.array(sizes).reshape(-1, 2) != size).any(1)))
