"""CASIA-WebFace (10 572 identities, 490 623 images), r50, softmax without a margin.

The ArcFace paper's schedule for this set. Published there (norm-softmax): LFW 99.08, CFP-FP 94.39,
AgeDB-30 92.33; ArcFace 99.53, 95.56, 95.15.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "softmax"
config.margin_args = {"scale": 64.0}
