"""A threshold to move in the report: FAR and FRR of it, and which of the shown pairs change sides.

The page needs nothing else: the points of the ROC and a few lines of JavaScript are in it.
"""

from __future__ import annotations

import json

import numpy as np

from eval.report.results import Result

POINTS = 400  # of the ROC, at thresholds evenly spread over those of its points

SCRIPT = """
for (const box of document.querySelectorAll(".slider")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const range = box.querySelector("input"), out = box.querySelector("output");
  const faces = document.querySelectorAll(`figure[data-set="${box.dataset.set}"]`);
  const show = () => {
    const at = data[range.value];
    out.textContent = `threshold ${at[0].toFixed(4)}: FAR ${at[1].toPrecision(3)}, ` +
      `FRR ${at[2].toPrecision(3)}`;
    let moved = 0;
    for (const face of faces) {
      const now = Number(face.dataset.score) >= at[0];
      const changed = now !== (Number(face.dataset.score) >= Number(box.dataset.threshold));
      face.classList.toggle("changed", changed);
      face.querySelector(".side").textContent = now ? "accepted" : "rejected";
      moved += changed;
    }
    if (faces.length) out.textContent += `; ${moved} of ${faces.length} shown pairs change sides`;
  };
  range.addEventListener("input", show);
  show();
}
"""


def slider(result: Result, place: str, threshold: float) -> str:
    """HTML of the slider of a result. place: the data-set of its pictures in the page."""
    curve = points(result)
    start = int(np.abs(curve[:, 0] - threshold).argmin())
    data = json.dumps(curve.round(9).tolist()).replace("</", "<\\/")
    return (
        f'<div class="slider" data-set="{place}" data-threshold="{threshold:.9g}">'
        f'<label>Threshold <input type="range" min="0" max="{len(curve) - 1}" '
        f'value="{start}"></label><output></output>'
        f'<script type="application/json">{data}</script></div>'
    )


def points(result: Result) -> np.ndarray:
    """float64 [n, 3]: threshold ascending, FAR, FRR = 1 - TAR, of points of the ROC as measured."""
    threshold, far, tar = (result.arrays[key] for key in ("threshold", "far", "tar"))
    kept = np.isfinite(threshold)
    whole = np.stack([threshold[kept], far[kept], 1 - tar[kept]], axis=1)
    whole = whole[np.argsort(whole[:, 0], kind="stable")]
    if len(whole) > POINTS:
        even = np.linspace(whole[0, 0], whole[-1, 0], POINTS)
        whole = whole[np.unique(np.searchsorted(whole[:, 0], even).clip(0, len(whole) - 1))]
    return whole
