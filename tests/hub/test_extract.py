"""Extraction against files of torch.save and pickle themselves, with torch.load as the twin, and against malice."""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from geo_pretrain.errors import CheckpointError, UnsafeFile
from geo_pretrain.hub import extract as extract_module
from geo_pretrain.hub import unpickle
from geo_pretrain.hub.extract import Extracted, Limits, extract
from tests.hub import hostile

CHILD = Path(unpickle.__file__)
DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]


def children() -> set[str]:
    """Process ids of this process's children, by any of its threads."""
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


def mapped(data: bytes) -> Any:
    """Bytes as the child sees a file."""
    if not data:
        return b""
    found = mmap.mmap(-1, len(data))
    found.write(data)
    found.seek(0)
    return found


def state_dict() -> OrderedDict[str, Any]:
    """Every supported dtype and every layout that state dicts come in."""
    draw = torch.Generator().manual_seed(0)
    state: OrderedDict[str, Any] = OrderedDict()
    for dtype in DTYPES:
        numbers = torch.rand(3, 4, 5, generator=draw) * 100 - (0 if dtype in ("uint8", "bool") else 50)
        state[f"net.{dtype}"] = numbers.to(getattr(torch, dtype))
    base = torch.rand(10, 10, generator=draw)
    state |= {
        "transposed": base.t(),
        "permuted": torch.rand(2, 3, 4, generator=draw).permute(2, 0, 1),
        "steps": base[2:9:3, ::2],
        "row": base[7],
        "expanded": torch.rand(3, 1, generator=draw).expand(3, 7),
        "half expanded": torch.rand(1, 4, generator=draw).bfloat16().expand(2, 4),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.rand(3, generator=draw)),
        "channels last": torch.rand(2, 3, 4, 5, generator=draw).contiguous(memory_format=torch.channels_last),
    }
    state["with attributes"] = torch.nn.Parameter(torch.rand(3, generator=draw))
    state["with attributes"].note = "kept by nobody"
    state["plain with attributes"] = torch.rand(3, generator=draw)
    state["plain with attributes"].note = "kept by nobody"
    return state


def torch_file(folder: Path, content: object, *, new: bool = True, protocol: int = 2) -> Path:
    path = folder / "authors.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    return path


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


# --- files that torch.save wrote -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new, protocol", [(True, 2), (True, 5), (False, 2), (False, 4)])
def test_what_torch_saved_comes_out_as_torch_loads_it(tmp_path: Path, new: bool, protocol: int):
    path = torch_file(tmp_path, {"step": 5, "model": state_dict()}, new=new, protocol=protocol)
    found = extract(path, tmp_path / "out.safetensors", entries=["model"])
    twin = torch.load(path, weights_only=False)["model"]
    assert len(twin) == 22
    assert_twins(tmp_path / "out.safetensors", twin)
    assert found == Extracted("model", 22, (), {"step": 5}, {})


