"""NumPy files: damage is named without a traceback, and flipped bits are noticed."""

import numpy as np
import pytest

from data_tools.common.arrays import load_hashed, load_npy, write_hashed
from data_tools.common.errors import UserError


@pytest.mark.parametrize("mmap", [False, True])
def test_a_hashed_array_comes_back_and_is_its_owners(tmp_path, mmap):
    array = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    write_hashed(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(load_hashed(tmp_path / "x.npy", mmap), array)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)  # any reader's
    assert (tmp_path / "x.npy").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_every_flipped_byte_is_noticed(tmp_path):
    write_hashed(tmp_path / "x.npy", np.arange(5, dtype=np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="x.npy"):
            load_hashed(tmp_path / "x.npy")


def test_every_cut_is_noticed(tmp_path):
    write_hashed(tmp_path / "x.npy", np.arange(5, dtype=np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:size])
        with pytest.raises(UserError, match="x.npy ends without a hash"):
            load_hashed(tmp_path / "x.npy")


def test_what_is_no_array_is_named_without_numpys_advice(tmp_path):
    """NumPy takes every other file for a pickle, and says how to load one."""
    for name, content, fault in (
        ("model.onnx", b"\x08\x08\x12\x07pytorch", "or Python objects; it is an ONNX model"),
        ("empty.npy", b"", "it is an empty file"),
        ("text.npy", b"1 2 3\n", "it holds no array, or Python objects"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=fault) as caught:
            load_npy(tmp_path / name)
        assert "pickle" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_any_damage_of_a_header_is_a_users_error(tmp_path):
    """NumPy reads the header as Python, so the tokenizer's errors come out too."""
    np.save(tmp_path / "x.npy", np.arange(5))
    whole = (tmp_path / "x.npy").read_bytes()
    kinds = set()
    for at in range(128):
        for byte in (0, ord("("), ord("'"), ord("\\"), 0xFF):
            (tmp_path / "x.npy").write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                load_npy(tmp_path / "x.npy")
            except UserError as error:
                assert "x.npy is no whole .npy" in str(error)
                kinds.add(type(error.__cause__).__name__)
    assert "TokenError" in kinds or "SyntaxError" in kinds, kinds
    assert len(kinds) > 1
