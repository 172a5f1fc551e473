"""The dense truths against what the authors' own classes gave, and against sums done by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests import reference
from tests.real import ROOT

VECTORS = ROOT.parent / "shared" / "reference" / "loss_vectors"
EXACT, SINGLE = 1e-9, 1e-6  # against classes that compute in fp64, and in fp32 inside
C, D = 12, 16  # of the vectors


def vector(name):
    """The arrays of one official result; the test is skipped where there are none."""
    path = VECTORS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no reference vectors at {VECTORS}")
    return {key: torch.from_numpy(array) for key, array in np.load(path).items()}


def noted(name):
    return json.loads((VECTORS / "manifest.json").read_text())[name]


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def run(name, x, weight, labels, state, classes=None, **arguments):
    """Loss, logits, gradients of x and of the weight, and the new state."""
    x, weight = (v.clone().requires_grad_() for v in (x, weight))
    classes = torch.arange(len(weight)) if classes is None else classes
    z, _ = reference.logits(name, x, weight, labels, classes, state, **arguments)
    loss, state = reference.loss(name, x, weight, labels, classes, state, **arguments)
    loss.backward()
    return {"loss": loss, "logits": z, "grad_X": x.grad, "grad_W": weight.grad}, state


def agree(got, official, tolerance, *names):
    for name in names or [n for n in ("logits", "loss", "grad_X", "grad_W") if n in official]:
        torch.testing.assert_close(
            got[name].detach(), official[name], rtol=0, atol=tolerance, msg=lambda m, n=name: n + m
        )


CASES = {
    "arcface_insightface_torch": ("arcface", {"gradient": "straight_through"}),
    "arcface_fallback": ("arcface", {"overflow": "fallback"}),
    "cosface_insightface_torch": ("cosface", {"margin": 0.4}),
    "adaface_head": ("adaface", {}),
    "adaface_cvlface_pfc": ("adaface", {"gradient": "straight_through"}),
    "interface_dd": ("interface", {"variant": "dd"}),
    "interface_dc": ("interface", {"variant": "dc"}),
    "interface_cc": ("interface", {"variant": "cc"}),
    "curricularface": ("curricularface", {}),
    "mv_am": ("mvsoftmax", {"kind": "am"}),
    "mv_arc": ("mvsoftmax", {"kind": "arc"}),
    "circle_cls": ("circle", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_authors_class(case):
    name, arguments = CASES[case]
    v = vector(case)
    state = reference.initial_state(name, C, D, **arguments)
    got, state = run(name, v["X"], v["W"], v["y"], state, **arguments)
    agree(got, v, SINGLE if case.startswith("cosface") else EXACT)
    after = {"t": "t_after", "mean": "ema_mean_after", "std": "ema_std_after"}
    for key in after.keys() & state.keys():
        if after[key] in noted(case):
            assert state[key].item() == pytest.approx(noted(case)[after[key]], abs=1e-12)


def test_adaface_with_warm_statistics():
    v = vector("adaface_head_warm")
    state = {"mean": scalar(20.0), "std": scalar(4.0)}
    got, _ = run("adaface", v["X"], v["W"], v["y"], state)
    agree(got, v, EXACT)


def test_kappaface_logits():
    v = vector("kappaface_logits")
    state = reference.initial_state("kappaface", C, D) | {"psi": v["psi"]}
    got, state = run("kappaface", v["X"], v["W"], v["y"], state)
    agree(got, v, SINGLE)
    assert state["seen"].tolist() == torch.bincount(v["y"], minlength=C).tolist()


def test_kappaface_margins_of_an_epoch():
    v = vector("kappaface_kappa")
    state = reference.initial_state("kappaface", 6, 32)
    _, state = reference.loss(
        "kappaface", v["features"].double(), torch.eye(6, 32, dtype=torch.float64),
        v["labels"], torch.arange(6), state,
    )  # fmt: skip
    assert torch.equal(state["seen"], v["counts"])
    kappa = reference.concentration(state["sum"], state["seen"])
    torch.testing.assert_close(kappa, v["kappa"].double(), rtol=SINGLE, atol=0)
    state = reference.end_epoch("kappaface", state)
    torch.testing.assert_close(state["psi"], v["psi"].double(), rtol=0, atol=SINGLE)
    assert state["sum"].abs().max() == 0 and state["seen"].max() == 0


def elastic(case):
    """The vector, and its margins: torch's generator draws them in fp32, one per row."""
    v, note = vector(case), noted(case)
    generator = torch.Generator().manual_seed(note["seed"])
    return v, torch.normal(note["m"], note["std"], (8, 1), generator=generator)[:, 0].double()


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface(kind):
    v, margins = elastic("elastic" + kind)
    got, _ = run("elasticface", v["X"], v["W"], v["y"], {"margins": margins}, kind=kind)
    agree(got, v, EXACT)


