"""The child process that reads authors' files, and the guard that starts it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from geo_pretrain.errors import CheckpointError, UnsafeFile
from geo_pretrain.hub import extract as extract_module
from geo_pretrain.hub.extract import CHILD, Limits, extract
from tests.hub import hostile
from tests.hub.extraction import children, failure, in_child, torch_file


def test_a_file_that_is_not_there_and_entries_that_are_none(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        extract(tmp_path / "nothing.pth", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no such file"):
        extract(tmp_path, tmp_path / "out")
    for entries in ("model", []):
        with pytest.raises(CheckpointError, match="a list of keys is accepted"):
            extract(torch_file(tmp_path, {}), tmp_path / "out", entries=entries)


def test_a_result_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path):
    path = torch_file(tmp_path, {"w": torch.ones(1)})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        extract(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        extract(path, tmp_path / "no folder" / "out")
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "out"]


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path):
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"N0" * 5_000_000 + b"N"))
    before = children()
    message = failure(path, limits=Limits(seconds=0.01, operations=1 << 40))  # starting Python takes longer
    assert "takes longer than 0.01 s; it was given up" in message
    assert children() <= before


def test_a_file_that_takes_too_much_memory_is_refused(tmp_path: Path):
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"".join(hostile.text("é" * 5_000_000) for _ in range(4)) + b"0000" + b"N"))
    with pytest.raises(UnsafeFile, match="more memory than is accepted"):
        extract(path, tmp_path / "out", limits=Limits(memory=8 << 20))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "program, error, message",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", UnsafeFile, "ended by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", UnsafeFile, "ended by SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", UnsafeFile, "more than 300 s of CPU"),
        ("raise SystemExit('no luck')", CheckpointError, r"failed \(1\), saying: no luck"),
        ("print('nonsense')", CheckpointError, r"failed \(0\), saying: nothing"),
        ("print('{}')", CheckpointError, ": None"),
    ],
)
def test_every_end_of_the_child_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], message: str
):
    child = tmp_path / "child.py"
    start = "import json, pathlib, sys; pathlib.Path(json.load(sys.stdin)['out']).write_text('half a file')\n"
    child.write_text(start + program)
    monkeypatch.setattr(extract_module, "CHILD", child)
    path = torch_file(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=message) as caught:
        extract(path, tmp_path / "out")
    assert type(caught.value) is error
    assert sorted(tmp_path.iterdir()) == [path, child]


def test_the_child_runs_with_an_empty_environment_and_no_path_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys; json.load(sys.stdin); "
        "print(json.dumps({'unreadable': json.dumps([sorted(os.environ), sys.flags.isolated])}))"
    )
    monkeypatch.setattr(extract_module, "CHILD", child)
    monkeypatch.setenv("SECRET_TOKEN", "x")
    message = failure(torch_file(tmp_path, {}))
    environment, isolated = json.loads(message[message.index("[") : message.rindex(".")])
    assert isolated == 1
    assert set(environment) - {"LC_CTYPE"} == {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}


def test_the_limits_are_set(tmp_path: Path):
    found = in_child(
        "import resource as r\nfrom geo_pretrain.hub.unpickle import job\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * r.getpagesize()\n"
        "job.set_limits({'seconds': 6.5, 'memory': 1 << 30, 'output': 1 << 20}, 7 << 20)\n"
        "print(r.getrlimit(r.RLIMIT_AS)[1] - used, *r.getrlimit(r.RLIMIT_CPU), *r.getrlimit(r.RLIMIT_FSIZE),"
        " *r.getrlimit(r.RLIMIT_CORE))"
    )
    memory, *others = map(int, found.split())
    assert abs(memory - (1 << 30) - (7 << 20)) < 32 << 20
    assert others == [7, 12, 28 << 20, 28 << 20, 0, 0]  # four times the file; the output's limit is larger here


ATTEMPTS = {
    "import os; os.system('true')": "os.system",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "import os; os.fork()": "os.fork",
    "import os; os.execv('/bin/true', ['true'])": "os.exec",
    "import os; os.posix_spawn('/bin/true', ['true'], {})": "os.posix_spawn",
    "import socket; socket.socket()": "socket.__new__",
    "import pickle, collections; pickle.loads(b'ccollections\\nOrderedDict\\n.')": "pickle.find_class",
    "import os; os.remove('/nonexistent')": "os.remove",
}


def test_there_is_a_second_wall():
    said = in_child(
        "import sys\nfrom geo_pretrain.hub.unpickle.job import Refused, deny\nsys.addaudithook(deny)\n"
        f"for attempt in {list(ATTEMPTS)!r}:\n"
        "    try: exec(attempt)\n"
        "    except Refused as error: print(error, flush=True)\n"
        "    else: print('went through', flush=True)\n"
    )
    assert said.splitlines() == [f"it tried {event}" for event in ATTEMPTS.values()]


def test_the_second_wall_stands_while_the_file_is_read(tmp_path: Path):
    """As if the reader had a hole: it runs a command."""
    (tmp_path / "authors.pth").write_bytes(b"x")
    given = {"file": str(tmp_path / "authors.pth"), "out": "", "entries": [""], "limits": asdict(Limits()), "path": []}
    said = in_child(
        "import io, os, sys; from geo_pretrain.hub.unpickle import job\n"
        f"job.read_file = lambda *given: os.system('touch {tmp_path}/canary')\n"
        f"sys.stdin = io.StringIO({json.dumps(given)!r})\n"
        "job.main()"
    )
    assert json.loads(said) == {"refused": "it tried os.system"}
    assert not (tmp_path / "canary").exists()


def test_the_child_stands_alone(tmp_path: Path):
    """Its modules, all of them, come from its own folder; nothing of the package around it, nothing heavy."""
    assert {path.name for path in CHILD.iterdir()} >= {"__main__.py", "__init__.py", "job.py"}
    folder = tmp_path / "unpickle"  # where no geo_pretrain is beside it
    shutil.copytree(CHILD, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "job.py").open("a") as stream:
        stream.write(
            "\n\ndef main() -> None:\n"
            "    heavy = {'torch', 'numpy', 'safetensors', 'geo_pretrain', 'geo_pretrain.hub'} & set(sys.modules)\n"
            "    ours = {key: value.__file__ for key, value in sys.modules.items() if '.unpickle.' in key}\n"
            "    print(json.dumps([sorted(heavy), ours, sys.path]))\n"
        )
    command = [sys.executable, "-I", "-B", os.fspath(folder)]  # as the guard does
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=600)
    heavy, ours, paths = json.loads(done.stdout)
    assert heavy == []
    modules = {path.stem for path in CHILD.glob("*.py")} - {"__init__", "__main__"}
    assert ours == {f"geo_pretrain.hub.unpickle.{name}": os.fspath(folder / f"{name}.py") for name in modules}
    assert os.fspath(folder) not in paths


def test_the_child_imports_the_standard_library_and_itself():
    for path in CHILD.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("geo_pretrain.hub.unpickle.")
                assert own or name == "numpy" or name.split(".")[0] in sys.stdlib_module_names, f"{path}: {name}"
    assert len(ast.parse((CHILD / "__init__.py").read_text(encoding="utf-8")).body) == 1  # its text, as it says


def state(pid: int) -> str:
    """What a process does: R runs, S sleeps."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]


def cpu_seconds(pid: int) -> float:
    """How long a process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_killed_parent_leaves_no_half_result(tmp_path: Path):
    """Interrupted from the keyboard in the middle of a long file."""
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"N0" * 5_000_000 + b"N"))
    script = (
        "import sys\nfrom pathlib import Path\nfrom geo_pretrain.hub.extract import Limits, extract\n"
        "print('ready', flush=True)\n"
        "extract(Path(sys.argv[1]), Path(sys.argv[1]).with_name('out'), limits=Limits(operations=1 << 40))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        while not (kids := Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()):
            assert parent.poll() is None
        while cpu_seconds(int(kids[0])) < 0.2 or state(parent.pid) != "S":  # until the child works and is waited for
            assert parent.poll() is None
            time.sleep(0.01)
        os.kill(parent.pid, signal.SIGINT)
        parent.wait(timeout=600)
    states = [Path(f"/proc/{kid}/stat") for kid in kids]
    assert all(not path.exists() or ") Z " in path.read_text() for path in states)  # a zombie waits for its new parent
    assert list(tmp_path.iterdir()) == [path]
