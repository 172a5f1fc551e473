"""Tell the kernel beforehand what a block shuffle will read: the disk then reads it in one go."""

import os
import threading

from data_tools.load.order import Order, window_stretches
from data_tools.shards import Shards
from data_tools.union import Union


class ReadAhead:
    """Asks for the window of blocks that rows are in, and for the one after it, once each."""

    def __init__(self, data: Shards | Union, order: Order) -> None:
        self._sets = data.sets if isinstance(data, Union) and len(order.sizes) > 1 else [data]
        self._order = order
        self._asked: set[tuple[int, int, int]] = set()  # set, epoch, window

    def ask(self, stretches: list[tuple[int, int]]) -> None:
        """Before the rows of one micro-step, see Order.stretches, are read. Returns at once."""
        blocks = self._order.blocks
        if blocks is None or not hasattr(os, "posix_fadvise"):
            return
        width = blocks.size * blocks.window
        wanted: dict[tuple[int, int, int], int] = {}
        for k, ((start, _), size) in enumerate(zip(stretches, self._order.sizes, strict=True)):
            window_end = start - start % size + min((start % size // width + 1) * width, size)
            for position in (start, window_end):
                wanted[k, position // size, position % size // width] = position
        new = [(key, position) for key, position in wanted.items() if key not in self._asked]
        self._asked = set(wanted)
        if new:
            threading.Thread(target=self._advise, args=(new,), daemon=True).start()

    def _advise(self, windows: list[tuple[tuple[int, int, int], int]]) -> None:
        order = self._order
        assert order.blocks is not None
        for (k, _, _), position in windows:
            size, seed = order.sizes[k], order.seed + k
            for start, stop in window_stretches(size, seed, position, order.blocks).tolist():
                for path, first, length in file_stretches(self._sets[k], start, stop):
                    descriptor = os.open(path, os.O_RDONLY)
                    try:
                        os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_WILLNEED)
                    finally:
                        os.close(descriptor)


def file_stretches(data: Shards | Union, start: int, stop: int) -> list[tuple[str, int, int]]:
    """Where the images [start, stop) lie: file, first byte, bytes."""
    found: list[tuple[str, int, int]] = []
    if isinstance(data, Union):
        first = 0
        for one in data.sets:
            low, high = max(start - first, 0), min(stop - first, one.num_images)
            found += file_stretches(one, low, high) if low < high else []
            first += one.num_images
        return found
    for shard, file in enumerate(data.files):
        low, high = max(start, data.starts[shard]), min(stop, data.starts[shard + 1])
        if low >= high:
            continue
        begin = data.locate(low)[1]
        end = data.locate(high)[1] if high < data.starts[shard + 1] else file.size
        found.append((str(file.path), begin, end - begin))
    return found
