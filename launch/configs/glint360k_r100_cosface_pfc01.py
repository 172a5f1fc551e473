"""Glint360K (360 232 identities, 17.1 M images), r100, CosFace, a tenth of the classes a step.

arcface_torch's glint360k_r100 with the sampling of Partial FC (arXiv:2203.15565). Published:
all classes MFR-ALL 89.52, IJB-C TAR 97.55 at FAR 1e-4 and 96.38 at 1e-5; sampling a tenth cost
88.67 -> 88.23 on the Partial FC page's benchmark.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/glint360k", "r100")
config.margin = "cosface"
config.margin_args = {"scale": 64.0, "margin": 0.4}  # margin_list (1.0, 0.0, 0.4)
config.sample_rate = 0.1  # the published job samples all: 1.0
config.weight_decay = 1e-4  # this job's; 5e-4 on MS1M and WebFace
