"""What the checks of a step launch: on a GPU every copy and every kernel counts."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recognition.distributed import collectives
from recognition.run.nonfinite import FiniteGuard


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **kwargs or {})


def channels_last(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    return weight.contiguous(memory_format=torch.channels_last)


def test_a_channels_last_gradient_is_checked_without_a_copy():
    gradients = {str(number): channels_last(number) for number in range(5)}
    guard = FiniteGuard(collectives.world_group(), torch.device("cpu"))
    with Operators() as seen:
        assert guard.check(gradients, 1, {}) == 0
    small = {"aten::clone": 1}  # of the two flags that the ranks agree on
    assert {name: seen.names[name] for name in ("aten::clone", "aten::copy_")} == {
        "aten::copy_": 0, **small,
    }  # fmt: skip


def test_a_bad_number_anywhere_in_a_channels_last_gradient_is_found():
    for place in (0, 100, 287):
        gradient = channels_last(place)
        gradient.as_strided((288,), (1,))[place] = torch.inf
        guard = FiniteGuard(collectives.world_group(), torch.device("cpu"))
        assert guard.check({"w": gradient, "fine": channels_last(1)}, 1, {}) == 1


def test_averaging_many_statistics_copies_them_at_once():
    statistics = [torch.full((3,), float(number)) for number in range(50)]
    statistics.append(torch.tensor(7.0))
    with Operators() as seen:
        collectives.average_(statistics, collectives.world_group())
    assert seen.names["aten::copy_"] == 0 and seen.names["aten::_foreach_copy_"] == 1
    assert [float(one.mean()) for one in statistics] == [*range(50), 7.0]
