"""The margin losses by the names that recipes use; `python -m recognition.losses` lists them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from data_tools.common.errors import UserError, UserKeyError
from data_tools.common.schema import nearest
from recognition.losses.adaptive import AdaCos, AdaFace, ElasticFace, MagFace
from recognition.losses.arguments import checked_arguments
from recognition.losses.classwise import AdaMSoftmax, DynamicArcFace, JAMsFace
from recognition.losses.fixed import (
    ArcFace,
    CombinedMargin,
    CosFace,
    Softmax,
    SphereFace,
    SphereFaceR,
)
from recognition.losses.kappaface import KappaFace
from recognition.losses.margin import Margin, Rows
from recognition.losses.mining import Circle, CurricularFace, InterFace, MVSoftmax
from recognition.losses.onevsall import SphereFace2, UniFace

MARGINS: dict[str, type[Margin]] = {
    "softmax": Softmax,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "spherefacer": SphereFaceR,
    "combined": CombinedMargin,
    "adaface": AdaFace,
    "magface": MagFace,
    "elasticface": ElasticFace,
    "adacos": AdaCos,
    "kappaface": KappaFace,
    "jamsface": JAMsFace,
    "adam": AdaMSoftmax,
    "dynamicarcface": DynamicArcFace,
    "interface": InterFace,
    "curricularface": CurricularFace,
    "mvsoftmax": MVSoftmax,
    "circle": Circle,
    "uniface": UniFace,
    "sphereface2": SphereFace2,
}

__all__ = ["MARGINS", "Margin", "Rows", "make_margin"]


def make_margin(name: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> Margin:
    """MARGINS[name](**arguments), with errors that name the recipe's keys.

    Raises:
        KeyError: no such margin, or an argument that it does not take; with the nearest.
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    if name not in MARGINS:
        raise UserKeyError(f"margin={name!r}: {nearest(name, MARGINS, 'one of')}")
    checked = checked_arguments(name, MARGINS[name], arguments)
    try:
        return MARGINS[name](**checked)
    except (ValueError, OverflowError) as error:
        raise UserError(f"margin={name} with {checked}: {error}") from error
