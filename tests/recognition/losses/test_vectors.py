"""The authors' own classes, run once in float64: the head gives their loss and gradients, and where
it does not, the difference is stated. (What each vector is: its manifest.)"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.losses.margin import Layer, Rows
from tests.real import ROOT

VECTORS = ROOT.parent / "shared" / "reference" / "loss_vectors"

# vector: (margin, arguments, tolerance). KappaFace and InsightFace's CosFace are float32 inside.
CASES = {
    "arcface_insightface_torch": ("arcface", {"gradient": "straight_through"}, 1e-9),
    "arcface_fallback": ("arcface", {"overflow": "fallback"}, 1e-9),
    "cosface_insightface_torch": ("cosface", {"margin": 0.4}, 1e-6),
    "sphereface_opensphere": (
        "sphereface",
        {"form": "piecewise", "m": 1.7, "scale": 30.0, "gradient": "straight_through"},
        1e-9,
    ),
    "adaface_head": ("adaface", {}, 1e-9),
    "adaface_head_warm": ("adaface", {}, 1e-9),
    "adaface_cvlface_pfc": ("adaface", {"gradient": "straight_through"}, 1e-9),
    "kappaface_logits": ("kappaface", {}, 1e-6),
    "adam_softmax": ("adam", {"reg": 0.0}, 1e-9),  # the loss of the vector is without the term
    "interface_dd": ("interface", {}, 1e-9),
    "interface_dc": ("interface", {"variant": "dc"}, 1e-9),
    "interface_cc": ("interface", {"variant": "cc"}, 1e-9),
    "curricularface": ("curricularface", {}, 1e-9),
    "mv_am": ("mvsoftmax", {"kind": "am"}, 1e-9),
    "mv_arc": ("mvsoftmax", {"kind": "arc"}, 1e-9),
    "magface": ("magface", {"lambda_g": 0.0}, 1e-9),  # likewise
    "elasticarc": ("elasticface", {"std": 0.05}, 1e-9),
    "elasticcos": ("elasticface", {"kind": "cos", "std": 0.05}, 1e-9),
    "circle_cls": ("circle", {}, 1e-9),
    "uniface_uce": ("uniface", {"bounded": True}, 1e-9),
}


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    path = VECTORS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no results of the official classes at {path}")
    facts = json.loads((VECTORS / "manifest.json").read_text())[name]
    with np.load(path) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}, facts


def run(name, margin, arguments):
    """Our head on the vector's case: loss, dX, dW, the head."""
    vector, facts = load(name)
    x, weight = vector["X"].clone().requires_grad_(), vector["W"]
    fed = 2 * x if name == "magface" else x
    head = PartialFC(MARGINS[margin](**arguments), x.shape[1], len(weight)).double()
    head.weight.data.copy_(weight)
    own = head.margin
    if name == "adaface_head_warm":
        own.mean.fill_(20.0)
        own.std.fill_(4.0)
    elif name == "kappaface_logits":
        own.psi.copy_(vector["psi"])
    elif name == "adam_softmax":
        own.margins.data.copy_(vector["margins"][0])
    elif name == "uniface_uce":
        own.bias.data.fill_(float(np.float32(facts["bias_init"])))  # as the authors hold it
    elif margin == "elasticface":
        own.draw = lambda rows: official_draw(facts, len(x))
    loss = head(fed, vector["y"].long())
    loss.backward()
    return vector, facts, loss.detach(), x.grad, head


