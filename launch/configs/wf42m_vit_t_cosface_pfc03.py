"""WebFace42M (2 059 906 identities, 42.5 M images), ViT-T, CosFace, three tenths of the classes.

Published as arcface_torch's vit_t_dp005_mask0: MFR-ALL 92.24, IJB-C TAR 97.31 at FAR 1e-4
and 95.97 at 1e-5; about 35 000 images/s on 64 GPUs.
"""

from launch.recipe_bases import webface_vit

config = webface_vit("vit_t")
