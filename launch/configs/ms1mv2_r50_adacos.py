"""MS1MV2 (85 742 identities, 5.8 M images), r50, AdaCos: no scale and no margin to choose.

FaceX-Zoo trained MobileFaceNet with it on MS-Celeb-1M-v1c less the test sets' people (72 778
identities, 3.28 M images; batch 512, 18 epochs, a tenth at 10, 13 and 16): LFW 99.65, CPLFW 83.27,
CALFW 92.63, AgeDB-30 95.38. For this set no figures are known to us: network and schedule are those
of ms1mv2_r50_arcface.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "data/ms1mv2"
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.network = "r50"
config.margin = "adacos"
config.global_batch_size = 1024  # 128 on each of 8 GPUs
config.lr = 0.1  # for that batch
config.lr_power = 2.0  # of the published logs of arcface_torch
config.num_epochs = 20
