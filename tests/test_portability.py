"""What other systems refuse is not there: names, renames over open files, folders that are flushed, line ends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from geo_pretrain import files

ROOT = Path(__file__).parents[1]
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows, with any ending


def test_names_of_files_are_possible_everywhere():
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout, to know which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listed.stdout.rstrip("\0").split("\0")
    assert len(names) > 500
    folded = Counter(name.casefold() for name in names)
    assert not [name for name, count in folded.items() if count > 1], "differ by case alone"
    parts = {part for name in names for part in name.split("/")}
    assert not [part for part in parts if RESERVED.fullmatch(part) or re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', part)]
    assert max(map(len, names)) < 150  # Windows allows 260 with the folder above


class Held(type(Path())):
    """A path that another program has open: the first renames are refused, as on Windows."""

    refusals: ClassVar[list[int]] = []

    def replace(self, target):
        if self.refusals:
            self.refusals.pop()
            raise PermissionError(13, "is used by another process", str(self))
        return super().replace(target)


def test_a_rename_waits_for_a_reader_on_windows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RETRIES", (0.0, 0.0))
    source, target = Held(tmp_path / "new"), tmp_path / "old"
    source.write_text("new")
    target.write_text("old")
    monkeypatch.setattr(Held, "refusals", [1])
    with pytest.raises(PermissionError):
        files.move(source, target)
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(Held, "refusals", [1] * 3)
    with pytest.raises(PermissionError):
        files.move(source, target)
    assert target.read_text() == "old"
    monkeypatch.setattr(Held, "refusals", [1] * 2)
    files.move(source, target)
    assert target.read_text() == "new"
    assert not source.exists()


def test_a_folder_is_not_flushed_on_windows(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        files.sync_folder(tmp_path / "none")  # it is opened
    monkeypatch.setattr(files, "WINDOWS", True)
    files.sync_folder(tmp_path / "none")


def test_text_has_the_same_bytes_everywhere(tmp_path, monkeypatch):
    written = []
    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: written.append(k) or real(*a, **k))
    files.write_text(tmp_path / "a.txt", "one\ntwo\n")
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo\n"
    assert written == [{"encoding": "utf-8", "newline": "\n"}]


def test_a_console_without_the_signs_is_no_error():
    code = "import sys; sys.argv = ['x', 'list']; from geo_pretrain.__main__ import main; main(); print('\\u2265')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "HOME": "/nowhere"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout.rstrip()[-1:]) == (0, b"?"), done.stderr
