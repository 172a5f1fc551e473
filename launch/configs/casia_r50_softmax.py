"""CASIA-WebFace (10 572 identities, 490 623 images), r50, normalised softmax without a margin.

The ArcFace paper's schedule for this set (arXiv:1801.07698, table 2). Published there for
normalised softmax: LFW 98.56, CFP-FP 89.79, AgeDB-30 88.72 at scale 64, which this recipe trains,
and 99.20, 94.61, 92.65 at scale 20. The paper's plain softmax, with norms and a bias, has 99.08,
94.39, 92.33.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "softmax"
config.margin_args = {"scale": 64.0}
