"""Every loss against the dense truth over three steps, at every world size: loss, dEmbeddings,
dWeight, the gradients of what the margin learns, and its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.optim import RowSGD
from tests import ranks, reference
from tests.recognition.losses.cases import CASES, FILTERED, STRAIGHT

C, D, STEPS, LR = 103, 16, 3, 0.05  # C divides by no world size above 1
EXACT = {"rtol": 1e-11, "atol": 1e-11}
COUNTS = 1 + np.arange(C) ** 2 % 37

# Names of the margins' state here -> in tests/reference.py.
TRUE_NAMES = {
    "margin.mean": "mean", "margin.std": "std", "margin.t": "t", "margin.adapted_scale": "scale",
    "margin.psi": "psi", "margin.feature_sum": "sum", "margin.seen": "seen",
    "margin.raw_angular": "angular", "margin.raw_cosine": "cosine", "margin.bias": "bias",
    "margin.margins": "margins",
}  # fmt: skip


def draw(step: int, rows: int, last_label: int):
    """Embeddings, labels; some near their centre, one opposite, one class twice."""
    generator = torch.Generator().manual_seed(100 + step)
    weight = first_weight()
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, last_label, (rows,), generator=generator)
    labels[3] = labels[4]
    for row, share in ((0, 1.0), (1, -1.0), (2, 0.4), (3, 0.3)):
        centre = weight[labels[row]].reshape(-1, D)[0]
        x[row] = (share * centre / centre.norm() * x[row].norm() + 0.4 * x[row]) * (1 + 0.2 * row)
    return x, labels


def first_weight(num_subcenters: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    shape = (C, D) if num_subcenters == 1 else (C, num_subcenters, D)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_head(name, arguments, sample_rate, num_subcenters=1):
    torch.set_default_dtype(torch.float64)  # or the margins by class size start as fp32 numbers
    try:
        margin = MARGINS[name](**arguments)
        head = PartialFC(margin, D, C, sample_rate, num_subcenters, seed=5, class_counts=COUNTS)
    finally:
        torch.set_default_dtype(torch.float32)
    head.weight.data.copy_(first_weight(num_subcenters)[slice(*head.shard)])
    return head


def state_of(head) -> tuple[dict, dict]:
    copies = (
        {k: v.clone() for k, v in s.items()} for s in (head.class_state(), head.model_state())
    )
    return tuple(copies)


def train(name, arguments, rows, sample_rate, num_subcenters, last_label, epochs):
    """One rank's run: what each step gave, and the state at the start and at the end."""
    head = make_head(name, arguments, sample_rate, num_subcenters)
    optimizer = RowSGD(head, momentum=0.0, weight_decay=0.0)
    drawn = []
    if name == "elasticface":
        draw_margins = head.margin.draw
        head.margin.draw = lambda batch: drawn.append(draw_margins(batch)) or drawn[-1]
    rank, steps, first = dist.get_rank(), [], state_of(head)
    local = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    for step in range(STEPS * epochs):
        x, labels = draw(step, sum(rows), last_label)
        local_x = x[local].clone().requires_grad_()
        loss = head(local_x, labels[local], None if len(set(rows)) == 1 else rows)
        loss.backward()
        gradients = {k: v.clone() for k, v in head.margin_gradients().items()}
        steps.append(
            (loss.detach(), local_x.grad, head.sampled_classes, head.sampled_grad, gradients)
        )
        optimizer.step(lr=LR)
        if epochs > 1 and step == STEPS - 1:
            head.end_epoch()
    return steps, first, state_of(head), head.weight.detach(), drawn


def whole(results, place: int) -> dict[str, torch.Tensor]:
    """State of all ranks by its name in the reference: class rows joined, the rest from rank 0."""
    by_class = {
        name: torch.cat([result[place][0][name] for result in results])
        for name in results[0][place][0]
    }
    for result in results[1:]:
        for name, value in result[place][1].items():
            assert torch.equal(value, results[0][place][1][name]), name
    everything = by_class | results[0][place][1]
    return {TRUE_NAMES[k]: v.double() for k, v in everything.items() if k != "votes"}


