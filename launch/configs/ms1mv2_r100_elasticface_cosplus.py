"""MS1MV2 (85 742 identities, 5.8 M images), r100, ElasticFace-Cos+.

The authors' schedule: their config says 8, 14, 20, 25, which their code reads as the number of the
epoch from 1 that has the lower rate. The paper's figures were not at hand.
Their pairing of sorted margins and sorted cosines is not monotone, ours is: the largest cosine gets
the smallest margin.
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
config.lr_milestones = [7, 13, 19, 24]  # epochs done, each times 0.1
config.num_epochs = 26
