"""Convolutions that multiply bfloat16 and sum in float32: against loops in float64 from the same rounded operands."""

from __future__ import annotations

import copy
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numba")

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse import SparseTensor, backend, fast, functional, packed, plain, processor, use
from geo_pretrain.sparse.layers import BatchNorm, Conv3d
from geo_pretrain.sparse.maps import KernelMap
from geo_pretrain.sparse.plain import Finish
from geo_pretrain.training.precision import bf16_is_faster
from tests.sparse.test_fast import assert_close, random_map, run_anew, slow_forward, slow_wgrad
from tests.sparse.twins import random_cloud

needs_bf16 = pytest.mark.skipif(not processor.BF16, reason="this processor does not multiply bfloat16 (avx512_bf16)")
BF16 = torch.bfloat16
CHANNELS = [(3, 5), (20, 32), (32, 96), (96, 100), (64, 3), (1, 64)]
SHAPES = [(1, 40, 70), (8, 257, 600), (27, 300, 300)]  # offsets, inputs, outputs
COORDS, FEATS = random_cloud(8, (300, 150), reach=6)


@pytest.fixture(autouse=True)
def on_the_fast_kernels() -> Any:
    with use("fast"):
        yield


# ---- The kernels -----------------------------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_products_equal_a_loop_in_double_precision(shape, channels):
    kernel_map = random_map(*shape)
    rows, kernel = torch.randn(shape[1], channels[0], dtype=BF16), torch.randn(shape[0], *channels)
    expected = slow_forward(rows, kernel.to(BF16), kernel_map.table)
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map), expected)
    assert_close(fast.sparse_conv_forward(rows, kernel.to(BF16), kernel_map), expected)
    flipped = kernel.transpose(1, 2).contiguous().transpose(1, 2)  # the same numbers as a transposed view
    assert_close(fast.sparse_conv_forward(rows, flipped, kernel_map), expected)
    finish = Finish(torch.rand(channels[1]), torch.randn(channels[1]), torch.randn(shape[2], channels[1]), relu=True)
    wanted = (expected * finish.scale + finish.shift + finish.residual).relu()
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map, finish), wanted)


@needs_bf16
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_kernel_gradients_equal_a_loop_in_double_precision(shape, channels):
    kernel_map = random_map(*shape)
    rows, grad = torch.randn(shape[1], channels[0], dtype=BF16), torch.randn(shape[2], channels[1], dtype=BF16)
    expected = slow_wgrad(rows, grad, kernel_map.table)
    assert_close(fast.sparse_conv_wgrad(rows, grad, kernel_map), expected)


@needs_bf16
def test_maps_without_pairs_give_zeros():
    kernel_map = KernelMap(torch.full((5, 8), -1, dtype=torch.int32), 3)
    rows, grad = torch.randn(3, 20, dtype=BF16), torch.randn(5, 32, dtype=BF16)
    assert fast.sparse_conv_forward(rows, torch.randn(8, 20, 32), kernel_map).equal(torch.zeros(5, 32))
    assert fast.sparse_conv_wgrad(rows, grad, kernel_map).equal(torch.zeros(8, 20, 32))


@needs_bf16
def test_results_are_the_same_to_the_last_bit_on_any_number_of_threads():
    rows, kernel = torch.randn(5000, 96, dtype=BF16), torch.randn(27, 96, 64)
    grad, results = torch.randn(5000, 64, dtype=BF16), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kernel_map = random_map(27, 5000, 5000)
            products = fast.sparse_conv_forward(rows, kernel, kernel_map)
            results.append((products, fast.sparse_conv_wgrad(rows, grad, kernel_map)))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_bf16
def test_numbers_that_are_none_stay_none():
    """Rounding as integers would turn some of them into numbers."""
    kernel_map = random_map(1, 40, 40)
    rows, kernel = torch.ones(40, 2, dtype=BF16), torch.ones(1, 2, 16)
    kernel.view(torch.int32)[0, 0, 3] = 0x7FFFFFFF
    out = fast.sparse_conv_forward(rows, kernel, kernel_map)
    assert out[:, 3].isnan().equal((kernel_map.table >= 0)[:, 0])
    assert not out[:, :3].isnan().any()


