"""MS1MV2 (85 742 identities, 5.8 M images), r100, ElasticFace-Cos+.

The authors' schedule: their config says 8, 14, 20, 25, which their code reads as the number of the
epoch from 1 that has the lower rate. The paper's figures were not at hand.
Their pairing of sorted margins and sorted cosines is not monotone, ours is: the largest cosine gets
the smallest margin.
"""

from launch.recipe_bases import stepped

config = stepped("data/ms1mv2", "r100", [7, 13, 19, 24], 26)
config.margin = "elasticface"
config.margin_args = {"scale": 64.0, "margin": 0.35, "std": 0.02, "kind": "cos", "plus": True}
config.clip_norm = 5.0
