"""Curves and histograms as inline SVG that takes its colours from the page around it."""

import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

SERIES = 7  # the page's colours --s1 .. --s7
# Matplotlib draws in these stand-ins; in the SVG they become the page's CSS variables.
_INK, _LINE = "#000001", "#000002"
_COLORS = [f"#00001{i}" for i in range(1, SERIES + 1)]
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    color: f"var(--s{i})" for i, color in enumerate(_COLORS, 1)
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_BESIDE_TITLE = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "ncols": 4, "borderpad": 0.2}

Curve = tuple[Sequence[float] | NDArray, Sequence[float] | NDArray]  # x, y


def roc(curves: Mapping[str, Curve]) -> str:
    """TAR over FAR on a log axis; curves: set -> (FAR, TAR) as `verification.roc` returns them."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "roc"}):
        figure, axes = _figure(6.6, 4.2)
        finest = 1.0
        for i, (name, (far, tar)) in enumerate(curves.items()):
            shown = np.asarray(far) > 0  # the log axis starts at one false accept
            finest = min(finest, np.asarray(far)[shown][0])
            axes.step(
                np.asarray(far)[shown],
                np.asarray(tar)[shown],
                where="post",
                label=_plain(name),
                **_of(i),
            )
        axes.set_xscale("log")
        axes.set_xlim(finest, 1)
        lowest = min(np.asarray(y)[np.asarray(x) > 0][0] for x, y in curves.values())
        axes.set_ylim(max(0.0, lowest - 0.05 * (1 - lowest) - 0.002), 1.002)
        axes.set_xlabel("FAR: different people accepted")
        axes.set_ylabel("TAR: same person accepted")
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.legend(loc="lower right")
        return _svg(figure, "ROC curves")


def histogram(name: str, cosine: NDArray, issame: NDArray, threshold: float) -> str:
    """Shares of same and different pairs over the cosine; a line at `threshold`."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"histogram {name}"}):
        figure, axes = _figure(4.6, 2.8)
        low, high = float(np.min(cosine)), max(1.0, float(np.max(cosine)))
        bins = np.linspace(low, high if high > low else low + 1, 61)
        for kind, label, color in ((~issame, "different", 1), (issame, "same", 0)):
            shares = np.histogram(cosine[kind], bins)[0] / max(1, kind.sum())
            style = _of(color)
            axes.stairs(shares, bins, fill=True, alpha=0.25, color=style["color"])
            axes.stairs(shares, bins, label=label, **style)
        axes.axvline(threshold, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_title(_plain(name))
        axes.set_xlabel("cosine of the pair")
        axes.set_ylabel("share of pairs")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.legend(**_BESIDE_TITLE)
        return _svg(figure, f"Histogram of scores, {name}")


def curves(
    title: str, lines: Mapping[str, Curve], percent: bool = False, from_zero: bool = False
) -> str:
    """Lines over the training step; more than one of them get a legend."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure, axes = _figure(4.6, 2.8)
        for i, (name, (steps, values)) in enumerate(lines.items()):
            marker = "o" if len(steps) < 40 else None
            axes.plot(steps, values, marker=marker, markersize=3, label=_plain(name), **_of(i))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if from_zero:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        if len(lines) > 3:
            axes.legend(loc="lower right", ncols=2)
        elif len(lines) > 1:
            axes.legend(**_BESIDE_TITLE)
        return _svg(figure, title)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _of(series: int) -> dict:
    """The look of a series: a colour, and another dash for each time round the colours."""
    dashes = ("solid", (0, (4, 2)), (0, (1, 1.5)))
    return {
        "color": _COLORS[series % SERIES],
        "linestyle": dashes[series // SERIES % len(dashes)],
    }


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.6g} %"


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # no formula


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    head = f'<svg role="img" aria-label="{escape(label)}"'
    svg = svg[svg.index("<svg") :].replace("<svg", head, 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
