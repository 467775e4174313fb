"""Locks and atomic writes: the old file or the whole new one, whatever breaks off."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geo_pretrain.errors import CheckpointError
from geo_pretrain.files import atomic_write, locked, parse_json, write_text


class Stop(Exception):
    pass


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    for text in ("long\n" * 99, "größer\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_file_that_is_written_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def break_off():
        with atomic_write(path) as new:
            new.write_text("ne")
            raise Stop

    with pytest.raises(Stop):
        break_off()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "x.png"
    with atomic_write(path, suffix=path.suffix) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".png"
        assert not path.exists()

    def interrupted():
        with atomic_write(path, suffix=path.suffix) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert path.read_text() == "old"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with atomic_write(path, suffix=path.suffix) as temporary:
        shutil.copy(tmp_path / "plain", temporary)
    assert path.read_text() == ""


def test_files_have_the_modes_that_the_user_gives_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "weights.safetensors") as part:
            save_file({"a": torch.zeros(1)}, part)  # puts a private file in its place
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == 0o640


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "x.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "x"):
        raise AssertionError


HOLDER = """
import sys
from pathlib import Path
from geo_pretrain.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_is_refused_with_the_given_words(tmp_path):
    out = tmp_path / "out"
    held = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"^out is in use$"), locked(out, busy="out is in use"):
            raise AssertionError
        other.kill()
    with locked(out, busy="out is in use"):  # the dead block nobody
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        with pytest.raises(CheckpointError, match="in use"), locked(out, busy="out is in use"):
            raise AssertionError  # nor may the same process enter twice
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_what_stays_stays_for_those_who_wait(tmp_path):
    order = []

    def work(number: int) -> None:
        with locked(tmp_path / "x"):
            order.append(number)
            (tmp_path / "x").write_text(str(number))

    with locked(tmp_path / "x"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        assert order == []
    for thread in threads:
        thread.join()
    assert sorted(order) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", "x"]
    with locked(Path(tmp_path / "gone")):
        pass
    assert not (tmp_path / ".gone.lock").exists()


def test_json_that_is_nested_too_deeply_is_no_json():
    for text in ("[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
