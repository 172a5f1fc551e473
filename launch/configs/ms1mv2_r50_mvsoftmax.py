"""MS1MV2 (85 742 identities, 5.8 M images), r50, MV-Softmax on ArcFace's target.

FaceX-Zoo trained MobileFaceNet with it on MS-Celeb-1M-v1c less the test sets' people (72 778
identities, 3.28 M images; batch 512, 18 epochs, a tenth at 10, 13 and 16; kind="am", t 0.12): LFW
99.57, CPLFW 83.33, CALFW 93.82, AgeDB-30 95.97. For this set no figures are known to us: network
and schedule are those of ms1mv2_r50_arcface.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin = "mvsoftmax"
config.margin_args = {"scale": 32.0, "margin": 0.5, "t": 0.2, "kind": "arc"}
