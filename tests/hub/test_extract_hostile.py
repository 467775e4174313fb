"""Extraction of what nobody should be sent: attacks, lies, damage, and files that are something else."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from geo_pretrain.errors import CheckpointError, UnsafeFile
from geo_pretrain.hub import extract as extract_module
from geo_pretrain.hub.extract import Limits, extract
from geo_pretrain.hub.unpickle import job
from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.machine import STEPS, Machine
from geo_pretrain.hub.unpickle.names import Refused, Unreadable
from tests.hub import hostile
from tests.hub.extraction import Children, children, failure, mapped, torch_bytes


@pytest.fixture(scope="module")
def many_children() -> Iterator[Children]:
    made = Children()
    with made.process:
        yield made


@pytest.fixture
def forked(many_children: Children, monkeypatch: pytest.MonkeyPatch) -> Children:
    """The guard's children come sooner."""
    stand_in = types.SimpleNamespace(run=many_children.run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(extract_module, "subprocess", stand_in)
    return many_children


# --- malice ----------------------------------------------------------------------------------------------------------


def assert_fails(folder: Path, title: str) -> None:
    """An attack ends in its error, with nothing left behind."""
    case = hostile.CORPUS[title]
    canary, path = folder / "canary", folder / "authors.pth"
    path.write_bytes(case.make(str(canary)))
    limits = Limits(**{"seconds": 600, "memory": 512 << 20} | case.limits)
    before = children()
    if case.harmless:
        errors = {UnsafeFile: Refused, CheckpointError: Unreadable}
        with pytest.raises(errors[case.error], match=case.match):
            job.extract(mapped(path.read_bytes()), folder / "out", [""], asdict(limits))
    else:
        with pytest.raises(CheckpointError, match=case.match) as caught:
            extract(path, folder / "out", limits=limits)
        assert type(caught.value) is case.error
    assert list(folder.iterdir()) == [path]
    assert children() <= before


@pytest.mark.parametrize("title", hostile.CORPUS)
def test_no_attack_does_anything_but_fail(tmp_path: Path, forked: Children, title: str):
    assert_fails(tmp_path, title)
    assert children(forked.process.pid) == set()


@pytest.mark.parametrize(
    "title",
    [
        "reduce os.system, protocol 2",
        "in optimizer state of a zip",
        "call of subprocess.getoutput",
        "nested lists, 100000 deep",
        "instructions without end",
        "a number expanded to 4 TB",
    ],
)
def test_an_attack_fails_in_a_child_that_is_started_for_it(tmp_path: Path, title: str):
    """One of each kind, past no stand-in of the tests."""
    assert not hostile.CORPUS[title].harmless
    assert_fails(tmp_path, title)


def test_the_corpus_is_real(tmp_path: Path):
    """Python's own unpickler, in a process of its own, is taken in by every attack that is said to fire."""
    fires = {title: case for title, case in hostile.CORPUS.items() if case.fires}
    assert len(hostile.CORPUS) >= 170
    assert len(fires) >= 40
    for number, case in enumerate(fires.values()):
        data = case.make(str(tmp_path / f"canary{number}"))
        if data.startswith(b"PK"):
            data = zipfile.ZipFile(io.BytesIO(data)).read("x/data.pkl")
        (tmp_path / f"{number}.pkl").write_bytes(data)
    script = (
        "import pickle, sys, pathlib\n"
        "class Inert:\n"
        "    def __init__(self, *given): pass\n"
        "    def __setstate__(self, state): pass\n"
        "class Reader(pickle.Unpickler):\n"
        "    def persistent_load(self, given): return None\n"
        "    def find_class(self, module, name):\n"
        "        return Inert if module.startswith(('torch', 'numpy')) else super().find_class(module, name)\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.pkl'):\n"
        "    try: Reader(path.open('rb')).load()\n"
        "    except BaseException: pass\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=600, capture_output=True)
    quiet = [title for number, title in enumerate(fires) if not (tmp_path / f"canary{number}").exists()]
    assert quiet == []


def test_a_message_names_everything_and_cannot_be_used_to_write_on_the_terminal(tmp_path: Path):
    calls = [hostile.name("os", f"call{i}\x1b") + b"0" for i in range(40)]
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"".join(calls) + b"N"))
    message = failure(path)
    assert "it names os.call0?, os.call1?, " in message
    assert message.endswith(
        "os.call29? and 10 more, not on the list of what a file of weights may name and call. Nothing of it was "
        "executed; a file that holds the state_dict alone is accepted."
    )


