"""A process with the pretend device: it calls what pool.py asks for and sends the result back.

python -m tests.pretend_cuda.worker LIBRARY ADDRESS RANK WORLD STORE
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Client

from tests.pretend_cuda import shim


def main(library: str, address: str, rank: int, world: int, store: str) -> None:
    loaded = shim.load(library)

    import torch  # after the library
    import torch.distributed as dist

    from tests.pretend_cuda import device, tensor

    torch.set_num_threads(1)
    device.install(loaded, rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with Client(address, family="AF_UNIX") as connection, tensor.PretendMode():
        connection.send(rank)
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send((False, function(*arguments)))
            except BaseException:
                connection.send((True, traceback.format_exc()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
