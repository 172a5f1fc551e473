"""CASIA-WebFace (10 572 identities, 490 623 images), r50, ArcFace with m = 0.5.

The ArcFace paper's main row (arXiv:1801.07698, table 2) on its schedule for this set. Published
there: LFW 99.53, CFP-FP 95.56, AgeDB-30 95.15.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin_args = {"scale": 64.0, "margin": 0.5}
