"""A small set of faces on a CPU, in minutes. rec=DIRECTORY names the set: packed, or InsightFace's.

No published recipe: the network and the loss are sized for some hundred identities and two cores.
"""

from types import SimpleNamespace

config = SimpleNamespace()
config.network = "mbf_tiny"
config.margin = "cosface"
config.margin_args = {"scale": 32.0, "margin": 0.2}  # mild: few classes, few steps
config.global_batch_size = 128
config.lr = 0.1
config.max_steps = 400
config.verify_every = 200
config.checkpoint_every = 200
