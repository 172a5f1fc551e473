"""RecordIO, the `.rec` / `.idx` pair of MXNet: bytes only, no images.

A `.rec` is a run of records, each starting on a multiple of 4 bytes, little-endian:

    u32 magic 0xCED7230A | u32 cflag << 29 | length | payload | zeros up to a multiple of 4

A record that holds the magic at a multiple of 4 is cut there into pieces (the magic itself is not
stored): cflag 0 is a whole record, 1 the first piece, 2 a middle one, 3 the last. The record of an
image is

    u32 flag | f32 label | u64 id | u64 id2 | flag x f32 | the encoded image

with flag = 0 for a scalar label, and flag = n, label = 0 for n labels after the header.
A `.idx` holds a line `key<TAB>byte offset<LF>` per record. What is written here is byte for byte
what MXNet 1.9.1 writes (`make test-peers`).
"""

import contextlib
import mmap
import numbers
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.common import content
from data_tools.common.errors import UserError, UserKeyError
from data_tools.common.files import explaining_too_many, make_room, naming
from data_tools.common.text import refuse_utf16

MAGIC = 0xCED7230A
MAX_RECORD = (1 << 29) - 1  # bytes: the length field has 29 bits
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag

_MAGIC = struct.pack("<I", MAGIC)
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_FRAMED_HEADER = struct.Struct("<IIIfQQ")
_IDX_LINES = re.compile(rb"(?:[0-9]{1,18}+\t[0-9]{1,18}+\n)*+")
_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
_IDX_BLOCK = 1 << 24  # bytes of .idx text parsed at a time
LABEL_AT = 12  # bytes from the start of a record to the label of its header
_HEADER_WORDS = 9  # of a frame, a header and the first of the array labels
_HEADER_BLOCK = 1 << 20  # records whose headers are gathered at a time


class Header(NamedTuple):
    """The header of an image record; an array label holds `flag` labels."""

    flag: int
    label: float | np.ndarray  # float, or float32 [flag]
    id: int
    id2: int


def pack_record(header: Header, payload: bytes) -> bytes:
    """Header, labels and image as one record, unframed.

    As in MXNet a scalar label forces flag 0, an array label flag = its length, whatever was given.
    Raises: ValueError for an id or a label that its field cannot hold.
    """
    if isinstance(header.label, numbers.Number):
        flag, label, labels = 0, float(header.label), b""
    else:
        values = np.asarray(header.label, dtype="<f4")
        flag, label, labels = values.size, 0.0, values.tobytes()
    try:
        return _HEADER.pack(flag, label, header.id, header.id2) + labels + payload
    except (struct.error, OverflowError) as error:
        raise UserError(f"{header} does not fit u32, f32, u64, u64: {error}") from error


def unpack_record(record: bytes, where: str) -> tuple[Header, bytes]:
    """The header and the image bytes of a record.

    Raises: ValueError naming `where` if the record is shorter than its header and labels.
    """
    if len(record) < _HEADER.size:
        raise UserError(f"{where}: a record of {len(record)} bytes has no 24-byte header")
    flag, label, id_, id2 = _HEADER.unpack_from(record)
    if flag == 0:
        return Header(0, label, id_, id2), record[_HEADER.size :]
    start = _HEADER.size + 4 * flag
    if len(record) < start:
        raise UserError(f"{where}: {len(record)} bytes cannot hold the {flag} labels it announces")
    labels = np.frombuffer(record, dtype="<f4", count=flag, offset=_HEADER.size)
    return Header(flag, labels, id_, id2), record[start:]


