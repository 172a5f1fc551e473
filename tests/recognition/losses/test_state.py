"""State of losses: what accumulation blends, what a skipped step drops, what a late backward sees,
the edges of the number range, and low precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.losses.margin import Histogram
from recognition.optim import RowAdamW, RowSGD
from tests import reference
from tests.recognition.losses.cases import CASES, STRAIGHT

C, D = 40, 8
COUNTS = 1 + np.arange(C) % 7

STATEFUL = [
    "adaface", "adacos", "kappaface", "jamsface-all", "jamsface-batch", "adam", "curricularface",
    "uniface", "sphereface2",
]  # fmt: skip


def make_head(case, num_subcenters=1, **options):
    name, arguments = (CASES | STRAIGHT)[case]
    return PartialFC(
        MARGINS[name](**arguments), D, C, num_subcenters=num_subcenters, seed=3,
        class_counts=COUNTS, **options,
    ).double()  # fmt: skip


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64) * (2 + step)
    return x, torch.randint(0, C, (rows,), generator=generator)


def everything(head, optimizer=None):
    state = {"weight": head.weight.detach()} | head.class_state() | head.model_state()
    if optimizer is not None:
        state |= optimizer.state | optimizer.model_state
    return {name: value.clone() for name, value in state.items()}


# Micro-batches 1..j blend into the old statistic; the optimiser step keeps them as one batch.


@pytest.mark.parametrize(
    "case", ["adaface", "adacos", "curricularface", "kappaface", "jamsface-all", "uniface"]
)
def test_two_micro_steps_leave_the_state_of_one_batch(case):
    """With the weights 1/2, as the trainer gives them; every class is compared with every row."""
    whole, parts = make_head(case), make_head(case)
    x, labels = batch(2, rows=12)
    whole(x, labels).backward()
    for rows in (slice(0, 6), slice(6, 12)):
        (parts(x[rows], labels[rows]) / 2).backward()
    for head in (whole, parts):
        RowSGD(head, momentum=0.0, weight_decay=0.0).step(0.0)  # the rows need not agree
    for name, value in everything(whole).items():
        torch.testing.assert_close(everything(parts)[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_micro_step_uses_what_has_been_gathered():
    """AdaFace's second micro-batch is judged by the statistics of both."""
    head = make_head("adaface")
    x, labels = batch(1, rows=12)
    alpha = head.margin.t_alpha
    head(x[:6], labels[:6]).backward()
    norm = x.norm(dim=1)
    assert float(head.margin.mean) == 20.0  # not before the step
    assert float(head.margin.current("mean")) == pytest.approx(
        20 + alpha * (float(norm[:6].mean()) - 20)
    )
    head(x[6:], labels[6:]).backward()
    assert float(head.margin.current("mean")) == pytest.approx(
        20 + alpha * (float(norm.mean()) - 20)
    )
    head.end_step()
    assert float(head.margin.mean) == pytest.approx(20 + alpha * (float(norm.mean()) - 20))
    assert float(head.margin.std) == pytest.approx(100 + alpha * (float(norm.std()) - 100))


@pytest.mark.parametrize("make_optimizer", [RowSGD, RowAdamW])
@pytest.mark.parametrize("case", STATEFUL)
def test_a_skipped_step_leaves_no_trace(case, make_optimizer):
    head = make_head(case, num_subcenters=2)
    optimizer = make_optimizer(head)
    head(*batch(1)).backward()
    optimizer.step(0.1, found_inf=torch.tensor(0.0))
    before = everything(head, optimizer)
    head(*batch(2)).backward()
    optimizer.step(0.1, found_inf=torch.tensor(1.0))
    for name, value in everything(head, optimizer).items():
        assert torch.equal(value, before[name]), name
    head(*batch(2)).backward()
    optimizer.step(0.1, found_inf=torch.tensor(0.0))
    changed = [n for n, v in everything(head, optimizer).items() if not torch.equal(v, before[n])]
    assert len(changed) >= 2 and "weight" in changed


def test_not_finite_features_of_a_skipped_step_stay_out():
    head = make_head("kappaface")
    x, labels = batch(1)
    x[2] = torch.inf
    head(x, labels).backward()
    RowSGD(head).step(0.1, found_inf=torch.tensor(1.0))
    assert head.margin.feature_sum.abs().sum() == 0 and head.margin.seen.sum() == 0


