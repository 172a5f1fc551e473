"""MS1MV2 (85 742 identities, 5.8 M images), r50, AdaCos: no scale and no margin to choose.

FaceX-Zoo trained MobileFaceNet with it on MS-Celeb-1M-v1c less the test sets' people (72 778
identities, 3.28 M images; batch 512, 18 epochs, a tenth at 10, 13 and 16): LFW 99.65, CPLFW 83.27,
CALFW 92.63, AgeDB-30 95.38. For this set no figures are known to us: network and schedule are those
of ms1mv2_r50_arcface.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin = "adacos"
