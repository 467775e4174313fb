"""Where results go, and on which device: refused before any work by every command, by one rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from geo_pretrain import cli
from geo_pretrain.cli.options import checked_target
from geo_pretrain.targets import MATCHES, file_fault, folder_fault, named
from tests.front_door import geo_pretrain
from tests.zoo import write_tiny

CONTEXT = SimpleNamespace(call_on_close=lambda say: None)
NOTHING_WRITTEN = {"bench table"}  # prints commands that write there
BY_FORMAT = {"convert"}  # a folder or a file: its body asks


def options(name: str) -> Iterator[tuple[str, Any]]:
    """Every command that has an option of this name, and the option."""
    waiting: list[tuple[str, Any]] = [("", typer.main.get_command(cli.app))]
    while waiting:
        path, command = waiting.pop()
        waiting += [(f"{path} {key}".strip(), one) for key, one in getattr(command, "commands", {}).items()]
        yield from ((path, option) for option in command.params if name in option.opts)


@pytest.mark.parametrize("name", ["--out", "--onnx", "--rerun", "--logs"])
def test_every_command_looks_at_what_it_will_write(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    found = dict(options(name))
    assert len(found) >= (18 if name == "--out" else 1)
    for command in set(found) - NOTHING_WRITTEN - BY_FORMAT:
        option = found[command]
        assert option.callback is not None, command
        for path in ("a/b/c/x.png", "file/x"):
            with pytest.raises(typer.BadParameter):
                option.callback(CONTEXT, option, Path(path))
        wrong = "x.xyz" if "folder" not in str(option.help).lower() else "file"
        with pytest.raises(typer.BadParameter, match="accepted: "):
            option.callback(CONTEXT, option, Path(wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_command_looks_at_its_device():
    found = dict(options("--device"))
    assert len(found) >= 9
    for command, option in found.items():
        assert option.callback is not None, command
        with pytest.raises(typer.BadParameter, match="accepted: cpu"):
            option.callback(None, option, "cuda:77")


def test_faults_name_the_nearest(tmp_path: Path):
    assert file_fault(tmp_path / "x.png", MATCHES) is None
    assert file_fault(tmp_path / "new" / "x.png", MATCHES) is None
    assert "'x.hmtl'; accepted: names that end in .png, .html" in str(file_fault(tmp_path / "x.hmtl", MATCHES))
    assert str(file_fault(tmp_path / "x.hmtl", MATCHES)).endswith("/x.html")
    assert str(file_fault(tmp_path / "x", MATCHES)).endswith("/x.png")
    assert "is a folder" in str(file_fault(tmp_path, MATCHES))
    assert "mkdir -p" in str(file_fault(tmp_path / "a" / "b" / "x.png", MATCHES))
    assert folder_fault(tmp_path) is folder_fault(tmp_path / "new") is folder_fault(tmp_path / "new" / "run") is None
    assert "nor the one above it" in str(folder_fault(tmp_path / "a" / "b" / "run"))
    assert folder_fault(tmp_path / "view.rooms") is None


def test_the_folder_where_one_is_has_a_name(tmp_path, monkeypatch):
    """Beside which a run keeps its state."""
    monkeypatch.chdir(tmp_path)
    assert named(Path()) == named(Path("a/..")) == tmp_path
    assert named(Path("a")) == Path("a")
    assert str(folder_fault(tmp_path / "out.PNG")).endswith("several files; accepted: a folder's name, such as out.")
    (tmp_path / "file").touch()
    assert "is a file; accepted: a new folder" in str(folder_fault(tmp_path / "file"))
    assert "is a file; accepted: a name in a folder" in str(folder_fault(tmp_path / "file" / "run"))


def test_a_folder_that_is_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    notes = [checked_target(Path(path), None) for path in ("runs/mine", "other/mine", "mine")]
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for say in notes:
        say()
    assert capsys.readouterr().err == "Made the folder 'runs' for 'mine'.\n"
    monkeypatch.setenv("RANK", "1")
    notes[0]()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("visualize points no_such -o x.obj", "accepted: names that end in .ply, .html, .png"),
        ("visualize matches no_such -o x.gif", "accepted: names that end in .png, .html, such as x.png"),
        ("data check rooms -o x.pgn", "x.png"),
        ("bundle pri3d_view_geo_r50 -o zoo.zip", "accepted: names that end in .tar, such as zoo.tar"),
        ("convert pri3d_view_geo_r50 --to detectron2 -o r50.pth", "accepted: names that end in .pkl, such as r50.pkl"),
        ("convert f.pth --from pri3d --name pri3d_view_geo_r50 -o a/b/c", "mkdir -p a/b"),
        ("train pri3d_view_r18 --toy --out a/b/run", "mkdir -p a/b"),
        ("train pri3d_view_r18 --toy --device cuda:77 --out run", "torch sees 0 GPUs here"),
        ("train pri3d_view_r18 --toy --device xpu --out run", "Device 'xpu': torch has none here; accepted: cpu"),
        ("card pri3d_view_r18 -o .", "'.' is a folder; accepted: the name of a file that ends in .md, .txt"),
        ("card pri3d_view_r18 -o no/such/x.md", "there is no folder 'no/such'"),
    ],
)
def test_commands_refuse_before_any_work(command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert said in " ".join(geo_pretrain(*command.split(), expected=2).errors.replace("│", "").split())
    assert list(tmp_path.iterdir()) == []


def test_a_card_goes_into_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "mine", "tiny_net_r18")
    ended = geo_pretrain("card", "./mine", "-o", "cards/mine.md")
    assert "Made the folder 'cards' for 'mine.md'." in ended.errors
    assert (tmp_path / "cards" / "mine.md").read_text().startswith("---")
