"""CASIA-WebFace (10 572 identities, 490 623 images), r50, UniFace (unified cross-entropy).

The authors' recipe: 4 micro-batches of 128, fp16, logits bounded to -s..s. They clip the gradient
of network and classes together at 10; here the network's alone. Published with it: LFW 99.56,
MFR-ALL 48.42.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/casia"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "uniface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "bounded": True}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [16, 24]  # epochs, each times 0.1
config.num_epochs = 28
config.clip_norm = 10.0
config.precision = "fp16"
