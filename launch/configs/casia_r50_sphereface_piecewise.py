"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace's piecewise form.

m, s and the detached gradient are OpenSphere's; the schedule is the ArcFace paper's for this set.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "sphereface"
config.margin_args = {"scale": 30.0, "form": "piecewise", "m": 1.7, "gradient": "straight_through"}
