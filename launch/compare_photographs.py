"""Are these two photographs of one person? With an exported file and no line of this project.

    python compare_photographs.py model.onnx face_detection_yunet.onnx a.jpg b.jpg

Needs numpy, opencv-python and onnxruntime. The detector is OpenCV Zoo's YuNet (640 x 640). How to
feed the model, the template that faces are aligned to and the score from which to accept are read
from the model's own metadata; `python -m eval thresholds` chose that score before the export.
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def five_points(detector, image):  # BGR [h, w, 3] -> [5, 2], of the face of the highest score
    scale = 640 / max(image.shape[:2])
    canvas = np.zeros((640, 640, 3), np.float32)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    canvas[: small.shape[0], : small.shape[1]] = small[:640, :640]
    blob = {detector.get_inputs()[0].name: canvas.transpose(2, 0, 1)[None]}
    names = [output.name for output in detector.get_outputs()]
    out = dict(zip(names, detector.run(None, blob), strict=True))
    faces = []
    for stride in (8, 16, 32):
        score = np.sqrt(out[f"cls_{stride}"][0, :, 0] * out[f"obj_{stride}"][0, :, 0])
        best = int(score.argmax())
        cell = np.array(divmod(best, 640 // stride)[::-1])  # column, row
        points = (out[f"kps_{stride}"][0, best].reshape(5, 2) + cell) * stride / scale
        faces.append((float(score[best]), points))
    score, points = max(faces, key=lambda face: face[0])
    if score < 0.6:
        sys.exit("no face found")
    return points


def embedding(model, facts, detector, path):  # -> [D] of length 1
    image = cv2.imread(path)
    if image is None:
        sys.exit(f"{path}: not an image")
    template = [[float(x) for x in point.split(",")] for point in facts["alignment"].split(";")]
    rows = [r for x, y in five_points(detector, image) for r in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), np.ravel(template), rcond=None)[0]
    height, width = (int(side) for side in facts["input_size"].split(","))
    face = cv2.warpAffine(image, np.array([[a, -b, tx], [b, a, ty]]), (width, height))
    pixels = face[:, :, ::-1] if facts["color_order"] == "RGB" else face
    x = (pixels.transpose(2, 0, 1) - float(facts["mean"])) / float(facts["std"])
    batch = np.stack([x, x[:, :, ::-1]]).astype(np.float32)  # the face and its mirror image
    e = model.run(["embedding"], {"input": batch})[0].sum(0)
    return e / np.linalg.norm(e)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        model, detector = (onnxruntime.InferenceSession(path) for path in sys.argv[1:3])
    except Exception as error:  # ONNX Runtime's errors share no other base
        sys.exit(f"{sys.argv[1]} and {sys.argv[2]} are to be ONNX files: {error}")
    if "kps_8" not in [output.name for output in detector.get_outputs()]:
        sys.exit(f"{sys.argv[2]} is no YuNet: take face_detection_yunet_2023mar.onnx")
    facts = model.get_modelmeta().custom_metadata_map
    if "thresholds" not in facts:
        sys.exit(f"{sys.argv[1]} has no threshold: `python -m eval thresholds RUN`, export again")
    a, b = (embedding(model, facts, detector, path) for path in sys.argv[3:5])
    chosen = json.loads(facts["thresholds"])["points"][0]  # the lowest FAR
    same = "one person" if a @ b >= chosen["threshold"] else "two persons"
    print(f"{same}: score {a @ b:.4f}, from {chosen['threshold']:.4f} on it is one person "
          f"(FAR {chosen['far_target']:g})")  # fmt: skip
