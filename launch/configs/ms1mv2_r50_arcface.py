"""MS1MV2 (85 742 identities, 5.8 M images), r50, ArcFace.

Published with arcface_torch's ms1mv2_r50 on 8 GPUs: MFR-ALL 75.13, IJB-C TAR 95.97 at FAR 1e-4 and
94.07 at 1e-5; the log ends at LFW 99.78, CFP-FP 97.94, AgeDB-30 98.25.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin_args = {"scale": 64.0, "margin": 0.5}  # margin_list (1.0, 0.5, 0.0)
