"""Alignment to the ArcFace template, by the names that scripts import."""

from data_tools.common.template import TEMPLATE, similarity, warp

__all__ = ["TEMPLATE", "similarity", "warp"]
