"""CASIA-WebFace (10 572 identities, 490 623 images), r50, KappaFace with the momentum encoder.

The schedule of the authors' code for this set: 50 epochs, a tenth at 10, 28, 38 and 46, fp16,
gradient norm clipped at 5. T, gamma and m are those of their MS1MV2 run.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/casia", "r50", [10, 28, 38, 46], 50)
config.val_targets = FIVE_SETS
config.margin = "kappaface"
config.margin_args = {
    "scale": 64.0,
    "margin": 0.8,
    "temperature": 0.4,
    "gamma": 0.7,
    "features": "momentum",
}
config.clip_norm = 5.0
config.precision = "fp16"
