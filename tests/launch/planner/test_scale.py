"""A step of the head as one rank of up to 1024 takes it, against the planner: memory and wire.

The process group is torch's fake one, which has any size in one process and moves nothing. Tensors
are real, because the sample of the classes is computed by numpy, which has no fake tensors; the
layer is therefore small, and the planner is asked for the same small layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch.planner import predict
from recognition import config
from recognition.backbones import make_backbone
from recognition.distributed import collectives
from recognition.head import PartialFC
from recognition.head.multi_head import limits_of
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from tests.launch.planner.test_predict import _peak
from tests.recognition.head.test_partial_fc import memory_profile

gather = collectives._all_gather
b, D, C = 8, 128, 200_000  # rows of a rank; C: 195 classes of each rank at W = 1024
WORLDS = [1, 8, 64, 1024]
KEYS = {
    "all classes": {},
    "all classes, updated in the backward": {"update_in_backward": True},
    "a tenth of the classes": {"sample_rate": 0.1},
    "a tenth, adamw": {"sample_rate": 0.1, "optimizer": "adamw"},
}


@contextmanager
def fake_group(world: int) -> Iterator[dist.ProcessGroup]:
    """The group of rank 0 of `world`. Its gathers repeat this rank's part."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Step:
    """The head of rank 0 and its optimiser, a batch, and what a step of them sends."""

    def __init__(self, group: dist.ProcessGroup, keys: dict) -> None:
        self.world, self.cfg = group.size(), config.make({"rec": "-", "embedding_size": D, **keys})
        self.head = PartialFC(
            MARGINS["cosface"](), D, C, self.cfg.sample_rate, group=group,
            limits=limits_of(self.cfg),
        )  # fmt: skip
        self.rows = (RowAdamW if self.cfg.optimizer == "adamw" else RowSGD)(self.head)
        # Spread over the classes of all ranks, those of rank 0 first.
        self.labels = torch.arange(b * self.world) * (C // (b * self.world))
        self.x = torch.randn(b, D, requires_grad=True)
        self.sent: list[tuple[str, float]] = []

    def take(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_all_gather", self._gather)
            patch.setattr(collectives, "_reduce_scatter", self._scatter)
            patch.setattr(dist, "all_reduce", self._sum)
            if self.cfg.update_in_backward:
                self.rows.begin(0.1)
            self.head(self.x, self.labels[:b]).backward()
            self.rows.step(0.1)

    def _send(self, name: str, whole: torch.Tensor, times: int = 1) -> None:
        """By a ring, each rank sends all parts but one."""
        size = whole.numel() * whole.element_size()
        self.sent.append((name, times * size * (self.world - 1) / self.world))

    def _gather(self, every, own, group):
        self._send("gather", every)
        gather(every, own, group=group)
        every[:, :8] = self.labels[:, None].contiguous().view(torch.uint8).view(-1, 8)

    def _scatter(self, own, every, group):
        self._send("scatter", every)
        own.copy_(every[: len(own)])

    def _sum(self, whole, *_, **__):
        self._send("sum", whole, 2)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_collectives_are_the_planners_line_by_line(world, keys):
    with fake_group(world) as group:
        step = Step(group, KEYS[keys])
        step.take()
    of_run = {"rec": "-", "network": "mbf_tiny", "precision": "fp32", "batch_size": b}
    cfg = config.make({**of_run, "embedding_size": D, **KEYS[keys]})
    line = predict.plan(cfg, C, world).wire
    merge = line["merge of log-sum-exps"] / 2
    assert step.sent == [
        ("gather", pytest.approx(line["gather of embeddings and labels"])),
        ("sum", pytest.approx(line["sum of target cosines"])),
        ("sum", pytest.approx(merge)),  # the maximum
        ("sum", pytest.approx(merge)),
        ("scatter", pytest.approx(line["scatter of their gradients"])),
    ]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_peak_is_the_planners(world, keys):
    with fake_group(world) as group:
        step = Step(group, KEYS[keys])
        step.rows.begin(0.1)  # creates what it keeps
        step.head.sink = None
        with memory_profile() as profile:
            step.take()
    predicted = predict.head_bytes(step.cfg, C, world, b * world, is_cuda=False)
    standing = sum(t.numel() * t.element_size() for t in step.head.storage.tensors().values())
    peak = standing + _peak(profile)
    assert 0.99 <= peak / sum(predicted.values()) <= 1.06


@pytest.mark.parametrize("world", WORLDS)
def test_the_peak_of_a_whole_step_is_the_planners(world):
    """Backbone, head and both optimisers; of DistributedDataParallel, only what it adds to no
    memory: gradients that are there before the step."""
    keys = {"rec": "-", "network": "r18", "precision": "fp32", "batch_size": b, "embedding_size": D}
    network = make_backbone("r18", D, {})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates its state
    images = torch.randn(b, 3, 112, 112)
    with fake_group(world) as group:
        step = Step(group, {})
        step.rows.begin(0.1)
        step.head.sink = None
        with memory_profile() as profile:
            optimizer.zero_grad(set_to_none=False)
            step.x = network(images)
            step.take()
            optimizer.step()
    weights = [*network.parameters()] * 3  # with gradients and momentum
    tables = step.head.storage.tensors().values()
    standing = sum(t.numel() * t.element_size() for t in (*weights, *tables))
    predicted = predict.plan(config.make(keys), C, world, is_cuda=False).total
    assert 0.99 <= (standing + _peak(profile)) / predicted <= 1.06