AMX = """
import torch
from geo_pretrain.sparse import compiled, fast, processor
from tests.sparse.test_fast import assert_close, random_map, slow_forward, slow_wgrad
from tests.sparse.tiles import emulate
assert processor.AMX
from geo_pretrain.sparse import kernels_amx
from geo_pretrain.sparse.kernels import TASKS
needed = {"list_pairs", "pair_rows", "transpose", "product_amx", "gradient_amx"}
for name in TASKS.keys() - needed:
    del TASKS[name]  # are not called below, and take long to compile
torch.cpu._init_amx = lambda: True
done = emulate()
for shape, channels in (((1, 40, 70), (32, 32)), ((8, 100, 300), (64, 48)), ((1, 40, 70), (96, 100))):
    kernel_map = random_map(*shape)
    rows, kernel = torch.randn(shape[1], channels[0]).bfloat16(), torch.randn(shape[0], *channels)
    grad = torch.randn(shape[2], channels[1]).bfloat16()
    expected = slow_forward(rows, kernel.bfloat16(), kernel_map.table)
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map), expected)
    assert_close(fast.sparse_conv_wgrad(rows, grad, kernel_map), slow_wgrad(rows, grad, kernel_map.table))
assert min(done.values()) > 0 and len(done) == 6, done
assert done["ldtilecfg"] == done["tilerelease"], done
"""


@needs_bf16
@pytest.mark.skipif(platform.system() != "Linux", reason="carries instructions out in a handler of Linux's signals")
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="this processor has AMX: all tests here run it")
def test_tiles_of_amx_give_the_same_results_instruction_by_instruction():
    run_anew(AMX, {"NUMBA_CPU_FEATURES": processor.FEATURES + ",+amx-tile,+amx-bf16"})


