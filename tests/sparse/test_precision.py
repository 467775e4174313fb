"""Number formats and devices: gradients checked in double precision, bfloat16 near float32, CUDA equal to the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geo_pretrain.sparse import SparseTensor, cat, layers, plain, use
from geo_pretrain.sparse import functional as SF
from tests.sparse.twins import dense_convolution, random_cloud, random_kernel, rows_at, within

COORDS, FEATS = random_cloud(0, (9, 5), reach=2, channels=2)
POINTS = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1.3
POINTS[:, 0] = torch.arange(6) % 2

Operation = Callable[[SparseTensor], SparseTensor | Tensor]


def up_and_down(x: SparseTensor, kernel: Tensor, size: int, stride: int) -> SparseTensor:
    return SF.convolve(SF.avg_pool(x, 2, stride), kernel, kernel_size=size, stride=stride, transposed=True)


CONVOLUTIONS: dict[str, tuple[int, Callable[[SparseTensor, Tensor], SparseTensor]]] = {
    "k3": (3, lambda x, k: SF.convolve(x, k, kernel_size=3)),
    "k2": (2, lambda x, k: SF.convolve(x, k, kernel_size=2)),
    "k3d2": (3, lambda x, k: SF.convolve(x, k, kernel_size=3, dilation=2)),
    "k2s2": (2, lambda x, k: SF.convolve(x, k, kernel_size=2, stride=2)),
    "k3s2": (3, lambda x, k: SF.convolve(x, k, kernel_size=3, stride=2)),
    "k3s3": (3, lambda x, k: SF.convolve(x, k, kernel_size=3, stride=3)),
    "transposed k2s2": (2, lambda x, k: up_and_down(x, k, 2, 2)),
    "transposed k3s2": (3, lambda x, k: up_and_down(x, k, 3, 2)),
}
OTHERS: dict[str, Operation] = {
    "max_pool": lambda x: SF.max_pool(x, 2, 2),
    "avg_pool": lambda x: SF.avg_pool(x, 3, 2),
    "sum_pool": lambda x: SF.sum_pool(x, 3, 2),
    "global avg": lambda x: SF.global_pool(x, "avg"),
    "global max": lambda x: SF.global_pool(x, "max"),
    "global sum": lambda x: SF.global_pool(x, "sum"),
    "interpolate": lambda x: SF.interpolate(x, POINTS.to(x.sorted_feats.device)),
    "interpolate strided": lambda x: SF.interpolate(SF.sum_pool(x, 2, 2), POINTS.to(x.sorted_feats.device)),
    "relu": SF.relu,
    "cat and add": lambda x: cat(x, x + SF.relu(x)),
    "with_feats": lambda x: x.with_feats(x.feats * 2),
    "batch norm": lambda x: layers.BatchNorm(2, momentum=0).to(x.sorted_feats.device, torch.float64)(x),
}


def feats_of(y: SparseTensor | Tensor) -> Tensor:
    return y.feats if isinstance(y, SparseTensor) else y


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    """First and second derivatives, in both ways of multiplying."""
    monkeypatch.setitem(plain.PADDING, "cpu", 1e9 if padded else -1.0)
    size, convolution = CONVOLUTIONS[name]
    kernel = random_kernel(0, size, 2, 2).requires_grad_()
    cloud = SparseTensor(COORDS, FEATS)  # its kernel maps are found once, not in every evaluation

    def function(feats: Tensor, kernel: Tensor) -> Tensor:
        return convolution(cloud.with_feats(feats), kernel).feats

    feats = FEATS.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (feats, kernel))
    if size == 2:
        assert torch.autograd.gradgradcheck(function, (feats, kernel))


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_other_operations(name: str):
    feats = FEATS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda feats: feats_of(OTHERS[name](SparseTensor(COORDS, feats))), feats)


def test_gradients_of_interpolation_by_position():
    x, points = SparseTensor(COORDS, FEATS), POINTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda xyz: SF.interpolate(x, torch.cat([POINTS[:, :1], xyz], 1)), points[:, 1:])


@pytest.mark.parametrize("choice", ["plain", "auto"])
def test_gradients_of_gradients_equal_those_of_dense_convolution(choice: str):
    coords, feats = random_cloud(1)
    leaves = feats.float().requires_grad_(), random_kernel(1, 3).float().requires_grad_()

    def second(out: Tensor) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), leaves)

    expected = second(dense_convolution(coords, leaves[0].double(), leaves[1].double(), 1, 1))
    with use(choice):
        y = SF.convolve(SparseTensor(coords, leaves[0]), leaves[1], kernel_size=3)
        for one, other in zip(second(y.feats), expected, strict=True):
            within(1e-5, one, other)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_bfloat16_are_near_float32(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    """From the same rounded numbers: what is left is the rounding of results, 2^-9 each."""
    monkeypatch.setitem(plain.PADDING, "cpu", 1e9 if padded else -1.0)
    size, convolution = CONVOLUTIONS[name]
    coords, feats = random_cloud(2, (90, 50), reach=4, channels=16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (feats, random_kernel(2, size, 16, 8))]
        y = convolution(SparseTensor(coords, inputs[0]), inputs[1])
        assert y.sorted_feats.dtype == dtype
        y.feats.square().sum().backward()
        results.append([y.feats.detach(), *(t.grad for t in inputs)])
    for half, full in zip(*results, strict=True):
        within(0.015, half.float(), full)


@pytest.mark.parametrize("reduce", ["avg", "sum", "max"])
def test_global_pools_in_bfloat16_do_not_stall(reduce: str):
    """A running sum in eight bits stops growing at 256 times its terms."""
    coords, feats = random_cloud(3, (3000, 1000), reach=10)
    feats = (feats * 0.1 + 1).bfloat16()
    half = SF.global_pool(SparseTensor(coords, feats), reduce)
    assert half.dtype == torch.bfloat16
    within(0.005, half.float(), SF.global_pool(SparseTensor(coords, feats.float()), reduce))


@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "sum_pool", "interpolate strided"])
def test_pools_in_bfloat16_are_near_float32(name: str):
    feats = FEATS.bfloat16()
    half = feats_of(OTHERS[name](SparseTensor(COORDS, feats)))
    assert half.dtype == torch.bfloat16
    within(0.01, half.float(), feats_of(OTHERS[name](SparseTensor(COORDS, feats.float()))))


class Small(nn.Module):
    """Every layer once, there and back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = layers.Conv3d(3, 16), layers.BatchNorm(16)
        self.down, self.deep = layers.Conv3d(16, 16, 2, 2), layers.Conv3d(16, 16, 3, bias=True)
        self.up, self.head = layers.ConvTranspose3d(16, 16), layers.Conv3d(32, 4, 1, bias=True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        stem = SF.relu(self.norm(self.stem(x)))
        y: SparseTensor = self.head(cat(stem, self.up(SF.relu(self.deep(self.down(stem))))))
        return y


def gradients(model: nn.Module, y: SparseTensor) -> dict[str, Tensor]:
    y.feats.float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_autocast_on_the_cpu_is_near_float32():
    coords, feats = random_cloud(4, (200, 90), reach=5)
    half, full = Small(), Small()
    expected = full(SparseTensor(coords, feats.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = half(SparseTensor(coords, feats.float()))
    assert y.sorted_feats.dtype == torch.bfloat16
    within(0.03, y.feats.detach().float(), expected.feats.detach())
    wanted = gradients(full, expected)
    for name, gradient in gradients(half, y).items():
        assert gradient.dtype == torch.float32
        difference = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)
        # 6 % where bfloat16 is multiplied: its rounding adds up over layers
        assert difference < 0.1 or wanted[name].abs().max() < 1e-6, name


@pytest.mark.parametrize("layer", [layers.Conv3d(3, 4), layers.Conv3d(3, 4, 1), layers.Conv3d(3, 4, 2, 2, bias=True)])
def test_autocast_reaches_every_convolution_but_leaves_doubles(layer: layers.Conv3d):
    coords, feats = random_cloud(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(SparseTensor(coords, feats.float())).sorted_feats.dtype == torch.bfloat16
        assert layer.double()(SparseTensor(coords, feats)).sorted_feats.dtype == torch.float64
    layer.float()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_on_cuda_equal_those_on_the_cpu(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(plain.PADDING, "cuda", 1e12 if padded else -1.0)
    size, convolution = CONVOLUTIONS[name]
    coords, feats = random_cloud(5, (90, 50), reach=4, channels=16)
    results = []
    for device in ("cuda", "cpu"):
        inputs = [t.clone().to(device).requires_grad_() for t in (feats, random_kernel(5, size, 16, 8))]
        y = convolution(SparseTensor(coords.to(device), inputs[0]), inputs[1])
        y.feats.square().sum().backward()
        results.append([y, *(t.grad.cpu() for t in inputs)])
    (there, *their_gradients), (here, *our_gradients) = results
    assert there.sorted_feats.device.type == "cuda"
    within(1e-10, rows_at(there, here.coords).detach().cpu(), here.feats.detach())
    for one, other in zip(their_gradients, our_gradients, strict=True):
        within(1e-10, one, other)


@cuda
@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_on_cuda_equal_those_on_the_cpu(name: str):
    there = OTHERS[name](SparseTensor(COORDS.cuda(), FEATS.cuda()))
    here = OTHERS[name](SparseTensor(COORDS, FEATS))
    if isinstance(here, SparseTensor):
        there, here = rows_at(there, here.coords), here.feats
    within(1e-10, there.cpu(), here)


@cuda
def test_autocast_on_cuda_is_near_float32():
    coords, feats = random_cloud(6, (2000, 900), reach=9)
    half, full = Small().cuda(), Small()
    expected = full(SparseTensor(coords, feats.float()))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = half(SparseTensor(coords.cuda(), feats.float().cuda()))
    assert y.sorted_feats.dtype == torch.bfloat16
    within(0.03, y.feats.detach().float().cpu(), expected.feats.detach())