def test_elasticface_plus_pairs_by_rank_where_the_authors_permute():
    v, margins = elastic("elasticarc_plus")
    c = reference.of_target(reference.cosines(v["X"], v["W"]), v["y"])
    official = margins.sort().values[c.argsort(descending=True)]
    got, _ = run("elasticface", v["X"], v["W"], v["y"], {"margins": official})
    agree(got, v, EXACT)
    ours, _ = run("elasticface", v["X"], v["W"], v["y"], {"margins": margins}, plus=True)
    paired = {"margins": torch.empty(8).double()}
    for rank, row in enumerate(sorted(range(8), key=lambda i: -c[i])):
        paired["margins"][row] = sorted(margins.tolist())[rank]
    agree(ours, run("elasticface", v["X"], v["W"], v["y"], paired)[0], 1e-12)
    assert not torch.equal(official, paired["margins"])
    assert (ours["loss"] - v["loss"]).item() == pytest.approx(-0.4220712, abs=1e-6)


def test_magface_is_the_authors_cross_entropy_and_their_regulariser():
    """The class got 2 X, and returned its regulariser g apart, before lambda_g."""
    v = vector("magface")
    got, _ = run("magface", 2 * v["X"], v["W"], v["y"], {}, lambda_g=0.0)
    got["grad_X"] = 2 * got["grad_X"]
    agree(got, v, EXACT)
    whole, _ = run("magface", 2 * v["X"], v["W"], v["y"], {})
    expected = v["loss"].item() + 35 * noted("magface")["g_mean"]
    assert whole["loss"].item() == pytest.approx(expected, abs=EXACT)


def test_adam_is_the_authors_cross_entropy_and_their_regulariser():
    v = vector("adam_softmax")
    state = {"margins": v["margins"][0]}
    got, _ = run("adam", v["X"], v["W"], v["y"], state, reg=0.0)
    agree(got, v, EXACT)
    whole, _ = run("adam", v["X"], v["W"], v["y"], state)
    assert whole["loss"].item() == pytest.approx(
        v["loss"].item() + noted("adam_softmax")["reg"], abs=EXACT
    )


def test_adacos():
    v = vector("adacos")
    state = reference.initial_state("adacos", C, D)
    assert state["scale"].item() == pytest.approx(noted("adacos")["s0"], abs=1e-12)
    got, state = run("adacos", v["X"], v["W"], v["y"], state)
    agree(got, v, EXACT)
    assert state["scale"].item() == pytest.approx(noted("adacos")["s_after"], abs=1e-12)


def test_uniface():
    """The authors' bias is an fp32 parameter and their z stays inside [-s, s]."""
    v = vector("uniface_uce")
    state = reference.initial_state("uniface", C, D)
    assert state["bias"].item() == pytest.approx(noted("uniface_uce")["bias_init"], abs=1e-12)
    bias = state["bias"].detach().float().double().requires_grad_()
    got, _ = run("uniface", v["X"], v["W"], v["y"], {"bias": bias})
    agree(got, v, EXACT)
    torch.testing.assert_close(bias.grad, v["grad_bias"][0], rtol=0, atol=EXACT)
    # Row 4 (cos -0.95) is alone beyond the bound: its target pulls neither x nor the bias.
    z_y = 64 * (-0.95 - 0.4) - bias.item()
    free = bias.detach().clone().requires_grad_()
    unbounded, _ = run("uniface", v["X"], v["W"], v["y"], {"bias": free}, bounded=False)
    assert (unbounded["loss"] - v["loss"]).item() == pytest.approx((-64 - z_y) / 8, abs=EXACT)
    assert (free.grad - bias.grad).item() == pytest.approx(1 / 8, abs=EXACT)


