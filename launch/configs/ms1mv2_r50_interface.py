"""MS1MV2 (85 742 identities, 5.8 M images), r50, InterFace (dd).

The authors' schedule: batch 512 a GPU, lr 0.1 for each 512, fp16, clipping at 5. No table of theirs
could be had. Sampling works here, not in their code.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "interface"
config.margin_args = {"scale": 64.0, "margin": 0.5, "alpha": 0.1, "variant": "dd"}
config.global_batch_size = 512
config.lr = 0.1  # for that batch
config.schedule = "step"
config.lr_milestones = [8, 14, 20, 25]  # epochs, each times 0.1
config.num_epochs = 26
config.precision = "fp16"
