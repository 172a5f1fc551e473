"""MS1MV2 (85 742 identities, 5.8 M images), r100, KappaFace with the momentum encoder.

The authors' schedule: 128 on each of 4 GPUs, fp16. Published by them for the momentum encoder: LFW
99.83, CFP-FP 98.60, CPLFW 93.40, AgeDB-30 98.35, CALFW 96.15; IJB-B 95.3, IJB-C 96.6 at FAR 1e-4;
with features="epoch" the nearest of their variants is the memory buffer: 98.69, 93.22, 98.47,
96.23; 95.1, 96.4. Their margins were those of other classes on every GPU but the first, ours are
not.
"""

from launch.recipe_bases import FIVE_SETS, stepped

config = stepped("data/ms1mv2", "r100", [10, 18, 22], 24)
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
