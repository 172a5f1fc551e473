"""Alignment to the ArcFace template, under the names that users' scripts import."""

from data_tools.images.template import TEMPLATE, similarity, warp

__all__ = ["TEMPLATE", "similarity", "warp"]
