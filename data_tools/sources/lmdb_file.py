"""The entries of an LMDB database file: its B+ tree, read without the lmdb library.

The library maps the file and follows what it says: a file that was cut short, or a damaged page,
ends the process (SIGBUS, SIGSEGV). Here every page is read by pread and checked, the pages of a
damaged branch are reported and left out, and no more than a path of pages is in memory.

Format (mdb.c, data version 1, 64-bit, little-endian): two meta pages; pages of psize bytes with a
header of 16; leaf nodes with a key and a value, or with the number of the first overflow page that
holds a longer value.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.common import content, files
from data_tools.common.errors import UserError

HEADER = 16  # bytes of a page's
_MAGIC = struct.pack("<I", 0xBEEFC0DE)
_PAGE = struct.Struct("<QHHHH")  # number, padding, flags, lower, upper
_META = struct.Struct("<IIQQ")  # magic, version, address, map size
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branches, leaves, overflow, entries, root
_NODE = struct.Struct("<HHHH")  # low, high, flags, key size
_LAST = struct.Struct("<QQ")  # last page, transaction
_TREES_AT, _LAST_AT = HEADER + _META.size, HEADER + _META.size + 2 * _TREE.size
_BRANCH, _LEAF, OVERFLOW = 1, 2, 4  # of a page
_BIG, _SUBTREE, _DUPLICATES = 1, 2, 4  # of a node
_DUPSORT = 4  # of a tree
_NONE = 2**64 - 1  # the root of an empty tree
_DEEPEST = 32  # levels
_DATA = "data.mdb"


class Value(NamedTuple):
    key: bytes
    at: int  # byte of the file
    size: int


def database_file(path: Path) -> Path | None:
    """The file of the LMDB database at `path`, itself or the directory of one; None: it is none."""
    if files.is_dir(path):
        path = path / _DATA
    if not files.is_file(path):
        return None
    with files.naming(path), open(path, "rb") as file:
        head = file.read(HEADER + len(_MAGIC))
    return path if head[HEADER:] == _MAGIC or path.name == _DATA else None


class Database:
    """A database that is open for reading. Raises: UserError: damaged, cut short, or not plain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: list[tuple[str, str]] = []  # (where, why) of pages that cannot be read
        self.descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(self.descriptor).st_size
            self.page_size, last, flags, self.entries, self._root = self._meta()
            if size < (last + 1) * self.page_size:
                raise UserError(
                    f"{path}: {size} bytes, but the database has {last + 1} pages of "
                    f"{self.page_size}: the file is cut short, copy it again"
                )
            if flags & _DUPSORT:
                raise UserError(f"{path}: a database with several values a key is not read")
            self._pages = self._left = last + 1  # that may still be visited: a loop ends
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def rewind(self) -> None:
        """Forget what values() has found so far: it is called again."""
        self.lost.clear()
        self._left = self._pages

    def _meta(self) -> tuple[int, int, int, int, int]:
        """Page size, last page, and the main tree's flags, entries and root, of the newest meta."""
        found = []
        first = self._read(0, _LAST_AT + _LAST.size)
        hint = content.hint(self.path)
        if len(first) < _LAST_AT + _LAST.size or first[HEADER : HEADER + 4] != _MAGIC:
            raise UserError(f"{self.path}: not an LMDB database{hint}")
        (page_size, *_) = _TREE.unpack_from(first, _TREES_AT)
        if page_size not in [1 << bits for bits in range(9, 17)]:
            raise UserError(f"{self.path}: its first page is damaged: pages of {page_size} bytes")
        for start in (0, page_size):
            page = self._read(start, _LAST_AT + _LAST.size)
            if len(page) < _LAST_AT + _LAST.size or page[HEADER : HEADER + 4] != _MAGIC:
                continue
            _, version, _, _ = _META.unpack_from(page, HEADER)
            if version != 1:
                raise UserError(f"{self.path}: LMDB of data version {version}; version 1 is read")
            last, transaction = _LAST.unpack_from(page, _LAST_AT)
            tree = _TREE.unpack_from(page, _TREES_AT + _TREE.size)
            found.append((transaction, (page_size, last, tree[1], tree[6], tree[7])))
        return max(found)[1]

    def _read(self, at: int, size: int) -> bytes:
        with files.naming(self.path):
            return os.pread(self.descriptor, size, at)

    def values(self) -> Iterator[Value]:
        """Every entry in the order of its key's bytes; what is damaged joins `lost`."""
        if self._root == _NONE:
            return
        stack = [iter([self._root])]  # of each level, the pages to visit
        while stack:
            number = next(stack[-1], None)
            if number is None:
                stack.pop()
                continue
            self._left -= 1
            try:
                if self._left < 0 or len(stack) > _DEEPEST:
                    raise _Damaged("its pages form a loop")
                page, flags = self._page(number)
                if flags & _BRANCH:
                    stack.append(iter(self._children(page)))
                    continue
                found = list(self._leaf(page))
            except (_Damaged, struct.error) as error:
                self.lost.append((f"{self.path.name}: page {number}", f"damaged: {error}"))
                if self._left < 0:
                    return
                continue
            yield from (
                Value(key, at + number * self.page_size if inline else at, size)
                for key, at, size, inline in found
            )

    def _page(self, number: int) -> tuple[bytes, int]:
        if number >= self._pages:
            raise _Damaged("it lies beyond the end of the database")
        page = self._read(number * self.page_size, self.page_size)
        if len(page) < self.page_size:
            raise _Damaged("it lies beyond the end of the file")
        own, _, flags, lower, upper = _PAGE.unpack_from(page)
        if own != number or not flags & (_BRANCH | _LEAF):
            raise _Damaged("it is no page of keys")
        if not HEADER <= lower <= upper <= self.page_size:
            raise _Damaged("its bounds contradict each other")
        return page, flags

    def _nodes(self, page: bytes) -> Iterator[tuple[int, int, int, int, int]]:
        lower = _PAGE.unpack_from(page)[3]
        for at in struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER):
            low, high, flags, key_size = _NODE.unpack_from(page, at)
            if at + _NODE.size + key_size > len(page):
                raise _Damaged("a key reaches beyond it")
            yield at, low, high, flags, key_size

    def _children(self, page: bytes) -> list[int]:
        return [low | high << 16 | flags << 32 for _, low, high, flags, _ in self._nodes(page)]

    def _leaf(self, page: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
        """Key, place and size of each value; the place is in the page if it is inline."""
        for at, low, high, flags, key_size in self._nodes(page):
            start = at + _NODE.size
            key, data = page[start : start + key_size], start + key_size
            size = low | high << 16
            if flags & (_SUBTREE | _DUPLICATES):
                raise UserError(
                    f"{self.path}: {os.fsdecode(key)!r} is a database of its own or a key with "
                    f"several values; a plain database is read"
                )
            if flags & _BIG:
                (number,) = struct.unpack_from("<Q", page, data)
                if number + size // self.page_size >= self._pages:
                    raise _Damaged("a value lies beyond the end of the database")
                yield key, number * self.page_size + HEADER, size, False
            elif data + size > len(page):
                raise _Damaged("a value reaches beyond it")
            else:
                yield key, data, size, True


def read_value(descriptor: int, at: int, size: int, page_size: int) -> bytes:
    """A value that Database.values() has found. Raises: UserError: it is damaged."""
    if at % page_size != HEADER:  # within a leaf page
        return os.pread(descriptor, size, at)
    data = os.pread(descriptor, HEADER + size, at - HEADER)
    if len(data) < HEADER + size:
        raise UserError("the database ends within it: cut short")
    number, _, flags, _, _ = _PAGE.unpack_from(data)
    if number != at // page_size or not flags & OVERFLOW:
        raise UserError("damaged in the database: its page is no page of a value")
    return data[HEADER:]


class _Damaged(Exception):
    pass
