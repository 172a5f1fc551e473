"""Row optimisers against torch's on the touched rows; the schedule against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from recognition.precision import LossScaler
from recognition.run.schedule import Schedule

C, D = 50, 8


def make_head(sample_rate, num_subcenters=1):
    return PartialFC(MARGINS["arcface"](), D, C, sample_rate, num_subcenters, seed=3).double()


def batch(step, rows=6):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (rows,), generator=generator)


OPTIMIZERS = {
    "sgd": (RowSGD, lambda p: torch.optim.SGD([p], 0.1, momentum=0.9, weight_decay=5e-4)),
    "adamw": (RowAdamW, lambda p: torch.optim.AdamW([p], 0.1, weight_decay=5e-4)),
}


@pytest.mark.parametrize("num_subcenters", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_torch_where_every_row_is_sampled(name, num_subcenters):
    ours, theirs = OPTIMIZERS[name]
    head = make_head(1.0, num_subcenters)
    weight = head.weight.detach().clone().requires_grad_()
    row_optimizer, optimizer = ours(head, weight_decay=5e-4), theirs(weight)
    for step in range(5):
        head(*batch(step)).backward()
        weight.grad = head.sampled_grad.clone()
        row_optimizer.step(lr=0.1)
        optimizer.step()
        torch.testing.assert_close(head.weight.detach(), weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unsampled_rows_stay_bit_identical(name):
    head = make_head(0.2)
    row_optimizer = OPTIMIZERS[name][0](head)
    for step in range(6):
        head(*batch(step)).backward()
        sampled = head.sampled_classes.clone()
        others = torch.ones(C, dtype=torch.bool)
        others[sampled] = False
        before = {k: v.clone() for k, v in row_optimizer.state.items()}
        weight = head.weight.detach().clone()
        row_optimizer.step(lr=0.1)
        assert torch.equal(head.weight[others], weight[others])
        assert (head.weight[sampled] != weight[sampled]).any(1).all()
        for key, value in row_optimizer.state.items():
            assert torch.equal(value[others], before[key][others])


def test_adamw_counts_the_steps_of_each_row():
    """A row first sampled late moves by lr in its first step, as Adam's first step does."""
    head = make_head(0.0)
    row_optimizer = RowAdamW(head, weight_decay=0.0, eps=0.0)
    x, _ = batch(0)
    for _ in range(5):
        head(x, torch.arange(6)).backward()
        row_optimizer.step(lr=0.01)
    before = head.weight.detach().clone()
    head(x, torch.arange(6) + 20).backward()
    row_optimizer.step(lr=0.01)
    moved = (head.weight.detach() - before)[20:26].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-9, atol=0)


