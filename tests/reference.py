"""Dense truths of every loss, written from the papers' formulas. Imports nothing of the project.

Letters: B rows, D embedding, C classes, S sampled classes, K sub-centres; c cosine, t = arccos c
its angle, s scale, T what replaces the target's cosine, N what replaces a negative's. Everything is
one process and one matrix, in the dtype of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

# Target cosine [B] and embedding norm [B] -> what replaces the target cosine [B].
Target = Callable[[Tensor, Tensor], Tensor]


def partial_fc(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [C, D] or [C, K, D]
    labels: Tensor,  # int64 [B]
    classes: Tensor,  # int64 [S] the sampled classes, any order
    target: Target,
    scale: float = 64.0,
    threshold: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over the sampled classes, and its gradients: (loss, dx, dweight)."""
    x = x.detach().to(dtype).clone().requires_grad_()
    weight = weight.detach().to(dtype).clone().requires_grad_()
    cos = cosines(x, weight)
    t = target(of_target(cos, labels), x.pow(2).sum(1).sqrt())
    z = scale * with_target(filtered(cos, threshold), labels, t)
    loss = cross_entropy(z.masked_fill(~chosen(classes, weight), -math.inf), labels)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def cosines(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C]: to each class the largest over its sub-centres (arXiv:1801.07698 eq. 7)."""
    centres = weight if weight.dim() == 3 else weight[:, None]  # [C, K, D]
    x = x / x.pow(2).sum(1, keepdim=True).sqrt()
    centres = centres / centres.pow(2).sum(2, keepdim=True).sqrt()
    return torch.stack([x @ centres[:, k].T for k in range(centres.shape[1])]).max(0).values


def filtered(cos: Tensor, threshold: float) -> Tensor:
    """Cosines above the threshold become the constant 0; threshold 0 is off (InsightFace's
    interclass_filtering_threshold)."""
    return torch.where(cos.detach() > threshold, torch.zeros_like(cos), cos) if threshold else cos


def of_target(matrix: Tensor, labels: Tensor) -> Tensor:
    return matrix[torch.arange(len(labels)), labels]  # [B, C] -> [B]


def with_target(matrix: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    return torch.where(one_hot(labels, matrix.shape[1]).bool(), target[:, None], matrix)


def softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))  # torch's softplus is 2e-9 off at its threshold


def chosen(classes: Tensor, weight: Tensor) -> Tensor:
    """Bool [C]: is this class sampled."""
    return torch.zeros(len(weight), dtype=torch.bool).index_fill_(0, classes, True)


# Target functions: what the published margins put in the place of the target's cosine.


def softmax(cos: Tensor, norm: Tensor) -> Tensor:
    return cos


def cosface(cos: Tensor, norm: Tensor, m: float) -> Tensor:
    return cos - m


def arcface(cos: Tensor, norm: Tensor, m: float | Tensor) -> Tensor:
    return torch.cos(torch.arccos(cos) + m)


def combined(cos: Tensor, norm: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    return torch.cos(m1 * torch.arccos(cos) + m2) - m3


def fallback(cos: Tensor, norm: Tensor, m: float | Tensor) -> Tensor:
    """ArcFace of 2018: past t + m = pi the straight line cos t - m sin m."""
    m = torch.as_tensor(m, dtype=cos.dtype)
    return torch.where(cos > torch.cos(math.pi - m), arcface(cos, norm, m), cos - m * torch.sin(m))


def easy(cos: Tensor, norm: Tensor, m: float | Tensor) -> Tensor:
    return torch.where(cos > 0, arcface(cos, norm, m), cos)


def by_norm(cos: Tensor, norm: Tensor) -> Tensor:
    """No published loss: a target that moves with the embedding's norm, as MagFace's does."""
    return cos - 0.02 * norm


def straight_through(target: Target) -> Target:
    """The value of `target` with the slope of the identity."""
    return lambda cos, norm: target(cos.detach(), norm) + cos - cos.detach()


# The losses. Each formula below takes a Batch and its state and gives Terms.

State = dict[str, Tensor]


class Batch(NamedTuple):
    c: Tensor  # [B] cosine to the own class; without gradient under straight_through
    cos: Tensor  # [B, C] cosine to every class, after the filter
    labels: Tensor  # [B]
    sampled: Tensor  # bool [C]
    x: Tensor  # [B, D] before normalisation
    weight: Tensor  # [C, (K,) D]

    @property
    def norm(self) -> Tensor:
        return self.x.pow(2).sum(1).sqrt()  # [B]


class Terms(NamedTuple):
    """z_y = scale T + bias, z_j = scale N + bias."""

    scale: float | Tensor
    target: Tensor  # T [B]
    negatives: Tensor  # N [B, C]; the own class's column is not read
    state: State = {}  # the entries that this step changes
    regularizer: float | Tensor = 0.0
    bias: float | Tensor = 0.0
    # The sigmoid losses' weights of softplus(-z_y) and of the sum of softplus(z_j); None: softmax.
    weights: tuple[float, float] | None = None
    bound: float = math.inf  # z stays in [-bound, bound], without gradient where it is cut


def loss(
    name: str,
    x: Tensor,  # [B, D]
    weight: Tensor,  # [C, (K,) D]
    labels: Tensor,  # int64 [B]
    classes: Tensor,  # int64 [S] the sampled classes, any order
    state: State,
    **arguments,
) -> tuple[Tensor, State]:
    """The loss of that name, mean over the rows, with its graph; and the state after this step.

    The arguments are the formula's below and, for each of them, `gradient` ("exact",
    "straight_through") and `interclass_filtering_threshold`.
    """
    z, terms = logits(name, x, weight, labels, classes, state, **arguments)
    sampled = chosen(classes, weight)
    if terms.weights is None:
        value = cross_entropy(z.masked_fill(~sampled, -math.inf), labels)
    else:
        positive, negative = terms.weights
        others = sampled & ~one_hot(labels, len(weight)).bool()
        per_row = positive * softplus(-of_target(z, labels))
        value = (per_row + negative * (softplus(z) * others).sum(1)).mean()
    return value + terms.regularizer, state | terms.state


def logits(
    name: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor,
    state: State,
    gradient: str = "exact",
    interclass_filtering_threshold: float = 0.0,
    **arguments,
) -> tuple[Tensor, Terms]:
    """z [B, C], of the classes outside of the sample too, and the terms it was made of.

    straight_through: T has its value and slope 1 in the target's cosine ("characteristic gradient
    detachment", arXiv:2109.05565); SphereFace-R and SphereFace2 reshape the negatives and get slope
    1 there as well. What does not pass through the cosine (norm, learned margin) stays exact.
    """
    cos = cosines(x, weight)
    c = of_target(cos, labels)
    cos = filtered(cos, interclass_filtering_threshold)
    detach_c = gradient == "straight_through"
    detach_cos = detach_c and name in ("spherefacer", "sphereface2")
    in_c, in_cos = c.detach() if detach_c else c, cos.detach() if detach_cos else cos
    batch = Batch(in_c, in_cos, labels, chosen(classes, weight), x, weight)
    terms = LOSSES[name](batch, state, **arguments)
    target, negatives = terms.target, terms.negatives
    if detach_c:
        target = target + c - c.detach()
    if detach_cos:
        negatives = negatives + cos - cos.detach()
    z = terms.scale * with_target(negatives, labels, target) + terms.bias
    return z.clamp(-terms.bound, terms.bound), terms


def add_angle(cos: Tensor, margin: float | Tensor, overflow: str) -> Tensor:
    """cos(t + m), by one of three rules where t + m passes pi."""
    return {"none": arcface, "fallback": fallback, "easy": easy}[overflow](cos, cos, margin)


def _softmax(b, state, scale=64.0):
    """NormFace, arXiv:1704.06369."""
    return Terms(scale, b.c, b.cos)


def _arcface(b, state, scale=64.0, margin=0.5, overflow="none"):
    """arXiv:1801.07698 eq. 3."""
    return Terms(scale, add_angle(b.c, margin, overflow), b.cos)


def _cosface(b, state, scale=64.0, margin=0.4):
    """arXiv:1801.09414 eq. 4."""
    return Terms(scale, b.c - margin, b.cos)


def _combined(b, state, scale=64.0, m1=1.0, m2=0.0, m3=0.0):
    """arXiv:1801.07698 eq. 4."""
    return Terms(scale, combined(b.c, b.c, m1, m2, m3), b.cos)


def _sphereface(b, state, scale=64.0, m1=1.35, form="cos", m=1.7):
    """arXiv:1704.08063 (piecewise) with a fixed scale; cos: arXiv:1801.07698 table 2."""
    if form == "cos":
        return Terms(scale, torch.cos(m1 * torch.arccos(b.c)), b.cos)
    mt = m * torch.arccos(b.c)
    k = torch.floor(mt / math.pi)
    return Terms(scale, (1 - 2 * (k % 2)) * torch.cos(mt) - 2 * k, b.cos)


def _spherefacer(b, state, scale=30.0, m=1.5, version="v1"):
    """arXiv:2109.05565: v1 stretches the target's angle, v2 shrinks the negatives'."""
    if version == "v1":
        return Terms(scale, torch.cos((m * torch.arccos(b.c)).clamp(max=math.pi)), b.cos)
    return Terms(scale, b.c, torch.cos(torch.arccos(b.cos) / m))


def _adaface(b, state, scale=64.0, margin=0.4, h=0.333, t_alpha=0.01):
    """arXiv:2204.00964 as its code runs it: statistics first, g_add inside the scale."""
    n = b.norm.detach().clamp(1e-3, 100)
    mean = (1 - t_alpha) * state["mean"] + t_alpha * n.mean()
    std = state["std"]
    if len(n) > 1:
        std = (1 - t_alpha) * std + t_alpha * n.std()
    q = (h * (n - mean) / (std + 1e-3)).clamp(-1, 1)
    t = (torch.arccos(b.c) - margin * q).clamp(1e-3, math.pi - 1e-3)
    target = torch.cos(t) - (margin + margin * q)
    return Terms(scale, target, b.cos, {"mean": mean, "std": std})


def _kappaface(b, state, scale=64.0, margin=0.8, overflow="none", **_of_end_epoch):
    """arXiv:2201.07394: the margin of a class times its psi; end_epoch renews psi."""
    unit = normalize(b.x.detach())
    seen = state["seen"].index_add(0, b.labels, torch.ones_like(b.c.detach()))
    changed = {"sum": state["sum"].index_add(0, b.labels, unit), "seen": seen}
    target = add_angle(b.c, state["psi"][b.labels] * margin, overflow)
    return Terms(scale, target, b.cos, changed)


def concentration(total: Tensor, seen: Tensor) -> Tensor:
    """The von Mises-Fisher kappa of each class: total [C, D] sums of unit features, seen [C]."""
    r = (total.pow(2).sum(1).sqrt() / seen).clamp(max=1 - 1e-3)
    return r * (total.shape[1] - r**2) / (1 - r**2)


def end_epoch(
    name: str,
    state: State,
    *,
    temperature: float = 0.4,
    gamma: float = 0.7,
    w_kappa: float | None = None,
    w_size: float | None = None,
    **_of_the_formula,
) -> State:
    """The state after an epoch. Only KappaFace's moves: psi = w_kappa w_k + w_size w_s.

    w_k is large where a class is spread, w_s where it is small. A class seen once has no
    concentration and takes the median one; a class not seen keeps its psi.
    """
    if name != "kappaface":
        return state
    seen, several = state["seen"], state["seen"] >= 2
    normalised = torch.zeros_like(seen)
    if several.sum() >= 2:
        kappa = concentration(state["sum"][several], seen[several])
        if kappa.std() > 1e-9 * kappa.mean().abs():  # else rounding
            kappa = (kappa - kappa.mean()) / kappa.std()
            normalised[:] = kappa.median()
            normalised[several] = kappa
    w_k = 1 - torch.sigmoid(temperature * normalised)
    w_s = (torch.cos(math.pi * seen / (1.05 * seen.max().clamp(min=1))) + 1) / 2
    psi = (gamma if w_kappa is None else w_kappa) * w_k
    psi = psi + (1 - gamma if w_size is None else w_size) * w_s
    psi = torch.where(seen >= 1, psi, state["psi"])
    return {"sum": 0 * state["sum"], "seen": 0 * seen, "psi": psi}


def _jamsface(
    b, state, scale=64.0, angular_bound=0.8, cosine_bound=0.5, angular_init=0.3, cosine_init=0.2,
    *, reg_angular, reg_cosine, scope="all", overflow="none",
):  # fmt: skip
    """Our reading of doi:10.1007/s00521-023-08732-5: two learned, bounded margins per class.

    The regulariser pushes them up: their mean over all classes, or over the batch's distinct ones.
    """
    angular = angular_bound * torch.sigmoid(state["angular"])  # [C]
    cosine = cosine_bound * torch.sigmoid(state["cosine"])
    ids = b.labels.unique() if scope == "batch" else slice(None)
    regularizer = reg_angular * (angular_bound - angular[ids].mean())
    regularizer = regularizer + reg_cosine * (cosine_bound - cosine[ids].mean())
    target = add_angle(b.c, angular[b.labels], overflow) - cosine[b.labels]
    return Terms(scale, target, b.cos, regularizer=regularizer)


def _adam(b, state, scale=30.0, reg=70.0):
    """AdaM-Softmax of AdaptiveFace (CVPR 2019): one learned cosine margin per class."""
    regularizer = reg * (1 - state["margins"].mean())
    return Terms(scale, b.c - state["margins"][b.labels], b.cos, regularizer=regularizer)


def project(name: str, state: State) -> State:
    """The state with its learned parameters inside their bounds, as after an optimiser step."""
    if name != "adam":
        return state
    return state | {"margins": state["margins"].detach().clamp(0, 1).requires_grad_()}


def _dynamicarcface(b, state, scale=80.0, low=0.05, high=0.5, overflow="none"):
    """arXiv:2010.05350: a margin that falls with the class's size n, as n^-1/4."""
    u = state["counts"].clamp(min=1).to(b.c.dtype) ** -0.25  # [C]
    span = u.max() - u.min()
    margins = low + (high - low) * (u - u.min()) / torch.where(span > 0, span, 1)
    return Terms(scale, add_angle(b.c, margins[b.labels], overflow), b.cos)


