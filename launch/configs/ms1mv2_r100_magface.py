"""MS1MV2 (85 742 identities, 5.8 M images), r100, MagFace.

lambda_g and the schedule are those of the authors' script (run_dist.sh, there with iresnet50):
batch 512, fp32, no clipping. Their code wants lambda_g of at least s k u^2 l^2 / (u^2 - l^2), 22.6
here, with k the slope of the margin. The paper's figures were not at hand.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv2", "r100", [10, 18, 22], 25)
config.margin = "magface"
config.margin_args = {
    "scale": 64.0,
    "l_a": 10.0,
    "u_a": 110.0,
    "l_m": 0.45,
    "u_m": 0.8,
    "lambda_g": 35.0,
}
