"""Engines of other libraries: spconv itself where it is installed, and for all of them the layouts that they read.

The readers below are loops over each library's documented layout; stand-ins of the libraries compute with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import GeoPretrainError, MissingDependency
from geo_pretrain.sparse import SparseTensor, backend, peer_layouts, peer_spconv, peer_warpconvnet, peers, plain, use
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d
from geo_pretrain.sparse.maps import KernelMap
from tests.sparse.twins import random_cloud, within

LAYERS = ["k3", "k2 s2", "k2 s2 transposed", "1x1", "k5", "k7", "k3 dilated"]
TILE = 16


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    for cached in (peers._way, peers.engine, peer_spconv.library, peer_warpconvnet.library, backend.say_once):
        cached.cache_clear()


@pytest.fixture
def spconv() -> Iterator[None]:
    if importlib.util.find_spec("spconv") is None:
        pytest.skip("needs spconv (pip install spconv)")
    with use("spconv"):
        yield


# ---- Layouts --------------------------------------------------------------------------------------------------------


def read_padded(feats: Tensor, kernel: Tensor, outputs: int, pairs: Tensor, counts: Tensor) -> Tensor:
    """spconv's native way: of each offset as many pairs as are counted."""
    out = feats.new_zeros(outputs, kernel.shape[2])
    for k, count in enumerate(counts.tolist()):
        for i, o in pairs[:, k, :count].t().tolist():
            out[o] += feats[i] @ kernel[k]
    return out


def read_masked(feats: Tensor, kernel: Tensor, outputs: int, masked: peer_layouts.MaskedPairs) -> Tensor:
    """spconv's implicit GEMM: tile by tile of sorted outputs, the offsets that any output of the tile has."""
    out = feats.new_zeros(outputs, kernel.shape[2])
    masks = [mask % (1 << 32) for mask in masked.masks[:, 0].tolist()]  # read as unsigned
    assert masks == sorted(masks)
    for start in range(0, outputs, TILE):
        tile = 0
        for mask in masks[start : start + TILE]:
            tile |= mask
        for k in range(len(kernel)):
            if tile >> k & 1:
                for row in masked.order[start : start + TILE].tolist():
                    source = int(masked.table[k, row])
                    if source >= 0:
                        out[row] += feats[source] @ kernel[k]
    return out


def read_listed(feats: Tensor, kernel: Tensor, outputs: int, pairs: Any) -> Tensor:
    """WarpConvNet's pairs, offset after offset; at the center every row meets itself and pairs are not read."""
    out = feats.new_zeros(outputs, kernel.shape[2]) if pairs.center is None else feats @ kernel[pairs.center]
    for k in range(len(kernel)):
        if k != pairs.center:
            place = slice(int(pairs.starts[k]), int(pairs.starts[k + 1]))
            out = out.index_add(0, pairs.outputs[place], feats[pairs.inputs[place].long()] @ kernel[k])
    return out


READERS = {
    "spconv, native": lambda f, w, m: read_padded(f, w, len(m.table), *peer_layouts.padded_pairs(m)),
    "spconv, implicit GEMM": lambda f, w, m: read_masked(f, w, len(m.table), peer_layouts.masked_pairs(m)),
    "warpconvnet": lambda f, w, m: read_listed(f, w, len(m.table), peer_layouts.listed_pairs(m)),
}


def maps(size: int) -> list[KernelMap]:
    coords, feats = random_cloud(3, (60, 1, 45), 3)  # one batch element of a single voxel
    manager = SparseTensor(coords, feats).coordinate_manager
    there = manager.kernel_map(1, 1 if size % 2 else size, size, 1)
    return [there, there.reverse]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", READERS)
def test_layouts_hold_every_pair_under_its_offset(layout: str, size: int):
    for kernel_map in maps(size):
        kernel = torch.randn(size**3, 3, 2, dtype=torch.float64)
        feats = torch.randn(kernel_map.inputs, 3, dtype=torch.float64)
        expected = plain.sparse_conv_forward(feats, kernel, kernel_map)
        within(1e-12, READERS[layout](feats, kernel, kernel_map), expected)


