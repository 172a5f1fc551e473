"""MS1MV2 (85 742 identities, 5.8 M images), r100, AdaFace.

The authors' schedule for this set: batch 512, fp16, no warm-up, no clipping, their images BGR, no
weight decay of BatchNorm (here it has). Published by them: LFW 99.82, CFP-FP 98.49, CPLFW 93.53,
CALFW 96.08, AgeDB-30 98.05; TAR at FAR 1e-4 IJB-B 95.67, IJB-C 96.89. Their statistics were those
of one GPU's batch, ours are the whole batch's; their flips are ours, their crop, low-resolution and
photometric augmentations are not in this recipe.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv2", "r100", [12, 20, 24], 26)
config.margin = "adaface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "h": 0.333, "t_alpha": 0.01}
config.clip_norm = None
config.precision = "fp16"
