"""CASIA-WebFace (10 572 identities, 490 623 images), r50, softmax without a margin.

The ArcFace paper's schedule for this set. Published there (norm-softmax): LFW 99.08, CFP-FP 94.39,
AgeDB-30 92.33; ArcFace 99.53, 95.56, 95.15.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/casia"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "softmax"
config.margin_args = {"scale": 64.0}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [20, 28]  # epochs, each times 0.1
config.num_epochs = 32
