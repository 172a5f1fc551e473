"""Glint360K (360 232 identities, 17.1 M images), r100, CosFace, a tenth of the classes a step.

arcface_torch's glint360k_r100 with the sampling of Partial FC (arXiv:2203.15565). Published:
all classes MFR-ALL 89.52, IJB-C TAR 97.55 at FAR 1e-4 and 96.38 at 1e-5; sampling a tenth cost
88.67 -> 88.23 on the Partial FC page's benchmark.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/glint360k"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r100"
config.margin = "cosface"
config.margin_args = {"scale": 64.0, "margin": 0.4}  # margin_list (1.0, 0.0, 0.4)
config.sample_rate = 0.1  # the published job samples all: 1.0
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs; the code's default became 1 in 2023
config.weight_decay = 1e-4  # this job's; 5e-4 on MS1M and WebFace
config.num_epochs = 20
config.warmup_epochs = 0
