"""Are these two photographs of one person? With an exported file and no line of this project.

    python compare_photographs.py model.onnx a.jpg b.jpg --detector yunet.onnx

Needs numpy, opencv-python and onnxruntime. The detector is OpenCV Zoo's YuNet (640 x 640) or an
SCRFD with key points, as `python -m data_tools pack --align --detector` takes them; of several
faces the large, central one is taken, as there. How to feed the model, the template that faces are
aligned to and the score from which to accept are read from the model's own metadata; `python -m
eval thresholds` chose that score before the export, for what the model gives of one image.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

SIDE, STRIDES = 640, (8, 16, 32)  # pixels of what a detector sees, if it does not say
YUNET, SCRFD = (0.6, 0.3), (0.5, 0.4)  # least score, most overlap of two faces
MOST = 100  # faces of an image


# Of each stride: scores [n], boxes [n, 4], points [n, 5, 2].
Found = Iterator[tuple[NDArray, NDArray, NDArray]]


def five_points(detector: InferenceSession, image: NDArray) -> NDArray:
    """The points [5, 2] of the large, central face in a BGR image [h, w, 3]."""
    high, wide = (x if isinstance(x, int) else SIDE for x in detector.get_inputs()[0].shape[2:])
    scale = min(1.0, high / image.shape[0], wide / image.shape[1])
    size = [max(1, round(scale * side)) for side in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)[:high, :wide]
    canvas = np.zeros((high, wide, 3), np.float32)
    canvas[: small.shape[0], : small.shape[1]] = small
    yunet = len(detector.get_outputs()) == 12
    decode = decode_yunet if yunet else decode_scrfd
    score, box, points = (np.concatenate(x) for x in zip(*decode(detector, canvas), strict=True))
    best_first = {"top_k": MOST} if yunet else {}  # its authors count before the overlaps
    limits = YUNET if yunet else SCRFD
    found = cv2.dnn.NMSBoxes(box.tolist(), score.tolist(), *limits, **best_first)
    kept = np.asarray(found, int).ravel()[:MOST]
    if not len(kept):
        raise ValueError("no face found")
    centre = np.array(small.shape[1::-1]) / 2
    away = ((box[kept, :2] + box[kept, 2:] / 2 - centre) ** 2).sum(1)
    best = kept[np.argmax(box[kept, 2] * box[kept, 3] - 2 * away)]
    return points[best] / scale


def places(canvas: NDArray, stride: int, count: int) -> NDArray:
    """x and y [count, 2] of the cells of a stride's map, row by row."""
    high, wide = canvas.shape[0] // stride, canvas.shape[1] // stride
    columns, rows = np.meshgrid(np.arange(wide), np.arange(high))
    return np.stack([columns, rows], -1).reshape(-1, 2).repeat(count // (high * wide), 0)


def decode_yunet(detector: InferenceSession, canvas: NDArray) -> Found:
    names = [output.name for output in detector.get_outputs()]
    blob = {detector.get_inputs()[0].name: canvas.transpose(2, 0, 1)[None]}
    out = dict(zip(names, detector.run(None, blob), strict=True))
    for stride in STRIDES:
        score = np.sqrt(out[f"cls_{stride}"][0, :, 0] * out[f"obj_{stride}"][0, :, 0])
        cell, box = places(canvas, stride, len(score)), out[f"bbox_{stride}"][0]
        size = np.exp(box[:, 2:]) * stride
        points = out[f"kps_{stride}"][0].reshape(-1, 5, 2) + cell[:, None]
        middle = (box[:, :2] + cell) * stride
        yield score, np.hstack([middle - size / 2, size]), points * stride


def decode_scrfd(detector: InferenceSession, canvas: NDArray) -> Found:
    pixels = (canvas[:, :, ::-1] - 127.5) / 128
    blob = {detector.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]}
    out = detector.run(None, blob)
    for level, stride in enumerate(STRIDES):
        score, box, points = (
            out[level + 3 * kind].reshape(-1, width) for kind, width in enumerate((1, 4, 10))
        )
        centre = places(canvas, stride, len(score)) * stride
        low = centre - box[:, :2] * stride
        size = (box[:, :2] + box[:, 2:]) * stride
        yield (
            score[:, 0],
            np.hstack([low, size]),
            centre[:, None] + points.reshape(-1, 5, 2) * stride,
        )


def embedding(
    model: InferenceSession, facts: Mapping[str, str], detector: InferenceSession, path: str
) -> NDArray:
    """The embedding [D], of length 1, of the photograph at `path`."""
    image = cv2.imread(path)
    if image is None:
        sys.exit(f"{path}: not an image")
    template = [[float(x) for x in point.split(",")] for point in facts["alignment"].split(";")]
    try:
        found = five_points(detector, image)
    except ValueError as error:
        sys.exit(f"{path}: {error}")
    rows = [r for x, y in found for r in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), np.ravel(template), rcond=None)[0]
    height, width = (int(side) for side in facts["input_size"].split(","))
    face = cv2.warpAffine(image, np.array([[a, -b, tx], [b, a, ty]]), (width, height))
    pixels = face[:, :, ::-1] if facts["color_order"] == "RGB" else face
    x = (pixels.transpose(2, 0, 1) - float(facts["mean"])) / float(facts["std"])
    e = model.run(["embedding"], {"input": x[None].astype(np.float32)})[0][0]
    return e / np.linalg.norm(e)


def main(arguments: list[str]) -> int:
    """Compare two photographs and print the answer; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an exported network, .onnx")
    parser.add_argument("files", nargs="+", help="[DETECTOR] PHOTOGRAPH PHOTOGRAPH")
    parser.add_argument("--detector", help="a YuNet or SCRFD, .onnx, if not named before them")
    args = parser.parse_args(arguments)
    words = [args.detector, *args.files] if args.detector else args.files
    if len(words) != 3:
        parser.error("a detector and two photographs are needed")
    detector_path, *photographs = words
    try:
        model, detector = (InferenceSession(path) for path in (args.model, detector_path))
    except Exception as error:  # ONNX Runtime's errors share no other base
        sys.exit(f"{args.model} and {detector_path} must be ONNX files: {error}")
    if len(detector.get_outputs()) not in (9, 12):
        sys.exit(
            f"{detector_path} is neither a YuNet (12 outputs) nor an SCRFD with key points (9)"
        )
    facts = model.get_modelmeta().custom_metadata_map
    if "thresholds" not in facts:
        sys.exit(f"{args.model} has no threshold: `python -m eval thresholds RUN`, export again")
    a, b = (embedding(model, facts, detector, path) for path in photographs)
    chosen = json.loads(facts["thresholds"])["points"][0]  # the lowest FAR
    same = "one person" if a @ b >= chosen["threshold"] else "two persons"
    print(
        f"{same}: score {a @ b:.4f}, from {chosen['threshold']:.4f} on it is one person "
        f"(FAR {chosen['far_target']:g})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
