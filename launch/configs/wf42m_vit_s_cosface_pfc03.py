"""WebFace42M (2 059 906 identities, 42.5 M images), ViT-S, CosFace, three tenths of the classes.

Published as arcface_torch's vit_s_dp005_mask_0: MFR-ALL 95.87, IJB-C TAR 97.73 at FAR 1e-4
and 96.57 at 1e-5; the log's median is 25 004 images/s on 64 GPUs, 19.5 hours.
"""

from launch.recipe_bases import webface_vit

config = webface_vit("vit_s")