@pytest.mark.parametrize("new", [True, False])
def test_a_training_checkpoint_gives_its_weights_and_nothing_else(tmp_path: Path, new: bool):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    momenta = {i: {"momentum_buffer": torch.rand(3), "step": torch.tensor(1.0)} for i in range(4)}
    groups = [{"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.99), "foreach": None, "params": [0, 1, 2, 3]}]
    content = {
        "curr_iter": 60_000,
        "state_dict": network.state_dict(),
        "optimizer": {"state": momenta, "param_groups": groups},
        "scheduler": {"milestones": Counter({1: 1}), "gamma": 0.1, "base_lrs": [0.1], "last_epoch": np.int64(3)},
        "best": np.float64(0.25),
        "seen": np.int64(7),
        "done": True,
        "note": "trained \x1b[2J twice",
        "long": "x" * 1000,
        "history": [0.1] * 100,
        "milestones": Counter([3, 3]),
        "rest": [{1, 2}, frozenset((3,)), 1 + 2j, slice(1), bytearray(b"x"), b"bytes", range(3), 1 << 400, ..., -1.5],
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "random": torch.get_rng_state(),
        "grouped": defaultdict(list, a=[1]),
    }
    path = torch_file(tmp_path, content, new=new)
    found = extract(path, tmp_path / "out.safetensors", entries=["state_dict", "model", ""])
    assert_twins(tmp_path / "out.safetensors", torch.load(path, weights_only=False)["state_dict"])
    assert found.entry == "state_dict"
    assert found.tensors == 7
    assert found.foreign == ()
    expected = {"curr_iter": 60_000, "best": 0.25, "seen": 7, "done": True, "note": "trained ?[2J twice"}
    assert found.scalars == expected
    assert found.skipped == {}


def test_entries_are_tried_in_order_and_the_top_level_needs_a_tensor_of_its_own(tmp_path: Path):
    out = tmp_path / "out.safetensors"
    one, two = torch.ones(1), torch.zeros(2)
    both = torch_file(tmp_path, {"model": {"w": one}, "ema": {"w": two}})
    assert extract(both, out, entries=["missing", "ema", "model"]).entry == "ema"
    assert load_file(out)["w"].shape == (2,)
    assert extract(both, out, entries=["", "model"]).entry == "model"
    flat = torch_file(tmp_path, {"w": two, "model": {"w": one}})
    assert extract(flat, out).skipped == {"model": "dict of 1"}
    assert load_file(out)["w"].shape == (2,)


def test_an_entry_that_is_not_there_is_answered_with_what_is(tmp_path: Path):
    content = {"network": {"w": torch.ones(1)}, "epoch": 3, "lines": [1, 2], 7: None, "w": torch.ones(2).cfloat()}
    message = failure(torch_file(tmp_path, content), entries=["model", ""])
    assert "no tensors in 'model' or the top level. Its top level holds 'network': dict of 1, 'epoch': int, " in message
    assert "'lines': list of 2, '7': None, 'w': tensor of unsupported dtype complex64." in message
    message = failure(torch_file(tmp_path, [torch.ones(1)]), entries=["model"])
    assert "its top level is list of 1; accepted is a dict with tensors in 'model'" in message
    message = failure(torch_file(tmp_path, {f"k{i}": i for i in range(100)}))
    assert "'k29': int, and 70 more" in message


@pytest.mark.filterwarnings("ignore")
def test_what_safetensors_or_we_cannot_hold_is_skipped_with_its_reason(tmp_path: Path):
    state = {
        "w": torch.ones(2),
        "complex": torch.ones(2, dtype=torch.complex64),
        "unsigned": torch.ones(2, dtype=torch.uint16),
        "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "nested": {"w": torch.ones(1)},
        "text": "hello",
        3: torch.ones(1),
        (1, 2): torch.ones(1),
    }
    found = extract(torch_file(tmp_path, state), tmp_path / "out.safetensors")
    assert list(load_file(tmp_path / "out.safetensors")) == ["w"]
    assert found.skipped == {
        "complex": "tensor of unsupported dtype complex64",
        "unsigned": "tensor of unsupported dtype uint16",
        "negated": "a conjugated or negated view",
        "quantized": "quantized tensor",
        "sparse": "sparse tensor",
        "nested": "dict of 1",
        "text": "text",
        "3": "its key is no text",
        "tuple of 2": "its key is no text",
    }


def test_tensors_that_share_a_storage_are_each_written(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"all": base, "twice": base, "column": base[:, 1], "tail": base[2, 2:]}
    extract(torch_file(tmp_path, state), tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", state)


def test_an_archive_without_checksums_is_read(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        path = torch_file(tmp_path, {"w": torch.arange(5)})
    finally:
        torch.serialization.set_crc32_options(True)
    extract(path, tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", {"w": torch.arange(5)})


def test_only_the_wanted_storages_need_to_be_whole(tmp_path: Path):
    content = {"model": {"w": torch.full((1000,), 1.5)}, "optimizer": {"m": torch.full((1000,), 2.5)}}
    path = torch_file(tmp_path, content)
    data = path.read_bytes()
    other = data.index(struct.pack("<f", 2.5) * 1000)
    path.write_bytes(data[:other] + b"\xff" + data[other + 1 :])
    extract(path, tmp_path / "out.safetensors", entries=["model"])
    assert_twins(tmp_path / "out.safetensors", content["model"])
    (tmp_path / "out.safetensors").unlink()
    wanted = data.index(struct.pack("<f", 1.5) * 1000)
    path.write_bytes(data[: wanted + 3999] + b"\xff" + data[wanted + 4000 :])
    assert "is damaged (its checksum differs); fetch it again" in failure(path, entries=["model"])


def test_a_large_strided_tensor_is_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpickle, "BLOCK", 64)
    state = state_dict()
    path = torch_file(tmp_path, state)
    unpickle.extract(mapped(path.read_bytes()), tmp_path / "out.safetensors", [""], asdict(Limits()))
    assert_twins(tmp_path / "out.safetensors", state)


# --- classes that are not on the list --------------------------------------------------------------------------------


@pytest.fixture
def foreign_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library that exists only while the file is written, with the ways in which configurations are pickled."""
    module = types.ModuleType("fake_conf")

    class DictConfig:
        def __init__(self, content: dict[str, Any]) -> None:
            self._content, self._parent = content, self

        def __getstate__(self) -> dict[str, Any]:
            return dict(self.__dict__)

    class Node(dict):
        __slots__ = ("extra",)

    class Items(list):
        pass

    class Kind:
        def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
            return super().__new__(cls)

        def __getnewargs_ex__(self) -> tuple[tuple[int, ...], dict[str, int]]:
            return (1, 2), {"a": 3}

    class Old:
        def __reduce__(self) -> tuple[Any, ...]:
            return Old, (1,), {"x": 1}, iter([1, 2]), iter([("k", "v")])

        def __init__(self, *_: Any) -> None:
            self.x = 0

    for cls in (DictConfig, Node, Items, Kind, Old):
        cls.__module__, cls.__qualname__ = "fake_conf", cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "fake_conf", module)
    return module


@pytest.mark.parametrize("new, protocol", [(True, 2), (False, 2), (True, 4)])
def test_foreign_objects_become_placeholders_and_are_named(
    tmp_path: Path, foreign_module: Any, new: bool, protocol: int
):
    node = foreign_module.Node(a=1)
    node.extra = node
    config = foreign_module.DictConfig({"lr": 0.1, "node": node, "items": foreign_module.Items([1, 2])})
    content = {"config": config, "old": foreign_module.Old(), "w": torch.ones(2)}
    if protocol == 4:  # earlier ones write this kind of object as a call of functools.partial, which is refused
        content["kind"] = foreign_module.Kind()
    found = extract(torch_file(tmp_path, content, new=new, protocol=protocol), tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", {"w": torch.ones(2)})
    names = ["DictConfig", "Items", *(["Kind"] if protocol == 4 else []), "Node", "Old"]
    assert found.foreign == tuple(f"fake_conf.{name}" for name in names)
    assert found.skipped["config"] == "object of fake_conf.DictConfig"


def test_the_list_of_foreign_names_has_an_end(tmp_path: Path):
    body = b"".join(hostile.name("conf", f"C{i}") + b"0" for i in range(500))
    path = tmp_path / "authors.pkl"
    array = hostile.numpy_array(hostile.tuple_(4), hostile.raw(hostile.FLOATS))
    path.write_bytes(hostile.proto(body + hostile.dict_(w=array)))
    found = extract(path, tmp_path / "out.safetensors")
    assert len(found.foreign) == 100
    assert found.foreign[:2] == ("conf.C0", "conf.C1")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1, 2, 3, 4]


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
        ("torch.jitter", "X", False),
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
    budget = unpickle.Budget(10, 10)
    unpickle.Machine(b"", 0, 0, budget).name(module, name)
    assert bool(budget.forbidden) == is_refused
    if is_refused:
        with pytest.raises(unpickle.Refused, match=re.escape(f"{module}.{name}")):
            budget.check_names()


# --- plain pickles ---------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    found = {dtype: (draw.random((3, 4)) * 100).astype(dtype) for dtype in DTYPES if dtype != "bfloat16"}
    return found | {
        "stem.conv1.weight": draw.random((2, 3, 4, 5), np.float32),
        "fortran": np.asfortranarray(draw.random((3, 4, 2))),
        "big": draw.random((2, 5)).astype(">f4"),
        "big fortran": np.asfortranarray(draw.random((3, 4)).astype(">i8")),
        "slice": draw.random((8, 8))[1::2, 3],
        "scalar shape": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_come_out_as_numpy_loads_them(tmp_path: Path, protocol: int):
    content = {"model": arrays(), "__author__": "Somebody", "matching_heuristics": True}
    found = extract(pickled(tmp_path, content, protocol), tmp_path / "out.safetensors", entries=["model", ""])
    native = {key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for key, array in arrays().items()}
    assert_twins(tmp_path / "out.safetensors", native)
    assert found == Extracted("model", 16, (), {"__author__": "Somebody", "matching_heuristics": True}, {})


def test_arrays_of_other_things_are_skipped(tmp_path: Path):
    content = {
        "w": np.ones(2, np.float32),
        "objects": np.array([None, {}], object),
        "texts": np.array(["a", "bc"]),
        "pairs": np.zeros(2, [("a", "<f4"), ("b", "<i4")]),
        "wide": np.zeros(2, np.uint32),
        "complex": np.zeros(2, np.complex64),
        "dates": np.zeros(2, "datetime64[s]"),
        "number": np.float32(1.5),
        "list": [np.ones(1)],
    }
    found = extract(pickled(tmp_path, content), tmp_path / "out.safetensors")
    assert found.tensors == 1
    assert found.scalars == {"number": 1.5}
    assert found.skipped["objects"] == "array of unsupported dtype O8"
    assert found.skipped["wide"] == "array of unsupported dtype u4"
    assert found.skipped["number"] == "float"
    assert found.skipped["list"] == "list of 1"
    assert set(found.skipped) == set(content) - {"w"}


def python2_text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


@pytest.mark.parametrize("protocol", [0, 2])
def test_pickles_of_python_2_are_read_as_latin1(tmp_path: Path, protocol: int):
    """Written by hand as Python 2 did: keys and numbers alike are its `str`."""
    data = np.linspace(-1, 1, 6, dtype="<f4").tobytes()
    if protocol == 0:
        numbers = b"S" + ascii(data)[1:].encode() + b"\n"
        key, prefix = b"S'res2_0_branch2a_w'\n", b""
    else:
        numbers, key, prefix = python2_text(data), python2_text(b"res2_0_branch2a_w"), b"\x80\x02"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nI3\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n" + numbers + b"tb"
    )
    body = prefix + b"(dS'blobs'\n(d" + key + array + b"ss" + b"S'lr'\nF0.5\nsS'it'\nL12L\ns."
    twin = pickle.loads(body, encoding="latin1")
    path = tmp_path / "model.pkl"
    path.write_bytes(body)
    found = extract(path, tmp_path / "out.safetensors", entries=["blobs"])
    assert_twins(tmp_path / "out.safetensors", {k: torch.from_numpy(v.copy()) for k, v in twin["blobs"].items()})
    assert found.scalars == {"lr": 0.5, "it": 12} == {key: twin[key] for key in ("lr", "it")}


NUMBERS = st.integers(-(1 << 500), 1 << 500) | st.integers(-70_000, 70_000) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(-9, 9), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_out_of_the_machine_as_they_went_in(value: Any, protocol: int):
    data = pickle.dumps([value, value], protocol)
    assert unpickle.Machine(data, 0, len(data), unpickle.Budget(10_000, 1 << 20)).run() == [value, value]


@pytest.mark.parametrize(
    "body",
    [
        b"(0N.",  # POP takes a mark
        b"(0(NNt.",
        b"(NN1I5\n.",  # POP_MARK takes all above it
        b"N20.",
        b"(I1\nI2\nl.",
        b"(I01\nI00\nd.",
        b"]p3\n0g3\n.",
        b"](I1\nI2\ne.",
        b"}q\x01r\xff\xff\x00\x00j\xff\xff\x00\x00\x86.",
        b"L-12L\n.",
        b"F1e3\n.",
        b"S'a\\n\\x41\"'\n.",
        b"V\\u00e9x\n.",
        b"\x80\x02T\x02\0\0\0\xe9xU\x01y\x86.",
        b"\x80\x04\x8b\x02\0\0\0\xff\x7f.",
        b"\x80\x04\x8e\x01\0\0\0\0\0\0\0a\x8d\x01\0\0\0\0\0\0\0b\x86.",
    ],
)
def test_rare_instructions_do_what_they_do_in_python(body: bytes):
    found = unpickle.Machine(body, 0, len(body), unpickle.Budget(100, 100)).run()
    twin = pickle.loads(body, encoding="latin1")
    assert found == twin
    assert type(found) is type(twin) or isinstance(found, unpickle.Dict)


def test_every_instruction_of_pickle_has_its_step():
    import pickletools

    assert {ord(opcode.code) for opcode in pickletools.opcodes} - {pickle.STOP[0]} == set(unpickle.STEPS)


# --- legacy views ----------------------------------------------------------------------------------------------------


def test_views_of_storages_in_legacy_files(tmp_path: Path):
    view = hostile.tensor(
        hostile.tuple_(2),
        hostile.tuple_(1),
        1,
        hostile.storage("0", 4, hostile.name("torch", "FloatStorage"), hostile.tuple_("v", 1, 3)),
    )
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.torch_legacy(hostile.dict_(whole=hostile.legacy_tensor(), view=view)))
    twin = torch.load(path, weights_only=False)
    extract(path, tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", twin)
    assert twin["view"].tolist() == [3, 4]


def test_a_tensor_beyond_its_view_is_refused_though_the_storage_goes_on(tmp_path: Path):
    view = hostile.storage("0", 4, hostile.name("torch", "FloatStorage"), hostile.tuple_("v", 0, 2))
    path = tmp_path / "authors.pth"
    path.write_bytes(
        hostile.torch_legacy(hostile.dict_(a=hostile.tensor(hostile.tuple_(3), hostile.tuple_(1), 0, view)))
    )
    assert "beyond the end of its storage" in failure(path)


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


def _torch(new: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(100.0)}, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


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
        (lambda: _torch()[:-100], "without its end: a truncated download; fetch it again"),
        (lambda: _torch()[:500], "without its end: a truncated download; fetch it again"),
        (lambda: _torch(new=False)[:-10], "it breaks off among its storages; download it again"),
        (lambda: _torch(new=False)[:200], "breaks off (a truncated file, or none of pickle)"),
        (lambda: pickle.dumps({"w": np.ones(1000)})[:-1000], "breaks off"),
        (lambda: pickle.dumps({"w": np.ones(10)})[:-1], "breaks off"),
        (lambda: _torch().replace(b"little", b"big\0\0\0"), "big-endian"),
        (lambda: hostile.torch_legacy(b"N", system=hostile.dict_(little_endian=b"\x89")), "big-endian"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(tmp_path: Path, data: Any, message: str):
    path = tmp_path / "authors.pth"
    path.write_bytes(data())
    said = failure(path)
    assert message in said
    assert said.startswith(f"{path}: ")


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


# --- malice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", hostile.CORPUS)
def test_no_attack_does_anything_but_fail(tmp_path: Path, title: str):
    case = hostile.CORPUS[title]
    canary, path = tmp_path / "canary", tmp_path / "authors.pth"
    path.write_bytes(case.make(str(canary)))
    limits = Limits(**{"seconds": 60, "memory": 512 << 20} | case.limits)
    before = children()
    if case.harmless:
        errors = {UnsafeFile: unpickle.Refused, CheckpointError: unpickle.Unreadable}
        with pytest.raises(errors[case.error], match=case.match):
            unpickle.extract(mapped(path.read_bytes()), tmp_path / "out", [""], asdict(limits))
    else:
        with pytest.raises(CheckpointError, match=case.match) as caught:
            extract(path, tmp_path / "out", limits=limits)
        assert type(caught.value) is case.error
    assert list(tmp_path.iterdir()) == [path]
    assert children() <= before


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
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60, capture_output=True)
    quiet = [title for number, title in enumerate(fires) if not (tmp_path / f"canary{number}").exists()]
    assert quiet == []


def test_a_message_names_everything_and_cannot_be_used_to_write_on_the_terminal(tmp_path: Path):
    calls = [hostile.name("os", f"call{i}\x1b") + b"0" for i in range(40)]
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"".join(calls) + b"N"))
    message = failure(path)
    assert "it names os.call0?, os.call1?, " in message
    assert message.endswith(
        "os.call29? and 10 more, which have no place in a file of weights. Nothing of it was executed."
    )


VALID = [
    _torch(),
    _torch(new=False),
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
        report = unpickle.extract(mapped(damaged(data, edits)), out, ["", "w"], asdict(Limits(operations=10_000)))
    except (unpickle.Refused, unpickle.Unreadable):
        assert not out.exists()
        return
    json.dumps(report)
    assert len(load_file(out)) == report["tensors"]


PIECES = [
    *(bytes([code]) for code in unpickle.STEPS),
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
        unpickle.extract(mapped(data), out, [""], asdict(Limits(operations=10_000)))
    except (unpickle.Refused, unpickle.Unreadable):
        assert not out.exists()


@pytest.mark.parametrize("which", range(4))
def test_a_file_cut_in_half_ends_in_one_clear_error(tmp_path: Path, which: int):
    path = tmp_path / "authors.pth"
    path.write_bytes(VALID[which][: len(VALID[which]) // 2])
    assert str(path) in failure(path)


# --- the guard around the child --------------------------------------------------------------------------------------


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path):
    path = tmp_path / "authors.pth"
    path.write_bytes(hostile.proto(b"N0" * 5_000_000 + b"N"))
    before = children()
    message = failure(path, limits=Limits(seconds=0.5, operations=1 << 40))
    assert "takes longer than 0.5 s; it was given up" in message
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


def in_child(script: str) -> str:
    """Run a script in a process that has the child's module as `unpickle`."""
    start = f"import sys; sys.path.insert(0, {str(CHILD.parent)!r}); import unpickle; sys.path.pop(0)\n"
    done = subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_the_limits_are_set(tmp_path: Path):
    found = in_child(
        "import resource as r\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * r.getpagesize()\n"
        "unpickle.set_limits({'seconds': 6.5, 'memory': 1 << 30, 'output': 1 << 20}, 7 << 20)\n"
        "print(r.getrlimit(r.RLIMIT_AS)[1] - used, *r.getrlimit(r.RLIMIT_CPU), *r.getrlimit(r.RLIMIT_FSIZE),"
        " *r.getrlimit(r.RLIMIT_CORE))"
    )
    memory, *others = map(int, found.split())
    assert abs(memory - (1 << 30) - (7 << 20)) < 32 << 20
    assert others == [7, 12, 129 << 20, 129 << 20, 0, 0]


@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import socket; socket.socket()",
        "import pickle, collections; pickle.loads(b'ccollections\\nOrderedDict\\n.')",
        "import os; os.remove('/nonexistent')",
    ],
)
def test_there_is_a_second_wall(attempt: str):
    said = in_child(f"sys.addaudithook(unpickle.deny)\n{attempt}\nprint('went through')")
    assert said.startswith("unpickle.Refused: it tried ")


def test_the_second_wall_stands_while_the_file_is_read(tmp_path: Path):
    """As if the reader had a hole: it runs a command."""
    (tmp_path / "authors.pth").write_bytes(b"x")
    job = {"file": str(tmp_path / "authors.pth"), "out": "", "entries": [""], "limits": asdict(Limits()), "path": []}
    said = in_child(
        "import io, os\n"
        f"unpickle.read_file = lambda *given: os.system('touch {tmp_path}/canary')\n"
        f"sys.stdin = io.StringIO({json.dumps(job)!r})\n"
        "unpickle.main()"
    )
    assert json.loads(said) == {"refused": "it tried os.system"}
    assert not (tmp_path / "canary").exists()


def test_the_child_stands_alone():
    found = in_child("print('heavy:', *{'torch', 'numpy', 'geo_pretrain', 'safetensors'} & set(sys.modules))")
    assert found == "heavy:"
    assert not re.search(r"^\s*(?:from|import) (?:torch|geo_pretrain)", CHILD.read_text(), re.M)


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
        time.sleep(0.3)  # beyond the moment in which the process exists and nobody holds it yet
        os.kill(parent.pid, signal.SIGINT)
        parent.wait(timeout=20)
    states = [Path(f"/proc/{kid}/stat") for kid in kids]
    assert all(not path.exists() or ") Z " in path.read_text() for path in states)  # a zombie waits for its new parent
    assert list(tmp_path.iterdir()) == [path]


def test_the_result_is_aligned_and_read_by_safetensors_alone(tmp_path: Path):
    """Eight-byte numbers first, as safetensors itself orders them, whatever the order of the keys."""
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.float64), "c": torch.ones(1).half()}
    extract(torch_file(tmp_path, state), tmp_path / "out.safetensors")
    raw = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    starts = {key: 8 + length + line["data_offsets"][0] for key, line in json.loads(raw[8 : 8 + length]).items()}
    assert length % 8 == 0
    assert [starts["b"] % 8, starts["c"] % 2] == [0, 0]
    with safe_open(tmp_path / "out.safetensors", "pt") as found:
        assert sorted(found.keys()) == ["a", "b", "c"]