@needs_bf16
def test_where_the_system_grants_no_tiles_the_dot_products_run(monkeypatch):
    monkeypatch.setattr(fast, "AMX", True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    fast.has_tiles.cache_clear()
    try:
        test_products_equal_a_loop_in_double_precision((8, 257, 600), (32, 96))
    finally:
        fast.has_tiles.cache_clear()


# ---- Packed kernels --------------------------------------------------------------------------------------------------


@needs_bf16
def test_a_parameter_is_packed_once_until_it_changes(monkeypatch):
    packs = []
    original = packed._pack
    monkeypatch.setattr(packed, "_pack", lambda kernel: packs.append(kernel.shape) or original(kernel))
    weights = nn.Parameter(torch.randn(8, 32, 64))

    def is_right(kernel: Tensor) -> bool:
        low = packed.packed(kernel).view(BF16).reshape(8, kernel.shape[1] // 2, kernel.shape[2], 2)
        return low.transpose(2, 3).reshape(kernel.shape).equal(kernel.detach().to(BF16))

    assert is_right(weights)
    assert is_right(weights)
    assert is_right(weights.mT)
    assert is_right(weights.mT)
    assert packs == [(8, 32, 64), (8, 64, 32)]
    with torch.no_grad():
        weights.mul_(2)
    assert is_right(weights)
    weights.data.add_(1)  # the version counter stays
    assert is_right(weights)
    weights.data = torch.randn(8, 32, 64)
    assert is_right(weights)
    assert len(packs) == 5
    assert is_right(weights.detach())  # which no one keeps
    assert is_right(weights.permute(0, 2, 1)[:, :32, :16])
    assert len(packs) == 7
    kept = len(packed._of[False])
    del weights
    assert len(packed._of[False]) == kept - 1


@needs_bf16
def test_a_fused_step_is_noticed_though_it_counts_no_version():
    """Few of the weights change by so small a step, and no sample may be among them."""
    weights = nn.Parameter(torch.randn(8, 32, 64))
    other = nn.Parameter(weights.detach().clone())
    packed.packed(weights), packed.packed(weights.mT), packed.packed(other)
    weights.grad = torch.zeros_like(weights)
    weights.grad[:, 1, 1] = 1.0
    optimizer = torch.optim.SGD([weights], lr=1.0, fused=True)
    optimizer.step()
    for kernel in (weights, weights.mT):
        assert packed.packed(kernel).equal(packed._pack(kernel))
    assert other in packed._of[False]


@needs_bf16
def test_steps_pack_a_kernel_once_for_products_and_once_for_gradients(monkeypatch):
    packs = []
    original = packed._pack
    monkeypatch.setattr(packed, "_pack", lambda kernel: packs.append(kernel.shape) or original(kernel))
    layers = nn.Sequential(Conv3d(3, 32), Conv3d(32, 64))
    once = [(27, 3, 32), (27, 32, 64), (27, 64, 32)]

    def accumulate() -> None:
        with autocast():
            y = layers(SparseTensor(COORDS, FEATS.float()))
        y.computed_feats.sum().backward()

    accumulate()
    accumulate()
    assert sorted(packs) == once
    torch.optim.SGD(layers.parameters(), lr=0.1).step()
    accumulate()
    assert sorted(packs) == sorted(2 * once)


# ---- Layers and networks ---------------------------------------------------------------------------------------------


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", BF16)


def differ(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def with_statistics(network: SRUNet) -> SRUNet:
    """The network in `eval` with the statistics of the features here."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        network(SparseTensor(COORDS, FEATS.float()))
    return network.eval()


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors.values()])


def small_network() -> SRUNet:
    torch.manual_seed(0)
    return SRUNet("18A", width=8, out_chans=6)


def step(network: nn.Module, feats: Tensor, context: AbstractContextManager[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    with context:
        features = network(SparseTensor(COORDS, feats)).feats
    features.float().square().mean().backward()
    return features.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes of features that the kernels got."""
    dtypes = set()
    for name in ("sparse_conv_forward", "sparse_conv_wgrad"):
        original = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda feats, *others, f=original: dtypes.add(feats.dtype) or f(feats, *others))
    return dtypes


@contextmanager
def rounded_operands() -> Iterator[None]:
    """Plain torch, which rounds to bfloat16 what the fast kernels round, and multiplies in float32: their slow twin."""

    def rounding(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def rounded(first: Tensor, second: Tensor, kernel_map: KernelMap, *others: Any) -> Tensor:
            if kernel_map.count >= functional.FEW * kernel_map.table.shape[1]:
                first, second = first.to(BF16).float(), second.to(BF16).float()
            return product(first, second, kernel_map, *others)

        return rounded

    with pytest.MonkeyPatch.context() as patch, use("plain"):
        for name in ("sparse_conv_forward", "sparse_conv_wgrad"):
            patch.setattr(plain, name, rounding(getattr(plain, name)))
        yield


@needs_bf16
@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_networks_differ_from_float32_by_the_rounding_of_operands_alone(way, multiplied):
    """With statistics that are given: those of the few voxels of the deep levels would make rounding errors larger."""
    context = autocast if way == "autocast" else nullcontext
    full = with_statistics(small_network())
    low = copy.deepcopy(full) if way == "autocast" else copy.deepcopy(full).bfloat16()
    twin, feats = copy.deepcopy(low), FEATS.float().to(low.final.kernel.dtype)
    multiplied.clear()
    unrounded, exact = step(full, FEATS.float(), nullcontext())
    assert multiplied == {torch.float32}
    features, gradients = step(low, feats, context())
    assert BF16 in multiplied
    assert features.dtype == BF16
    with rounded_operands():
        expected, wanted = step(twin, feats, context())
    for name, gradient in gradients.items():
        assert gradient.dtype == wanted[name].dtype
    assert 0.002 < differ(features, unrounded) < 0.05
    # Sums in another order are rounded to the other side here and there.
    assert differ(features, expected) < 0.5 * differ(features, unrounded)
    assert differ(joined(gradients), joined(wanted)) < 0.5 * differ(joined(gradients), joined(exact))


@needs_bf16
def test_gradients_equal_those_of_rounded_operands():
    """Features, kernel and the gradient from above are rounded once each; nothing else is."""
    torch.manual_seed(0)
    feats, kernel = torch.randn(len(COORDS), 20), nn.Parameter(torch.randn(27, 20, 12))
    above = torch.randn(len(COORDS), 12)
    x = SparseTensor(COORDS, feats)
    rows = x.sorted_feats.clone().requires_grad_()
    with autocast():
        y = functional.convolve(x.with_sorted_feats(rows), kernel, kernel_size=3)
    y.computed_feats.backward(above)
    kernel_map = x.coordinate_manager.kernel_map(1, 1, 3, 1)
    rounded, weights, slope = rows.detach().to(BF16), kernel.detach().to(BF16), above.to(BF16)
    assert_close(y.computed_feats.detach(), slow_forward(rounded, weights, kernel_map.table))
    assert_close(rows.grad, slow_forward(slope, weights.transpose(1, 2), kernel_map.reverse.table))
    assert_close(kernel.grad, slow_wgrad(rounded, slope, kernel_map.table))


@needs_bf16
def test_gradients_of_gradients_reach_features_and_kernels():
    def second(context: AbstractContextManager[Any]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        leaves = torch.randn(len(COORDS), 6, requires_grad=True), torch.randn(27, 6, 8, requires_grad=True)
        with context:
            y = functional.convolve(SparseTensor(COORDS, leaves[0]), leaves[1], kernel_size=3)
        slopes = torch.autograd.grad(y.computed_feats.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), leaves)

    for low, full in zip(second(autocast()), second(nullcontext()), strict=True):
        assert differ(low, full) < 0.05


@needs_bf16
def test_few_voxels_are_multiplied_in_float32(multiplied):
    """Rounding the kernel would take longer than the products."""
    coords, feats = random_cloud(0, (12,), reach=2, channels=16)
    with autocast(), torch.no_grad():
        Conv3d(16, 16)(SparseTensor(coords, feats.float()))
    assert multiplied == {torch.float32}


@needs_bf16
def test_norms_take_statistics_in_float32():
    torch.manual_seed(0)
    convolution, norm = Conv3d(3, 32), BatchNorm(32)
    with autocast():
        y = convolution(SparseTensor(COORDS, FEATS.float()))
        norm(y)
    rows = y.computed_feats.detach().double()
    assert y.computed_feats.dtype == torch.float32
    torch.testing.assert_close(norm.bn.running_mean.double(), 0.1 * rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.bn.running_var.double(), 0.9 + 0.1 * rows.var(0), rtol=1e-5, atol=1e-6)


@needs_bf16
def test_it_can_be_asked_for_and_is_not_warned_of():
    words = "torch.bfloat16 on cpu: multiplied in torch.bfloat16, summed in torch.float32 by numba's kernels"
    assert backend.describe(BF16) == words
    assert bf16_is_faster(torch.device("cpu"), points=True)
    backend.warn_once.cache_clear()
    with warnings.catch_warnings(), autocast():
        warnings.simplefilter("error")
        Conv3d(3, 8)(SparseTensor(COORDS, FEATS.float()))


def test_where_no_kernel_multiplies_it_float32_is_used_and_said(monkeypatch, multiplied):
    monkeypatch.setattr(backend, "_multiplies_bf16", lambda: False)
    assert "computed in torch.float32" in backend.describe(BF16)
    assert not bf16_is_faster(torch.device("cpu"), points=True)
    backend.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="computed in torch.float32 by numba's kernels"), autocast():
        Conv3d(3, 8)(SparseTensor(COORDS, FEATS.float()))
    assert multiplied == {torch.float32}


@pytest.mark.parametrize("features,has", [("+avx512f,+avx512bf16", True), ("+avx512f", False), ("+avx2", False)])
def test_the_processor_that_numba_compiles_for_is_asked(monkeypatch, features, has):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    backend._multiplies_bf16.cache_clear()
    assert backend._multiplies_bf16() is has
    monkeypatch.delenv("NUMBA_CPU_FEATURES")
    backend._multiplies_bf16.cache_clear()
    if "NUMBA_CPU_FEATURES" not in os.environ:
        assert backend._multiplies_bf16() == processor.BF16


@pytest.mark.parametrize("context", [nullcontext, autocast])
def test_weights_of_float16_load_and_run(context):
    half, full = small_network().eval(), small_network().eval()
    full.load_state_dict({name: value.half().to(value.dtype) for name, value in full.state_dict().items()})
    half.half().load_state_dict(full.state_dict())
    with torch.no_grad():
        expected = full(SparseTensor(COORDS, FEATS.half().float())).feats
        with context():
            features = half(SparseTensor(COORDS, FEATS.half())).feats
    assert features.dtype == (torch.float16 if context is nullcontext else BF16)
    assert differ(features, expected) < 0.02