def _interface(b, state, scale=64.0, margin=0.5, alpha=0.1, variant="dd", overflow="none"):
    """arXiv:2210.02018 as its code runs it: negatives pulled by the row's place between centres."""
    t_y = torch.arccos(b.c.detach())[:, None]
    between = torch.full_like(b.cos, math.pi / 2).detach()
    if variant[0] == "d":
        centres = b.weight.detach().flatten(1)  # [C, D]: one sub-centre only
        between = cosines(centres[b.labels], centres).clamp(-1, 1).arccos().clamp(0.01, math.pi)
    tau = {"cc": 0 * between + 0.2, "dc": 0 * between + 0.3, "dd": math.pi / 18 / between}[variant]
    pull = alpha * (torch.exp(-tau) - torch.exp(-t_y / between))
    negatives = torch.cos(torch.arccos(b.cos) - pull)
    return Terms(scale, add_angle(b.c, margin, overflow), negatives)


def _curricularface(b, state, scale=64.0, margin=0.5, momentum=0.01, overflow="fallback"):
    """arXiv:2004.00288; t is renewed first, then used."""
    t = (1 - momentum) * state["t"] + momentum * b.c.detach().mean()
    hard = b.cos.detach() > arcface(b.c.detach(), b.c, margin)[:, None]
    negatives = torch.where(hard, b.cos * (t + b.cos), b.cos)
    return Terms(scale, add_angle(b.c, margin, overflow), negatives, {"t": t})


