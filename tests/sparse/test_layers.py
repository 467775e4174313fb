"""Layers: MinkowskiEngine's parameter names and shapes, initial weights, statistics, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ConvTranspose3d, ReLU
from tests.sparse.twins import coarse_cells, dense_convolution, random_cloud, rows_at, within

pytestmark = pytest.mark.usefixtures("plain")


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Conv3d(4, 6), {"kernel": (27, 4, 6)}),
        (Conv3d(4, 6, 5, bias=True), {"kernel": (125, 4, 6), "bias": (1, 6)}),
        (Conv3d(4, 6, 2, 2), {"kernel": (8, 4, 6)}),
        (Conv3d(4, 6, 1), {"kernel": (4, 6)}),
        (Conv3d(4, 6, 1, 2), {"kernel": (1, 4, 6)}),
        (ConvTranspose3d(4, 6), {"kernel": (8, 4, 6)}),
        (ConvTranspose3d(4, 6, 3, 2, bias=True), {"kernel": (27, 4, 6), "bias": (1, 6)}),
        (ReLU(), {}),
    ],
    ids=str,
)
def test_parameters_are_named_and_shaped_as_in_minkowski(layer: nn.Module, shapes: dict[str, tuple]):
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == shapes


def test_batch_norm_keeps_its_parameters_in_bn():
    layer = BatchNorm(6, eps=1e-3, momentum=0.02)
    assert set(layer.state_dict()) == {
        f"bn.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert (layer.bn.eps, layer.bn.momentum) == (1e-3, 0.02)
    assert (BatchNorm(6).bn.eps, BatchNorm(6).bn.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize(
    ("layer", "fan"),
    [
        (Conv3d(32, 8, 3, bias=True), 32 * 27),
        (Conv3d(32, 8, 2, 2), 32 * 8),
        (Conv3d(512, 256, 1), 512),
        (ConvTranspose3d(32, 8, 2, 2, bias=True), 8 * 8),
    ],
    ids=str,
)
def test_initial_weights_are_uniform_within_one_over_root_fan(layer: Conv3d | ConvTranspose3d, fan: int):
    bound = 1 / math.sqrt(fan)
    assert 0.98 * bound < layer.kernel.abs().max() <= bound
    assert float(layer.kernel.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert layer.bias is None or 0 < layer.bias.abs().max() <= bound


def test_defaults_are_a_centered_kernel_and_a_step_to_the_finer_voxels():
    coords, feats = random_cloud(0)
    conv = Conv3d(3, 5).double()
    x = SparseTensor(coords, feats)
    within(1e-12, conv(x).feats.detach(), dense_convolution(coords, feats, conv.kernel.detach(), 1, 1))
    y = ConvTranspose3d(5, 2).double()(Conv3d(3, 5, 2, 2).double()(x))
    assert torch.equal(y.coords, coords)
    assert (y.stride, y.sorted_feats.shape[1], y.sorted_feats.dtype) == (1, 2, torch.float64)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_layers_pass_stride_dilation_and_bias_on(stride: int):
    coords, feats = random_cloud(1)
    layer = Conv3d(3, 5, 3, stride, 2, True).double()
    expected = dense_convolution(coords, feats, layer.kernel.detach(), stride, 2) + layer.bias.detach()
    within(1e-12, rows_at(layer(SparseTensor(coords, feats)), coarse_cells(coords, stride)).detach(), expected)


def test_statistics_cover_all_voxels_of_all_batch_elements():
    coords, feats = random_cloud(2, (30, 5, 1))
    y = BatchNorm(3).double()(SparseTensor(coords, feats * 3 + 1)).feats.detach()
    within(1e-12, y.mean(dim=0) + 1, torch.ones(3).double())
    within(1e-4, y.var(dim=0, unbiased=False), torch.ones(3).double())


def test_one_voxel_has_no_statistics():
    x = SparseTensor(torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm(3)(x)
    assert torch.isfinite(BatchNorm(3).eval()(x).feats).all()


@pytest.mark.parametrize("argument", ["kernel_size", "stride", "dilation"])
@pytest.mark.parametrize("value", [0, -1, 2.0, (3, 3, 3)])
def test_wrong_arguments_are_explained(argument: str, value: object):
    with pytest.raises(ValueError, match=rf"{argument} is .*; accepted: whole numbers from 1 up\."):
        Conv3d(3, 4, **{argument: value})  # type: ignore[arg-type]


def test_wrong_channels_are_explained():
    coords, feats = random_cloud(3)
    x = SparseTensor(coords, feats.float())
    for layer in (Conv3d(4, 4), Conv3d(4, 4, 1), Conv3d(4, 4, 2, 2)):
        with pytest.raises(
            ValueError, match=r"This convolution takes 4 channels; got SparseTensor\(65 voxels x 3 chan"
        ):
            layer(x)
    with pytest.raises(ValueError, match="cannot refine a tensor of stride 1"):
        ConvTranspose3d(3, 4)(x)


def test_description_shows_sizes():
    assert repr(Conv3d(3, 4, 5, 2)) == "Conv3d(3, 4, kernel_size=5, stride=2)"
    assert repr(ConvTranspose3d(3, 4)) == "ConvTranspose3d(3, 4, kernel_size=2, stride=2)"


def test_a_pyramid_returns_to_the_voxels_it_came_from():
    """Four levels down and up, as in an SR-UNet: coordinates, order and gradients reach the input."""
    coords, feats = random_cloud(4, (300, 100, 1), reach=12)
    leaf = feats.clone().requires_grad_()
    x = SparseTensor(coords, leaf)
    way = [x]
    for _ in range(4):
        way.append(Conv3d(3, 3, 2, 2).double()(way[-1]))
    assert [y.stride for y in way] == [1, 2, 4, 8, 16]
    y = way[-1]
    for finer in reversed(way[:-1]):
        y = ConvTranspose3d(3, 3).double()(y) + finer
        assert torch.equal(y.coords, finer.coords)
    y.feats.sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad != 0).all())


def test_layers_compose_in_sequential_and_train():
    coords, feats = random_cloud(5)
    torch.manual_seed(0)
    model = nn.Sequential(Conv3d(3, 8), BatchNorm(8), ReLU(), Conv3d(8, 2, 1, bias=True)).double()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(SparseTensor(coords, feats)).feats.square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
