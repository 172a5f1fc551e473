"""HSFace20k (20 000 synthetic identities, 1 M images), r50, ArcFace.

Vec2Face (arXiv:2409.02979). Published with this set: LFW 98.87, CFP-FP 89.87, AgeDB-30 93.85, CALFW
93.65, CPLFW 86.13. Data: hsfaces/hsface20k.lmdb of huggingface.co/BooBooWu/Vec2Face, whose card
states the MIT licence; the generator was trained on WebFace4M. `pack` reads the file as it is.
About 6 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import hsface

config = hsface("data/hsface20k")
