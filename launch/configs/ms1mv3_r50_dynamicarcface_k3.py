"""MS1MV3 (93 431 identities, 5.2 M images), r50, ArcFace with a margin by class size, three sub-
centres.

The loss of a landmark-recognition solution (third place, 2020), which used s = 80 and three centres
a class. For faces no recipe with figures is known to us: the schedule is ms1mv2_r50_arcface's.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv3", "r50")
config.margin = "dynamicarcface"
config.margin_args = {"scale": 80.0, "low": 0.05, "high": 0.5}
config.num_subcenters = 3
