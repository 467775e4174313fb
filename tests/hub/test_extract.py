"""Extraction of files that authors write: of torch.save and pickle themselves, with torch.load and pickle as twins."""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import struct
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from geo_pretrain.hub.extract import Extracted, Limits, extract
from geo_pretrain.hub.unpickle import job, tensors
from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.machine import STEPS, Machine
from geo_pretrain.hub.unpickle.nodes import Dict
from tests.hub import hostile
from tests.hub.extraction import DTYPES, assert_twins, failure, mapped, pickled, torch_file


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


@pytest.mark.parametrize("new", [True, False])
def test_empty_slices_are_read_wherever_they_start(tmp_path: Path, new: bool):
    """torch gives x[3:, 2:] of 12 numbers the offset 14: beyond the end, and nothing is read there."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"w": base, "rows": base[3:], "columns": base[:, 4:], "corner": base[3:, 2:], "none": torch.zeros(0)}
    state |= {"of none": torch.zeros(0, 4)[:, 2:], "expanded": torch.zeros(1, 0).expand(5, 0)}
    assert state["corner"].storage_offset() == 14
    extract(torch_file(tmp_path, state, new=new), tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", state)


def test_views_unfold_up_to_four_times_the_file(tmp_path: Path):
    row = torch.arange(5000.0)
    content = {"w": row, "expanded": row.expand(2, 5000)}
    path = torch_file(tmp_path, content)
    extract(path, tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", content)
    assert (tmp_path / "out.safetensors").stat().st_size <= 4 * path.stat().st_size
    (tmp_path / "out.safetensors").unlink()
    path = torch_file(tmp_path, {"w": row, "expanded": row.expand(4, 5000)})
    message = failure(path)
    assert "('expanded' alone to 80000), while the file has " in message
    assert f"{path.stat().st_size}; up to 4 times its size is accepted" in message


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
    monkeypatch.setattr(tensors, "BLOCK", 64)
    state = state_dict()
    path = torch_file(tmp_path, state)
    job.extract(mapped(path.read_bytes()), tmp_path / "out.safetensors", [""], asdict(Limits()))
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
    content = {"config": config, "w": torch.ones(2)}
    if protocol == 4:  # earlier ones write this kind of object as a call of functools.partial, which is refused
        content["kind"] = foreign_module.Kind()
    found = extract(torch_file(tmp_path, content, new=new, protocol=protocol), tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", {"w": torch.ones(2)})
    names = ["DictConfig", "Items", *(["Kind"] if protocol == 4 else []), "Node"]
    assert found.foreign == tuple(f"fake_conf.{name}" for name in names)
    assert found.skipped["config"] == "object of fake_conf.DictConfig"


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_honest_checkpoints_hold_beside_weights_is_read(tmp_path: Path, protocol: int):
    """Settings, paths, dates, counters, schedulers, whole modules: placeholders all, by the list of names."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU())
    optimizer = torch.optim.AdamW(network.parameters())
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "space": types.SimpleNamespace(a=1),
        "date": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        "losses": deque([1.0], maxlen=3),
        "seen": Counter("ab"),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "network": network,
        "random": np.random.RandomState(0),
        "numpy": np.random.get_state(),
        "type": Any,
        "version": torch.torch_version.TorchVersion("2.6"),
        "activation": torch.nn.functional.gelu,
        "wide": torch.float8_e5m2fnuz,
        "masked": np.ma.array([1, 2], mask=[0, 1]),
    }
    content = {"w": torch.ones(2), "beside": beside, "optimizer": optimizer.state_dict()}
    extract(torch_file(tmp_path, content, protocol=protocol), tmp_path / "out.safetensors")
    assert_twins(tmp_path / "out.safetensors", {"w": torch.ones(2)})


@pytest.mark.parametrize("new", [True, False])
def test_a_call_of_a_class_on_no_list_is_refused_by_its_name(tmp_path: Path, foreign_module: Any, new: bool):
    message = failure(torch_file(tmp_path, {"old": foreign_module.Old(), "w": torch.ones(2)}, new=new))
    assert "it names fake_conf.Old (to be called), not on the list" in message
    assert "a file that holds the state_dict alone is accepted" in message


def test_the_list_of_foreign_names_has_an_end(tmp_path: Path):
    body = b"".join(hostile.name("conf", f"C{i}") + b"0" for i in range(500))
    path = tmp_path / "authors.pkl"
    array = hostile.numpy_array(hostile.tuple_(4), hostile.raw(hostile.FLOATS))
    path.write_bytes(hostile.proto(body + hostile.dict_(w=array)))
    found = extract(path, tmp_path / "out.safetensors")
    assert len(found.foreign) == 100
    assert found.foreign[:2] == ("conf.C0", "conf.C1")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1, 2, 3, 4]


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
    assert Machine(data, Budget(10_000, 1 << 20)).run() == [value, value]


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
    found = Machine(body, Budget(100, 100)).run()
    twin = pickle.loads(body, encoding="latin1")
    assert found == twin
    assert type(found) is type(twin) or isinstance(found, Dict)


def test_every_instruction_of_pickle_has_its_step():
    import pickletools

    assert {ord(opcode.code) for opcode in pickletools.opcodes} - {pickle.STOP[0]} == set(STEPS)


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
