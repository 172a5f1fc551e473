"""HSFace10k (10 000 synthetic identities, 0.5 M images), r50, ArcFace.

Vec2Face (arXiv:2409.02979). Published with this set: LFW 98.87, CFP-FP 88.97, AgeDB-30 93.12, CALFW
93.57, CPLFW 85.47. Data: hsfaces/hsface10k.lmdb of huggingface.co/BooBooWu/Vec2Face, whose card
states the MIT licence; the generator was trained on WebFace4M. `pack` reads the file as it is.
About 3 GB on the disk, at 6 kB an image.
"""

from launch.recipe_bases import hsface

config = hsface("data/hsface10k")
