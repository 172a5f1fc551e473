"""The margin losses by the names that recipes use."""

from recognition.losses.margin import (
    ArcFace,
    CombinedMargin,
    CosFace,
    Margin,
    Rows,
    Softmax,
    SphereFace,
)

MARGINS = {
    "softmax": Softmax,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "combined": CombinedMargin,
}

__all__ = ["MARGINS", "Margin", "Rows"]
