"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace2.

r, m, t, lambda, the weight 50 and the detached gradient are the defaults of OpenSphere's class; its
file for MS1M and iresnet100 has r 64, m 0.5, lambda 0.8 and 240 000 steps of 512, a tenth at 80
000, 140 000 and 200 000. The schedule is the ArcFace paper's for this set.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/casia"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "sphereface2"
config.margin_args = {
    "scale": 40.0,
    "margin": 0.4,
    "t": 3.0,
    "lam": 0.7,
    "loss_weight": 50.0,
    "gradient": "straight_through",
}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [20, 28]  # epochs, each times 0.1
config.num_epochs = 32
