"""Counts and sizes as a person reads them."""


def count(number: int, one: str, many: str = "") -> str:
    """`1 image`, `2 images`; `many` where the plural is not `one` + s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def file_size(num_bytes: int) -> str:
    """In bytes, kB, MB or GB (powers of 1000), with the digits that tell something."""
    if num_bytes < 1000:
        return count(num_bytes, "byte")
    unit, factor = next(
        (unit, factor)
        for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if num_bytes >= factor
    )
    return f"{num_bytes / factor:.1f} {unit}"
