"""MS1MV3 (93 431 identities, 5.2 M images), r100, ArcFace.

Published with arcface_torch's ms1mv3_r100 on 8 GPUs: MFR-ALL 81.97, IJB-C TAR 96.85 at FAR 1e-4 and
95.02 at 1e-5; the log ends at LFW 99.82, CFP-FP 98.93, AgeDB-30 98.55.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv3"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r100"
config.margin = "arcface"
config.margin_args = {"scale": 64.0, "margin": 0.5}  # margin_list (1.0, 0.5, 0.0)
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs; the code's default became 1 in 2023
config.weight_decay = 5e-4
config.num_epochs = 20
config.warmup_epochs = 0
