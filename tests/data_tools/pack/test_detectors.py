"""What a detector's ONNX file may say, and what of it is believed."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from data_tools.pack.alignment import Aligner
from data_tools.pack.detectors import detect
from launch import compare_photographs
from tests.data_tools.samples import pixels

_PLACES = (40 * 40, 20 * 20, 10 * 10)  # of an input of 320x320 at strides 8, 16, 32
_FACE = np.array([-1, -1, 1, -1, 0, 0, -1, 1, 1, 1])  # five points, in units of the stride


def network(path, score, points, kinds=((1,), (4,), (10,)), before=(), shape=(1, 3, 320, 320)):
    """An SCRFD of two anchors a place whose answer is always the same."""
    outputs, nodes = [], []
    answers = {(1,): score, (4,): [1, 1, 1, 1], (10,): points}
    for kind in kinds:
        for n in _PLACES:
            name = f"o{len(outputs)}"
            value = np.broadcast_to(answers[kind], (2 * n, *kind)).astype(np.float32)
            value = value.reshape(*before, *value.shape)
            tensor = helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.ravel())
            nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "scrfd", inputs, outputs)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


@pytest.mark.parametrize("before", [(), (1,)])
def test_an_answer_as_the_contract_has_it(tmp_path, before):
    path = network(tmp_path / "net.onnx", [0.9], _FACE, before=before)
    points = detect(pixels(0, 300, 320), str(path))
    assert points.shape == (5, 2)
    assert np.allclose((points - points[2]) / np.ptp(points[:, 0]) * 2, _FACE.reshape(5, 2))


def test_the_example_of_two_photographs_takes_scrfd_as_pack_does(tmp_path):
    path = network(tmp_path / "net.onnx", [0.9], _FACE)
    session = onnxruntime.InferenceSession(str(path))
    image = pixels(0, 300, 320)
    found = compare_photographs.five_points(session, np.ascontiguousarray(image[:, :, ::-1]))
    np.testing.assert_allclose(found, detect(image, str(path)), atol=1e-4)


def test_the_example_says_that_a_narrow_picture_has_no_face(tmp_path):
    """Its shorter side is a fraction of a pixel in what the detector sees."""
    session = onnxruntime.InferenceSession(network(tmp_path / "net.onnx", [0.1], _FACE))
    for shape in ((1, 2000, 3), (2000, 1, 3), (1, 1, 3)):
        with pytest.raises(ValueError, match="no face found"):
            compare_photographs.five_points(session, np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("score", "points"),
    [([0.1], _FACE), ([np.nan], _FACE), ([0.9], _FACE * np.nan), ([0.9], _FACE * 1e30)],
    ids=["low", "no score", "not finite", "far away"],
)
def test_what_is_no_face(tmp_path, score, points):
    path = network(tmp_path / "net.onnx", score, points)
    with pytest.raises(ValueError, match="no face found"):
        detect(pixels(0, 300, 320), str(path))


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"kinds": ((1,), (4,))}, r"6 \(an SCRFD without key points: take one of the _kps models"),
        ({"kinds": ((1,), (10,), (4,))}, r"\[3200, 10\] where \[n, 4\] is expected"),
        ({"before": (1, 1)}, r"\[1, 1, 3200, 1\] where \[n, 1\] is expected"),
        ({"shape": (1, 320, 320, 3)}, r"the input \[1, 320, 320, 3\] is not \[1, 3, h, w\]"),
        ({"shape": (1, 3, 640, 640)}, "3200 scores, .* the 80 x 80 places of stride 8"),
        ({"shape": (2, 3, 320, 320)}, "its 9 outputs are not those of Scrfd"),
    ],
)
def test_other_networks_are_refused(tmp_path, other, fault):
    path = network(tmp_path / "net.onnx", [0.9], _FACE, **other)
    with pytest.raises(ValueError, match=rf"net\.onnx: .*{fault}"):
        detect(pixels(0, 320), str(path))


def test_maps_in_another_order_are_refused(tmp_path):
    """[1, A 4, h, w] holds as many numbers as [h w A, 4], in another order."""
    path = network(tmp_path / "net.onnx", [0.9], _FACE)
    model = onnx.load(path)
    for node, info, n in zip(model.graph.node, model.graph.output, _PLACES * 3, strict=True):
        tensor, side = node.attribute[0].t, int(n**0.5)
        shape = [1, tensor.dims[1] * 2, side, side]
        tensor.dims[:] = shape
        info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, shape))
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"\[1, 2, 40, 40\] where \[n, 1\] is expected"):
        detect(pixels(0, 320), str(path))


def test_points_of_another_size_of_the_image_are_refused():
    image, points = pixels(0, 112), _FACE.reshape(5, 2) * 20.0 + 56
    assert Aligner().face(image, points)[0].any()
    with pytest.raises(
        ValueError, match=r"around \(224, 224\), outside the image of 112x112 pixels"
    ):
        Aligner().face(image, points * 4)