def test_found_inf_changes_nothing_and_scale_divides():
    head = make_head(0.3)
    row_optimizer = RowSGD(head, momentum=0.0, weight_decay=0.0)
    (head(*batch(0)) * 1024).backward()
    before, grad, classes = head.weight.detach().clone(), head.sampled_grad, head.sampled_classes
    row_optimizer.step(0.1, torch.tensor(1024.0), torch.tensor(1.0))
    assert torch.equal(head.weight, before) and head.step == 1
    (head(*batch(1)) * 1024).backward()
    before, grad, classes = head.weight.detach().clone(), head.sampled_grad, head.sampled_classes
    row_optimizer.step(0.1, torch.tensor(1024.0), torch.tensor(0.0))
    expected = before[classes] - 0.1 * grad / 1024
    torch.testing.assert_close(head.weight[classes].detach(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_micro_steps_are_union_and_sum(sample_rate):
    """Three micro-steps with weights 1/3 are the whole batch, and the rows are moved once."""
    whole, parts = make_head(sample_rate), make_head(sample_rate)
    x, labels = batch(4, rows=12)
    whole(x, labels).backward()
    for chunk in range(3):
        where = slice(4 * chunk, 4 * chunk + 4)
        (parts(x[where], labels[where]) / 3).backward()
    got = torch.zeros(C, D, dtype=torch.float64)
    got[parts.sampled_classes] = parts.sampled_grad
    assert len(parts.sampled_classes.unique()) == len(parts.sampled_classes)
    if sample_rate == 1.0:
        torch.testing.assert_close(got, whole.sampled_grad, rtol=1e-12, atol=1e-14)
    else:  # each micro-batch sees its own positives beside the shared negatives
        expected = torch.zeros_like(got)
        for chunk in range(3):
            alone = make_head(sample_rate)
            where = slice(4 * chunk, 4 * chunk + 4)
            alone(x[where], labels[where]).backward()
            expected[alone.sampled_classes] += alone.sampled_grad / 3
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    RowSGD(parts).step(0.1)
    assert parts.step == 1


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_a_backward_may_come_late(sample_rate):
    """Forward a, forward b, backward a, a look at the gradient, backward b: both count."""
    late, usual = make_head(sample_rate), make_head(sample_rate)
    a, b = batch(1), batch(2)
    loss_a, loss_b = late(*a), late(*b)
    loss_a.backward()
    assert len(late.sampled_grad) == len(late.sampled_classes)
    loss_b.backward()
    usual(*a).backward()
    usual(*b).backward()
    assert torch.equal(late.sampled_classes, usual.sampled_classes)
    torch.testing.assert_close(late.sampled_grad, usual.sampled_grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sample_rate, most", [(1.0, 1), (0.2, 4)])
def test_micro_steps_do_not_pile_up_gradients(sample_rate, most):
    """Tensors of the sampled rows' size alive after eight micro-steps."""
    head = make_head(sample_rate)
    for step in range(8):
        head(*batch(step)).backward()
    head.sampled_grad  # noqa: B018  the last one is collected
    alive = [rows.grad for rows in head._micro_steps.open if rows.grad is not None]
    alive.append(head._micro_steps.done.grad)
    assert len({grad.data_ptr() for grad in alive}) <= most


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_travels_by_class_id(name):
    """Rows handed over in another order, with classes of other ranks among them."""
    head, other = make_head(0.3), make_head(0.3)
    row_optimizer = OPTIMIZERS[name][0](head)
    for step in range(3):
        head(*batch(step)).backward()
        row_optimizer.step(0.1)
    state = row_optimizer.state_dict()
    assert state["classes"].tolist() == list(range(C))
    shuffle = torch.randperm(C + 5, generator=torch.Generator().manual_seed(0))
    extended = {
        k: torch.cat([v, v[:5] + C if k == "classes" else v[:5] * 0])[shuffle]
        for k, v in state.items()
    }
    loaded = OPTIMIZERS[name][0](other)
    loaded.load_state_dict(extended)
    assert all(torch.equal(loaded.state[k], row_optimizer.state[k]) for k in loaded.state)
    with pytest.raises(KeyError, match="no state for 1 classes, the first 49"):
        loaded.load_state_dict({k: v[:-1] for k, v in state.items()})
    with pytest.raises(KeyError, match="expected"):
        loaded.load_state_dict({"classes": state["classes"]})


@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_the_rows_may_not_change_between_forward_and_backward(sample_rate):
    head = make_head(sample_rate)
    first, second = head(*batch(1)), head(*batch(2))
    first.backward()
    RowSGD(head).step(0.1)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        second.backward()


def test_an_optimizer_older_than_the_heads_precision_is_refused():
    head = PartialFC(MARGINS["arcface"](), D, C)
    row_optimizer = RowSGD(head)
    head.double()
    head(*batch(1)).backward()
    with pytest.raises(TypeError, match="after moving the head"):
        row_optimizer.step(0.1)


def test_a_dropped_step_takes_its_begin_with_it():
    head, other = make_head(1.0), make_head(1.0)
    row_optimizer, plain = RowSGD(head), RowSGD(other)
    row_optimizer.begin(0.1)
    head(*batch(1))
    head.drop_step()
    for one, rows in ((head, row_optimizer), (other, plain)):
        one(*batch(2)).backward()
        rows.step(0.1)
    assert torch.equal(head.weight, other.weight)


def test_after_a_refused_step_the_right_one_ends_it():
    head = make_head(1.0)
    row_optimizer = RowSGD(head)
    row_optimizer.begin(0.1)
    head(*batch(1)).backward()
    with pytest.raises(ValueError, match="have another lr"):
        row_optimizer.step(0.2)
    row_optimizer.step(0.1)
    assert head.step == 1 and not head.has_begun


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_refused(name, dtype):
    with pytest.raises(TypeError, match="keep the head in float32"):
        OPTIMIZERS[name][0](make_head(0.3).to(dtype))


def test_a_step_without_a_gradient_is_an_error():
    head = make_head(1.0)
    with pytest.raises(RuntimeError, match="backward"):
        RowSGD(head).step(0.1)


def test_schedules():
    poly = Schedule("polynomial", 0.1, 100, warmup_steps=10, power=2.0)
    assert [poly.lr_at(s) for s in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])
    assert poly.lr_at(10) == pytest.approx(0.1)
    assert poly.lr_at(55) == pytest.approx(0.1 * 0.25)
    assert poly.lr_at(100) == poly.lr_at(1000) == 0.0
    cosine = Schedule("cosine", 0.2, 100)
    assert cosine.lr_at(25) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    steps = Schedule("step", 0.1, 100, milestones=[30, 60], gamma=0.1)
    assert [steps.lr_at(s) for s in (29, 30, 60)] == pytest.approx([0.1, 0.01, 0.001])


def test_loss_scale_halves_and_grows():
    scaler = LossScaler(torch.device("cpu"), initial=8.0, growth_interval=2)
    scaler.update(torch.tensor(1.0))
    assert scaler.scale.item() == 4.0
    scaler.update(torch.tensor(0.0))
    scaler.update(torch.tensor(0.0))
    assert scaler.scale.item() == 8.0
