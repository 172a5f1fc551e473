"""MS1MV2 (85 742 identities, 5.8 M images), r50, SphereFace-R v1.

The authors' only file (an early OpenSphere) trains another network on VGGFace2 with version="v2",
s = 60, m = 1.4, batch 512, 70 000 steps, a tenth at 40 000 and 60 000, and weighs the loss by
50 / s, which is not done here; no figures with it. Network and schedule are those of
ms1mv2_r50_arcface.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin = "spherefacer"
config.margin_args = {"scale": 30.0, "m": 1.5, "version": "v1", "gradient": "straight_through"}
