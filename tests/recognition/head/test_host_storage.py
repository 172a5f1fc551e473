"""Class rows in the host's memory: the numbers of rows on the device, bit for bit."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recognition import config
from recognition.head import PartialFC
from recognition.head.async_copy import CopyQueue
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from tests import ranks
from tests.recognition import runs
from tests.recognition.losses.cases import CASES

C, D, B = 203, 16, 12


def make(storage, case="arcface", sample_rate=0.3, num_subcenters=1, dtype=torch.float32):
    name, arguments = CASES[case]
    head = PartialFC(
        MARGINS[name](**arguments), D, C, sample_rate, num_subcenters, seed=5,
        class_counts=np.arange(C) % 7 + 1, head_storage=storage,
        limits=MemoryLimits(1500, chunk_size=7),
    )  # fmt: skip
    return head.to(dtype)


def batch(number, rank, world):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(B, D, generator=generator)
    # Half of the labels are of a few classes: the samples of neighbouring steps have them both.
    labels = torch.randint(0, C, (B,), generator=generator)
    labels[::2] = torch.randint(0, 9, (B // 2,), generator=generator)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    return x[mine], labels[mine]


def trained(storage, optimizer, steps=4, micro_steps=1, skipped=(), **options):
    """Everything that comes of some steps: losses, gradients, classes, rows, state."""
    rank, world = dist.get_rank(), dist.get_world_size()
    head = make(storage, **options)
    rows = optimizer(head)
    seen = []
    for step in range(steps):
        for micro in range(micro_steps):
            x, labels = batch(100 * step + micro, rank, world)
            local_x = x.to(head.weight.dtype).requires_grad_()
            loss = head(local_x, labels)
            loss.backward()
            seen += [loss.detach(), local_x.grad]
        seen += [head.sampled_classes.clone(), head.sampled_grad.clone()]
        found = torch.tensor(float(step in skipped)) if skipped else None
        rows.step(0.1, torch.tensor(4.0) if skipped else None, found)
    head.end_epoch()
    state = {**head.class_state(), **head.model_state(), **rows.state_dict()}
    return [*seen, head.weight.detach(), *(state[name] for name in sorted(state))]


def same(world, *arguments, **options):
    both = [ranks.run(world, called, trained, s, arguments, options) for s in ("device", "host")]
    for device, host in zip(*both, strict=True):
        assert len(device) == len(host)
        for one, other in zip(device, host, strict=True):
            assert torch.equal(one, other)


def called(function, storage, arguments, options):
    return function(storage, *arguments, **options)


@pytest.mark.parametrize("optimizer, micro_steps, sample_rate", [
    (RowSGD, 1, 0.0), (RowSGD, 3, 0.3), (RowSGD, 1, 1.0),
    (RowAdamW, 3, 0.0), (RowAdamW, 1, 0.3), (RowAdamW, 3, 1.0),
    *(pytest.param(*case, marks=pytest.mark.long) for case in [
        (RowSGD, 3, 0.0), (RowSGD, 1, 0.3), (RowSGD, 3, 1.0),
        (RowAdamW, 1, 0.0), (RowAdamW, 3, 0.3), (RowAdamW, 1, 1.0),
    ]),
])  # fmt: skip
def test_the_same_bits(optimizer, micro_steps, sample_rate):
    same(2, optimizer, micro_steps=micro_steps, sample_rate=sample_rate)


def losses():
    """Every loss with a sample of the rows or with all of them, in turn; the rest are long."""
    for number, (case, sample_rate) in enumerate(itertools.product(CASES, (0.3, 1.0))):
        quick = number % 4 in (0, 3)
        yield pytest.param(case, sample_rate, marks=[] if quick else pytest.mark.long)


@pytest.mark.parametrize("case, sample_rate", losses())
def test_of_every_loss(case, sample_rate):
    same(2, RowSGD, steps=3, case=case, sample_rate=sample_rate)


@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_skipped_steps_sub_centres_and_one_process(sample_rate):
    same(2, RowAdamW, skipped=(1, 2), sample_rate=sample_rate)
    same(2, RowSGD, micro_steps=2, num_subcenters=3, sample_rate=sample_rate)
    same(1, RowAdamW, sample_rate=sample_rate, dtype=torch.float64)


@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_a_step_skipped_on_the_device(sample_rate):
    """As on a GPU, where whether it is skipped is not known to the host."""
    ends = []
    for storage in ("device", "host"):
        head = make(storage, sample_rate=sample_rate)
        rows = RowSGD(head)
        for step in range(4):
            x, labels = batch(step, 0, 1)
            head(x.requires_grad_(), labels).backward()
            sampled = head.end_step()
            gradient = sampled.gradient().flatten(1)
            for start in range(0, len(gradient), 50):
                where = slice(start, min(start + 50, len(gradient)))
                found = torch.tensor(float(step == 1))
                rows._apply(
                    sampled.tables, sampled.at(where), gradient[where], lr=0.1, found_inf=found
                )
            head.storage.commit()
        head.settle()
        ends.append([head.weight.detach(), *rows.state.values()])
    assert all(map(torch.equal, *ends))


def test_two_forwards_before_their_backwards_and_one_that_learns_nothing():
    ends = []
    for storage in ("device", "host"):
        head = make(storage)
        rows = RowSGD(head)
        for step in range(3):
            losses = []
            for micro in range(2):
                x, labels = batch(10 * step + micro, 0, 1)
                with torch.no_grad():
                    head(x + 1, labels.flip(0))
                losses.append(head(x.requires_grad_(), labels))
            sum(losses).backward()
            rows.step(0.1)
        head.settle()
        ends.append([head.weight.detach(), *rows.state.values()])
    assert all(map(torch.equal, *ends))


def test_no_more_than_the_sampled_rows_are_on_the_device():
    classes, sample_rate = 20_000, 0.05
    head = PartialFC(MARGINS["cosface"](), D, classes, sample_rate, head_storage="host")
    rows, storage = RowSGD(head), head.storage
    drawn, loaded, stored = round(classes * sample_rate), [], []
    for step in range(5):
        x, labels = batch(step, 0, 1)
        before = storage.copies.rows_loaded, storage.copies.rows_stored
        head(x.requires_grad_(), labels).backward()
        sampled = len(head.sampled_classes)
        rows.step(0.1)
        storage.settle()
        storage._next.arrival.finish()
        loaded.append(storage.copies.rows_loaded - before[0])
        stored.append(storage.copies.rows_stored - before[1] - sampled)
    assert loaded[0] >= 2 * drawn and max(loaded[1:]) <= drawn + B  # the next step's, and missed
    assert stored == [0] * 5
    # Two stages, of weight and momentum, with room for the missed classes of two such batches.
    assert storage.bytes_on_device() <= 2 * 2 * (drawn + 2 * B + 1) * D * 4


def test_of_all_rows_two_pieces_of_each_table_are_on_the_device():
    head = PartialFC(
        MARGINS["cosface"](), D, 2000, head_storage="host", limits=MemoryLimits(0, chunk_size=100)
    )
    rows = RowSGD(head)
    for step in range(3):
        x, labels = batch(step, 0, 1)
        rows.begin(0.1)
        head(x.requires_grad_(), labels).backward()
        rows.step(0.1)
    assert head.storage.bytes_on_device() == 2 * 2 * 100 * D * 4
    assert head.storage.copies.rows_loaded == 3 * 2 * 2000


def test_changes_from_outside_are_seen():
    head = make("host")
    rows = RowSGD(head)
    x, labels = batch(0, 0, 1)
    for _ in range(2):
        head(x.requires_grad_(), labels).backward()
        rows.step(0.1)
    other = make("device", sample_rate=0.3)
    head.settle()
    with torch.no_grad():
        head.weight.mul_(2)
        other.weight.copy_(head.weight)
    other.step = head.step
    assert head(x, labels).item() == other(x, labels).item()
    loss = head(x, labels)
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_a_backward_after_its_step_was_dropped_is_refused(sample_rate):
    """Its memory may hold the rows of later steps."""
    head = make("host", sample_rate=sample_rate)
    rows = RowSGD(head)
    late = head(*batch(0, 0, 1))
    head.drop_step()
    for number in range(1, 5):
        x, labels = batch(number, 0, 1)
        rows.begin(0.1)
        head(x.requires_grad_(), labels).backward()
        rows.step(0.1)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        late.backward()


def test_the_weight_does_not_wait_for_the_copies_and_settle_does():
    head = make("host")
    rows, copied = RowSGD(head), threading.Event()
    before = head.weight.detach().clone()
    x, labels = batch(0, 0, 1)
    head(x.requires_grad_(), labels).backward()
    classes = head.sampled_classes
    head.storage.copies._thread.submit(copied.wait, 60)  # holds up the copies behind it
    rows.step(0.1)
    assert torch.equal(head.weight, before)
    copied.set()
    head.settle()
    assert (head.weight[classes] != before[classes]).any(1).all()


def test_the_state_dict_waits_for_the_copies():
    head = make("host")
    rows = RowSGD(head)
    start = {name: tensor.clone() for name, tensor in head.state_dict().items()}

    def step():
        x, labels = batch(0, 0, 1)
        head(x.requires_grad_(), labels).backward()
        head.storage.copies._thread.submit(time.sleep, 0.2)  # the copies behind it wait
        rows.step(0.1)

    step()
    saved = head.state_dict()["weight"].clone()
    assert torch.equal(saved, head.weight) and not torch.equal(saved, start["weight"])
    step()
    head.load_state_dict(start)
    assert torch.equal(head.weight, start["weight"])


def test_the_rows_stay_with_the_host_when_the_head_moves():
    """The meta device stands for one that is not the host's: nothing is computed here."""
    head = make("host", case="jamsface-all")
    head.to("meta")
    assert head.device.type == "meta" and head.weight.device.type == "cpu"
    assert head.margin.raw_angular.device.type == "meta"
    assert head.to(torch.float64).weight.dtype == torch.float64


