"""Every operation, as a function and as a layer, against MinkowskiEngine 0.5.4: outputs, coordinates, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geo_pretrain.sparse import SparseTensor, cat, functional, layers
from geo_pretrain.sparse.maps import kernel_offsets
from tests.sparse.twins import cells, on_coarse, rows_at, within

LIMIT = 1e-5  # of the largest magnitude: the golden README's suggestion
Golden = dict[str, Tensor]

# name: (input, kernel size, stride, dilation, transposed)
CONVOLUTIONS = {
    "conv_k3s1": ("fine", 3, 1, 1, False),
    "conv_k5s1": ("fine", 5, 1, 1, False),
    "conv_k3s1d2": ("fine", 3, 1, 2, False),
    "conv_k1s1_bias": ("fine", 1, 1, 1, False),
    "conv_k2s2": ("fine", 2, 2, 1, False),
    "conv_k3s2": ("fine", 3, 2, 1, False),
    "conv_k1s2": ("fine", 1, 2, 1, False),
    "conv_k3s1_ts2": ("alone", 3, 1, 1, False),
    "conv_k3s1_ts2 in the pyramid": ("coarse", 3, 1, 1, False),
    "convtr_k2s2": ("coarse", 2, 2, 1, True),
    "convtr_k3s2": ("coarse", 3, 2, 1, True),
    "convtr_k2s2_newmap": ("alone", 2, 2, 1, True),
}


def given(golden: Golden, kind: str) -> tuple[SparseTensor, Tensor]:
    """A fine tensor, a coarse one of the same grid, or a coarse one that knows no finer voxels; and its leaf."""
    leaf = golden["feats" if kind == "fine" else "coarse_feats"].clone().requires_grad_()
    if kind == "fine":
        return SparseTensor(golden["coords"], leaf), leaf
    if kind == "alone":
        return SparseTensor(golden["coarse_coords"], leaf, stride=2), leaf
    fine = SparseTensor(golden["coords"], golden["feats"])
    return on_coarse(fine, 2, golden["coarse_coords"], leaf), leaf


def check(golden: Golden, name: str, y: SparseTensor, leaf: Tensor) -> None:
    """Output, exact coordinates and the input's gradient."""
    feats = rows_at(y, golden[f"{name}.out_coords"])
    within(LIMIT, feats, golden[f"{name}.out_feats"])
    feats.backward(golden[f"{name}.grad_out"])
    within(LIMIT, leaf.grad, golden[f"{name}.grad_in"])


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_minkowski(golden: Golden, engine: str, case: str):
    kind, size, stride, dilation, transposed = CONVOLUTIONS[case]
    name = case.split()[0]
    x, leaf = given(golden, kind)
    kernel = golden[f"{name}.kernel"].clone().requires_grad_()
    y = functional.convolve(x, kernel, kernel_size=size, stride=stride, dilation=dilation, transposed=transposed)
    if name.endswith("bias"):
        y = y.with_sorted_feats(y.sorted_feats + golden[f"{name}.bias"])
    check(golden, name, y, leaf)
    within(LIMIT, kernel.grad, golden[f"{name}.grad_kernel"])


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_layers_equal_minkowski(golden: Golden, engine: str, case: str):
    kind, size, stride, dilation, transposed = CONVOLUTIONS[case]
    name = case.split()[0]
    x, leaf = given(golden, kind)
    kernel = golden[f"{name}.kernel"]
    channels, bias = kernel.shape[-2:], name.endswith("bias")
    layer = (
        layers.ConvTranspose3d(*channels, size, stride, bias)
        if transposed
        else layers.Conv3d(*channels, size, stride, dilation, bias)
    )
    layer.load_state_dict({key: golden[f"{name}.{key}"] for key in ("kernel", "bias")[: 1 + bias]})
    y = layer(x)
    assert y.stride == (x.stride // stride if transposed else x.stride * stride)
    check(golden, name, y, leaf)
    for key, parameter in layer.named_parameters():
        within(LIMIT, parameter.grad, golden[f"{name}.grad_{key}"])


POOLS: dict[str, Callable[[SparseTensor], SparseTensor]] = {
    f"pool_{reduce}_k{size}s2": lambda x, pool=pool, size=size: pool(x, size, 2)
    for reduce, pool, sizes in (
        ("max", functional.max_pool, (2, 3)),
        ("avg", functional.avg_pool, (2, 3)),
        ("sum", functional.sum_pool, (2,)),
    )
    for size in sizes
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_equal_minkowski(golden: Golden, name: str):
    x, leaf = given(golden, "fine")
    y = POOLS[name](x)
    assert y.stride == 2
    check(golden, name, y, leaf)


@pytest.mark.parametrize("reduce", ["avg", "max", "sum"])
def test_global_pools_equal_minkowski(golden: Golden, reduce: str):
    x, leaf = given(golden, "fine")
    out = functional.global_pool(x, reduce)
    assert golden[f"global_{reduce}.out_coords"][:, 0].tolist() == [0, 1]
    within(LIMIT, out, golden[f"global_{reduce}.out_feats"])
    out.backward(golden[f"global_{reduce}.grad_out"])
    within(LIMIT, leaf.grad, golden[f"global_{reduce}.grad_in"])


@pytest.mark.parametrize(("name", "kind"), [("fine", "fine"), ("coarse", "coarse"), ("coarse", "alone")])
def test_interpolation_equals_minkowski(golden: Golden, name: str, kind: str):
    x, leaf = given(golden, kind)
    queries = golden["interp.queries"].clone()
    out = functional.interpolate(x, queries)
    assert torch.equal(queries, golden["interp.queries"])
    within(LIMIT, out, golden[f"interp_{name}.out_feats"])
    out.backward(golden[f"interp_{name}.grad_out"])
    within(LIMIT, leaf.grad, golden[f"interp_{name}.grad_in"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_equals_minkowski(golden: Golden, mode: str):
    x, leaf = given(golden, "fine")
    layer = layers.BatchNorm(4).train(mode == "train")
    state = {f"bn.{key}": golden[f"bn.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    layer.load_state_dict(state | {"bn.num_batches_tracked": torch.tensor(0)})
    y = layer(x)
    within(LIMIT, y.feats, golden[f"bn.{mode}.out_feats"])
    y.feats.backward(golden["bn.grad_out"])
    within(LIMIT, leaf.grad, golden[f"bn.{mode}.grad_in"])
    for key, parameter in layer.bn.named_parameters():
        within(LIMIT, parameter.grad, golden[f"bn.{mode}.grad_{key}"])
    for key in ("running_mean", "running_var"):
        within(LIMIT, getattr(layer.bn, key), golden[f"bn.{mode}.{key}_after"])


@pytest.mark.parametrize("relu", [functional.relu, layers.ReLU()], ids=["function", "layer"])
def test_relu_equals_minkowski(golden: Golden, relu: Callable[[SparseTensor], SparseTensor] | nn.Module):
    x, leaf = given(golden, "fine")
    y = relu(x)
    assert torch.equal(y.feats, golden["relu.out_feats"])
    y.feats.backward(golden["relu.grad_out"])
    assert torch.equal(leaf.grad, golden["relu.grad_in"])


def test_concatenation_and_sum_equal_minkowski(golden: Golden):
    x, _ = given(golden, "fine")
    b, c = (x.with_feats(golden[f"cat.feats_{name}"]) for name in "bc")
    assert torch.equal(cat(x, b).feats, golden["cat.out_feats"])
    assert torch.equal((x + c).feats, golden["cat.add_out_feats"])
    assert torch.equal(cat(x, b).coords, golden["coords"])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_kernel_slices_follow_minkowski(golden: Golden, size: int):
    offsets = torch.tensor(kernel_offsets(size), dtype=torch.int32)
    assert torch.equal(offsets, golden[f"kernel_offsets.k{size}"])
    if size != 5:
        assert torch.equal(offsets, golden[f"kernel_offsets.k{size}s2_down"])
        assert torch.equal(offsets, golden[f"kernel_offsets.k{size}s2_transpose"])


def test_duplicates_keep_the_first_row_as_in_minkowski(golden: Golden):
    """RANDOM_SUBSAMPLE of 900 floored points in 415 voxels, rows in order of first occurrence."""
    voxels = torch.floor(golden["quant.points"] / 0.05).int()
    coords = torch.cat([voxels.new_zeros(len(voxels), 1), voxels], dim=1)
    x = SparseTensor(coords, golden["quant.feats"])
    prefix = "quant.st_random_subsample"
    assert torch.equal(x.coords, golden[f"{prefix}.coords"])
    assert torch.equal(x.feats, golden[f"{prefix}.feats"])
    assert torch.equal(x.feats, golden["quant.feats"][golden[f"{prefix}.unique_index"]])
    assert torch.equal(x.inverse, golden[f"{prefix}.inverse_mapping"])
    assert cells(x.coords[x.inverse]) == cells(coords)