def _mvsoftmax(
    b, state, scale=32.0, margin=None, t=0.2, kind="arc", adaptive=True, overflow="easy"
):  # fmt: skip
    """arXiv:1912.00833: negatives above the margined target weigh more."""
    if kind == "arc":
        margin = 0.5 if margin is None else margin
        plain, target = arcface(b.c, b.c, margin), add_angle(b.c, margin, overflow)
    else:
        plain = b.c - (0.35 if margin is None else margin)
        target = torch.where(b.c > 0, plain, b.c) if overflow == "easy" else plain
    hard = b.cos.detach() > plain.detach()[:, None]
    raised = (1 + t) * b.cos + t if adaptive else b.cos + t
    return Terms(scale, target, torch.where(hard, raised, b.cos))


def _magface(
    b, state, scale=64.0, l_a=10.0, u_a=110.0, l_m=0.45, u_m=0.8, lambda_g=35.0, overflow="easy"
):  # fmt: skip
    """arXiv:2103.06627: the margin grows with the norm a, the regulariser makes a grow."""
    a = b.norm.clamp(l_a, u_a)
    margin = l_m + (u_m - l_m) / (u_a - l_a) * (a - l_a)
    regularizer = lambda_g * (a / u_a**2 + 1 / a).mean()
    return Terms(scale, add_angle(b.c, margin, overflow), b.cos, regularizer=regularizer)


