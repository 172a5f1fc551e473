"""CASIA-WebFace (10 572 identities, 490 623 images), r50, CosFace with m = 0.35.

The ArcFace paper's row (arXiv:1801.07698, table 2) on its schedule for this set. Published there:
LFW 99.51, CFP-FP 95.44, AgeDB-30 94.56.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "cosface"
config.margin_args = {"scale": 64.0, "margin": 0.35}
