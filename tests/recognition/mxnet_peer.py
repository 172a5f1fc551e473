"""Run by the Python that has MXNet 1.9.1: a LResNet-E-IR of its own, saved as InsightFace saved it.

    mxnet_peer.py PREFIX PIXELS.npy OUT.npy BLOCKS...

Builds the symbol with BLOCKS blocks in the four stages, draws its numbers, writes
PREFIX-symbol.json and PREFIX-0000.params, and to OUT what MXNet computes of PIXELS, float32
[n, 3, 112, 112], 0..255. It imports nothing of ours.
"""

import sys
import warnings

warnings.filterwarnings("ignore")  # MXNet 1.9.1 uses names that NumPy 1.23 deprecates

import mxnet as mx  # noqa: E402
import numpy  # noqa: E402

sym = mx.sym


def norm(x, name, fix_gamma=False):
    return sym.BatchNorm(x, fix_gamma=fix_gamma, eps=2e-5, momentum=0.9, name=name)


def convolution(x, width, kernel, stride, name):
    return sym.Convolution(
        x, num_filter=width, kernel=(kernel, kernel), stride=(stride, stride),
        pad=(kernel // 2, kernel // 2), no_bias=True, name=name,
    )  # fmt: skip


def prelu(x, name):
    return sym.LeakyReLU(x, act_type="prelu", name=name)


def network(blocks):
    x = (sym.Variable("data") - 127.5) * 0.0078125
    x = prelu(norm(convolution(x, 64, 3, 1, "conv0"), "bn0"), "relu0")
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for unit in range(1, count + 1):
            at, stride = f"stage{stage}_unit{unit}", 2 if unit == 1 else 1
            y = convolution(norm(x, at + "_bn1"), width, 3, 1, at + "_conv1")
            y = prelu(norm(y, at + "_bn2"), at + "_relu1")
            y = norm(convolution(y, width, 3, stride, at + "_conv2"), at + "_bn3")
            if unit == 1:
                x = norm(convolution(x, width, 1, stride, at + "_conv1sc"), at + "_sc")
            x = y + x
    x = sym.FullyConnected(norm(x, "bn1"), num_hidden=512, name="pre_fc1")
    return norm(x, "fc1", fix_gamma=True)


def main(prefix, pixels, out, *blocks):
    images = numpy.load(pixels)
    symbol = network([int(count) for count in blocks])
    bound = symbol.simple_bind(mx.cpu(), data=images.shape, grad_req="null")
    random = numpy.random.RandomState(0)
    for name, array in list(bound.arg_dict.items()) + list(bound.aux_dict.items()):
        if name != "data":
            std = 0.1 if array.ndim == 1 else (2 / numpy.prod(array.shape[1:])) ** 0.5
            values = random.normal(0, std, array.shape)
            positive = name.endswith(("_gamma", "_moving_var")) and "relu" not in name
            array[:] = numpy.abs(values) + 0.5 if positive else values
    (embeddings,) = bound.forward(is_train=False, data=mx.nd.array(images))
    numpy.save(out, embeddings.asnumpy())
    arguments = {name: a for name, a in bound.arg_dict.items() if name != "data"}
    mx.model.save_checkpoint(prefix, 0, symbol, arguments, bound.aux_dict)


if __name__ == "__main__":
    main(*sys.argv[1:])