def _elasticface(
    b, state, scale=64.0, margin=None, std=0.05, kind="arc", plus=False, overflow="none"
):  # fmt: skip
    """arXiv:2109.09416, the margins drawn by the caller (margin and std are the draw's).

    plus: the largest target cosine of the batch gets the smallest margin.
    """
    margins = state["margins"]  # [B]
    if plus:
        order = b.c.detach().argsort(descending=True)
        margins = torch.empty_like(margins).index_copy(0, order, margins.sort().values)
    target = add_angle(b.c, margins, overflow) if kind == "arc" else b.c - margins
    return Terms(scale, target, b.cos)


def _circle(b, state, gamma=256.0, margin=0.25):
    """arXiv:2002.10857, with class centres as the pairs' other side."""
    positive = (1 + margin - b.c.detach()).clamp(min=0)
    negative = (b.cos.detach() + margin).clamp(min=0)
    return Terms(gamma, positive * (b.c - (1 - margin)), negative * (b.cos - margin))


def _adacos(b, state, scale=None):
    """arXiv:1905.00292; the sum over a sample of the negatives is scaled up to all."""
    others = b.sampled & ~one_hot(b.labels, len(b.sampled)).bool()
    total = (torch.exp(state["scale"] * b.cos.detach()) * others).sum(1).mean()
    total = total * (len(b.sampled) - 1) / (b.sampled.sum() - 1)
    median = torch.arccos(b.c.detach()).median().clamp(max=math.pi / 4)
    scale = (torch.log(total) / torch.cos(median)).clamp(min=1)
    return Terms(scale, b.c, b.cos, {"scale": scale})


