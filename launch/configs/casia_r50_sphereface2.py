"""CASIA-WebFace (10 572 identities, 490 623 images), r50, SphereFace2.

r, m, t, lambda, the weight 50 and the detached gradient are the defaults of OpenSphere's class; its
file for MS1M and iresnet100 has r 64, m 0.5, lambda 0.8 and 240 000 steps of 512, a tenth at 80
000, 140 000 and 200 000. The schedule is the ArcFace paper's for this set.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [20, 28], 32)
config.margin = "sphereface2"
config.margin_args = {
    "scale": 40.0,
    "margin": 0.4,
    "t": 3.0,
    "lam": 0.7,
    "loss_weight": 50.0,
    "gradient": "straight_through",
}
