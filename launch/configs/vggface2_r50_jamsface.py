"""VGGFace2 (8 631 identities, 3.1 M images), r50, JAMsFace as we read it.

No recipe was published where we could read it, not even the training set: its IJB figures (89.09
and 91.81 at FAR 1e-4) look like a set of this size. The schedule is the ArcFace paper's for
VGGFace2, the weights of the regulariser are ours. The loss itself is our reading of the paper, not
verified.
"""

from launch.recipe_bases import stepped

config = stepped("data/vggface2", "r50", [6, 9], 12)
config.margin = "jamsface"
config.margin_args = {"scale": 64.0, "reg_angular": 8.0, "reg_cosine": 8.0}