def test_sphereface():
    """The authors normalise W in place: their dW is that of the unit rows, the part along the row
    included. Ours is its tangential part over |W|."""
    v = vector("sphereface_opensphere")
    got, _ = run(
        "sphereface", v["X"], v["W"], v["y"], {},
        scale=30.0, form="piecewise", m=1.7, gradient="straight_through",
    )  # fmt: skip
    agree(got, v, EXACT, "loss", "grad_X")
    length = v["W"].norm(dim=1, keepdim=True)
    unit = v["W"] / length
    along = (v["grad_W"] * unit).sum(1, keepdim=True) * unit
    agree(got, {"grad_W": (v["grad_W"] - along) / length}, EXACT, "grad_W")


# Where we differ from the authors' code on purpose.


def plane(*angles):
    """Unit vectors at these angles of the plane."""
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)


def logit(name, angle, state=None, others=(3.0,), **arguments):
    """T of one row whose target's angle is `angle`, and N of the negatives at `others`."""
    state = reference.initial_state(name, 2, 2) if state is None else state
    weight = plane(angle, *others)
    z, terms = reference.logits(
        name, plane(0.0), weight, torch.tensor([0]), torch.arange(len(weight)), state, **arguments
    )
    return (z[0] / terms.scale).tolist()


def test_adaface_does_not_clamp_the_cosine():
    """The authors cut it at 1 - 1e-3: at t = 0.01 (cos 1 - 5e-5) their target stands at t = 0.0447
    and has no gradient."""
    state = {"mean": scalar(1.0), "std": scalar(1.0)}  # q = 0: cos t - m
    assert logit("adaface", 0.01, state)[0] == pytest.approx(math.cos(0.01) - 0.4, abs=1e-12)
    official = math.cos(math.acos(1 - 1e-3)) - 0.4
    assert logit("adaface", 0.01, state)[0] - official == pytest.approx(9.5e-4, abs=1e-6)


def test_combined_uses_all_three_margins():
    """InsightFace's torch class drops m1 and m2 when m3 > 0: there the target is cos t - m3."""
    ours = logit("combined", math.pi / 3, m1=1.0, m2=0.3, m3=0.2)[0]
    assert ours == pytest.approx(math.cos(math.pi / 3 + 0.3) - 0.2, abs=1e-12)
    assert ours - (0.5 - 0.2) == pytest.approx(-0.2782598, abs=1e-6)


def test_kappaface_without_singletons_is_not_moved_by_one():
    """The authors' r of a single feature is 1 up to rounding, its kappa anything."""
    unit = plane(0.0, 1.0, 0.0, 0.3, 2.0)
    labels = torch.tensor([0, 0, 1, 1, 2])
    psi = []
    for rows in (4, 5):  # without and with the singleton of class 2
        state = reference.initial_state("kappaface", 3, 2)
        state["sum"].index_add_(0, labels[:rows], unit[:rows])
        state["seen"].index_add_(0, labels[:rows], torch.ones(rows, dtype=torch.float64))
        psi.append(reference.end_epoch("kappaface", state)["psi"])
    assert torch.equal(psi[0][:2], psi[1][:2]) and psi[0][2] == 1


