"""Face detectors as ONNX files, told apart by their outputs.

| contract | input | outputs at strides 8, 16, 32 | run by |
|---|---|---|---|
| YuNet (OpenCV Zoo) | BGR, 0 .. 255 | 12: cls, obj, bbox and kps | `cv2.FaceDetectorYN` |
| SCRFD (with key points) | RGB, (x - 127.5) / 128 | 9: scores, boxes, points | ONNX Runtime |

SCRFD, for a place (u, v) of the map of a stride s with A anchors (arXiv:2105.04714 and its code):
the anchor's centre is (u s, v s); a box is the distances left, up, right and down from there in
units of s, and five points are offsets in units of s. Scores [n, 1], boxes [n, 4], points [n, 10]
have a row for each anchor, places row by row, the anchors of a place together; a batch axis of one
before them is accepted. An input of fixed size is filled from the upper left, the rest black.

The longer side of what a detector sees has at most DETECT_SIDE pixels.
"""

import functools
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from data_tools.common import content, files
from data_tools.common.errors import UserError

DETECT_SIDE = 640  # pixels
_STRIDES = (8, 16, 32)
_MOST = 100  # faces of an image
_FAR = 1e4  # pixels: what a network says beyond, of an image of a few rows say, is no face


class Detections(NamedTuple):
    """n faces of an image, in its pixels."""

    boxes: np.ndarray  # float32 [n, 4] left, top, width, height
    points: np.ndarray  # float32 [n, 5, 2] left eye, right eye, nose, left and right mouth corner


class Detector(Protocol):
    def __call__(self, image: np.ndarray) -> Detections:
        """The faces of an RGB image, uint8 [h, w, 3], that is not larger than DETECT_SIDE."""


def detect(image: np.ndarray, detector: str) -> np.ndarray:
    """The five points float32 [5, 2] that find_face() gives."""
    return find_face(image, detector)[0]


