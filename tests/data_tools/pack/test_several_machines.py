"""Parts of a pack on several machines make, joined, what one machine makes."""

import pytest

from data_tools.__main__ import main
from data_tools.common import locks
from data_tools.common.part_locks import part_lock
from data_tools.pack import several_machines
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.pack.several_machines import Part
from tests.data_tools.pack.test_pack_killed import slow_source, wait_for
from tests.data_tools.packs import contents, start_pack
from tests.data_tools.samples import encoded, folder

__all__ = ["slow_source"]  # a fixture

SHARDS = ["--shards", "7"]


@pytest.fixture
def faces(tmp_path):
    root = folder(tmp_path / "faces", [9] * 12)
    (root / "p03" / "0.jpg").write_bytes(encoded(1)[:-200])
    return root


def run(faces, out, *arguments):
    return main(["pack", str(faces), str(out), *SHARDS, *arguments])


def tree(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "options", [[], ["--split", "images=0.3", "--hold-out", "3", "--pairs", "20"]]
)
def test_the_parts_joined_are_the_set_of_one_machine(faces, tmp_path, options, capsys):
    assert run(faces, tmp_path / "one", *options) == 0
    out = tmp_path / "many"
    for number in (3, 1, 2):
        assert run(faces, out, *options, "--part", f"{number}/3") == 0
        assert not out.exists()
    assert "part 2/3 of" in capsys.readouterr().out
    assert run(faces, out, *options, "--finish") == 0
    assert tree(out) == tree(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "many", "one"]


def test_parts_run_at_the_same_time(faces, tmp_path):
    out = tmp_path / "many"
    running = [
        start_pack(faces, out, *SHARDS, "--workers", "1", "--part", f"{n}/3") for n in (1, 2, 3)
    ]
    for process in running:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    assert run(faces, out, "--finish") == 0
    pack(faces, tmp_path / "one", PackOptions(shards=7))
    assert contents(out) == contents(tmp_path / "one")


def test_finish_names_the_parts_that_are_missing(faces, tmp_path, capsys):
    out = tmp_path / "many"
    assert run(faces, out, "--finish") == 1
    assert "nothing to finish: run the parts first" in capsys.readouterr().err
    assert run(faces, out, "--part", "2/4") == 0
    before = tree(tmp_path / "many.partial")
    assert run(faces, out, "--finish") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "5 shards of 3 parts not finished: run --part 1/4, 3/4, 4/4 again" in error
    assert tree(tmp_path / "many.partial") == before


def test_a_damaged_shard_is_found_and_its_part_writes_it_again(faces, tmp_path, capsys):
    out, partial = tmp_path / "many", tmp_path / "many.partial"
    for number in (1, 2):
        assert run(faces, out, "--part", f"{number}/2") == 0
    shard = partial / "train-00003-of-00007.rec"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert run(faces, out, "--finish") == 1
    assert "1 shard of 1 part not finished: run --part 2/2 again" in capsys.readouterr().err
    assert run(faces, out, "--part", "2/2") == 0
    assert "3 shards (2 finished before)" in capsys.readouterr().out
    assert run(faces, out, "--finish") == 0
    pack(faces, tmp_path / "one", PackOptions(shards=7))
    assert contents(out) == contents(tmp_path / "one")


def test_a_killed_part_resumes(slow_source, tmp_path):
    out, partial = tmp_path / "many", tmp_path / "many.partial"
    shards = ["--shards", "6", "--workers", "1", "--resize", "--part", "1/2"]
    process = start_pack(slow_source, out, *shards)
    wait_for(lambda: list(partial.glob("journal/*-of-*.npz")), "the first shard")
    process.kill()
    process.communicate()
    kept = {path.name: path.stat().st_ino for path in partial.glob("train-00000-*.rec")}
    done = pack(slow_source, out, PackOptions(shards=6, resize=True), part=Part(1, 2))
    assert done["shards"] == 3 and 1 <= done["reused"] < 3 and done["images"] == 120
    now = {path.name: path.stat().st_ino for path in partial.glob("*.rec")}
    assert len(now) == 3 and now.items() >= kept.items()


def test_the_same_part_twice_is_refused_and_others_run_beside_it(faces, tmp_path, capsys):
    out = tmp_path / "many"
    assert run(faces, out, "--part", "3/3") == 0
    with locks.hold(part_lock(out, 1), "busy"):
        assert run(faces, out, "--part", "1/3") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "part 1/3 of it is being written: process" in error
        assert run(faces, out, "--part", "2/3") == 0
        for whole in ([], ["--finish"]):
            assert run(faces, out, *whole) == 1
    assert run(faces, out, "--part", "1/3") == 0
    assert run(faces, out, "--finish") == 0


def test_a_part_beside_an_ordinary_pack_is_refused(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(several_machines, "_WAIT", 0.0)
    with locks.hold(tmp_path / ".many.lock", "busy"):
        assert run(faces, tmp_path / "many", "--part", "1/3") == 1
    assert "another process is writing it: process" in capsys.readouterr().err


def test_parts_that_do_not_belong_together_are_refused(faces, tmp_path, capsys):
    out = tmp_path / "many"
    assert run(faces, out, "--part", "1/3") == 0
    before = tree(tmp_path / "many.partial")
    for arguments, fault in (
        (["--part", "1/4"], "is being packed in 3 parts: --part I/3, not 1/4"),
        (["--part", "2/3", "--seed", "1"], "holds shards of another source or other options"),
        (["--finish", "--seed", "1"], "give --finish the command of its parts"),
    ):
        assert run(faces, out, *arguments) == 1
        assert fault in capsys.readouterr().err
        assert tree(tmp_path / "many.partial") == before


def test_more_parts_than_shards(faces, tmp_path, capsys):
    assert run(faces, tmp_path / "many", "--part", "1/9") == 1
    assert "7 shards cannot fill 9 parts" in capsys.readouterr().err
    assert not (tmp_path / "many.partial").exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_what_is_no_part(faces, tmp_path, text, capsys):
    assert run(faces, tmp_path / "many", f"--part={text}") == 1
    assert "expected I/N, a part from 1 to N of N" in capsys.readouterr().err
    assert main(["pack", str(faces), str(tmp_path / "many"), "--part", "1/2"]) == 1
    assert "need --shards S" in capsys.readouterr().err
    assert not (tmp_path / "many.partial").exists()


def test_an_ordinary_pack_goes_on_with_what_the_parts_have_finished(faces, tmp_path):
    out = tmp_path / "many"
    assert run(faces, out, "--part", "1/3") == 0
    assert pack(faces, out, PackOptions(shards=7))["status"] == "resumed"
    pack(faces, tmp_path / "one", PackOptions(shards=7))
    assert contents(out) == contents(tmp_path / "one")
