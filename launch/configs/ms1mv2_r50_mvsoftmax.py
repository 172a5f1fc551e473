"""MS1MV2 (85 742 identities, 5.8 M images), r50, MV-Softmax on ArcFace's target.

No published recipe with figures for this set is known to us: network and schedule are those of
ms1mv2_r50_arcface.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "mvsoftmax"
config.margin_args = {"scale": 32.0, "margin": 0.5, "t": 0.2, "kind": "arc"}
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs of arcface_torch
config.num_epochs = 20
