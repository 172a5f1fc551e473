"""HSFace200k (200 000 synthetic identities, 10 M images), r50, ArcFace.

Vec2Face (arXiv:2409.02979). Published with this set: LFW 99.23, CFP-FP 90.81, AgeDB-30 94.22, CALFW
94.52, CPLFW 87.30. Data: hsfaces/hsface200k.lmdb of huggingface.co/BooBooWu/Vec2Face, whose card
states the MIT licence; the generator was trained on WebFace4M. `pack` reads the file as it is.
About 60 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import hsface

config = hsface("data/hsface200k")
