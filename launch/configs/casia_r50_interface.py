"""CASIA-WebFace (10 572 identities, 490 623 images), r50, InterFace (dd).

The schedule of the authors' code for this set, which their configuration calls MS1MV1: 34 epochs,
a tenth at 20, 28 and 32, batch 512 a GPU, lr 0.1 for each 512, fp16, gradient norm clipped at 5.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/casia", "r50", [20, 28, 32], 34)
config.val_targets = FIVE_SETS
config.margin = "interface"
config.margin_args = {"scale": 64.0, "margin": 0.5, "alpha": 0.1, "variant": "dd"}
config.clip_norm = 5.0
config.precision = "fp16"
