"""MS1MV2 (85 742 identities, 5.8 M images), r50, ArcFace.

Published with arcface_torch's ms1mv2_r50 on 8 GPUs: MFR-ALL 75.13, IJB-C TAR 95.97 at FAR 1e-4 and
94.07 at 1e-5; the log ends at LFW 99.78, CFP-FP 97.94, AgeDB-30 98.25.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "arcface"
config.margin_args = {"scale": 64.0, "margin": 0.5}  # margin_list (1.0, 0.5, 0.0)
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs; the code's default became 1 in 2023
config.weight_decay = 5e-4
config.num_epochs = 20
config.warmup_epochs = 0
