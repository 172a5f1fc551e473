"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace as cos(1.35 t).

The ArcFace paper's schedule for this set. Published there: LFW 99.11, CFP-FP 94.38, AgeDB-30 91.70.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/casia"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "sphereface"
config.margin_args = {"scale": 64.0, "m1": 1.35}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [20, 28]  # epochs, each times 0.1
config.num_epochs = 32
