"""What every backbone takes: float images [n, 3, 112, 112], RGB, normalised to [-1, 1]."""

from torch import Tensor

from data_tools.common.errors import UserError

INPUT_SIZE = 112  # pixels, height and width of an aligned face


def check_images(images: Tensor) -> None:
    """Refuse a batch that is not float [n, 3, 112, 112].

    Raises:
        ValueError: another shape, or an integer dtype (pixels that nobody has normalised).
    """
    expected = (3, INPUT_SIZE, INPUT_SIZE)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise UserError(
            f"a backbone takes images of shape [n, {', '.join(map(str, expected))}], "
            f"got {list(images.shape)}; align or resize faces to {INPUT_SIZE}x{INPUT_SIZE} first"
        )
    if not images.is_floating_point():
        raise UserError(
            f"a backbone takes float images normalised as ((x / 255) - 0.5) / 0.5, "
            f"got {images.dtype}; normalise them first"
        )
