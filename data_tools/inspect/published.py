"""A data set written out as sets are published: parquet of Hugging Face, tars of WebDataset."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools import shards
from data_tools.common import extras, files
from data_tools.common.parallel import Advance

_ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}
_IMAGES = 20_000  # of a file, some 200 MB
_GROUP = 100  # rows of a row group, as `datasets` writes images


def ending_of(encoded: bytes) -> str:
    """The ending of a file that holds this image."""
    return _ENDINGS.get(encoded[:2], "bin")


def to_parquet(data: shards.Shards, out: Path, advance: Advance) -> None:
    """data/train-*.parquet and README.md. Raises: UserError: pyarrow is not installed."""
    with extras.needed("pyarrow", "formats", "--layout parquet"):
        import pyarrow as arrow
        from pyarrow import parquet
    names = data.identities
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = arrow.schema(
        [
            ("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])),
            ("label", arrow.int64()),
        ],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    (out / "data").mkdir()
    num_files = _num_files(data)
    rows: Iterator[tuple[int, tuple[int, bytes]]] = enumerate(data)
    for number in range(num_files):
        path = out / "data" / f"train-{number:05d}-of-{num_files:05d}.parquet"
        left = _of_file(data, number)
        with files.naming(path), parquet.ParquetWriter(path, schema, compression="none") as writer:
            while left:
                some = [next(rows) for _ in range(min(left, _GROUP))]
                images = [
                    {"bytes": encoded, "path": f"{i:08d}.{ending_of(encoded)}"}
                    for i, (_, encoded) in some
                ]
                labels = [label for _, (label, _) in some]
                writer.write_table(arrow.table([images, labels], schema=schema))
                left -= len(some)
                advance(len(some))
    files.write_bytes(out / "README.md", os.fsencode(_readme(data, names)))


def to_webdataset(data: shards.Shards, out: Path, advance: Advance) -> None:
    """train-*.tar with 00000000.jpg and 00000000.cls for each image, and classes.txt."""
    num_files = _num_files(data)
    rows = enumerate(data)
    for number in range(num_files):
        path = out / f"train-{number:06d}.tar"
        with files.naming(path), tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(_of_file(data, number)):
                i, (label, encoded) = next(rows)
                _add(tar, f"{i:08d}.cls", str(label).encode())
                _add(tar, f"{i:08d}.{ending_of(encoded)}", encoded)
                advance(1)
    lines = b"".join(os.fsencode(name) + b"\n" for name in data.identities)
    files.write_bytes(out / "classes.txt", lines)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _num_files(data: shards.Shards) -> int:
    return -(-len(data) // _IMAGES)


def _of_file(data: shards.Shards, number: int) -> int:
    """How many images the file of this number holds."""
    return min(_IMAGES, len(data) - number * _IMAGES)


def _readme(data: shards.Shards, names: list[str]) -> str:
    """The card of the data set, with its features as `datasets` writes them."""
    quoted = "".join(f"          '{c}': {_quoted(name)}\n" for c, name in enumerate(names))
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n"
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n"
        f"    dtype:\n      class_label:\n        names:\n{quoted}"
        f"  splits:\n  - name: train\n    num_examples: {len(data)}\n---\n\n"
        f"{len(data)} images of {data.num_classes} people.\n"
    )


def _quoted(name: Any) -> str:
    return "'" + str(name).replace("'", "''") + "'"