def _uniface(b, state, scale=64.0, margin=0.4, negative_weight=1.0, bounded=True):
    """The unified cross-entropy of UniFace (ICCV 2023); one learned bias.

    bounded: the authors' code cuts z at -s and s, so a row far behind its margin has no gradient.
    """
    weights, bound = (1.0, negative_weight), scale if bounded else math.inf
    return Terms(scale, b.c - margin, b.cos, bias=-state["bias"], weights=weights, bound=bound)


def _sphereface2(b, state, scale=40.0, margin=0.4, t=3.0, lam=0.7, loss_weight=50.0):
    """arXiv:2108.01513, SphereFace2-C; one learned bias."""

    def g(c):
        return 2 * ((c + 1) / 2) ** t - 1

    weights = (loss_weight * lam / scale, loss_weight * (1 - lam) / scale)
    return Terms(scale, g(b.c) - margin, g(b.cos) + margin, bias=state["bias"], weights=weights)


_FORMULAS = (
    _softmax, _arcface, _cosface, _combined, _sphereface, _spherefacer, _adaface, _kappaface,
    _jamsface, _adam, _dynamicarcface, _interface, _curricularface, _mvsoftmax, _magface,
    _elasticface, _circle, _adacos, _uniface, _sphereface2,
)  # fmt: skip
LOSSES = {formula.__name__[1:]: formula for formula in _FORMULAS}
LEARNED = {
    "jamsface": ("angular", "cosine"),
    "adam": ("margins",),
    "uniface": ("bias",),
    "sphereface2": ("bias",),
}


