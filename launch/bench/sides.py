"""What launch/bench/head.py times: our head in each of its forms, the standard one, the floor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from launch.bench.standard_head import DenseHead
from recognition.head import PartialFC, partial_fc
from recognition.head.kernels.autotune import choose
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import make_margin
from recognition.optim import RowSGD

SEED, _LR, _NORM = 1, 0.01, 20.0  # norm of an embedding, about what a trained network gives

# dtype of the embeddings and of the products; the class rows are fp32 in all.
DTYPES = {"fp32": None, "bf16": torch.bfloat16}

Storage = Literal["device", "host"]


class Case(NamedTuple):
    classes: int  # C
    batch: int  # B, of all processes
    sample_rate: float = 1.0
    embedding_size: int = 512
    dtype: str = "fp32"
    # At most, of time / rival, time / floor, peak / rival; None: none is promised.
    targets: tuple[float, float, float] | None = None
    stored_mib: int = 64  # what the forward may keep for the backward
    update_in_backward: bool = False
    piece: int | None = None  # classes; None: from the cache
    kernel: str = "plain"  # our form, as config.py's head_kernel
    forms: tuple[str, ...] = ()  # to be timed beside it
    storage: Storage = "device"
    alone: bool = False  # no rival, no floor
    margin: str = "cosface"  # of our head


class Unavailable(Exception):
    """A form that falls back here, on every rank."""


class OurHead:
    """form: the case's, or another of config.py's head_kernel.

    Raises:
        Unavailable: it cannot be had here.
    """

    def __init__(self, case: Case, device: torch.device, form: str | None = None) -> None:
        with _rows_drawn_on(device if case.storage == "device" else torch.device("cpu")):
            self.head = PartialFC(
                make_margin(case.margin),
                case.embedding_size,
                case.classes,
                case.sample_rate,
                seed=SEED,
                head_storage=case.storage,
                limits=MemoryLimits(case.stored_mib << 20, case.piece, DTYPES[case.dtype]),
            ).to(device)
        form = form or case.kernel
        choice = choose(form, self.head, case.batch)
        if form not in ("auto", "plain") and choice.form == "plain":
            raise Unavailable(choice.message)
        self.form = choice.form
        self.optimizer = RowSGD(self.head)
        self.in_backward = case.update_in_backward

    def step(self, x: Tensor, labels: Tensor) -> None:
        if self.in_backward:
            self.optimizer.begin(_LR)
        self.head(x, labels).backward()
        self.optimizer.step(_LR)

    def held(self) -> list[Tensor]:  # weights and state
        return [self.head.weight.detach(), *self.optimizer.state.values()]


@contextlib.contextmanager
def _rows_drawn_on(device: torch.device) -> Iterator[None]:
    """Let PartialFC draw its rows on a GPU, which takes no time: a benchmark needs rows of some
    length, not the numbers that are the same at every world size."""
    if device.type == "cpu":
        yield
        return

    def rows(shard: tuple[int, int], num_subcenters: int, size: int, seed: int) -> Tensor:
        return torch.empty(shard[1] - shard[0], num_subcenters, size, device=device).normal_(
            0, 0.01
        )

    with mock.patch.object(partial_fc, "initial_rows", rows):
        yield


class Rival:
    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(SEED)
        with device:
            self.head = DenseHead(
                case.embedding_size, case.classes, case.sample_rate, dtype=DTYPES[case.dtype]
            )
        self.optimizer = torch.optim.SGD(
            self.head.parameters(), _LR, momentum=0.9, weight_decay=5e-4
        )

    def step(self, x: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        self.head(x, labels.to(x.device, copy=True)).backward()
        self.optimizer.step()

    def held(self) -> list[Tensor]:
        momentum = self.optimizer.state[self.head.weight]["momentum_buffer"]
        return [self.head.weight.detach(), momentum]


class Floor:
    """The GEMMs of a step of ours, at the shapes of its chunks, over a weight of its size."""

    def __init__(self, ours: OurHead, case: Case, device: torch.device) -> None:
        dtype = DTYPES[case.dtype] or torch.float32
        self.size = ours.head.chunk_size(case.batch)
        self.num = round(len(ours.head.weight) * case.sample_rate)
        columns = self.num * case.batch * 4
        kept = min((case.stored_mib << 20) // max(columns, 1), 1)
        self.num_products = 4 - kept
        self.weight = torch.randn(self.num, case.embedding_size, dtype=dtype, device=device)
        self.x = torch.randn(case.batch, case.embedding_size, dtype=dtype, device=device)
        self.z = torch.rand(case.batch, self.size, dtype=dtype, device=device)
        self.grad = torch.empty(self.size, case.embedding_size, dtype=dtype, device=device)
        self.grad_x = torch.zeros_like(self.x)

    def step(self, x: Tensor, labels: Tensor) -> None:
        for _ in range(self.num_products - 2):
            for start in range(0, self.num, self.size):
                rows = self.weight[start : start + self.size]
                torch.mm(self.x, rows.T, out=self.z[:, : len(rows)])
        for start in range(0, self.num, self.size):
            rows = self.weight[start : start + self.size]
            grad_z = self.z[:, : len(rows)]
            self.grad_x.addmm_(grad_z, rows, beta=0)
            torch.mm(grad_z.T, self.x, out=self.grad[: len(rows)])


def batch_of(case: Case, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [b, D] and host labels int64 [b] of this rank."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(case.classes, (case.batch,), generator=generator)
    x = torch.randn(case.batch, case.embedding_size, generator=generator)
    x = x * _NORM / case.embedding_size**0.5
    mine = slice(rank * case.batch // world, (rank + 1) * case.batch // world)
    dtype = DTYPES[case.dtype] or torch.float32
    return x[mine].to(device, dtype).requires_grad_(), labels[mine]
