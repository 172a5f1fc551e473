"""Whole training steps, build() and take_step(), on the pretend device."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recognition import config
from recognition.distributed.runtime import Runtime
from recognition.run import build, trainer
from recognition.run.state import TrainState
from tests.pretend_cuda import device as cuda
from tests.pretend_cuda.recorder import NON_DETERMINISTIC

STEPS = 3  # the first two allocate


class Replicated(nn.Module):
    """DistributedDataParallel's contract without its C++ reducer, which reads the memory of tensors
    and finds none in pretend ones: gradients are averaged when the last backward ends."""

    def __init__(self, module: nn.Module, process_group: Any, **_: Any) -> None:
        super().__init__()
        self.module, self._group, self._is_synchronised = module, process_group, True
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: Tensor) -> None:
        if self._is_synchronised:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= self._group.size()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._is_synchronised = False
        try:
            yield
        finally:
            self._is_synchronised = True


def steps(rec: str, keys: dict[str, Any]) -> tuple[list[str], list[str], float]:
    """What was seen in a step of such a run that a GPU would wait or fail for, what a GPU does not
    compute the same twice, and the last loss."""
    with _stand_ins() as output:
        return _steps({"rec": rec, "output": output} | keys)


def launches(rec: str, keys: dict[str, Any]) -> int:
    """Kernels and copies of a step of such a run."""
    with _stand_ins() as output:
        _steps({"rec": rec, "output": output} | keys)
        return cuda.RECORDER.launched


def products(rec: str, keys: dict[str, Any]) -> tuple[str, str, list[str]]:
    """The dtype of the head's products in such a run, what config.json says of it, and the log's
    lines at the start."""
    with _stand_ins() as output:
        state = _build({"rec": rec, "output": output} | keys)
        return str(state.head.limits.dtype), state.facts["head_precision"], state.messages


@contextlib.contextmanager
def _stand_ins() -> Iterator[str]:
    """For what cannot run on pretend tensors: DDP's reducer and torch.compile. A directory."""
    build.DistributedDataParallel, kept = Replicated, build.DistributedDataParallel  # type: ignore
    compiled, nn.Module.compile = nn.Module.compile, lambda *_, **__: None  # type: ignore
    try:
        with tempfile.TemporaryDirectory() as output:
            yield output
    finally:
        build.DistributedDataParallel, nn.Module.compile = kept, compiled  # type: ignore


def _build(keys: dict[str, Any]) -> TrainState:
    device = torch.device("cuda", cuda.current_device())
    here = Runtime(device, dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    base = {
        "network": "mbf_tiny", "embedding_size": 32, "sample_rate": 0.5, "global_batch_size": 8,
        "lr": 0.05, "max_steps": 6, "num_workers": 1, "head_kernel": "plain",
    }  # fmt: skip
    return build.build(config.make(base | keys), here)


def _steps(keys: dict[str, Any]) -> tuple[list[str], list[str], float]:
    state = _build(keys)
    with trainer.make_loader(state) as loader:
        batches = iter(loader)
        for _ in range(STEPS - 1):
            trainer.take_step(state, batches)
        with cuda.RECORDER.watching() as seen:
            loss, norm = trainer.take_step(state, batches)
    assert loss.device == norm.device == state.runtime.device
    for part in state.parts.heads:
        part.head.settle()
    wrong = {str(one) for one in seen if one.kind != NON_DETERMINISTIC}
    varying = {str(one) for one in seen if one.kind == NON_DETERMINISTIC}
    return sorted(wrong), sorted(varying), loss.item()
