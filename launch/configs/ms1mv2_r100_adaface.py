"""MS1MV2 (85 742 identities, 5.8 M images), r100, AdaFace.

The authors' schedule and augmentations for this set (arXiv:2204.00964 and their code): batch 512,
fp16, no warm-up, no clipping, dropout 0.4; each of the crop, low-resolution and photometric
augmentations for a fifth of the images. Published by them: LFW 99.82, CFP-FP 98.49, CPLFW 93.53,
CALFW 96.08, AgeDB-30 98.05; TAR at FAR 1e-4 IJB-B 95.67, IJB-C 96.89.

What differs: their images are BGR, their BatchNorms have no weight decay, and the last BatchNorm
has neither scale nor bias; here all BatchNorms decay, and the last one learns its bias. Their norm
statistics are those of one GPU's batch, ours those of the global batch.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/ms1mv2", "r100", [12, 20, 24], 26)
config.val_targets = FIVE_SETS
config.network_args = {"dropout": 0.4}
config.margin = "adaface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "h": 0.333, "t_alpha": 0.01}
config.crop_augmentation_prob = 0.2
config.low_res_augmentation_prob = 0.2
config.photometric_augmentation_prob = 0.2
config.precision = "fp16"