# By hand.


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_kappaface_of_four_classes_by_hand():
    """Two features at right angles; three and one; a singleton; none."""
    state = reference.initial_state("kappaface", 4, 2)
    x = torch.tensor([[5, 0], [0, 2], [1, 0], [3, 0], [1, 0], [0, 1], [7, 0]]).double()
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    _, state = reference.loss(
        "kappaface", x, plane(0, 1, 2, 3), labels, torch.arange(4), state
    )  # fmt: skip
    assert state["sum"].tolist() == [[1, 1], [3, 1], [1, 0], [0, 0]]
    state["psi"][3] = 0.4
    arguments = {"temperature": 0.4, "w_kappa": 0.6, "w_size": 0.9}
    psi = reference.end_epoch("kappaface", state, **arguments)["psi"]
    # Of two values the standardised ones are -+ 1/sqrt 2; class 0 (r 0.71) is below class 1
    # (r 0.79); the lower median is class 0's.
    low, high = (1 - sigmoid(0.4 * sign / math.sqrt(2)) for sign in (-1, 1))
    size = [(math.cos(math.pi * n / 4.2) + 1) / 2 for n in (2, 4, 1)]
    expected = [0.6 * k + 0.9 * n for k, n in zip((low, high, low), size, strict=True)]
    assert psi.tolist() == pytest.approx([*expected, 0.4], abs=1e-12)


@pytest.mark.parametrize("sums, seen", [([3.0, 1.0], [4, 1]), ([1.2, 1.2], [2, 2])])
def test_kappaface_without_a_spread_of_kappas_weighs_size_alone(sums, seen):
    seen = torch.tensor(seen).double()
    state = {"sum": torch.diag(scalar(sums)), "seen": seen, "psi": torch.ones(2).double()}
    psi = reference.end_epoch("kappaface", state)["psi"]
    size = (torch.cos(math.pi * seen / (1.05 * seen.max())) + 1) / 2
    torch.testing.assert_close(psi, 0.7 * 0.5 + 0.3 * size)


def test_kappaface_of_equal_features_is_finite():
    """r = 1 would be kappa infinite: r stays at 1 - 1e-3."""
    kappa = reference.concentration(scalar([[2.0, 0.0], [1.0, 1.0]]), scalar([2.0, 2.0]))
    near, r = 1 - 1e-3, math.sqrt(0.5)
    expected = [near * (2 - near**2) / (1 - near**2), r * (2 - 0.5) / 0.5]
    assert kappa.tolist() == pytest.approx(expected, rel=1e-12)


def test_kappaface_of_an_empty_epoch_keeps_its_margins():
    state = reference.initial_state("kappaface", 3, 2)
    assert reference.end_epoch("kappaface", state)["psi"].tolist() == [1, 1, 1]


def test_jamsface_starts_at_its_margins_and_regularises_three_classes():
    arguments = {"reg_angular": 10.0, "reg_cosine": 100.0}
    state = reference.initial_state("jamsface", 3, 2)
    assert logit("jamsface", 0.7, state, (2.0, 3.0), **arguments)[0] == pytest.approx(
        math.cos(0.7 + 0.3) - 0.2, abs=1e-12
    )
    raw = torch.tensor([-1.0, 0.0, 2.0]).double()
    batch = (plane(0.0, 0.1, 0.3), plane(0.2, 1, 2), torch.tensor([2, 2, 0]), torch.arange(3))
    value = {}
    for scope in ("all", "batch"):
        for reg in (0.0, 1.0):
            state = {"angular": raw.clone().requires_grad_(), "cosine": 2 * raw}
            loss, _ = reference.loss(
                "jamsface", *batch, state, reg_angular=10 * reg, reg_cosine=100 * reg, scope=scope
            )
            loss.backward()
            value[scope, reg] = loss.item(), state["angular"].grad
    every = [10 * (0.8 - 0.8 * sigmoid(a)) + 100 * (0.5 - 0.5 * sigmoid(2 * a)) for a in (-1, 0, 2)]
    assert value["all", 1.0][0] - value["all", 0.0][0] == pytest.approx(sum(every) / 3, abs=1e-9)
    mean = (every[0] + every[2]) / 2  # class 2 counts once
    assert value["batch", 1.0][0] - value["batch", 0.0][0] == pytest.approx(mean, abs=1e-9)
    slope = [-10 * 0.8 * sigmoid(a) * sigmoid(-a) for a in (-1, 0, 2)]
    pushed = value["all", 1.0][1] - value["all", 0.0][1]
    assert pushed.tolist() == pytest.approx([s / 3 for s in slope], abs=1e-9)
    pushed = value["batch", 1.0][1] - value["batch", 0.0][1]
    assert pushed.tolist() == pytest.approx([slope[0] / 2, 0, slope[2] / 2], abs=1e-9)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_sphereface2_starts_where_the_two_gradients_balance(sample_rate):
    """At cos 0 everywhere the bias's gradient, of the positives and of the negatives, sums to 0."""
    x, weight = torch.eye(11)[9:].double(), torch.eye(9, 11).double()
    classes = torch.arange(1 + round(8 * sample_rate))
    grads = []
    for shift in (0.0, 1.0):
        state = reference.initial_state("sphereface2", 9, 11, sample_rate)
        state["bias"] = (state["bias"] + shift).detach().requires_grad_()
        batch = (x, weight, torch.tensor([0, 0]), classes)
        reference.loss("sphereface2", *batch, state)[0].backward()
        grads.append(state["bias"].grad.item())
    assert abs(grads[0]) < 1e-12 < grads[1]


