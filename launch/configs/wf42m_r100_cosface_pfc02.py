"""WebFace42M (2 059 906 identities, 42.5 M images), r100, CosFace, a fifth of the classes a step.

Published with arcface_torch's wf42m_pfc02_16gpus_r100: MFR-ALL 96.69, IJB-C TAR 97.85 at FAR 1e-4
and 96.63 at 1e-5; the log ends at LFW 99.83, CFP-FP 99.40, AgeDB-30 98.65 after 48.8 hours.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/webface42m", "r100")
config.margin = "cosface"
config.margin_args = {"scale": 64.0, "margin": 0.4}  # margin_list (1.0, 0.0, 0.4)
config.sample_rate = 0.2
config.global_batch_size = 4096  # 256 on each of 16 GPUs
config.lr = 0.3  # for that batch
config.warmup_epochs = 1