def test_state_never_reaches_a_stand_in(tmp_path: Path):
    """A file that tries to change, through BUILD, what it then uses: nothing changes."""
    rebuild = hostile.name("torch._utils", "_rebuild_tensor_v2")
    slots = hostile.tuple_(b"N", hostile.dict_(__defaults__=hostile.tuple_(1), path="x", storage="y", what="z"))
    edits = b"".join(
        target + slots + b"b0"
        for target in (
            rebuild,
            hostile.storage(),
            hostile.GOOD,
            hostile.name("torch", "FloatStorage"),
            b"]",
            b"}",
            b")",
        )
    )
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.torch_zip(edits + hostile.dict_(a=hostile.GOOD + slots + b"b")))
    extract(path, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "module, name, is_refused",
    [
        ("os", "system", True),
        ("os.path", "join", True),
        ("builtins", "eval", True),
        ("builtins", "print", True),
        ("builtins", "set", False),
        ("__builtin__", "object", False),
        ("__builtin__", "apply", True),
        ("copy_reg", "_reconstructor", False),
        ("copyreg", "pickle", True),
        ("torch", "load", True),
        ("torch.hub", "load_state_dict_from_url", True),
        ("torch", "hub.load", True),
        ("torch.nn.modules.conv", "Conv2d", False),
        ("torch.jitter", "X", True),
        ("torch.optim.lr_scheduler", "StepLR", False),
        ("torch.optim.lr_scheduler", "warnings.sys", True),
        ("torch.nn", "modules.sys.modules", True),
        ("torch.utils._content_store", "x", True),
        ("torch", "float8_e8m0fnu", False),
        ("numpy.core.records", "fromfile", True),
        ("numpy.lib.npyio", "load", True),
        ("pandas", "read_pickle", True),
        ("pandas.core.computation.eval", "eval", True),
        ("turtle", "x", True),
        ("a module", "X", True),
        ("argparse", "Namespace", False),
        ("argparse", "FileType", True),
        ("types", "SimpleNamespace", False),
        ("pathlib", "PosixPath", False),
        ("typing", "Any", False),
        ("__main__", "Config", False),
        ("numpy.core.multiarray", "scalar", False),
        ("numpy._core.multiarray", "scalar", False),
        ("numpy", "load", True),
        ("omegaconf.dictconfig", "DictConfig", False),
        ("omegaconf", "sys.modules", True),
        ("mylib", "Class.Inner", False),
        ("mylib", "Class.__init__", True),
        ("my.os", "X", False),
        ("osmium", "X", False),
        ("_codecs", "decode", True),
    ],
)
def test_names_are_told_apart_by_where_they_come_from(module: str, name: str, is_refused: bool):
    budget = Budget(10, 10)
    Machine(b"", budget).name(module, name)
    assert bool(budget.forbidden) == is_refused
    if is_refused:
        with pytest.raises(Refused, match=re.escape(f"{module}.{name}")):
            budget.check_names()


# --- damage -----------------------------------------------------------------------------------------------------------


VALID = [
    torch_bytes(),
    torch_bytes(new=False),
    pickle.dumps({"w": np.ones((2, 3)), "b": np.ones(2, ">i4"), "t": (1, 2.5, "x", {3})}, 2),
    pickle.dumps({"w": np.ones((2, 3)), "b": np.ones(2, ">i4"), "t": (1, 2.5, "x", {3})}, 5),
    hostile.torch_zip(hostile.dict_(a=hostile.tensor(hostile.tuple_(2, 3), hostile.tuple_(0, 1)))),
    hostile.torch_legacy(hostile.dict_(a=hostile.legacy_tensor(hostile.tuple_("v", 0, 4)))),
]
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.integers(1, 40)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)),
)


