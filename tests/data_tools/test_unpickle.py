"""What the restricted reader accepts, from every protocol, and what it refuses without running."""

import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest

from data_tools import unpickle
from tests.real import ROOT

IMAGES = [b"", b"\xff\xd8jpeg\x00\x80\n'\\", bytes(range(256)) * 300]


def write(tmp_path, content):
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_bytes_and_bools_of_every_protocol(tmp_path, protocol):
    path = write(tmp_path, pickle.dumps((IMAGES, [True, False]), protocol=protocol))
    assert unpickle.load(path) == (IMAGES, [True, False])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_numpy_arrays_and_scalars(tmp_path, protocol):
    images = [np.frombuffer(image, np.uint8) for image in IMAGES]
    images.append(np.arange(9, dtype=np.uint8))  # writable: a bytearray under protocol 5
    labels = [np.bool_(True), np.bool_(False)]
    content = pickle.dumps((images, labels, np.array([True, False])), protocol=protocol)
    arrays, scalars, flags = unpickle.load(write(tmp_path, content))
    assert [array.data for array in arrays] == [image.tobytes() for image in images]
    assert {(array.dtype, len(array.shape)) for array in arrays} == {("u1", 1)}
    assert scalars == [True, False]
    assert (flags.dtype, flags.shape, flags.data) == ("b1", (2,), b"\x01\x00")


def test_numpy_1_names(tmp_path):
    content = pickle.dumps([np.arange(3, dtype=np.uint8)], protocol=2)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert unpickle.load(write(tmp_path, old))[0].data == b"\x00\x01\x02"


def test_python_2_strings(tmp_path):
    # (["\xff\xd8", "abc"], [True]) as cPickle of Python 2 writes it under protocols 2 and 0.
    binary = b"\x80\x02]q\x01(U\x02\xff\xd8q\x02T\x03\x00\x00\x00abcq\x03e]q\x04\x88a\x86q\x05."
    text = b"((lp1\nS'\\xff\\xd8'\np2\naS'abc'\np3\na(lp4\nI01\natp5\n."
    for content in (binary, text):
        assert unpickle.load(write(tmp_path, content)) == ([b"\xff\xd8", b"abc"], [True])


def test_python_2_array_of_uint8(tmp_path):
    # numpy 1.x under Python 2, protocol 2: dtype name and data are byte strings.
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b"
        b"\x87Rq\x03(K\x01K\x03\x85cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x01\x02\xfetb."
    )
    assert unpickle.load(write(tmp_path, content)).data == b"\x01\x02\xfe"


class Evil:
    def __init__(self, function, *arguments):
        self.recipe = function, arguments

    def __reduce__(self):
        return self.recipe


@pytest.mark.parametrize("protocol", range(6))
def test_a_planted_command_is_named_and_not_run(tmp_path, protocol):
    victim = tmp_path / "ran"
    content = pickle.dumps(([Evil(os.system, f"touch {victim}")], [True]), protocol=protocol)
    with pytest.raises(ValueError, match="set.bin: .*forbidden global posix.system"):
        unpickle.load(write(tmp_path, content))
    assert not victim.exists()


