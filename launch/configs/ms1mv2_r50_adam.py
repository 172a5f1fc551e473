"""MS1MV2 (85 742 identities, 5.8 M images), r50, AdaM-Softmax (AdaptiveFace).

FaceX-Zoo trained MobileFaceNet with it on MS-Celeb-1M-v1c less the test sets' people (72 778
identities, 3.28 M images; batch 512, 18 epochs, a tenth at 10, 13 and 16; scale 32): LFW 99.58,
CPLFW 83.85, CALFW 93.50, AgeDB-30 96.02. For this set no figures are known to us: network and
schedule are those of ms1mv2_r50_arcface.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin = "adam"
config.margin_args = {"scale": 30.0, "reg": 70.0}