@pytest.mark.parametrize("case", STATEFUL)
def test_a_look_without_training_changes_nothing(case):
    head = make_head(case, num_subcenters=2)
    before = everything(head)
    with torch.no_grad():
        head(*batch(1))
    head.eval()
    head(*batch(1)).backward()
    head.end_step()
    for name, value in everything(head).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", ["adaface", "adacos", "curricularface", "interface-dd", "uniface"])
def test_a_late_backward_uses_the_state_of_its_forward(case):
    late, usual = make_head(case), make_head(case)
    grads = []
    for head, is_late in ((late, True), (usual, False)):
        a, b = (batch(step)[0].requires_grad_() for step in (1, 2))
        loss_a = head(a, batch(1)[1])
        if not is_late:
            loss_a.backward()
        loss_b = head(b, batch(2)[1])
        if is_late:
            loss_a.backward()
        loss_b.backward()
        grads.append((a.grad, b.grad, head.sampled_grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make_optimizer", [RowSGD, RowAdamW])
def test_margins_of_classes_outside_the_batch_rest(make_optimizer):
    """jamsface with scope="batch": value and optimiser state of other classes stay bit-identical,
    though they have momentum; with scope="all" every class moves up."""
    head = make_head("jamsface-batch")
    optimizer = make_optimizer(head)
    x = batch(1)[0]
    head(x, torch.arange(8)).backward()
    optimizer.step(0.1)
    before = everything(head, optimizer)
    head(x, torch.arange(8) + 8).backward()
    optimizer.step(0.1)
    after = everything(head, optimizer)
    for name in before:
        if name.startswith("margin."):
            assert torch.equal(after[name][:8], before[name][:8]), name
            assert (after[name][8:16] != before[name][8:16]).any(), name
            assert torch.equal(after[name][16:], before[name][16:]), name
    everywhere = make_head("jamsface-all")
    everywhere(x, torch.arange(8)).backward()
    start = everywhere.margin.margins().detach().clone()
    make_optimizer(everywhere).step(0.1)
    assert (everywhere.margin.margins().detach()[8:] > start[8:]).all()


def test_learned_margins_are_not_decayed_and_have_their_own_rate():
    rates = {}
    for factor in (1.0, 0.1):
        margin = MARGINS["jamsface"](lr_factor=factor, reg_angular=5.0, reg_cosine=3.0)
        head = PartialFC(margin, D, C, seed=3).double()
        start = margin.raw_angular.detach().clone()
        head(*batch(1)).backward()
        RowSGD(head, momentum=0.0, weight_decay=0.9).step(0.1)
        rates[factor] = margin.raw_angular.detach() - start
    torch.testing.assert_close(rates[0.1], 0.1 * rates[1.0], rtol=1e-6, atol=1e-9)
    outside = torch.ones(C, dtype=torch.bool)
    outside[batch(1)[1]] = False
    assert rates[1.0][outside].abs().max() < 0.01  # a decay of 0.09 would take 0.046


def test_adam_margins_stay_in_their_bounds():
    head = make_head("adam")
    for _ in range(3):
        head(*batch(1)).backward()
        RowSGD(head, momentum=0.0).step(1.0)
    margins = head.margin.margins.detach()
    assert margins.min() >= 0 and margins.max() <= 1 and (margins == 1).any()


# KappaFace's corners.


def test_kappaface_singletons_and_unseen_classes():
    """A class of one image takes the median weight, an unseen one keeps its psi, and neither moves
    the others: their psi is that of an epoch without them."""

    def epoch(labels):
        head = PartialFC(MARGINS["kappaface"](), D, 9).double()
        head.margin.psi[8] = 0.123
        generator = torch.Generator().manual_seed(0)
        centre = torch.randn(9, D, generator=generator, dtype=torch.float64) * 2
        noise = torch.randn(32, D, generator=generator, dtype=torch.float64)
        head(centre[labels] + noise[: len(labels)], labels).backward()
        head.end_step()
        head.end_epoch()
        return head.margin.psi

    several = torch.arange(5).repeat(4)
    plain, with_single = epoch(several), epoch(torch.cat([several, torch.tensor([6])]))
    torch.testing.assert_close(with_single[:5], plain[:5], rtol=1e-12, atol=1e-12)
    assert with_single[8] == plain[8] == 0.123
    w_s = (math.cos(math.pi / (1.05 * 4)) + 1) / 2
    w_k = (plain[:5] - 0.3 * (math.cos(math.pi / 1.05) + 1) / 2) / 0.7
    assert float(with_single[6]) == pytest.approx(0.7 * float(w_k.median()) + 0.3 * w_s, rel=1e-9)


def test_kappaface_with_one_image_over_and_over():
    """Identical images have no finite concentration: psi stays finite and in range, for all."""
    head = PartialFC(MARGINS["kappaface"](), D, 6).double()
    x = torch.randn(6, D, dtype=torch.float64)
    x[:2] = x[0]
    head(x, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    head.end_step()
    head.end_epoch()
    assert head.margin.psi.isfinite().all()
    assert (head.margin.psi >= 0).all() and (head.margin.psi <= 1).all()
    assert head.margin.psi[0] < head.margin.psi[1:3].min()  # the most concentrated, least margin


@pytest.mark.parametrize("num", [3, 5, 10, 100])
def test_kappaface_where_all_classes_are_alike(num):
    """All concentrations at their limit: a deviation of rounding must not become +-1."""
    head = PartialFC(MARGINS["kappaface"](), D, num).double()
    x = torch.eye(D, dtype=torch.float64)[torch.arange(num) % D].repeat(2, 1)
    head(x, torch.arange(num).repeat(2)).backward()
    head.end_step()
    head.end_epoch()
    w_s = (math.cos(math.pi / 1.05) + 1) / 2
    torch.testing.assert_close(
        head.margin.psi, torch.full((num,), 0.7 * 0.5 + 0.3 * w_s, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "scale, num_classes, sample_rate", [(64, 2, 1.0), (40, 2, 1.0), (46, 2, 1.0), (64, 90, 0.0)]
)
def test_sphereface2_starts_balanced_with_one_negative(scale, num_classes, sample_rate):
    """lam / ((1 - lam) n) > 1: the pulls at cos t = 0, target and negatives, are equal."""
    margin = MARGINS["sphereface2"](scale=float(scale))
    PartialFC(margin, D, num_classes, sample_rate)
    bias, middle = margin.bias.item(), 2 * 0.5**3 - 1
    positive, negative = (scale * (middle + sign * 0.4) + bias for sign in (-1, 1))
    pull = 0.7 / (1 + math.exp(positive))
    assert pull == pytest.approx(0.3 / (1 + math.exp(-negative)), rel=1e-4)  # b is fp32


def test_an_open_step_can_be_dropped():
    head = make_head("adaface")
    before = everything(head)
    head(*batch(1)).backward()
    head.drop_step()
    with pytest.raises(RuntimeError, match="backward"):
        head.end_step()
    head(*batch(2)).backward()
    fresh = make_head("adaface")
    fresh(*batch(2)).backward()
    assert torch.equal(head.sampled_grad, fresh.sampled_grad)
    head.drop_step()
    for name, value in everything(head).items():
        assert torch.equal(value, before[name]), name


def test_an_epoch_without_a_sample_changes_nothing():
    head = make_head("kappaface")
    head.end_epoch()
    assert torch.equal(head.margin.psi, torch.ones_like(head.margin.psi))


# Edges of the number range.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES | STRAIGHT)
def test_finite_at_the_edges(case, dtype):
    """cos = +-1, 0 and norm 0, a tiny and a huge norm, then a batch of one; the state too."""
    head = make_head(case).to(torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = RowSGD(head)
    centre = head.weight[7].detach() / head.weight[7].detach().norm()
    other = torch.nn.functional.normalize(torch.randn(D, dtype=centre.dtype), dim=0)
    across = other - (other @ centre) * centre
    rows = [20 * centre, -20 * centre, 20 * across, 0 * centre, 1e-20 * centre, 1e6 * centre]
    for x in (torch.stack(rows), rows[0][None], rows[3][None]):
        x = x.to(dtype).requires_grad_()
        loss = head(x, torch.full((len(x),), 7))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and head.sampled_grad.isfinite().all()
        for name, gradient in head.margin_gradients().items():
            assert gradient.isfinite().all(), name
        optimizer.step(0.01)
    head.end_epoch()
    for name, value in everything(head, optimizer).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("elasticface")])
def test_bf16_features_are_no_worse_than_a_naive_bf16_layer(case):
    """Error of the embeddings' gradient against fp64 on the same bf16 features: ours (fp32
    logits) and that of the formula written down in bf16."""
    name, arguments = CASES[case]
    ours, naive = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(32, 64, generator=generator) * 2).bfloat16()
        weight = torch.randn(200, 64, generator=generator).bfloat16()
        labels = torch.randint(0, 200, (32,), generator=generator)
        x[:8] = (weight[labels[:8]].float() * 2 + x[:8].float()).bfloat16()  # some near
        counts = np.arange(200) % 9 + 1
        head = PartialFC(MARGINS[name](**arguments), 64, 200, class_counts=counts)
        head.weight.data.copy_(weight.float())
        state = reference.initial_state(name, 200, 64, counts=torch.from_numpy(counts), **arguments)
        if name == "adam":
            state["margins"] = head.margin.margins.detach().double()
        grads = []
        for dtype in (torch.float64, torch.bfloat16):
            wide = x.detach().to(dtype).requires_grad_()
            cast = {key: v.detach().to(dtype) for key, v in state.items()}
            loss, _ = reference.loss(
                name, wide, weight.to(dtype), labels, torch.arange(200), cast, **arguments
            )
            loss.backward()
            grads.append(wide.grad.double())
        local_x = x.clone().requires_grad_()
        head(local_x, labels).backward()
        ours.append(float((local_x.grad.double() - grads[0]).norm()))
        naive.append(float((grads[1] - grads[0]).norm()))
    assert np.median(ours) <= np.median(naive)


# What the log says.


@pytest.mark.parametrize("case", CASES)
def test_statistics(case):
    head = make_head(case, num_subcenters=1 if case.startswith("interface") else 3)
    head(*batch(1)).backward()
    head.end_step()
    found = head.statistics()
    assert {"cos_target", "margin"} <= found.keys()
    assert not {"cos_target", "margin"} & head.margin.statistics(head._reduce_values).keys()
    end = head.end_epoch()
    for name, value in (found | end).items():
        if isinstance(value, Histogram):
            assert len(value.edges) == len(value.counts) + 1 and value.counts.sum() > 0, name
        else:
            assert value.dim() == 0 and value.isfinite(), name
    if head.votes is not None:
        assert 1 / 3 <= end["dominant_subcenter_share"] <= 1


def test_the_mean_margin_is_what_the_loss_takes_off():
    head = make_head("cosface")
    head(*batch(1)).backward()
    assert float(head.statistics()["margin"]) == pytest.approx(0.4)


def test_votes_count_the_nearest_sub_centre():
    head = make_head("arcface", num_subcenters=3)
    labels = torch.tensor([5, 5, 5, 9])
    x = head.weight.detach()[labels, torch.tensor([2, 2, 0, 1])]
    head(x, labels).backward()
    head.end_step()
    assert head.votes[5].tolist() == [1, 0, 2] and head.votes[9].tolist() == [0, 1, 0]
    assert float(head.end_epoch()["dominant_subcenter_share"]) == pytest.approx(3 / 4)
    assert head.votes.sum() == 0


def test_kappaface_histograms_count_classes():
    head = make_head("kappaface")
    head(*batch(1, rows=60)).backward()
    head.end_step()
    seen = head.margin.seen.clone()
    end = head.end_epoch()
    assert end["psi"].counts.sum() == C and end["kappa"].counts.sum() == (seen >= 2).sum()
    assert end["classes_seen"] == (seen > 0).sum()
    sizes = [name for name in end if name.startswith("margin_of_classes")]
    assert "margin_of_classes_from_2_images" in sizes


# Mistakes.


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("interface", {"num_subcenters": 3}, "one centre a class"),
        ("dynamicarcface", {}, "number of images of each class"),
        ("arcface", {"class_counts": np.ones(3)}, r"class_counts of shape \(3,\), not \(40,\)"),
        ("arcface", {"class_counts": np.full(C, 0.5)}, "class_counts of float64: whole numbers"),
        ("arcface", {"class_counts": np.full(C, -1)}, "none negative"),
    ],
)
def test_a_layer_that_a_margin_cannot_serve(name, options, words):
    with pytest.raises(ValueError, match=words):
        PartialFC(MARGINS[name](), D, C, **options)


def test_a_slow_copy_must_be_given():
    head = PartialFC(MARGINS["kappaface"](features="momentum"), D, C)
    x, labels = torch.randn(4, D), torch.arange(4)
    with pytest.raises(ValueError, match="local_features"):
        head(x, labels)
    with pytest.raises(ValueError, match=r"features of shape \(3, 8\)"):
        head(x, labels, None, torch.randn(3, D))
    slow = torch.randn(4, D)
    head(x, labels, None, slow).backward()
    head.end_step()
    torch.testing.assert_close(
        head.margin.feature_sum[:4], torch.nn.functional.normalize(slow), rtol=1e-6, atol=1e-6
    )
