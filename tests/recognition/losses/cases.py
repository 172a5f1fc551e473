"""Every loss and mode that the tests of this folder run: id -> (name, arguments).

AdaFace's statistics move fast here (t_alpha), so that a wrong one shows within three steps.
"""

from __future__ import annotations

ADAFACE = {"t_alpha": 0.5}
JAMSFACE = {"reg_angular": 5.0, "reg_cosine": 3.0}

CASES: dict[str, tuple[str, dict]] = {
    "softmax": ("softmax", {}),
    "arcface": ("arcface", {}),
    "arcface-fallback": ("arcface", {"overflow": "fallback"}),
    "arcface-easy": ("arcface", {"overflow": "easy"}),
    "cosface": ("cosface", {}),
    "combined": ("combined", {"m1": 0.9, "m2": 0.4, "m3": 0.15}),
    "sphereface": ("sphereface", {}),
    "sphereface-piecewise": ("sphereface", {"form": "piecewise", "scale": 30.0}),
    "spherefacer-v1": ("spherefacer", {}),
    "spherefacer-v2": ("spherefacer", {"version": "v2"}),
    "adaface": ("adaface", ADAFACE),
    "magface": ("magface", {}),
    "magface-none": ("magface", {"overflow": "none", "lambda_g": 300.0}),
    "elasticface-arc": ("elasticface", {}),
    "elasticface-cos": ("elasticface", {"kind": "cos"}),
    "elasticface-arc+": ("elasticface", {"plus": True, "std": 0.0175}),
    "elasticface-cos+": ("elasticface", {"kind": "cos", "plus": True, "std": 0.02}),
    "adacos": ("adacos", {}),
    "kappaface": ("kappaface", {}),
    "kappaface-weights": ("kappaface", {"w_kappa": 0.5, "w_size": 0.9, "overflow": "fallback"}),
    "jamsface-all": ("jamsface", JAMSFACE),
    "jamsface-batch": ("jamsface", {"scope": "batch", **JAMSFACE}),
    "adam": ("adam", {}),
    "dynamicarcface": ("dynamicarcface", {}),
    "interface-dd": ("interface", {}),
    "interface-dc": ("interface", {"variant": "dc"}),
    "interface-cc": ("interface", {"variant": "cc"}),
    "curricularface": ("curricularface", {"momentum": 0.3}),
    "mvsoftmax-arc": ("mvsoftmax", {}),
    "mvsoftmax-am": ("mvsoftmax", {"kind": "am"}),
    "mvsoftmax-fixed": ("mvsoftmax", {"kind": "am", "adaptive": False, "overflow": "none"}),
    "circle": ("circle", {}),
    "uniface": ("uniface", {"bounded": False}),
    "uniface-bounded": ("uniface", {"negative_weight": 0.3, "bounded": True}),
    "sphereface2": ("sphereface2", {}),
}

STRAIGHT = {
    f"{case}-straight": (name, {**arguments, "gradient": "straight_through"})
    for case, (name, arguments) in CASES.items()
    if name not in ("softmax", "cosface", "adacos", "adam", "circle", "uniface")
}

FILTERED = {
    f"{case}-filtered": (name, {**arguments, "interclass_filtering_threshold": 0.3})
    for case, (name, arguments) in CASES.items()
}
