"""MS1MV2 (85 742 identities, 5.8 M images), r100, ElasticFace-Cos+.

The authors' milestones. Their pairing of sorted margins and sorted cosines is not monotone, ours
is: the largest cosine gets the smallest margin.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r100"
config.margin = "elasticface"
config.margin_args = {"scale": 64.0, "margin": 0.35, "std": 0.02, "kind": "cos", "plus": True}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [8, 14, 20, 25]  # epochs, each times 0.1
config.num_epochs = 26
