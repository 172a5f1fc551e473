"""VGGFace2 (8 631 identities, 3.1 M images), r50, ArcFace.

The ArcFace paper's schedule for this set (arXiv:1801.07698): batch 512, a tenth at epochs 6 and 9,
12 epochs. Published there: TAR at FAR 1e-4 IJB-B 89.8, IJB-C 92.79.
"""

from launch.recipe_bases import stepped

config = stepped("data/vggface2", "r50", [6, 9], 12)
config.margin_args = {"scale": 64.0, "margin": 0.5}
