"""Ranks on the pretend devices beside the same ranks on the CPU: the same numbers, bit for bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.pretend_cuda import device as cuda
from tests.pretend_cuda.recorder import FOREIGN, FREED, MIX, RACE
from tests.pretend_cuda.scenes_head import Way, batch, make_head, make_optimizer
from tests.pretend_cuda.tensor import PretendTensor

STEPS = 3
_FAULTS = (FOREIGN, FREED, MIX, RACE)


def differences(jobs: list[tuple[str, Way]]) -> dict[str, list[str]]:
    """What differs between the two, and what was seen on the pretend device, by job."""
    found = {}
    for case, way in jobs:
        here = torch.device("cuda", cuda.current_device())
        on_cpu = _train(case, way, torch.device("cpu"))
        with cuda.RECORDER.watching() as seen:
            on_cuda = _train(case, way, here)
        wrong = [str(one) for one in seen if one.kind in _FAULTS]
        assert on_cpu.keys() == on_cuda.keys()
        wrong += [name for name in on_cpu if not torch.equal(on_cpu[name], on_cuda[name])]
        if wrong:
            found[f"{case} {way}"] = wrong
    return found


def _train(case: str, way: Way, device: torch.device) -> dict[str, Tensor]:
    """Every number of a few steps in fp64, one of them skipped; ranks with unequal batches."""
    head = make_head(case, way, torch.float64, device)
    optimizer, found = make_optimizer(head, way), {}
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = [5 + 3 * r for r in range(world)]
    for step in range(STEPS):
        if way.in_backward:
            optimizer.begin(0.1)
        for micro in range(way.micro_steps):
            x, y = batch(10 * step + micro, sum(counts), torch.device("cpu"), torch.float64)
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            local_x = x.detach()[own].clone().to(device).requires_grad_()
            features = None if head.margin.encoder_momentum is None else local_x.detach() * 2
            loss = head(local_x, y[own].clone(), counts, features)
            loss.backward()
            found[f"loss {step}.{micro}"] = loss
            found[f"gradient {step}.{micro}"] = local_x.grad
        if not way.in_backward:
            found[f"rows' gradient {step}"] = head.sampled_grad
        skip = None if way.in_backward else torch.full((), float(step == 1)).to(device)
        optimizer.step(0.1, None, skip)
    head.settle()
    found |= {"weight": head.weight, **optimizer.state, **optimizer.model_state}
    found |= head.class_state() | head.model_state()
    head.end_epoch()
    found |= {f"{name} after the epoch": value for name, value in head.class_state().items()}
    return {name: _on_cpu(value.detach()) for name, value in found.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return (tensor.held if isinstance(tensor, PretendTensor) else tensor).clone()
