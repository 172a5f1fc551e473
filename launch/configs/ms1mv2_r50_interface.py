"""MS1MV2 (85 742 identities, 5.8 M images), r50, InterFace (dd).

The authors' schedule: batch 512 a GPU, lr 0.1 for each 512, fp16, clipping at 5. No table of theirs
could be had. Sampling works here, not in their code.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/ms1mv2", "r50", [8, 14, 20, 25], 26)
config.val_targets = FIVE_SETS
config.margin = "interface"
config.margin_args = {"scale": 64.0, "margin": 0.5, "alpha": 0.1, "variant": "dd"}
config.clip_norm = 5.0
config.precision = "fp16"
