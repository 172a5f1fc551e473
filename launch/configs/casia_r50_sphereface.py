"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace as cos(1.35 t).

The ArcFace paper's schedule for this set. Published there: LFW 99.11, CFP-FP 94.38, AgeDB-30 91.70.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "sphereface"
config.margin_args = {"scale": 64.0, "m1": 1.35}
