"""HSFace100k (100 000 synthetic identities, 5 M images), r50, ArcFace.

Vec2Face (arXiv:2409.02979). Published with this set: LFW 99.25, CFP-FP 90.36, AgeDB-30 94.38, CALFW
94.12, CPLFW 86.75. Data: hsfaces/hsface100k.lmdb of huggingface.co/BooBooWu/Vec2Face, whose card
states the MIT licence; the generator was trained on WebFace4M. `pack` reads the file as it is.
About 30 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import hsface

config = hsface("data/hsface100k")
