"""A real YuNet behind SCRFD's contract: the same weights, the outputs written in the other form."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

_STRIDES = (8, 16, 32)


def as_scrfd(yunet: Path, out: Path) -> Path:
    """`yunet` with RGB input (x - 127.5) / 128 and nine outputs: scores, distances and offsets.

    YuNet's score is sqrt(cls obj); its box has the centre (u + b0) s, (v + b1) s and the size
    exp(b2) s, exp(b3) s; its points are (u + k0) s, (v + k1) s.
    """
    model = onnx.load(yunet)
    graph = model.graph
    (name,) = (i.name for i in graph.input if i.name == "input")
    for node in graph.node:
        node.input[:] = ["bgr" if i == name else i for i in node.input]

    scalar = {tensor.name for tensor in graph.initializer if list(tensor.dims) in ([], [1])}
    for node in graph.node:  # ONNX Runtime refuses the block size that OpenCV's file states for one
        if node.op_type == "DequantizeLinear" and node.input[1] in scalar:
            left = [own for own in node.attribute if own.name != "block_size"]
            del node.attribute[:]
            node.attribute.extend(left)

    def constant(label: str, values: list, kind: int = TensorProto.FLOAT, shape=None) -> str:
        shape = [len(values)] if shape is None else shape
        graph.initializer.append(helper.make_tensor(label, kind, shape, values))
        return label

    before = [
        helper.make_node("Mul", [name, constant("c128", [128.0])], ["scaled"]),
        helper.make_node("Add", ["scaled", constant("c127", [127.5])], ["rgb"]),
        helper.make_node(
            "Gather", ["rgb", constant("order", [2, 1, 0], TensorProto.INT64)], ["bgr"], axis=1
        ),
    ]
    half = constant("half", [0.5])
    lengths = constant("lengths", [2, 2], TensorProto.INT64)
    after = []
    for s in _STRIDES:
        after += [
            helper.make_node("Mul", [f"cls_{s}", f"obj_{s}"], [f"product_{s}"]),
            helper.make_node("Sqrt", [f"product_{s}"], [f"score_{s}"]),
            helper.make_node("Split", [f"bbox_{s}", lengths], [f"at_{s}", f"log_{s}"], axis=2),
            helper.make_node("Exp", [f"log_{s}"], [f"size_{s}"]),
            helper.make_node("Mul", [f"size_{s}", half], [f"half_{s}"]),
            helper.make_node("Sub", [f"half_{s}", f"at_{s}"], [f"before_{s}"]),
            helper.make_node("Add", [f"half_{s}", f"at_{s}"], [f"behind_{s}"]),
            helper.make_node("Concat", [f"before_{s}", f"behind_{s}"], [f"box_{s}"], axis=2),
            helper.make_node("Identity", [f"kps_{s}"], [f"points_{s}"]),
        ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(
        helper.make_tensor_value_info(f"{kind}_{s}", TensorProto.FLOAT, [1, None, width])
        for kind, width in (("score", 1), ("box", 4), ("points", 10))
        for s in _STRIDES
    )
    onnx.save(model, out)
    return out