def test_uniface_by_hand():
    """One row, two negatives: dloss/db = sigmoid(-z_y) - w sum sigmoid(z_j)."""
    state = reference.initial_state("uniface", 3, 2, sample_rate=0.5)
    b = math.log(10 * 3 * 0.5)
    assert state["bias"].item() == pytest.approx(b)
    batch = (plane(0.0), plane(0.8, 1.4, 2.0), torch.tensor([0]), torch.arange(3))
    loss, _ = reference.loss("uniface", *batch, state, scale=8.0, negative_weight=0.3)
    loss.backward()
    z_y, *z_j = 8 * (math.cos(0.8) - 0.4) - b, 8 * math.cos(1.4) - b, 8 * math.cos(2.0) - b
    expected = math.log(1 + math.exp(-z_y)) + 0.3 * sum(math.log(1 + math.exp(z)) for z in z_j)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    slope = sigmoid(-z_y) - 0.3 * sum(map(sigmoid, z_j))
    assert state["bias"].grad.item() == pytest.approx(slope, abs=1e-12)


def test_sphereface2_by_hand():
    def g(angle):
        return 2 * ((math.cos(angle) + 1) / 2) ** 3 - 1

    batch = (plane(0.0), plane(0.8, 1.4, 2.0), torch.tensor([0]), torch.arange(2))  # 2.0 left out
    loss, _ = reference.loss("sphereface2", *batch, {"bias": scalar(1.0)}, scale=8.0)
    z_y, z_j = 8 * (g(0.8) - 0.4) + 1, 8 * (g(1.4) + 0.4) + 1
    expected = 0.7 * math.log(1 + math.exp(-z_y)) + 0.3 * math.log(1 + math.exp(z_j))
    assert loss.item() == pytest.approx(50 / 8 * expected, abs=1e-12)


def adacos(angles, weight, classes, **state):
    labels = torch.zeros(len(angles), dtype=torch.int64)
    x = torch.nn.functional.pad(plane(*angles), (0, weight.shape[1] - 2))
    start = reference.initial_state("adacos", len(weight), weight.shape[1]) | state
    return reference.loss("adacos", x, weight, labels, classes, start)[1]["scale"].item()


def test_adacos_scales_a_sample_of_the_negatives_up_to_all():
    """All negatives at cos 0: B_avg = C - 1, sampled or not; the median of two is the lower."""
    weight = torch.eye(40, 42).double()[:, [0, 40, *range(1, 40), 41]]  # class 0 in the plane
    for classes in (torch.arange(40), torch.arange(0, 40, 3)):
        assert adacos([0.2, 0.6], weight, classes) == pytest.approx(
            math.log(39) / math.cos(0.2), abs=1e-12
        )
        assert adacos([1.2, 1.3], weight, classes) == pytest.approx(
            math.log(39) / math.cos(math.pi / 4), abs=1e-12
        )


