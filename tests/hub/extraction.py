"""What the tests of extraction share: files as authors write them, the twin check, and the child by other ways in."""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.extract import CHILD, extract

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
# A process that has the child's modules as the child has them.
STAND_ALONE = f"import runpy; runpy.run_path({os.fspath(CHILD / '__main__.py')!r})['stand_alone']()\n"


def children(process: int | str = "self") -> set[str]:
    """Process ids of a process's children, by any of its threads."""
    return {child for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split()}


def mapped(data: bytes) -> Any:
    """Bytes as the child sees a file."""
    if not data:
        return b""
    found = mmap.mmap(-1, len(data))
    found.write(data)
    found.seek(0)
    return found


def torch_file(folder: Path, content: object, *, new: bool = True, protocol: int = 2) -> Path:
    path = folder / "authors.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    return path


def torch_bytes(new: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(100.0)}, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def pickled(folder: Path, content: object, protocol: int = 2) -> Path:
    path = folder / "authors.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def assert_twins(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """The same keys, dtypes, shapes and bits."""
    found = load_file(out)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        bits = [one.detach().contiguous().flatten().view(torch.uint8) for one in (found[key], tensor)]
        assert torch.equal(*bits), key


def failure(path: Path, **arguments: Any) -> str:
    """The message of the error; nothing may be left in the folder but the file that was there."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        extract(path, path.parent / "out.safetensors", **arguments)
    assert sorted(path.parent.iterdir()) == before
    return str(caught.value)


def in_child(script: str) -> str:
    """Run a script in a process that has the child's modules."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", STAND_ALONE + script], capture_output=True, text=True, timeout=600
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


FORKING = """
import io, json, os, signal, sys
from geo_pretrain.hub.unpickle import job
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        sys.stdin, sys.stdout = io.StringIO(line), os.fdopen(write, "w")
        job.main()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answer = stream.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), answer]), flush=True)
"""


class Children:
    """The child, a process for every file as always, but forked from one that has its modules, which takes no time."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-B", "-c", STAND_ALONE + FORKING]
        env = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, command: list[str], *, input: bytes, **_: Any) -> subprocess.CompletedProcess[bytes]:
        """In place of `subprocess.run` in the guard."""
        assert command == [sys.executable, "-I", "-B", os.fspath(CHILD)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(input.decode() + "\n")
        self.process.stdin.flush()
        code, answer = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, code, answer.encode(), b"")