def initial_state(
    name: str,
    num_classes: int,
    embedding_size: int,
    sample_rate: float = 1.0,
    counts: Tensor | None = None,  # [C] images per class (dynamicarcface)
    **arguments,
) -> State:
    """The state before the first step, in fp64; learned parameters require gradients.

    ElasticFace has none here: its margins are drawn for each step. AdaM's margins, drawn from
    U(0.3, 0.4) by its authors, start at 0.35.
    """

    def full(value, *shape):
        return torch.full(shape, value, dtype=torch.float64)

    def logit(start, bound):
        return math.log(start / (bound - start))

    get, c = arguments.get, num_classes
    state = {
        "adaface": lambda: {"mean": full(20.0), "std": full(100.0)},
        "curricularface": lambda: {"t": full(0.0)},
        "adacos": lambda: {"scale": full(get("scale") or math.sqrt(2) * math.log(c - 1))},
        "kappaface": lambda: {
            "sum": full(0.0, c, embedding_size), "seen": full(0.0, c), "psi": full(1.0, c)
        },
        "jamsface": lambda: {
            "angular": full(logit(get("angular_init", 0.3), get("angular_bound", 0.8)), c),
            "cosine": full(logit(get("cosine_init", 0.2), get("cosine_bound", 0.5)), c),
        },
        "adam": lambda: {"margins": full(0.35, c)},
        "uniface": lambda: {"bias": full(math.log(10 * c * sample_rate))},
        "sphereface2": lambda: {"bias": full(_balanced_bias(c, sample_rate, **arguments))},
        "dynamicarcface": lambda: {"counts": counts.double()},
    }.get(name, dict)()  # fmt: skip
    for key in LEARNED.get(name, ()):
        state[key].requires_grad_()
    return state


def _balanced_bias(c, sample_rate, scale=40.0, margin=0.4, t=3.0, lam=0.7, **_) -> float:
    """The bias at which, all cosines being 0, lam sigmoid(-z_y) = (1 - lam) n sigmoid(z_j): a
    quadratic in e^b."""
    z = lam / ((1 - lam) * max((c - 1) * sample_rate, 1))
    a_y, a_i = (scale * (2 * 0.5**t - 1 + sign * margin) for sign in (-1, 1))
    root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(a_y - a_i))
    return math.log(2 * z) - a_i - math.log(1 - z + root)


class Step(NamedTuple):
    loss: Tensor  # []
    dx: Tensor  # [B, D]
    dweight: Tensor  # [C, (K,) D]
    dparameters: State  # of the learned parameters


class Run(NamedTuple):
    steps: list[Step]
    weight: Tensor
    state: State


def train(
    name: str,
    # x [B, D], labels [B], sampled classes [S], what the step draws (ElasticFace's margins)
    batches: list[tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, State]],
    weight: Tensor,
    state: State,
    lr: float,
    parameter_factor: float = 1.0,
    **arguments,
) -> Run:
    """Plain SGD, without momentum or decay, one step per batch.

    The sampled rows of the weight and the learned parameters (at lr times `parameter_factor`) move
    along their gradients, then `project` bounds the parameters.
    """
    weight, done = weight.detach().clone(), []
    for x, labels, classes, *drawn in batches:
        x, weight = (v.detach().clone().requires_grad_() for v in (x, weight))
        learned = LEARNED.get(name, ())
        state = state | {k: state[k].detach().clone().requires_grad_() for k in learned}
        for more in drawn:
            state = state | more
        value, state = loss(name, x, weight, labels, classes, state, **arguments)
        value.backward()
        gradients = {k: state[k].grad for k in learned}
        done.append(Step(value.detach(), x.grad, weight.grad, gradients))
        with torch.no_grad():
            weight = weight.index_add(0, classes, -lr * weight.grad[classes])
            for key in learned:
                state[key] = state[key] - lr * parameter_factor * gradients[key]
        state = project(name, state)
    return Run(done, weight.detach(), state)
