"""Curves and histograms as inline SVG that takes its colours from the page around it."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

SERIES = 7  # the page's colours --s1 .. --s7
# Matplotlib draws in these stand-ins; in the SVG they become the page's CSS variables.
_INK, _LINE = "#000001", "#000002"
_COLORS = [f"#00001{i}" for i in range(1, SERIES + 1)]
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    color: f"var(--s{i})" for i, color in enumerate(_COLORS, 1)
}
# matplotlib types its keys as a literal that it does not export.
_STYLE: dict[Any, Any] = {
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


def lines(
    title: str,
    curves: Mapping[str, Curve],
    axes_text: tuple[str, str],  # x, y
    log: str = "",  # "x", "y" or "xy"
    step: bool = False,
    limits: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None),
    has_legend: bool = False,
) -> str:
    """Curves of shares, one for each model or set; the y axis in percent, log axes where said."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure, axes = _figure(4.6, 2.8)
        points = {name: np.asarray(curve, dtype=float) for name, curve in curves.items()}
        if "x" in log:
            points = {name: xy[:, xy[0] > 0] for name, xy in points.items()}
        if "y" in log and not any((xy[1] > 0).any() for xy in points.values()):
            log = log.replace("y", "")  # no error at all has no place on a log axis
        for i, (name, (x, y)) in enumerate(points.items()):
            shown = (y > 0) | ("y" not in log)
            drawstyle = "steps-post" if step else "default"
            axes.plot(x[shown], y[shown], label=_plain(name), drawstyle=drawstyle, **_of(i))
        axes.set_xscale("log" if "x" in log else "linear")
        axes.set_yscale("log" if "y" in log else "linear")
        if limits[0]:
            axes.set_xlim(*limits[0])
        if limits[1]:
            axes.set_ylim(*limits[1])
        axes.set_title(title)
        axes.set_xlabel(axes_text[0])
        axes.set_ylabel(axes_text[1])
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        if "y" in log:
            axes.yaxis.set_minor_formatter(FuncFormatter(_percent))
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        if len(curves) > 1 or has_legend:
            axes.legend(loc="best")
        return _svg(figure, title)


def roc(curves: Mapping[str, Curve], title: str = "ROC curves") -> str:
    """TAR over FAR on a log axis; curves: name -> (FAR, TAR). It starts at one false accept."""
    positive = [
        (np.asarray(x)[np.asarray(x) > 0], np.asarray(y)[np.asarray(x) > 0])
        for x, y in curves.values()
    ]
    finest = min((float(x[0]) for x, _ in positive if len(x)), default=0.5)
    lowest = min((float(y[0]) for _, y in positive if len(y)), default=0.0)
    limits = ((min(finest, 0.5), 1.0), (max(0.0, lowest - 0.05 * (1 - lowest) - 0.002), 1.002))
    text = ("FAR: different people accepted", "TAR: same person accepted")
    return lines(title, curves, text, "x", True, limits, has_legend=True)


def det(curves: Mapping[str, Curve], title: str = "DET curves") -> str:
    """1 - TAR over FAR, both axes log; curves: name -> (FAR, TAR)."""
    misses = {name: (x, 1 - np.asarray(y)) for name, (x, y) in curves.items()}
    text = ("FAR: different people accepted", "1 - TAR: same person rejected")
    return lines(title, misses, text, "xy", True, has_legend=True)


def cmc(curves: Mapping[str, Sequence[float] | NDArray], title: str = "CMC curves") -> str:
    """Share of mated probes found within a rank; curves: name -> [K]."""
    by_rank = {name: (np.arange(1, len(y) + 1), y) for name, y in curves.items()}
    return lines(title, by_rank, ("rank", "mated probes found"), "x")


def folds(title: str, accuracy: Mapping[str, Sequence[float]]) -> str:
    """The accuracy of each fold as a dot, its mean as a line; one column a model or set."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure, axes = _figure(4.6, 2.8)
        for i, values in enumerate(accuracy.values()):
            shift = (np.arange(len(values)) - (len(values) - 1) / 2) * 0.05
            axes.scatter(i + shift, values, s=14, color=_COLORS[i % SERIES], zorder=3)
            axes.hlines(np.mean(values), i - 0.35, i + 0.35, color=_INK, linewidth=1)
        axes.set_xticks(range(len(accuracy)), [_plain(name) for name in accuracy])
        axes.set_xlim(-0.6, len(accuracy) - 0.4)
        axes.set_title(title)
        axes.set_ylabel("accuracy of a fold")
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, title)


def histogram(
    title: str,
    edges: NDArray,
    same: NDArray,  # counts
    different: NDArray,
    threshold: float | None = None,
    labels: tuple[str, str] = ("different", "same"),
) -> str:
    """Shares of both kinds over the score; a line at `threshold`."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"histogram {title}"}):
        figure, axes = _figure(4.6, 2.8)
        for counts, label, color in ((different, labels[0], 1), (same, labels[1], 0)):
            shares = counts / max(1, counts.sum())
            style = _of(color)
            axes.stairs(shares, edges, fill=True, alpha=0.25, color=style["color"])
            axes.stairs(shares, edges, label=label, **style)
        if threshold is not None:
            axes.axvline(threshold, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_title(_plain(title))
        axes.set_xlabel("score")
        axes.set_ylabel("share")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.legend(loc="best")
        return _svg(figure, f"Histogram of scores, {title}")


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
    return f"{100 * value:.4g} %"


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
