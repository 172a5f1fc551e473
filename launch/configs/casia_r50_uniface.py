"""CASIA-WebFace (10 572 identities, 490 623 images), r50, UniFace (unified cross-entropy).

The authors' recipe: 4 micro-batches of 128, fp16, logits bounded to -s..s. They clip the gradient
of network and classes together at 10; here the network's alone. Published with it: LFW 99.56,
MFR-ALL 48.42.
"""

from launch.recipe_bases import stepped

config = stepped("data/casia", "r50", [16, 24], 28)
config.margin = "uniface"
config.margin_args = {"scale": 64.0, "margin": 0.4, "bounded": True}
config.clip_norm = 10.0
config.precision = "fp16"
