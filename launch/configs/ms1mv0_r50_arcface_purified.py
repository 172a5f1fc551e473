"""MS1MV0 after purification, r50, ArcFace: the second round of sub-center ArcFace.

First train ms1mv0_r50_arcface_k3; then `python -m data_tools purify` finds the images more than 75
degrees from their class's dominant centre, and `python -m data_tools relabel` takes them out. This
recipe trains a plain ArcFace from the start on what is left, on the same schedule. Published TAR at
FAR 1e-4 (ECCV 2020): IJB-B 94.56, IJB-C 95.92.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv0", "r50", [8, 14], 18)
config.margin_args = {"scale": 64.0, "margin": 0.5}
