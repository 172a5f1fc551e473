"""MS1MV2 (85 742 identities, 5.8 M images), r50, the combined margin CM1 of the ArcFace paper.

No published recipe with figures for this set is known to us: network and schedule are those of
ms1mv2_r50_arcface.
"""

from launch.recipe_bases import arcface_torch

config = arcface_torch("data/ms1mv2", "r50")
config.margin = "combined"
config.margin_args = {"scale": 64.0, "m1": 1.0, "m2": 0.3, "m3": 0.2}
