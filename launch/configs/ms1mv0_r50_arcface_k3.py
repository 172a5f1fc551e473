"""MS1MV0 (the noisy MS-Celeb-1M, about 10 M images), r50, sub-center ArcFace with K = 3.

The first round of the paper's recipe, on its MS1MV3 schedule: train with three centres a class,
drop what lies more than 75 degrees from its class's dominant one, train a plain ArcFace anew.
Published TAR at FAR 1e-4, IJB-B / IJB-C: 91.70 / 93.72 (K = 1: 87.87 / 90.27), and 94.56 / 95.92
after the second round.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv0", "r50", [8, 14], 18)
config.margin_args = {"scale": 64.0, "margin": 0.5}
config.num_subcenters = 3
