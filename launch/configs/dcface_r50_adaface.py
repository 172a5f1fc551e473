"""DCFace (10 000 synthetic identities, 0.5 M images), r50, AdaFace.

DCFace (arXiv:2304.07060). Published by Vec2Face's authors for a network trained on this set: LFW
98.55, CFP-FP 85.33, AgeDB-30 89.70, CALFW 91.60, CPLFW 82.62. The training settings could not be
read: loss, schedule and augmentations here are those of AdaFace's code, by the same first author.
Data: dcface_0.5m_oversample_xid.zip, linked from github.com/mk-minchul/dcface, which states no
licence for it; the generator was trained on CASIA-WebFace. It holds a .rec, which `pack` reads.
About 3 GB on the disk, at 6 kB an image. The 1.2 M set has 60 000 identities.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/dcface", "r50", [12, 20, 24], 26)
config.val_targets = FIVE_SETS
config.network_args = {"dropout": 0.4}
config.margin = "adaface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "h": 0.333, "t_alpha": 0.01}
config.crop_augmentation_prob = 0.2
config.low_res_augmentation_prob = 0.2
config.photometric_augmentation_prob = 0.2
config.precision = "fp16"
