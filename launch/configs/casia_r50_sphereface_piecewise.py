"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace's piecewise form.

m, s and the detached gradient are OpenSphere's; the schedule is the ArcFace paper's for this set.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/casia"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "sphereface"
config.margin_args = {"scale": 30.0, "form": "piecewise", "m": 1.7, "gradient": "straight_through"}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [20, 28]  # epochs, each times 0.1
config.num_epochs = 32