def test_adacos_never_falls_below_one():
    assert adacos([0.1], plane(0.0, math.pi), torch.arange(2), scale=scalar(5.0)) == 1


def test_dynamicarcface_by_hand():
    state = reference.initial_state("dynamicarcface", 4, 2, counts=torch.tensor([16, 81, 0, 1]))
    # n^-1/4 = 1/2, 1/3, 1 (an empty class counts as one image), 1
    for label, margin in enumerate([0.05 + 0.45 * (1 / 2 - 1 / 3) / (1 - 1 / 3), 0.05, 0.5, 0.5]):
        weight = plane(*[2.0] * label, 0.7, *[2.0] * (3 - label))
        z, _ = reference.logits(
            "dynamicarcface", plane(0.0), weight, torch.tensor([label]), torch.arange(4), state
        )
        assert z[0, label].item() == pytest.approx(80 * math.cos(0.7 + margin), abs=1e-12)
    equal = reference.initial_state("dynamicarcface", 2, 2, counts=torch.tensor([7, 7]))
    assert logit("dynamicarcface", 0.7, equal)[0] == pytest.approx(math.cos(0.75), abs=1e-12)


def test_sphereface_and_its_revival_by_hand():
    cos = math.cos
    assert logit("sphereface", 0.7)[0] == pytest.approx(cos(1.35 * 0.7))
    for angle, k in ((1.0, 0), (2.0, 1)):
        expected = (-1) ** k * cos(1.7 * angle) - 2 * k
        got = logit("sphereface", angle, form="piecewise")[0]
        assert got == pytest.approx(expected, abs=1e-12)
    for angle, target in ((1.0, cos(1.5)), (2.5, -1)):
        got = logit("spherefacer", angle, version="v1")
        assert got == pytest.approx([target, cos(3.0)], abs=1e-12)
    assert logit("spherefacer", 2.5, version="v2") == pytest.approx([cos(2.5), cos(2)], abs=1e-12)


def test_overflow_rules():
    """t + m = 3.3 > pi; a margin per class crosses at its own angle."""
    t, m = 2.8, 0.5
    after = {
        "none": math.cos(t + m),
        "fallback": math.cos(t) - m * math.sin(m),
        "easy": math.cos(t),
    }
    for overflow, expected in after.items():
        for name in ("arcface", "curricularface", "interface"):
            got = logit(name, t, overflow=overflow)[0]
            assert got == pytest.approx(expected, abs=1e-12)
        got = logit("elasticface", t, {"margins": scalar([m])}, overflow=overflow)[0]
        assert got == pytest.approx(expected, abs=1e-12)
    got = logit("elasticface", t, {"margins": scalar([0.3])}, overflow="fallback")[0]
    assert got == pytest.approx(math.cos(3.1), abs=1e-12)


def test_curricularface_renews_t_before_it_is_used():
    """The negative at 0.4 is hard for the target at 0.3 with m = 0.5, the one at 0.9 is not."""
    got = logit("curricularface", 0.3, {"t": scalar(0.5)}, (-0.4, 0.9))
    t = 0.99 * 0.5 + 0.01 * math.cos(0.3)
    hard = math.cos(0.4) * (t + math.cos(0.4))
    assert got == pytest.approx([math.cos(0.8), hard, math.cos(0.9)], abs=1e-12)


def test_mvsoftmax_fixed_reweighting():
    got = logit("mvsoftmax", 0.3, {}, (0.4, 0.9), adaptive=False)
    assert got == pytest.approx([math.cos(0.8), math.cos(0.4) + 0.2, math.cos(0.9)], abs=1e-12)


def test_adaface_of_one_row_keeps_its_deviation():
    state = reference.initial_state("adaface", 2, 2)
    batch = (3 * plane(0.0), plane(0.5, 2.0), torch.tensor([0]), torch.arange(2))
    _, state = reference.loss("adaface", *batch, state)
    assert state["std"] == 100 and state["mean"].item() == pytest.approx(0.99 * 20 + 0.01 * 3)