def test_a_mask_holds_32_offsets():
    table = torch.full((3, 32), -1, dtype=torch.int32)
    table[0, 31], table[2, 0] = 1, 2
    masked = peer_layouts.masked_pairs(KernelMap(table, 3))
    assert masked.masks.tolist() == [[0], [1], [-(1 << 31)]]  # the highest bit is the sign
    assert masked.order.tolist() == [1, 2, 0]


# ---- spconv on a CPU ------------------------------------------------------------------------------------------------


def layer(name: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    made = {
        "k3": lambda: Conv3d(3, 8),
        "k2 s2": lambda: Conv3d(3, 8, 2, 2),
        "k2 s2 transposed": lambda: torch.nn.Sequential(Conv3d(3, 8, 2, 2), ConvTranspose3d(8, 16)),
        "1x1": lambda: Conv3d(3, 8, 1),
        "k5": lambda: Conv3d(3, 8, 5),
        "k7": lambda: Conv3d(3, 8, 7),
        "k3 dilated": lambda: Conv3d(3, 8, dilation=2),
    }[name]()
    return made.to(dtype)


def results(network: torch.nn.Module, coords: Tensor, feats: Tensor) -> list[Tensor]:
    """Features, gradients of the input and of every kernel."""
    given = feats.clone().requires_grad_()
    out = network(SparseTensor(coords, given)).sorted_feats
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [given, *parameters])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_spconv_gives_the_features_and_gradients_of_plain_torch(spconv: None, name: str, dtype: torch.dtype):
    network = layer(name, dtype)
    for sizes in ((40, 25), (1,), (30, 1, 20)):
        coords, feats = random_cloud(1, sizes)
        found = results(network, coords, feats.to(dtype))
        with use("plain"):
            expected = results(network, coords, feats.to(dtype))
        for value, right in zip(found, expected, strict=True):
            within(1e-5 if dtype == torch.float32 else 1e-12, value, right)


def test_spconv_computes_a_network_in_training_inference_and_autocast(spconv: None, monkeypatch: pytest.MonkeyPatch):
    calls = []
    engine = peers.engine("spconv")
    convolution = engine.convolution
    monkeypatch.setattr(engine, "convolution", lambda *args: calls.append(1) or convolution(*args))
    torch.manual_seed(0)
    network, (coords, feats) = SRUNet("18A", in_chans=3, out_chans=7, width=8), random_cloud(2, (300, 200))
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            calls.clear()
            found = results(network, coords, feats.float())
            assert len(calls) >= 40
            with use("plain"):
                expected = results(network, coords, feats.float())
        for value, right in zip(found, expected, strict=True):
            within(2e-3 if dtype is None else 2e-2, value.float(), right.float())
    network.eval()
    with torch.inference_mode():
        out = network(SparseTensor(coords, feats.float())).feats
        with use("plain"):
            within(1e-4, out, network(SparseTensor(coords, feats.float())).feats)


def test_the_implicit_way_hands_spconv_what_it_documents(spconv: None, monkeypatch: pytest.MonkeyPatch):
    """There is no GPU here: the arguments are read by the loop above."""

    def apply(*given: Any) -> Tensor:
        feats, filters, there, back, masks, masks_back, order, order_back, outputs, words, train, subm, _, exact = given
        assert (train, subm, exact) == (False, False, True)
        assert [int(word[0]) for word in words] == [0xFFFFFFFF]
        kernel = filters.reshape(len(filters), -1, filters.shape[-1]).permute(1, 2, 0)
        reverse = peer_layouts.MaskedPairs(back, *masks_back, *order_back)
        read_masked(feats.new_ones(outputs, 1), torch.ones(len(kernel), 1, 1), len(feats), reverse)
        return read_masked(feats, kernel, outputs, peer_layouts.MaskedPairs(there, *masks, *order))

    engine = peers.engine("spconv")
    functions = SimpleNamespace(SparseImplicitGemmFunction=SimpleNamespace(apply=apply))
    library = engine.library()._replace(functions=functions)
    monkeypatch.setattr(engine, "library", lambda: library)
    for kernel_map in (*maps(2), *maps(3)):
        offsets = kernel_map.table.shape[1]
        feats, kernel = torch.randn(kernel_map.inputs, 3), torch.randn(offsets, 3, 2)
        with torch.no_grad():
            out = engine.convolution(feats, kernel, kernel_map, engine.IMPLICIT)
        within(1e-5, out, plain.sparse_conv_forward(feats, kernel, kernel_map))


