"""CASIA-WebFace (10 572 identities, 490 623 images), r50, the combined margin CM1.

The ArcFace paper's row (arXiv:1801.07698, table 2) on its schedule for this set. Published there:
LFW 99.48, CFP-FP 95.12, AgeDB-30 94.38.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "combined"
config.margin_args = {"scale": 64.0, "m1": 1.0, "m2": 0.3, "m3": 0.2}