def test_the_filter_zeroes_negatives_and_their_gradient():
    """Before the negatives' formula: N of a filtered one is N(0)."""
    got = logit("cosface", 0.3, None, (0.4, 1.2), interclass_filtering_threshold=0.5)
    assert got == pytest.approx([math.cos(0.3) - 0.4, 0, math.cos(1.2)], abs=1e-12)
    got = logit("spherefacer", 0.3, None, (0.4,), version="v2", interclass_filtering_threshold=0.5)
    assert got[1] == pytest.approx(math.cos(math.pi / 2 / 1.5), abs=1e-12)
    for name in ("cosface", "sphereface2"):
        for gradient in ("exact", "straight_through"):
            state, tau = (
                reference.initial_state(name, 2, 2),
                {"interclass_filtering_threshold": 0.5},
            )
            batch = (plane(0.0), plane(0.3, 0.4), torch.tensor([0]), state)
            got, _ = run(name, *batch, gradient=gradient, **tau)
            assert got["grad_W"][1].abs().max() == 0 and got["grad_W"][0].abs().max() > 0


def test_adam_stays_between_nought_and_one():
    state = reference.project("adam", {"margins": scalar([-0.1, 0.4, 1.2])})
    assert state["margins"].tolist() == [0, 0.4, 1] and state["margins"].requires_grad


# What holds for every loss.

LOSSES = {name: {} for name in reference.LOSSES} | {
    "combined": {"m1": 0.9, "m2": 0.4, "m3": 0.15},
    "jamsface": {"reg_angular": 7.0, "reg_cosine": 9.0},
    "spherefacer": {"version": "v2"},
    "uniface": {"scale": 10.0},
}
OF_THE_WHOLE_SET = {"adacos", "jamsface", "adam", "dynamicarcface"}  # they read all C classes


