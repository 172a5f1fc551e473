"""Alignment to the ArcFace template, by the names that scripts import."""

from data_tools.images.template import TEMPLATE, similarity, warp

__all__ = ["TEMPLATE", "similarity", "warp"]
