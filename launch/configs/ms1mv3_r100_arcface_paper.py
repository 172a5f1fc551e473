"""MS1MV3 (93 431 identities, 5.2 M images), r100, ArcFace on the paper's own schedule.

arXiv:1801.07698 (TPAMI): batch 512, learning rate 0.1, a tenth at epochs 8 and 14, 18 epochs.
Published there: CFP-FP 98.79, IJB-C TAR 96.83 at FAR 1e-4. ms1mv3_r100_arcface is arcface_torch's
job on the same data.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv3", "r100", [8, 14], 18)
config.margin_args = {"scale": 64.0, "margin": 0.5}
