"""MS1MV2 (85 742 identities, 5.8 M images), r50, the combined margin CM1 of the ArcFace paper.

No published recipe with figures for this set is known to us: network and schedule are those of
ms1mv2_r50_arcface.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "combined"
config.margin_args = {"scale": 64.0, "m1": 1.0, "m2": 0.3, "m3": 0.2}
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs of arcface_torch
config.num_epochs = 20