def check(name, arguments, world, sample_rate, rows=None, num_subcenters=1, last_label=C, epochs=1):
    rows = rows or [12 // world] * world
    results = ranks.run(
        world, train, name, arguments, rows, sample_rate, num_subcenters, last_label, epochs
    )
    state = whole(results, 1)
    if name == "dynamicarcface":
        state = {"counts": torch.from_numpy(COUNTS).double()}
    weight = first_weight(num_subcenters)
    for epoch in range(epochs):
        batches = []
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            x, labels = draw(step, sum(rows), last_label)
            classes = torch.cat([result[0][step][2] for result in results])
            assert len(classes.unique()) == len(classes) and np.isin(labels, classes).all()
            more = [{"margins": results[0][4][step]}] if name == "elasticface" else []
            batches.append((x, labels, classes, *more))
        run = reference.train(name, batches, weight, state, LR, **arguments)
        for step, truth in enumerate(run.steps, epoch * STEPS):
            check_step([result[0][step] for result in results], truth, weight.shape)
        weight, state = run.weight, run.state
        if epoch < epochs - 1:
            state = reference.end_epoch(name, state, **arguments)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), weight, **EXACT)
    if name not in ("dynamicarcface", "elasticface"):
        ours = whole(results, 2)
        assert ours.keys() <= state.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, state[key].double().detach(), msg=key, **EXACT)


def check_step(ours, truth, shape):
    for loss, *_ in ours:
        assert abs(loss - truth.loss) < 1e-11 * max(1, abs(truth.loss))
    # DistributedDataParallel divides by the world size what the gather multiplied.
    grad_x = torch.cat([grad for _, grad, *_ in ours]) / len(ours)
    torch.testing.assert_close(grad_x, truth.dx, **EXACT)
    classes, rows = (torch.cat([step[i] for step in ours]) for i in (2, 3))
    grad_weight = torch.zeros(shape, dtype=torch.float64).index_copy_(0, classes, rows)
    torch.testing.assert_close(grad_weight, truth.dweight, **EXACT)
    for name in ours[0][4]:
        gradients = [gradients[name] for *_, gradients in ours]
        by_class = gradients[0].dim() > 0
        gradient = torch.cat(gradients) if by_class else gradients[0]
        expected = truth.dparameters[TRUE_NAMES[f"margin.{name}"]]
        torch.testing.assert_close(gradient, expected, msg=name, **EXACT)


@pytest.mark.parametrize(
    "world, sample_rate",
    [
        (1, 1.0),
        (4, 0.3),
        # Between those above.
        pytest.param(2, 0.3, marks=pytest.mark.long),
        pytest.param(4, 1.0, marks=pytest.mark.long),
        pytest.param(1, 0.3, marks=pytest.mark.long),
        pytest.param(2, 1.0, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("case", CASES | STRAIGHT)
def test_three_steps_are_those_of_the_dense_layer(case, world, sample_rate):
    check(*(CASES | STRAIGHT)[case], world, sample_rate)


@pytest.mark.parametrize(
    "rows, last_label",
    [([5, 0, 3, 6], 50), pytest.param([9, 4], 20, marks=pytest.mark.long)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_ranks_without_a_target_and_uneven_batches(case, rows, last_label):
    """Half of the ranks, and more, hold no class of the batch: their shards are all negative."""
    check(*CASES[case], len(rows), 0.3, rows=rows, last_label=last_label)


@pytest.mark.parametrize("case", FILTERED)
def test_filtered(case):
    check(*FILTERED[case], 2, 1.0)


@pytest.mark.parametrize("num_subcenters", [pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("interface-dd", "interface-dc")]
)
def test_sub_centres(case, num_subcenters):
    check(*CASES[case], 2, 0.3, num_subcenters=num_subcenters)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("case", ["kappaface", "kappaface-weights"])
def test_the_second_epoch_has_new_margins(case, world):
    check(*CASES[case], world, 0.3, epochs=2)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_state_at_the_start(case, world):
    name, arguments = CASES[case]
    results = ranks.run(world, first_state, name, arguments)
    ours = whole(results, 0)
    counts = torch.from_numpy(COUNTS)
    truth = reference.initial_state(name, C, D, 0.3, counts, **arguments)
    if name == "adam":  # the authors draw from U(0.3, 0.4)
        assert 0.3 <= ours["margins"].min() < ours["margins"].max() <= 0.4
        assert abs(ours["margins"].mean() - 0.35) < 0.002
    elif name != "dynamicarcface":
        assert ours.keys() == truth.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, truth[key].detach(), **EXACT)


def first_state(name, arguments):
    return (state_of(make_head(name, arguments, 0.3)),)