def frame(record: bytes) -> bytes:
    """The record as the file holds it: cut at aligned magics, framed, padded.

    Raises: ValueError if the record has 2^29 bytes or more.
    """
    if len(record) > MAX_RECORD:
        raise UserError(f"a record has {len(record)} bytes; the format allows at most {MAX_RECORD}")
    pieces: list[bytes] = []
    start, at = 0, record.find(_MAGIC)
    while at >= 0:
        if at % 4 == 0:
            pieces.append(record[start:at])
            start = at + 4
        at = record.find(_MAGIC, at + 1)
    pieces.append(record[start:])
    cflags = [FIRST, *[MIDDLE] * (len(pieces) - 2), LAST] if len(pieces) > 1 else [WHOLE]
    framed = [
        _FRAME.pack(MAGIC, cflag << 29 | len(piece)) + piece
        for cflag, piece in zip(cflags, pieces, strict=True)
    ]
    return b"".join([*framed, bytes(-len(record) % 4)])


class RecordFile:
    """A mapped `.rec` file: reads the record at an offset. Safe in threads, over fork, pickled.

    The file must keep its length while it is open: reading a page that someone has truncated away
    ends the process by SIGBUS, which no Python code can turn into an error. Write a new file and
    rename it over this one instead.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with explaining_too_many(), naming(self.path), open(self.path, "rb") as file:
            make_room(file.fileno())
            self.size = file.seek(0, 2)  # bytes
            # An empty file is a valid one of no records, but cannot be mapped.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def __reduce__(self) -> tuple[type["RecordFile"], tuple[Path]]:
        return RecordFile, (self.path,)

    def where(self, offset: int) -> str:
        """The place of a record, for messages."""
        return f"{self.path}: byte {offset}"

    def read(self, offset: int) -> tuple[bytes, int]:
        """The record that starts at `offset`, its pieces joined, and the offset where it ends.

        Raises: ValueError naming file and byte: no magic, length past the end, pieces out of order.
        """
        pieces: list[bytes] = []
        at = offset
        while True:
            cflag, start, stop, end = self._piece(at)
            if cflag in (WHOLE, FIRST) and pieces:
                raise UserError(
                    f"{self.where(at)}: a new record (flag {cflag}) starts before the one at byte "
                    f"{offset} ends; the file is damaged there"
                )
            if cflag in (MIDDLE, LAST) and not pieces:
                raise UserError(
                    f"{self.where(at)}: a continuation (flag {cflag}) where a record should start"
                )
            pieces.append(self._data[start:stop])
            at = end
            if cflag in (WHOLE, LAST):
                return _MAGIC.join(pieces), end

    def _piece(self, at: int) -> tuple[int, int, int, int]:
        """Of the piece framed at `at`: cflag, start and stop of its bytes, end of its padding."""
        if at < 0 or at % 4:
            raise UserError(f"{self.where(at)}: not an offset of a record (a multiple of 4)")
        if at + _FRAME.size > self.size:
            raise UserError(
                f"{self.where(at)}: no record: the file ends at byte {self.size}; it is cut short, "
                f"or its .idx belongs to another file"
            )
        magic, lrec = _FRAME.unpack_from(self._data, at)
        if magic != MAGIC:
            hint = content.hint(self.path, "a RecordIO file") if at == 0 else ""
            raise UserError(f"{self.where(at)}: 0x{magic:08X} is not the magic 0x{MAGIC:08X}{hint}")
        cflag, length = lrec >> 29, lrec & MAX_RECORD
        if cflag > LAST:
            raise UserError(f"{self.where(at)}: unknown continuation flag {cflag}")
        start = at + _FRAME.size
        end = start + length + -length % 4
        if end > self.size:
            raise UserError(
                f"{self.where(at)}: the record goes on to byte {end}, but the file ends at byte "
                f"{self.size}: it is cut short, or damaged here"
            )
        return cflag, start, start + length, end

    def read_image(self, offset: int) -> tuple[Header, bytes]:
        """Header and image bytes of the record that starts at `offset`.

        Raises: ValueError as read() and unpack_record().
        """
        # Nearly all records are whole and have a scalar label: their bytes are copied once.
        if 0 <= offset <= self.size - _FRAMED_HEADER.size and offset % 4 == 0:
            magic, lrec, flag, label, id_, id2 = _FRAMED_HEADER.unpack_from(self._data, offset)
            stop = offset + _FRAME.size + lrec
            whole = magic == MAGIC and _HEADER.size <= lrec <= MAX_RECORD  # with its cflag
            if whole and flag == 0 and stop + -lrec % 4 <= self.size:
                encoded = self._data[offset + _FRAMED_HEADER.size : stop]
                return Header(0, label, id_, id2), encoded
        return unpack_record(self.read(offset)[0], self.where(offset))

    def scan(
        self, start: int = 0, stop: int | None = None, damaged: list[int] | None = None
    ) -> Iterator[int]:
        """The offset of every record in file order, found by walking the file.

        damaged: a list that receives the offsets of unreadable records; the walk goes on at the
            next place that looks like a record. None: the first of them ends the walk.

        Raises: UserError at a record that cannot be read, if `damaged` is None.
        """
        at = start
        stop = self.size if stop is None else stop
        while at < stop:
            if damaged is None:
                yield at
                _, at = self.read(at)
                continue
            try:
                _, end = self.read(at)
            except UserError:
                damaged.append(at)
                at = self._next_record(at + 4)
                continue
            yield at
            at = end

    def _next_record(self, at: int) -> int:
        """The first place from `at` on where a record starts, followed by another or by the end."""
        at = self._data.find(_MAGIC, at)
        while at >= 0:
            with contextlib.suppress(UserError):
                cflag, _, _, end = self._piece(at)
                if cflag in (WHOLE, FIRST) and self._data[end : end + 4] in (_MAGIC, b""):
                    return at
            at = self._data.find(_MAGIC, at + 1)
        return self.size

    def _heads(self, offsets: np.ndarray, num_words: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The first words of the records at `offsets`, uint32 [m, num_words], a block at a time.

        Zeros stand where no record can start. Reading them touches one page a record.
        """
        if self.size >= 4 * num_words:
            words = np.frombuffer(self._data, dtype="<u4", count=self.size // 4)
            for start in range(0, len(offsets), _HEADER_BLOCK):
                some = offsets[start : start + _HEADER_BLOCK]
                at = np.clip(some // 4, 0, len(words) - num_words)
                heads = words[at[:, None] + np.arange(num_words)]
                heads[at * 4 != some] = 0
                yield slice(start, start + len(some)), heads

    def ends(self, offsets: np.ndarray) -> np.ndarray:
        """The byte where each record of `offsets` [n] ends, int64 [n]; -1 if it is unreadable."""
        ends = np.full(len(offsets), -1, np.int64)
        for block, heads in self._heads(offsets, 2):
            magic, lrec = heads.astype(np.int64).T
            stop = offsets[block] + _FRAME.size + ((lrec & MAX_RECORD) + 3) // 4 * 4
            whole = (magic == MAGIC) & (lrec >> 29 == WHOLE) & (stop <= self.size)
            ends[block] = np.where(whole, stop, -1)
        for i in np.flatnonzero(ends < 0).tolist():  # cut in pieces, or damaged
            with contextlib.suppress(UserError):
                ends[i] = self.read(int(offsets[i]))[1]
        return ends

    def unlisted(self, offsets: np.ndarray) -> int:
        """How many records lie between those at `offsets` (ascending), on no line of the index."""
        starts = np.append(offsets, self.size)
        ends = np.append(0, self.ends(offsets))
        gaps = np.flatnonzero((ends >= 0) & (ends < starts))
        found = 0
        for gap in gaps.tolist():
            found += sum(1 for _ in self.scan(int(ends[gap]), int(starts[gap]), damaged=[]))
        return found

    def first_labels(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flag uint32 [n] and first label float32 [n] of the records at `offsets` [n].

        Vectorised: it touches one page per record and holds no Python object per record.
        Raises: ValueError naming file and byte for what is not a record with a header.
        """
        flags = np.zeros(len(offsets), np.uint32)
        labels = np.zeros(len(offsets), np.float32)
        plain = np.zeros(len(offsets), bool)  # whole, with a header and a first label
        for block, heads in self._heads(offsets, _HEADER_WORDS):
            magic, lrec, flag = heads[:, :3].astype(np.int64).T
            plain[block] = (
                (magic == MAGIC)
                & (lrec >> 29 == WHOLE)
                & (lrec >= 4 * (_HEADER_WORDS - 2))
                & (offsets[block] + _FRAME.size + lrec <= self.size)
                & (_HEADER.size + 4 * flag <= lrec)
            )
            flags[block] = flag
            labels[block] = np.where(flag == 0, heads[:, 3], heads[:, 8]).view(np.float32)
        for i in np.flatnonzero(~plain):  # cut in pieces, very short, or damaged: the plain way
            offset = int(offsets[i])
            header, _ = unpack_record(self.read(offset)[0], self.where(offset))
            flags[i] = header.flag
            labels[i] = np.ravel(header.label)[0]
        return flags, labels

    def close(self) -> None:
        if isinstance(self._data, mmap.mmap):
            with contextlib.suppress(BufferError):  # an error on its way up holds a view of it
                self._data.close()


class IndexedReader:
    """Random access to a `.rec` by the keys of its `.idx`: `reader[key] -> (Header, image bytes)`.

    `keys` and `offsets` are int64 [n] in file order. Without a `.idx` (None) the file is walked and
    the keys are 0 .. n-1. Safe in threads, over fork, pickled.

    Raises: ValueError for a damaged, cut or foreign .idx; at access, KeyError for an unknown key.
    """

    def __init__(
        self,
        idx_path: str | Path | None,
        rec_path: str | Path,
        damaged: list[int] | None = None,  # as of RecordFile.scan(); without an .idx only
    ) -> None:
        self.idx_path = None if idx_path is None else Path(idx_path)
        self.file = RecordFile(rec_path)
        if self.idx_path is None:
            self.offsets = np.fromiter(self.file.scan(damaged=damaged), np.int64)
            self.keys = np.arange(len(self.offsets), dtype=np.int64)
        else:
            self.keys, self.offsets = read_idx(self.idx_path)
            self._check_offsets()
        ascending = bool((self.keys[1:] > self.keys[:-1]).all())
        self._order = None if ascending else np.argsort(self.keys, kind="stable")
        self._sorted = self.keys if self._order is None else self.keys[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            key = self._sorted[twice[0]]
            raise UserError(
                f"{self.idx_path}: two lines have the key {key} ({len(twice) - 1} other such keys)"
            )

    def _check_offsets(self) -> None:
        beyond = np.flatnonzero(self.offsets >= self.file.size)
        if len(beyond):
            key, offset = self.keys[beyond[0]], self.offsets[beyond[0]]
            raise UserError(
                f"{self.idx_path}: key {key} points to byte {offset}, but {self.file.path} ends at "
                f"byte {self.file.size}; {len(beyond)} of {len(self.keys)} keys do: the .rec is "
                f"cut short, or the .idx belongs to another file"
            )
        if (self.offsets[1:] < self.offsets[:-1]).any():
            order = np.argsort(self.offsets, kind="stable")
            self.keys, self.offsets = self.keys[order], self.offsets[order]
        end = 0
        if len(self.offsets):
            try:
                _, end = self.file.read(int(self.offsets[-1]))
            except ValueError:
                return  # reading that record will name its damage; the others can be read
        if end != self.file.size:
            raise UserError(
                f"{self.idx_path}: its last record ends at byte {end} of {self.file.path}, which "
                f"has {self.file.size}: no line of the .idx covers the last "
                f"{self.file.size - end} bytes: the .idx is cut short, or belongs to another file; "
                f"pack and inspect read the .rec without it with --walk"
            )

    def __reduce__(self) -> tuple[type["IndexedReader"], tuple[Path | None, Path]]:
        return IndexedReader, (self.idx_path, self.file.path)

    def __len__(self) -> int:
        return len(self.keys)

    def _find(self, key: int) -> int | None:
        """The position of a key among the sorted ones, None without it."""
        at = int(np.searchsorted(self._sorted, key))
        return at if at < len(self._sorted) and int(self._sorted[at]) == key else None

    def __contains__(self, key: int) -> bool:
        return self._find(key) is not None

    def position(self, key: int) -> int:
        """The position of the key in `keys`. Raises: KeyError naming the file."""
        at = self._find(key)
        if at is None:
            known = f"{self._sorted[0]} .. {self._sorted[-1]}" if len(self) else "none"
            place = self.idx_path or self.file.path
            raise UserKeyError(
                f"{place}: no record has the key {key}; its {len(self)} keys: {known}"
            )
        return at if self._order is None else int(self._order[at])

    def raw(self, key: int) -> bytes:
        """The record's own bytes: header, labels and image, pieces joined."""
        return self.file.read(int(self.offsets[self.position(key)]))[0]

    def __getitem__(self, key: int) -> tuple[Header, bytes]:
        offset = int(self.offsets[self.position(key)])
        return unpack_record(self.file.read(offset)[0], f"{self.file.where(offset)}, key {key}")

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "IndexedReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_idx(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and offsets, int64 [n] each, in the order of the lines.

    Raises: ValueError naming file, line and byte of the first line that is not `key<TAB>offset`.
    """
    blocks = [np.empty(0, np.int64)]
    done, lines = 0, 0  # bytes and lines parsed
    with open(path, "rb") as file:
        start = file.read(len(_MARK))
        refuse_utf16(start, str(path))
        if start != _MARK:
            file.seek(0)
        while block := file.read(_IDX_BLOCK):
            block += file.readline()
            text = block.replace(b"\r\n", b"\n")
            if not text.endswith(b"\n"):
                text += b"\n"
            if not _IDX_LINES.fullmatch(text):
                raise UserError(f"{path}: {_first_bad_line(block, done, lines)}")
            blocks.append(np.fromstring(text, dtype=np.int64, sep=" "))
            done += len(block)
            lines += len(blocks[-1]) // 2
    pairs = np.concatenate(blocks).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _first_bad_line(block: bytes, done: int, lines: int) -> str:
    for line in block.split(b"\n"):
        lines += 1
        if not _IDX_LINES.fullmatch(line.removesuffix(b"\r") + b"\n"):
            break
        done += len(line) + 1
    return f"byte {done}, line {lines}: {line[:60]!r} is not key<TAB>offset"


class Writer:
    """Writes a `.rec` and its `.idx`, replacing both: `writer.write(key, header, payload)`."""

    def __init__(self, idx_path: str | Path, rec_path: str | Path) -> None:
        with contextlib.ExitStack() as stack:
            self._rec = stack.enter_context(open(rec_path, "wb"))
            self._idx = stack.enter_context(open(idx_path, "w", encoding="ascii", newline="\n"))
            stack.pop_all()
        self.offset = 0  # bytes written to the .rec so far: where the next record starts

    def write(self, key: int, header: Header, payload: bytes) -> None:
        """Append a record. Raises: ValueError if it has 2^29 bytes or more, OSError of the disk."""
        framed = frame(pack_record(header, payload))
        with naming(self._rec.name):  # the error of a full disk names no file
            self._rec.write(framed)
        with naming(self._idx.name):
            self._idx.write(f"{int(key)}\t{self.offset}\n")
        self.offset += len(framed)

    def close(self) -> None:
        """Raises: OSError naming the file whose last bytes cannot be written."""
        with contextlib.ExitStack() as stack:
            for file in (self._rec, self._idx):
                stack.enter_context(naming(file.name))
                stack.callback(file.close)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
