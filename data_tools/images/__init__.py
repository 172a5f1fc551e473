"""Encoded images: kinds, sizes and pixels; landmarks and the alignment template."""
