"""MS1MV3 (93 431 identities, 5.2 M images), r100, ArcFace.

Published with arcface_torch's ms1mv3_r100 on 8 GPUs: MFR-ALL 81.97, IJB-C TAR 96.85 at FAR 1e-4 and
95.02 at 1e-5; the log ends at LFW 99.82, CFP-FP 98.93, AgeDB-30 98.55.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv3", "r100")
config.margin_args = {"scale": 64.0, "margin": 0.5}  # margin_list (1.0, 0.5, 0.0)