def test_a_second_optimizer_is_not_mistaken_for_the_first():
    head = make("host")
    first = RowSGD(head)
    RowSGD(head)
    with pytest.raises(RuntimeError, match="another row optimizer"):
        first.step(0.1)


def test_a_failure_of_the_copies_is_the_steps():
    lane = CopyQueue(torch.device("cpu"))
    table = torch.zeros(4, 2)
    arrival = lane.load({"weight": table}, torch.tensor([9]), {"weight": torch.zeros(1, 2)})
    with pytest.raises(IndexError):
        arrival.wait()


@pytest.mark.parametrize("buffer_bytes", [12, 100, 1 << 20])
def test_copies_pass_through_buffers_of_any_size(buffer_bytes):
    lane = CopyQueue(torch.device("cpu"), buffer_bytes)
    table, there = torch.randn(50, 3), torch.zeros(7, 3)
    rows = torch.tensor([3, 9, 10, 11, 40, 41, 49])
    lane.load({"weight": table}, rows, {"weight": there}).wait()
    assert torch.equal(there, table[rows])
    expected = table.clone()
    expected[rows] = -there
    lane.store({"weight": table}, rows, {"weight": -there}).finish()
    assert torch.equal(table, expected)
    lane.store({"weight": table}, slice(5, 12), {"weight": there}).finish()
    assert torch.equal(table[5:12], there)
    assert (lane.rows_loaded, lane.rows_stored) == (7, 14)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"sample_rate": 0.5}, marks=pytest.mark.long),
        {"sample_rate": 1.0, "optimizer": "adamw"},
        pytest.param({"accumulation": 2, "margin": "jamsface"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_changes_its_storage_at_a_resume(shards_dir, tmp_path, keys):
    keys = {"rec": str(shards_dir), "max_steps": 4, "checkpoint_every": 2, "lr": 0.01, **keys}
    whole = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    for first, then in (("host", "device"), ("device", "host")):
        output = {"output": str(tmp_path / first)}
        ranks.run(2, runs.run, keys | output | {"head_storage": first}, 2)
        resumed = ranks.run(2, runs.run, keys | output | {"head_storage": then})[0]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="head_storage='disk'"):
        config.make({"rec": "-", "head_storage": "disk"})
    with pytest.raises(ValueError, match="head_storage='disk'"):
        make("disk")
