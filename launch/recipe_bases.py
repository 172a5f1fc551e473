"""What several recipes share. A recipe takes one of these and sets what differs.

A schedule is meant for the global batch size beside it.
"""

from __future__ import annotations

from types import SimpleNamespace

VAL_TARGETS = ["lfw", "cfp_fp", "agedb_30"]
# Classes and images of the sets as they are published, for the planner and as a check of `rec`;
# another `rec=` on the command line puts its own in their place.
_COUNTS = {
    "data/casia": (10_572, 490_623),
    "data/glint360k": (360_232, 17_091_657),
    "data/ms1mv2": (85_742, 5_822_653),
    "data/ms1mv3": (93_431, 5_179_510),
    "data/webface12m": (617_970, 12_720_066),
    "data/webface42m": (2_059_906, 42_474_557),
}
FIVE_SETS = [*VAL_TARGETS, "calfw", "cplfw"]  # the papers since AdaFace report all five


def _set(rec: str) -> dict[str, object]:
    num_classes, num_image = _COUNTS.get(rec, (None, None))
    return {"rec": rec, "num_classes": num_classes, "num_image": num_image}


def arcface_torch(rec: str, network: str) -> SimpleNamespace:
    """The published jobs of arcface_torch: 20 epochs, polynomial, 128 images on each of 8 GPUs."""
    return SimpleNamespace(
        **_set(rec),
        val_targets=VAL_TARGETS,
        network=network,
        global_batch_size=1024,
        lr=0.1,
        lr_power=2.0,  # of the published logs; the code's default became 1 in 2023
        num_epochs=20,
    )


def stepped(rec: str, network: str, milestones: list[int], num_epochs: int) -> SimpleNamespace:
    """Batch 512, learning rate 0.1 times 0.1 at each milestone (epochs): most papers' schedule.

    These papers name no gradient clipping, so there is none. Their embedding layers have a dropout
    whose rate most of them do not state; here it is 0.
    """
    return SimpleNamespace(
        **_set(rec),
        val_targets=VAL_TARGETS,
        network=network,
        global_batch_size=512,
        lr=0.1,
        schedule="step",
        lr_milestones=milestones,
        num_epochs=num_epochs,
        clip_norm=None,
    )


def hsface(rec: str) -> SimpleNamespace:
    """ArcFace on Vec2Face's synthetic faces, with the settings of the framework that they used.

    HaiyuWu/SOTA-Face-Recognition-Train-and-Test, configs/base.py: r50, batch 512, learning rate
    0.1, a tenth at epochs 8, 12 and 14, 20 epochs, fp16. They erase a random rectangle of some
    images as well, which has no key here.
    """
    config = stepped(rec, "r50", [8, 12, 14], 20)
    config.val_targets = FIVE_SETS
    config.margin_args = {"scale": 64.0, "margin": 0.5}
    config.precision = "fp16"
    return config


def webface_vit(network: str) -> SimpleNamespace:
    """arcface_torch's ViT jobs on WebFace42M: CosFace, AdamW, 384 images on each of 64 GPUs."""
    return SimpleNamespace(
        **_set("data/webface42m"),
        val_targets=VAL_TARGETS,
        network=network,
        network_args={"drop_path": 0.05},
        margin="cosface",
        margin_args={"scale": 64.0, "margin": 0.4},
        sample_rate=0.3,
        global_batch_size=24576,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.1,
        num_epochs=40,
        warmup_epochs=4,
    )
