"""MS1MV2 (85 742 identities, 5.8 M images), r100, CurricularFace.

The authors' schedule for IR-101 (config.py of their repository): batch 512, no clipping; they give
BatchNorm no weight decay, which is not done here. Their released model: LFW 99.80, CFP-FP 98.36,
CPLFW 93.13, CALFW 96.05, AgeDB-30 98.37; TAR at FAR 1e-4 IJB-B 94.86, IJB-C 96.15.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv2", "r100", [10, 18, 22], 24)
config.margin = "curricularface"
config.margin_args = {"scale": 64.0, "margin": 0.5}