@pytest.mark.parametrize("function", [eval, getattr, __import__, bytearray, np.load, np.zeros])
def test_other_callables_are_forbidden(tmp_path, function):
    with pytest.raises(ValueError, match=f"forbidden global .*{function.__name__}"):
        unpickle.load(write(tmp_path, pickle.dumps(Evil(function, "x"))))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b"\x80\x04]", "ends early"),
        (b"\x80\x63.", "unsupported pickle protocol"),
        (b"not a pickle", "forbidden instruction 'n'"),
        (b"\x80\x02}.", "forbidden instruction '}'"),  # a dict
        (b"\x80\x02c_codecs\nencode\n)\x81.", "forbidden instruction '\\\\x81'"),  # NEWOBJ
        (b"\x80\x02]q\x00h\x07.", "Memo value not found"),
        (b"\x80\x02a.", "not a verification pickle"),  # APPEND to an empty stack
        # BUILD that would set an attribute of one of the reader's own functions
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aK\x01\x86b.", "state of a function"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.", "encoding"),
        (b"\x80\x02cnumpy\nndarray\nN\x62.", "state of a type"),
        (pickle.dumps(np.arange(3.0)), "type 'f8'"),
        (pickle.dumps(np.array([[], None], dtype=object)), "type 'O8'"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        unpickle.load(write(tmp_path, content))
    assert "set.bin" in str(caught.value)


def nested(levels):
    """The instructions that build lists whose text has 2^levels parts."""
    bomb = []
    for _ in range(levels):
        bomb = [bomb, bomb]
    return pickle.dumps(bomb, protocol=2)[2:-1]


ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01%scnumpy\ndtype\n%s\x85R\x89%stb."


@pytest.mark.parametrize(
    "content, message",
    [
        (ARRAY % (b"K\x03\x85", nested(18), b"U\x03abc"), r"type \(a list\); only bools"),
        (ARRAY % (nested(18), b"U\x02u1", b"U\x03abc"), "array without a shape"),
        (ARRAY % (nested(18) + b"\x85", b"U\x02u1", b"U\x03abc"), "shape is not of lengths"),
        (ARRAY % (b"(" + b"K\x01" * 33 + b"t", b"U\x02u1", b"U\x01a"), "array without a shape"),
        (ARRAY % (b"J\xff\xff\xff\xff\x85", b"U\x02u1", b"U\x01a"), "shape is not of lengths"),
        (ARRAY % (b"K\x04\x85", b"U\x02u1", b"U\x03abc"), "4 elements with 3 bytes"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + nested(18) + b"\x86R.", r"\(a list\)"),
        (b"\x80\x02cos\n" + b"x" * 10**6 + b"\n.", "forbidden global os.xxx"),
        (b"\x80\x02cnumpy\ndtype\nT\x00\x00\x10\x00" + b"f" * 2**20 + b"\x85R.", "type 'fff"),
    ],
)
def test_what_a_file_says_is_not_printed_at_length(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        unpickle.load(write(tmp_path, content))
    assert len(str(caught.value)) < 500


def test_every_truncation_is_an_error(tmp_path):
    images = [np.arange(5, dtype=np.uint8), b"abcdef"]
    for protocol in (0, 2, 4, 5):
        content = pickle.dumps((images, [True]), protocol=protocol)
        for length in range(len(content)):
            with pytest.raises(ValueError, match="set.bin"):
                unpickle.load(write(tmp_path, content[:length]))


def claims(opcode, size, width):
    return b"\x80\x05" + opcode + struct.pack({1: "<B", 4: "<I", 8: "<Q"}[width], size)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",  # memo slot 2^32 - 1: 64 GiB in the C interpreter
        claims(pickle.BYTEARRAY8, 1 << 40, 8) + b".",
        claims(pickle.BINBYTES8, 1 << 40, 8) + b".",
        claims(pickle.BINUNICODE, 0xFFFFFFFF, 4) + b".",
        claims(pickle.FRAME, 1 << 40, 8) + b"]",
        # a NumPy array that claims 2^40 elements and brings three
        pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2).replace(
            b"K\x03\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"
        ),
    ],
    ids=["memo", "bytearray", "bytes", "text", "frame", "array"],
)
def test_claimed_sizes_allocate_nothing(tmp_path, content):
    path = write(tmp_path, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    try:
        assert unpickle.load(path) == []  # a lone huge memo index is harmless here
    except ValueError as error:
        assert "set.bin" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_the_allowed_instructions_are_the_documented_ones():
    known = {opcode.name for opcode in pickletools.opcodes}
    names = set(unpickle._ALLOWED.split())
    assert names <= known
    calling = {"NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert not names & calling


@pytest.mark.parametrize("depth", [10**5, 10**6])
@pytest.mark.parametrize("closing", [b"a", b"t", b"0"])
def test_deep_nesting_ends_in_an_error(tmp_path, depth, closing):
    """Lists in lists, tuples in tuples: no recursion of ours, and none when they are let go."""
    if closing == b"a":
        content = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    elif closing == b"t":
        content = b"\x80\x02" + b"(" * depth + b"t" * depth + b"."
    else:
        content = b"\x80\x02" + b"]" * depth + b"0" * depth + b"."
    path = write(tmp_path, content)
    code = (
        "import sys; from data_tools import verification_bin\n"
        "try: verification_bin.load_bin(sys.argv[1])\n"
        "except ValueError as error: print('refused', len(str(error)) < 500)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "refused True\n", (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize("seed", range(6))
def test_mutations_never_get_past_the_reader(tmp_path, seed):
    """Bytes flipped, cut in and out: an error that names the file, or harmless content."""
    rng = np.random.default_rng(seed)
    images = [np.arange(30, dtype=np.uint8), b"abcdef" * 5]
    base = pickle.dumps((images, [True]), protocol=int(rng.integers(0, 6)))
    for _ in range(200):
        content = bytearray(base)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(len(content)))
            kind = rng.integers(3)
            if kind == 0:
                content[at] = int(rng.integers(256))
            elif kind == 1:
                del content[at : at + int(rng.integers(1, 8))]
            else:
                content[at:at] = rng.bytes(int(rng.integers(1, 8)))
        path = write(tmp_path, bytes(content) or b"x")
        try:
            found = unpickle.load(path)
        except ValueError as error:
            assert "set.bin" in str(error)
        else:
            assert isinstance(
                found, tuple | list | bytes | str | bool | int | unpickle.Array | None
            )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"(cnumpy\nndarray\no.", "forbidden instruction 'o'"),  # OBJ
        (b"(X\x02\x00\x00\x00idios\nsystem\n.", "forbidden instruction 'i'"),  # INST
        (b"\x80\x02cbuiltins\neval\n.", "forbidden global builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", "forbidden global builtins.exec"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "forbidden global"),
        (b"\x80\x04\x8c\x05numpy\x8c\x1andarray.__class__.__base__\x93.", "forbidden global"),
        (b"\x80\x02ccopyreg\n_reconstructor\n.", "forbidden global copyreg"),
        (b"\x80\x02\x82\x01.", "forbidden instruction"),  # EXT1
        (b"\x80\x02Pid\n.", "forbidden instruction 'P'"),  # PERSID
    ],
)
def test_ways_around_the_allow_list(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        unpickle.load(write(tmp_path, content))
