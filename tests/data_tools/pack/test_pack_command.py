"""`pack` as it is typed: what is refused, and what it prints."""

import json
import re
import shutil

import pytest

from data_tools.__main__ import main
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from tests.data_tools.packs import start_pack


@pytest.mark.parametrize(
    ("spoil", "arguments", "fault"),
    [
        (
            lambda s: [p.write_bytes(b"") for p in s.glob("*/*.jpg")],
            [],
            r"0 of 7 identities have a",
        ),
        (lambda s: [shutil.rmtree(p) for p in s.iterdir()], [], r"no images: expected .*/<id"),
        (lambda s: [shutil.rmtree(p) for p in list(s.iterdir())[1:]], [], "1 of 1 identities"),
        (lambda s: None, ["--hold-out", "6", "--pairs", "20"], "6 to hold out and 2 to train"),
        (lambda s: None, ["--hold-out", "2", "--pairs", "21"], "multiple of 20"),
        (lambda s: None, ["--hold-out", "6"], "--hold-out can be at most 5"),
        (lambda s: None, ["--hold-out", "1"], "--hold-out 1: 20 pairs need 10 of .* more images"),
        (lambda s: None, ["--shards", "32"], "31 images cannot fill 32 shards"),
        (lambda s: None, ["--shards", "0"], "--shards 0: must be 1 or more"),
        (lambda s: None, ["--seed", "-1"], "--seed -1"),
        (lambda s: None, ["--size", "1025"], "--size 1025: must be 1024 or less"),
        (lambda s: None, ["--quality", "101"], "at most 100"),
        (lambda s: None, ["--workers", "0"], "--workers 0"),
        (lambda s: (s / "x\ny").mkdir(), [], "line break"),
    ],
)
def test_mistakes_leave_nothing(source, tmp_path, capsys, spoil, arguments, fault):
    spoil(source)
    out = tmp_path / "set"
    assert main(["pack", str(source), str(out), "--workers", "1", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert len(list(tmp_path.iterdir())) == 1, "something was left beside the source"
    assert re.search(fault, error), error


def test_source_and_output_are_kept_apart(source, tmp_path, capsys):
    for one, other in [
        (source, source), (source, source / "p00" / "out"), (source / "p00", source),
        (source, tmp_path),
    ]:  # fmt: skip
        assert main(["pack", str(one), str(other), "--overwrite"]) == 1
        assert "keep source and output apart" in capsys.readouterr().err
    assert len(list(source.glob("*/*.jpg"))) == 31
    assert main(["pack", str(tmp_path / "absent"), str(tmp_path / "set")]) == 1
    assert "absent: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["inspect"], ["verify"], ["unpack"], ["view", "--label", "0"]], ids=lambda x: x[0]
)
def test_a_file_is_no_data_set(tmp_path, capsys, words):
    (tmp_path / "model.onnx").write_bytes(b"x")
    command, *options = words
    out = [str(tmp_path / "out.png")] * (command in ("unpack", "view"))
    assert main([command, str(tmp_path / "model.onnx"), *out, *options]) == 1
    assert "model.onnx is a file, not a data set: name the dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["inspect", "SET", "--quality", "-1"], "--quality -1: must be 0 or more"),
        (["overlap", "SET", "SET", "out.txt", "--workers", "0"], "--workers 0: must be 1 or more"),
    ],
)
def test_numbers_out_of_range(source, tmp_path, capsys, words, fault):
    pack(source, tmp_path / "set", PackOptions())
    assert main([word.replace("SET", str(tmp_path / "set")) for word in words]) == 1
    assert fault in capsys.readouterr().err


def test_the_command_prints_one_json_line_last(source, tmp_path):
    process = start_pack(source, tmp_path / "set", "--shards", "2", "--workers", "1", "--json")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    done = json.loads(output.splitlines()[-1])
    seconds = done.pop("seconds")
    assert 0 < seconds < 60
    assert done == {
        "status": "packed",
        "path": str(tmp_path / "set"),
        "images": 31,
        "classes": 7,
        "shards": 2,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "set").glob("*.rec")),
        "skipped": 0,
        "empty_identities": 0,
        "resized": {"count": 0, "of": 31},
        "held_out_identities": 0,
        "pairs_asked": 0,
        "pairs_made": 0,
        "verification": [],
        "left_out": {},
        "ignored_files": 0,
        "too_few_images": 0,
        "beyond_max_images": 0,
    }
    assert "images" in error and "31/31" in error  # the progress


def test_mistyped_commands(capsys):
    for arguments in (["pakc"], ["pack"], ["pack", "a", "b", "--shards", "x"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
    assert main([]) == 2
    with pytest.raises(SystemExit) as exit:
        main(["pack", "--help"])
    assert exit.value.code == 0
    assert "--hold-out N" in capsys.readouterr().out
