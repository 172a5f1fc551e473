"""HSFace300k (300 000 synthetic identities, 15 M images), r50, ArcFace.

Vec2Face (arXiv:2409.02979). Published with this set: LFW 99.30, CFP-FP 91.54, AgeDB-30 94.45, CALFW
94.58, CPLFW 87.70. Data: hsfaces/hsface300k.lmdb of huggingface.co/BooBooWu/Vec2Face, whose card
states the MIT licence; the generator was trained on WebFace4M. `pack` reads the file as it is.
About 90 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import hsface

config = hsface("data/hsface300k")