def damaged(data: bytes, edits: list[Any]) -> bytes:
    for what, where, how in edits:
        at = int(where * len(data))
        if what == "flip" and data:
            data = data[:at] + bytes([data[at] ^ how]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[at + how :]
        elif what == "insert":
            data = data[:at] + how + data[at:]
    return data


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(VALID), st.lists(DAMAGE, min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path, data: bytes, edits: list[Any]):
    """No other exception leaves the reader; what it writes, safetensors reads."""
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    try:
        report = job.extract(mapped(damaged(data, edits)), out, ["", "w"], asdict(Limits(operations=10_000)))
    except (Refused, Unreadable):
        assert not out.exists()
        return
    json.dumps(report)
    assert len(load_file(out)) == report["tensors"]


PIECES = [
    *(bytes([code]) for code in STEPS),
    *(b"a", b"\0", b"\n", b"0\n"),
    *(hostile.text("w"), hostile.raw(bytes(8)), hostile.numpy_dtype("f4"), hostile.GOOD),
    *(hostile.name("numpy", "dtype"), hostile.name("numpy.core.multiarray", "_reconstruct")),
    *(hostile.name("numpy.core.multiarray", "scalar"), hostile.name("numpy.core.numeric", "_frombuffer")),
    *(hostile.name("_codecs", "encode"), hostile.name("collections", "OrderedDict"), hostile.name("torch", "Size")),
    *(hostile.name("torch._tensor", "_rebuild_from_type_v2"), hostile.name("torch._utils", "_rebuild_tensor_v3")),
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_sequence_of_instructions_is_read_or_refused(tmp_path: Path, instructions: list[bytes]):
    data = hostile.torch_zip(b"".join(instructions))
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    try:
        job.extract(mapped(data), out, [""], asdict(Limits(operations=10_000)))
    except (Refused, Unreadable):
        assert not out.exists()


@pytest.mark.parametrize("which", range(4))
def test_a_file_cut_in_half_ends_in_one_clear_error(tmp_path: Path, forked: Children, which: int):
    path = tmp_path / "authors.pth"
    path.write_bytes(VALID[which][: len(VALID[which]) // 2])
    assert str(path) in failure(path)


# --- files that are something else -----------------------------------------------------------------------------------


def _tar() -> bytes:
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2))
    return stream.getvalue()


def _script() -> bytes:
    stream = io.BytesIO()
    with pytest.warns():
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), stream)
    return stream.getvalue()


def _safetensors() -> bytes:
    from safetensors.torch import save

    return save({"a": torch.ones(2)})


@pytest.mark.parametrize(
    "data, message",
    [
        (lambda: b"", "it is empty;"),
        (lambda: b"\n<!DOCTYPE html><html>Quota exceeded</html>", "it is a web page, not the file behind it"),
        (lambda: b'{"error": 404}', "it is text"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (_tar, "it is a tar archive (torch before 0.2"),
        (_safetensors, "it is a safetensors file already"),
        (_npz, "it is a zip archive with 0 data.pkl, not a file of torch.save; it holds a.npy"),
        (_script, "it is a TorchScript archive, a program"),
        (lambda: b"\x1f\x8b\x08\x00" + bytes(100), "compressed with gzip; unpack it first"),
        (lambda: b"PK\x05\x06" + bytes(18), "an empty or damaged zip archive"),
        (lambda: b"hello world, this is no checkpoint", "it is no pickle; accepted are files of torch.save"),
        (lambda: torch_bytes()[:-100], "without its end: a truncated download; fetch it again"),
        (lambda: torch_bytes()[:500], "without its end: a truncated download; fetch it again"),
        (lambda: torch_bytes(new=False)[:-10], "it breaks off among its storages; download it again"),
        (lambda: torch_bytes(new=False)[:200], "breaks off (a truncated file, or none of pickle)"),
        (lambda: pickle.dumps({"w": np.ones(1000)})[:-1000], "breaks off"),
        (lambda: pickle.dumps({"w": np.ones(10)})[:-1], "breaks off"),
        (lambda: torch_bytes().replace(b"little", b"big\0\0\0"), "big-endian"),
        (lambda: hostile.torch_legacy(b"N", system=hostile.dict_(little_endian=b"\x89")), "big-endian"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(tmp_path: Path, forked: Children, data: Any, message: str):
    path = tmp_path / "authors.pth"
    path.write_bytes(data())
    said = failure(path)
    assert message in said
    assert said.startswith(f"{path}: ")
