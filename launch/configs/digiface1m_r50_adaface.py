"""DigiFace-1M (110 000 rendered identities, 1.22 M images), r50, AdaFace, heavy augmentation.

DigiFace-1M (arXiv:2210.02579): 10 000 identities with 72 images each, 100 000 with 5. Published
there: LFW 96.17, CFP-FP 89.81, CPLFW 82.23, AgeDB-30 81.10, CALFW 82.55. The paper needs strong
augmentation to close the gap between rendered and real faces, also blur, noise and warping, which
have no key here; its schedule and rates could not be read. Here each of the three augmentations
applies to half of the images, on AdaFace's schedule.
Data: github.com/microsoft/DigiFace1M, for non-commercial research. `pack --align --detector` aligns
the images as those of the evaluation are. About 8 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/digiface1m", "r50", [12, 20, 24], 26)
config.val_targets = FIVE_SETS
config.margin = "adaface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "h": 0.333, "t_alpha": 0.01}
config.crop_augmentation_prob = 0.5
config.low_res_augmentation_prob = 0.5
config.photometric_augmentation_prob = 0.5
config.precision = "fp16"