def problem(name, num_subcenters=1):
    """x, weight, labels and a state with something in it."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight = 4 * randn(6, 8), randn(10, num_subcenters, 8)
    labels = torch.tensor([0, 3, 3, 7, 9, 5])
    x[0] += 6 * weight[0, 0]
    counts = torch.arange(10) * 7
    state = reference.initial_state(name, 10, 8, counts=counts, **LOSSES[name])
    if name == "elasticface":
        state["margins"] = 0.5 + 0.05 * randn(6)
    return x, weight, labels, state


@pytest.mark.parametrize("name", LOSSES)
def test_straight_through_changes_gradients_alone(name):
    x, weight, labels, state = problem(name)
    exact, _ = run(name, x, weight, labels, state, **LOSSES[name])
    straight, _ = run(name, x, weight, labels, state, gradient="straight_through", **LOSSES[name])
    torch.testing.assert_close(straight["loss"], exact["loss"], rtol=1e-14, atol=0)
    same = (straight["grad_X"] - exact["grad_X"]).abs().max() < 1e-12
    assert same == (name in {"softmax", "cosface", "adam", "adacos", "uniface"})


@pytest.mark.parametrize("name", ["spherefacer", "sphereface2"])
def test_straight_through_reaches_the_negatives(name):
    """dz/dcos = scale for the target and for each negative."""
    cos = torch.tensor([[0.3, -0.2, 0.6]], dtype=torch.float64).requires_grad_()
    x = torch.nn.functional.pad(cos, (0, 1))
    x = x + torch.tensor([0, 0, 0, 1]) * (1 - cos.pow(2).sum()).sqrt()  # of length 1
    z, terms = reference.logits(
        name, x, torch.eye(3, 4).double(), torch.tensor([0]), torch.arange(3),
        {"bias": scalar(0.0)}, "straight_through", **LOSSES[name],
    )  # fmt: skip
    for j in range(3):
        (grad,) = torch.autograd.grad(z[0, j], cos, retain_graph=True)
        assert grad[0].tolist() == pytest.approx([terms.scale * (i == j) for i in range(3)])


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - OF_THE_WHOLE_SET - {"kappaface"}))
def test_a_sample_is_the_loss_of_its_classes_alone(name):
    x, weight, labels, state = problem(name)
    classes = torch.tensor([9, 0, 3, 5, 2, 7])
    got, _ = run(name, x, weight, labels, state, classes, **LOSSES[name])
    position = {int(c): i for i, c in enumerate(classes)}
    renamed = torch.tensor([position[int(y)] for y in labels])
    alone, _ = run(name, x, weight[classes], renamed, state, **LOSSES[name])
    assert got["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-13)
    torch.testing.assert_close(got["grad_X"], alone["grad_X"])
    torch.testing.assert_close(got["grad_W"][classes], alone["grad_W"])
    assert got["grad_W"][[1, 4, 6, 8]].abs().max() == 0


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"interface"}))
def test_sub_centres_are_the_loss_of_the_nearest(name):
    """One row, so that each class has one nearest sub-centre: the others do not matter."""
    x, weight, labels, state = problem(name, num_subcenters=3)
    x, labels = x[:1], labels[:1]
    if name == "elasticface":
        state = {"margins": state["margins"][:1]}
    unit = torch.nn.functional.normalize(weight, dim=2)
    nearest = (unit @ x[0]).argmax(1)  # [C]
    got, _ = run(name, x, weight, labels, state, **LOSSES[name])
    alone, _ = run(name, x, weight[torch.arange(10), nearest], labels, state, **LOSSES[name])
    assert got["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-13)
    torch.testing.assert_close(got["grad_W"][torch.arange(10), nearest], alone["grad_W"])
    assert len(nearest.unique()) > 1


@pytest.mark.parametrize("name", LOSSES)
def test_training_is_plain_sgd(name):
    """Against torch's optimiser on every class, the learned parameters at a tenth of the rate."""
    x, weight, labels, state = problem(name)
    batches = [(x * k, labels.roll(k), torch.arange(10)) for k in (1, 2, 3)]
    got = reference.train(name, batches, weight, state, 0.02, 0.1, **LOSSES[name])
    weight = weight.clone().requires_grad_()
    learned = [state[key] for key in reference.LEARNED.get(name, ())]
    sgd = torch.optim.SGD(
        [{"params": [weight]}, {"params": learned, "lr": 0.002}][: 1 + bool(learned)], lr=0.02
    )
    for step, (x, labels, classes) in zip(got.steps, batches, strict=True):
        sgd.zero_grad()
        loss, state = reference.loss(name, x, weight, labels, classes, state, **LOSSES[name])
        loss.backward()
        torch.testing.assert_close(step.loss, loss.detach())
        torch.testing.assert_close(step.dweight, weight.grad)
        for key, gradient in step.dparameters.items():
            torch.testing.assert_close(gradient, state[key].grad)
            assert gradient.abs().max() > 0
        sgd.step()
        if name == "adam":
            learned[0].data.clamp_(0, 1)
    torch.testing.assert_close(got.weight, weight.detach())
    assert got.state.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(got.state[key].detach(), value.detach())


def test_training_moves_the_sampled_rows_and_takes_each_steps_draw():
    x, weight, labels, _ = problem("elasticface")
    classes, draws = torch.tensor([0, 3, 5, 7, 9, 1]), [scalar([m] * 6) for m in (0.1, 0.4)]
    batches = [(x, labels, classes, {"margins": margins}) for margins in draws]
    got = reference.train("elasticface", batches, weight, {}, 0.1)
    assert torch.equal(got.weight[[2, 4, 6, 8]], weight[[2, 4, 6, 8]])
    assert (got.weight[classes] - weight[classes]).flatten(1).abs().amax(1).min() > 0
    second, _ = run(
        "arcface", x, weight - 0.1 * got.steps[0].dweight, labels, {}, classes, margin=0.4
    )  # fmt: skip
    assert second["loss"].item() == pytest.approx(got.steps[1].loss.item(), rel=1e-13)