def find_face(image: np.ndarray, detector: str) -> tuple[np.ndarray, int]:
    """Five points float32 [5, 2] of the face in RGB [h, w, 3], and how many faces there are.

    Of several that one is taken whose box is large and central: area - 2 (distance of its centre
    from the image's)^2 is largest, as InsightFace chooses. Raises: ValueError without one.
    """
    height, width = image.shape[:2]
    scale = min(1.0, DETECT_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    boxes, points = open_detector(detector)(small)
    near = (np.abs(boxes) < _FAR).all(1) & (np.abs(points) < _FAR).all((1, 2))  # False for NaN too
    boxes, points = boxes[near], points[near]
    if not len(boxes):
        raise UserError("no face found")
    away = ((boxes[:, :2] + boxes[:, 2:] / 2 - np.array(size) / 2) ** 2).sum(1)
    best = int(np.argmax(boxes[:, 2] * boxes[:, 3] - 2 * away))
    return points[best] / np.array([size[0] / width, size[1] / height], np.float32), len(boxes)


@functools.cache
def open_detector(path: str) -> Detector:
    """The detector in an ONNX file. Raises: FileNotFoundError, ValueError if it is not one."""
    if not files.is_file(Path(path)):
        raise FileNotFoundError(f"--detector {path}: no such file")
    import onnx

    try:
        outputs = len(onnx.load(path, load_external_data=False).graph.output)
    except Exception as error:  # protobuf's DecodeError, which onnx does not name
        hint = content.hint(path, "an ONNX")
        raise UserError(
            f"--detector {path}: not a face detector: not an ONNX file{hint}"
        ) from error
    kinds: dict[int, type[_YuNet] | type[_Scrfd]] = {12: _YuNet, 9: _Scrfd}
    if outputs not in kinds:
        without = " (an SCRFD without key points: take one of the _kps models)" * (outputs == 6)
        raise UserError(
            f"--detector {path}: not a face detector with YuNet's 12 outputs or SCRFD's 9, it has "
            f"{outputs}{without}"
        )
    try:
        detector = kinds[outputs](path)
        detector(np.zeros((320, 320, 3), np.uint8))
    except Exception as error:
        raise UserError(
            f"--detector {path}: its {outputs} outputs are not those of "
            f"{kinds[outputs].__name__[1:]}: {error}"
        ) from error
    return detector


def detector_sha256(path: str) -> str:
    open_detector(path)
    return files.sha256(path)


class _YuNet:
    SCORE, OVERLAP = 0.6, 0.3  # least, and most of two faces; its authors'

    def __init__(self, path: str) -> None:
        self._net = cv2.FaceDetectorYN.create(path, "", (320, 320), self.SCORE, self.OVERLAP, _MOST)

    def __call__(self, image: np.ndarray) -> Detections:
        self._net.setInputSize((image.shape[1], image.shape[0]))
        _, found = self._net.detect(np.ascontiguousarray(image[:, :, ::-1]))
        if found is None:
            found = np.empty((0, 15), np.float32)
        return Detections(found[:, :4], found[:, 4:14].reshape(-1, 5, 2))


class _Scrfd:
    SCORE, OVERLAP = 0.5, 0.4

    def __init__(self, path: str) -> None:
        import onnxruntime  # half a second to import

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # packing runs in as many processes as there are cores
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        (self._input,) = self._session.get_inputs()
        _, channels, *sides = self._input.shape
        if channels != 3 or len(sides) != 2:
            raise UserError(f"the input {self._input.shape} is not [1, 3, h, w]")
        self._sides = [side if isinstance(side, int) else None for side in sides]  # None: any

    def __call__(self, image: np.ndarray) -> Detections:
        canvas, scale = self._canvas(image)
        pixels = (canvas.astype(np.float32) - 127.5) / 128
        found = self._session.run(None, {self._input.name: pixels.transpose(2, 0, 1)[None]})
        scores, boxes, points = [], [], []
        for level, stride in enumerate(_STRIDES):
            score, box, point = (
                _columns(found[level + 3 * kind], width) for kind, width in enumerate((1, 4, 10))
            )
            rows, columns = canvas.shape[0] // stride, canvas.shape[1] // stride
            anchors, rest = divmod(len(score), rows * columns)
            if rest or not anchors or not len(score) == len(box) == len(point):
                raise UserError(
                    f"{len(score)} scores, {len(box)} boxes and {len(point)} sets of points for "
                    f"the {rows} x {columns} places of stride {stride}"
                )
            places = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
            centres = np.repeat(places, anchors, 0).astype(np.float32) * stride  # [n, 2]
            low, high = centres - box[:, :2] * stride, centres + box[:, 2:] * stride
            scores.append(score[:, 0])
            boxes.append(np.concatenate([low, high - low], 1))
            points.append(centres[:, None] + point.reshape(-1, 5, 2) * stride)
        all_boxes = np.concatenate(boxes) / scale
        found_at = cv2.dnn.NMSBoxes(
            all_boxes.tolist(), np.concatenate(scores).tolist(), self.SCORE, self.OVERLAP
        )
        kept = np.asarray(found_at, np.int64).reshape(-1)[:_MOST]
        return Detections(all_boxes[kept], np.concatenate(points)[kept] / scale)

    def _canvas(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """The image in the upper left of what the network takes, and how much it was scaled."""
        height, width = image.shape[:2]
        high, wide = (
            own or -(-side // _STRIDES[-1]) * _STRIDES[-1]
            for own, side in zip(self._sides, (height, width), strict=True)
        )
        scale = min(1.0, high / height, wide / width)
        if scale < 1:
            size = max(1, int(width * scale)), max(1, int(height * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        canvas = np.zeros((high, wide, 3), np.uint8)
        canvas[: image.shape[0], : image.shape[1]] = image
        return canvas, scale


def _columns(output: np.ndarray, width: int) -> np.ndarray:
    """[n, width] of [n, width] or [1, n, width]: a map [1, A width, h, w] has another order."""
    if output.ndim < 2 or output.shape[-1] != width or output.shape[:-2] not in ((), (1,)):
        raise UserError(f"an output of {list(output.shape)} where [n, {width}] is expected")
    return output.reshape(-1, width)
