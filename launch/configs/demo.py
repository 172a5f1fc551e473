"""A small set of faces on a CPU, in minutes: rec=DIRECTORY of packed shards or of InsightFace's form.

The numbers are tried on generated faces, 300 identities, two cores; they are no published recipe.
"""

from easydict import EasyDict as edict

config = edict()
config.network = "mbf_tiny"
config.margin = "cosface"
config.margin_args = {"scale": 32.0, "margin": 0.2}  # few classes: the usual 64 and 0.4 stall
config.global_batch_size = 128
config.lr = 0.1
config.weight_decay = 5e-4
config.num_epochs = 20
