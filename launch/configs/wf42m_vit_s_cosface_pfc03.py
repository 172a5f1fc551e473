"""WebFace42M (2 059 906 identities, 42.5 M images), ViT-S, CosFace, three tenths of the classes.

Published as arcface_torch's vit_s_dp005_mask_0: MFR-ALL 95.87, IJB-C TAR 97.73 at FAR 1e-4
and 96.57 at 1e-5; the log's median is 25 004 images/s on 64 GPUs, 19.5 hours.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/webface42m"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "vit_s"
config.network_args = {"drop_path": 0.05}
config.margin = "cosface"
config.margin_args = {"scale": 64.0, "margin": 0.4}  # margin_list (1.0, 0.0, 0.4)
config.sample_rate = 0.3
config.global_batch_size = 24576  # 384 on each of 64 GPUs
config.optimizer = "adamw"
config.lr = 1e-3  # for that batch
config.weight_decay = 0.1
config.num_epochs = 40
config.warmup_epochs = 4