def test_spconvs_build_for_cpus_says_so_on_a_gpu(spconv: None):
    engine = peers.engine("spconv")
    if engine.library().has_cuda:
        pytest.skip("this spconv has CUDA")
    with pytest.raises(GeoPretrainError, match=r"build for CPUs.*cuda:0.*pip install spconv-cu126"):
        engine.ways(SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32), 27)


# ---- WarpConvNet, by a stand-in -------------------------------------------------------------------------------------


class _StandIn:
    """WarpConvNet's functions as its source says: explicit products over listed pairs, argument by argument."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def unified(self, feats: Tensor, kernel: Tensor, pairs: Any, outputs: int, *rest: Any) -> Tensor:
        self.calls.append(rest)
        return read_listed(feats, kernel, outputs, pairs)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def search(inputs: Tensor, outputs: Tensor, starts: Tensor, center: int | None) -> Any:
            assert len(inputs) == len(outputs) == int(starts[-1])
            return SimpleNamespace(inputs=inputs, outputs=outputs, starts=starts.cpu(), center=center)

        functions = {
            "UnifiedSpatiallySparseConvFunction": SimpleNamespace(apply=self.unified),
            "SpatiallySparseConvExplicitGEMMFunction": SimpleNamespace(apply=self.unified),
        }
        contents = {
            "warpconvnet": {"__version__": "1.8.2"},
            "warpconvnet.geometry.coords.search.search_results": {"IntSearchResult": search},
            "warpconvnet.nn.functional.sparse_conv": functions,
        }
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(backend.PEERS["warpconvnet"], "cpu", (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("name", LAYERS)
def test_warpconvnet_gets_our_pairs_and_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    stand_in = _StandIn()
    stand_in.install(monkeypatch)
    network, (coords, feats) = layer(name, torch.float32), random_cloud(1)
    with use("warpconvnet"):
        found = results(network, coords, feats.float())
    with use("plain"):
        expected = results(network, coords, feats.float())
    for value, right in zip(found, expected, strict=True):
        within(1e-5, value, right)
    exact = ["explicit_gemm", "explicit_gemm_grouped", "implicit_gemm"]
    for rest in stand_in.calls:  # float32 stays float32: its quickest kernels would round to float16
        assert rest in ((exact, exact, exact, torch.float32, None, None), (torch.float32,))
    assert (name == "1x1") == (not stand_in.calls)


def test_warpconvnet_may_take_its_quickest_way_for_16_bits(monkeypatch: pytest.MonkeyPatch):
    stand_in = _StandIn()
    stand_in.install(monkeypatch)
    engine = peers.engine("warpconvnet")
    kernel_map = maps(2)[0]
    feats, kernel = torch.randn(kernel_map.inputs, 8).bfloat16(), torch.randn(8, 8, 8).bfloat16()
    (way,) = engine.ways(feats, 8)
    engine.convolution(feats, kernel, kernel_map, way)
    assert stand_in.calls == [("auto", "auto", "auto", torch.bfloat16, None, None)]


# ---- What all engines share -----------------------------------------------------------------------------------------


def stand_in(convolution: Any) -> SimpleNamespace:
    library = SimpleNamespace(version="0")
    return SimpleNamespace(
        library=lambda: library, ways=lambda feats, offsets: ("first", "second"), convolution=convolution
    )


def chosen(monkeypatch: pytest.MonkeyPatch, convolution: Any) -> None:
    monkeypatch.setattr(peers, "engine", lambda name: stand_in(convolution))
    monkeypatch.setattr(backend, "_choice", "spconv")


def right(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, way: str) -> Tensor:
    return read_listed(feats, kernel, len(kernel_map.table), peer_layouts.listed_pairs(kernel_map))


def test_an_engine_with_other_numbers_is_an_error_not_wrong_features(monkeypatch: pytest.MonkeyPatch):
    coords, feats = random_cloud(0)
    chosen(monkeypatch, lambda feats, kernel, *rest: right(feats, kernel.flip(0), *rest))  # another kernel order
    with pytest.raises(
        GeoPretrainError, match=r"spconv 0 on cpu does not give .* 27 offsets .*first: .*use\('plain'\)"
    ):
        Conv3d(3, 8)(SparseTensor(coords, feats.float()))

    def reduced(feats: Tensor, kernel: Tensor, *rest: Any) -> Tensor:  # float32 as TF32 multiplies it
        return right(feats.bfloat16().float(), kernel, *rest)

    peers._way.cache_clear()
    chosen(monkeypatch, reduced)
    with pytest.raises(GeoPretrainError, match="accepted: 2e-05"):
        Conv3d(3, 8)(SparseTensor(coords, feats.float()))


def test_the_first_way_with_the_right_numbers_is_taken(monkeypatch: pytest.MonkeyPatch):
    ways = []

    def convolution(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, way: str) -> Tensor:
        ways.append(way)
        return right(feats, kernel, kernel_map, way) * (1 if way == "second" else 1.01)

    chosen(monkeypatch, convolution)
    coords, feats = random_cloud(0)
    for _ in range(3):
        Conv3d(3, 8)(SparseTensor(coords, feats.float()))
    assert ways == ["first", "second", "second", "second", "second"]  # compared once, then used


def test_what_an_engine_cannot_do_torch_does_and_says_so(monkeypatch: pytest.MonkeyPatch):
    def convolution(*_: Any) -> Tensor:
        raise RuntimeError("no kernel for 3 channels")

    chosen(monkeypatch, convolution)
    coords, feats = random_cloud(0)
    conv = Conv3d(3, 8)
    with pytest.warns(UserWarning, match="spconv 0 cannot do this .*no kernel for 3 channels.*torch does it"):
        out = conv(SparseTensor(coords, feats.float())).feats
    with use("plain"):
        assert torch.equal(out, conv(SparseTensor(coords, feats.float())).feats)


def test_dtypes_and_maps_that_no_engine_takes_are_torchs(monkeypatch: pytest.MonkeyPatch):
    chosen(monkeypatch, lambda *_: pytest.fail("was called"))
    monkeypatch.setitem(backend.PEERS["spconv"], "cpu", (torch.float32,))
    coords, feats = random_cloud(0)
    Conv3d(3, 8).double()(SparseTensor(coords, feats))
    x = SparseTensor(torch.tensor([[0, 4, 4, 4]], dtype=torch.int32), torch.ones(1, 3))
    empty = Conv3d(3, 8, 2, 5)(x)  # a stride larger than the kernel: this voxel is in no window
    assert torch.equal(empty.feats, torch.zeros(1, 8))


def test_second_derivatives_are_refused(monkeypatch: pytest.MonkeyPatch):
    chosen(monkeypatch, right)
    coords, feats = random_cloud(0)
    given = feats.float().requires_grad_()
    out = Conv3d(3, 8)(SparseTensor(coords, given)).sorted_feats
    (first,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_step_frees_what_the_engine_kept(monkeypatch: pytest.MonkeyPatch):
    chosen(monkeypatch, right)
    coords, feats = random_cloud(0)
    conv = Conv3d(3, 8)
    out = conv(SparseTensor(coords, feats.float())).sorted_feats
    node = out.grad_fn
    while "Convolution" not in type(node).__name__:
        node = node.next_functions[0][0]
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        _ = node.saved_tensors


@pytest.mark.parametrize("name", list(backend.PEERS))
def test_a_missing_library_is_named_with_the_line_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=rf"'{name}', which is not installed: pip install {name}"), use(name):
        pass
    monkeypatch.setattr(backend, "_choice", name)  # as the environment variable does
    monkeypatch.setitem(backend.PEERS[name], "cpu", (torch.float32,))
    with pytest.raises(MissingDependency, match=f"pip install {name}"):
        Conv3d(3, 8)(SparseTensor(random_cloud(0)[0], random_cloud(0)[1].float()))


def test_who_computes_is_told():
    assert "plain" in backend.describe(torch.bfloat16, "cuda")
    for name, dtype, device, told in (
        ("spconv", torch.float16, "cuda", "computed by spconv"),
        ("spconv", torch.bfloat16, "cuda", "computed by plain torch"),
        ("warpconvnet", torch.bfloat16, "cuda", "computed by warpconvnet"),
        ("warpconvnet", torch.float32, "cpu", "computed by plain torch"),
    ):
        backend_before, backend._choice = backend._choice, name
        try:
            assert told in backend.describe(dtype, device)
        finally:
            backend._choice = backend_before