def official_draw(facts, rows):
    """The authors' torch.normal from the seed in the manifest."""
    generator = torch.Generator().manual_seed(facts["seed"])
    size = torch.zeros(rows, 1, dtype=torch.float64)
    return torch.normal(facts["m"], facts["std"], size=size.shape, generator=generator).double()[
        :, 0
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_both_gradients_are_the_authors(name):
    margin, arguments, tolerance = CASES[name]
    vector, _, loss, grad_x, head = run(name, margin, arguments)
    assert float(loss) == pytest.approx(float(vector["loss"]), rel=tolerance)
    exact = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(grad_x, vector["grad_X"].double(), **exact)
    grad_weight = vector["grad_W"].double()
    if name == "sphereface_opensphere":
        # OpenSphere overwrites the centres by unit ones, so its gradient is that of a unit centre
        # and moves its length; ours is that of the centre as it is.
        norm = head.weight.detach().norm(dim=1, keepdim=True)
        unit = head.weight.detach() / norm
        grad_weight = (grad_weight - (grad_weight * unit).sum(1, keepdim=True) * unit) / norm
    torch.testing.assert_close(head.sampled_grad, grad_weight, **exact)
    if "grad_bias" in vector:
        torch.testing.assert_close(head.margin.bias.grad, vector["grad_bias"][0], **exact)


def replaced(margin, x, weight, labels):
    """scale * target of our margin on a vector's rows: [B]."""
    head = PartialFC(margin, x.shape[1], len(weight)).double()
    head.weight.data.copy_(weight)
    head(x, labels)
    return margin.scale * head._last[1]


def test_kappaface_concentrations_and_margins():
    """Ten-odd images of six classes: kappa and psi after the epoch."""
    vector, facts = load("kappaface_kappa")
    features, labels = vector["features"].double(), vector["labels"].long()
    size, num = features.shape[1], int(labels.max()) + 1
    margin = MARGINS["kappaface"](temperature=facts["T"], gamma=facts["gamma"])
    head = PartialFC(margin, size, num).double()
    head(features, labels).backward()
    head.end_step()
    torch.testing.assert_close(
        margin.feature_sum.norm(dim=1) / margin.seen, vector["R"].double().flatten(),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(
        margin._concentrations(), vector["kappa"].double().flatten(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(margin.seen, vector["counts"].long())
    head.end_epoch()
    torch.testing.assert_close(margin.psi, vector["psi"].double(), rtol=1e-6, atol=1e-6)


def test_adacos_scale_and_logits():
    """The loss of this class is not in the vector: its scale and logits are."""
    vector, facts = load("adacos")
    x, weight, labels = vector["X"], vector["W"], vector["y"].long()
    head = PartialFC(MARGINS["adacos"](), x.shape[1], len(weight)).double()
    head.weight.data.copy_(weight)
    assert float(head.margin.scale) == pytest.approx(facts["s0"], rel=1e-6)
    head.margin.adapted_scale.fill_(facts["s0"])
    loss = head(x.clone().requires_grad_(), labels)
    loss.backward()
    head.end_step()
    assert float(head.margin.adapted_scale) == pytest.approx(facts["s_after"], rel=1e-9)
    truth = torch.nn.functional.cross_entropy(vector["logits"], labels)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-9)


def test_what_a_step_leaves_behind():
    """AdaFace's statistics and CurricularFace's t after the step of their vectors."""
    _, facts, *_, head = run("adaface_head", "adaface", {})
    head.end_step()
    assert float(head.margin.mean) == pytest.approx(facts["ema_mean_after"], rel=1e-6)
    assert float(head.margin.std) == pytest.approx(facts["ema_std_after"], rel=1e-6)
    _, facts, *_, head = run("curricularface", "curricularface", {})
    head.end_step()
    assert float(head.margin.t) == pytest.approx(facts["t_after"], rel=1e-6)


def test_magface_regulariser():
    vector, facts, *_ = run("magface", "magface", {})
    own = MARGINS["magface"](lambda_g=1.0)
    norm = (2 * vector["X"]).norm(dim=1)
    assert float(own.regularizer(Rows(norm, norm, norm, norm))) == pytest.approx(
        facts["g_mean"], rel=1e-9
    )


def test_adam_regulariser():
    vector, facts = load("adam_softmax")
    margin = MARGINS["adam"](reg=facts["lamda"])
    margin.bind(Layer(12, (0, 12), 16))
    margin.margins.data = vector["margins"][0].double()
    assert margin.class_regularizer().item() == pytest.approx(facts["reg"], rel=1e-6)


# --- Where we differ on purpose -------------------------------------------------------------------


def test_elasticface_plus_pairs_in_order():
    """The authors apply a permutation where its inverse is due; ours gives the largest cosine the
    smallest margin. Both from the same draw; the vector shows theirs."""
    vector, facts = load("elasticarc_plus")
    x, weight, labels = vector["X"], vector["W"], vector["y"].long()
    drawn = official_draw(facts, len(x))
    unit = torch.nn.functional.normalize
    cos = (unit(x) * unit(weight)[labels]).sum(1)
    theirs = drawn.sort().values[torch.argsort(cos, descending=True)]
    rows = torch.arange(len(x))
    logits = 64 * torch.cos(torch.arccos(cos) + theirs)
    torch.testing.assert_close(logits, vector["logits"][rows, labels], rtol=1e-6, atol=1e-6)

    margin = MARGINS["elasticface"](std=facts["std"], plus=True)
    margin.draw = lambda rows: drawn
    ours = torch.arccos(replaced(margin, x, weight, labels) / 64) - torch.arccos(cos)
    inside = torch.arccos(cos) + drawn.max() < math.pi
    assert (
        ours[cos.argsort(descending=True)][inside[cos.argsort(descending=True)]].diff() > 0
    ).all()
    assert not torch.allclose(ours[inside], theirs[inside], atol=1e-3)


def test_adaface_does_not_clamp_the_cosine():
    """The authors' cosines end at 0.999, so a row on its centre keeps an angle of 0.045; ours
    follows the formula to the angle 0.001."""
    weight = torch.eye(4, 8, dtype=torch.float64)
    x = 20.0 * weight[:1]
    margin = MARGINS["adaface"](t_alpha=0.0)  # q = 0
    ours = replaced(margin, x, weight, torch.tensor([0]))
    assert float(ours) == pytest.approx(64 * (math.cos(1e-3) - 0.4), rel=1e-9)
    theirs = 64 * (0.999 - 0.4)
    assert float(ours) - theirs == pytest.approx(0.064, rel=1e-2)


def test_the_combined_margin_combines():
    """InsightFace's class with m3 > 0 drops m1 and m2."""
    vector, _ = load("cosface_insightface_torch")
    x, weight, labels = vector["X"], vector["W"], vector["y"].long()
    ours = replaced(MARGINS["combined"](m1=1.0, m2=0.3, m3=0.4), x, weight, labels)
    unit = torch.nn.functional.normalize
    angle = torch.arccos((unit(x) * unit(weight)[labels]).sum(1))
    torch.testing.assert_close(ours, 64 * (torch.cos(angle + 0.3) - 0.4), rtol=1e-12, atol=1e-12)
    theirs = vector["logits"][torch.arange(len(x)), labels].double()
    torch.testing.assert_close(theirs, 64 * (torch.cos(angle) - 0.4), rtol=1e-6, atol=1e-5)
    assert (ours - theirs).abs().min() > 1


def test_uniface_far_behind_its_margin_still_learns():
    """The authors cut z at -s: no gradient for the worst rows. Not here, unless bounded=True."""
    x = torch.tensor([[-1.0, 0.1]], dtype=torch.float64)
    grads = []
    for bounded in (False, True):
        head = PartialFC(MARGINS["uniface"](bounded=bounded), 2, 2).double()
        head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        local_x = x.clone().requires_grad_()
        head(local_x, torch.tensor([0])).backward()
        grads.append(head.sampled_grad[0].norm())
    assert grads[0] > 1 and grads[1] == 0
