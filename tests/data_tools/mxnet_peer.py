"""Run by the Python that has MXNet 1.9.1: reads what we wrote, writes the same again.

    mxnet_peer.py read REC_WITHOUT_SUFFIX     a JSON line for every record, in file order
    mxnet_peer.py copy FROM TO                reads every record of FROM and writes it to TO
    mxnet_peer.py pixels REC_WITHOUT_SUFFIX   sha256 of the RGB pixels that MXNet decodes

It imports nothing of ours.
"""

import hashlib
import json
import sys
import warnings

warnings.filterwarnings("ignore")  # MXNet 1.9.1 uses names that NumPy 1.23 deprecates

import mxnet  # noqa: E402
import numpy  # noqa: E402
from mxnet.recordio import MXIndexedRecordIO, pack, unpack  # noqa: E402


def records(stem):
    reader = MXIndexedRecordIO(stem + ".idx", stem + ".rec", "r")
    for key in reader.keys:
        header, payload = unpack(reader.read_idx(key))
        yield key, header, payload
    reader.close()


def read(stem):
    for key, header, payload in records(stem):
        label = numpy.ravel(header.label).tolist()
        sha256 = hashlib.sha256(payload).hexdigest()
        print(json.dumps([key, header.flag, label, header.id, header.id2, sha256]))


def copy(source, target):
    writer = MXIndexedRecordIO(target + ".idx", target + ".rec", "w")
    for key, header, payload in records(source):
        writer.write_idx(key, pack(header, payload))
    writer.close()


def pixels(stem):
    for key, _, payload in records(stem):
        image = mxnet.image.imdecode(payload, to_rgb=1).asnumpy()
        print(json.dumps([key, list(image.shape), hashlib.sha256(image.tobytes()).hexdigest()]))


if __name__ == "__main__":
    {"read": read, "copy": copy, "pixels": pixels}[sys.argv[1]](*sys.argv[2:])
