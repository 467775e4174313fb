"""Norms, sums and ReLUs done as products are stored: the same bits, and only where nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse import SparseTensor, layers
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ConvTranspose3d, ReLU, normalized
from tests.sparse.twins import random_cloud

COORDS, FEATS = random_cloud(9, (300, 150), reach=6, channels=8)


def input_tensor(dtype: torch.dtype = torch.float32) -> SparseTensor:
    return SparseTensor(COORDS, FEATS.to(dtype))


def settled(norm: BatchNorm) -> BatchNorm:
    """Random weights and statistics, for inference."""
    torch.manual_seed(3)
    for value in (norm.bn.weight, norm.bn.bias, norm.bn.running_mean, norm.bn.running_var):
        assert value is not None
        nn.init.uniform_(value, 0.2, 2)
    return norm.eval()


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The norms that are called as modules."""
    called: list[nn.Module] = []
    original = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x: called.append(self) or original(self, x))
    monkeypatch.setitem(layers.FORWARDS, BatchNorm, BatchNorm.forward)  # else it would be called as a tracer is
    return called


def in_steps(conv: nn.Module, norm: nn.Module, x: Any, relu: nn.Module | None, residual: Any) -> SparseTensor:
    y = norm(conv(x))
    y = y if residual is None else y + residual
    return y if relu is None else relu(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize("kind", ["k3", "k1", "k2s2", "transposed"])
def test_one_pass_gives_the_bits_of_four(kind, channels, with_relu, with_residual, dtype, engine, norms):
    torch.manual_seed(0)
    x = input_tensor(dtype)
    conv: nn.Module = {"k3": Conv3d(8, channels), "k1": Conv3d(8, channels, 1), "k2s2": Conv3d(8, channels, 2, 2)}.get(
        kind, ConvTranspose3d(8, channels)
    )
    conv, norm, relu = conv.to(dtype), settled(BatchNorm(channels)).to(dtype), ReLU(inplace=True) if with_relu else None
    with torch.no_grad():
        if kind == "transposed":
            x = Conv3d(8, 8, 2, 2).to(dtype)(x)
        shape = conv(x)
        residual = shape.with_sorted_feats(torch.randn(len(shape), channels).to(dtype)) if with_residual else None
        expected = in_steps(conv, norm, x, relu, residual)
        norms.clear()
        y = normalized(conv, norm, x, relu, residual)
    assert not norms
    assert y.dtype == expected.dtype == dtype
    if kind == "k1" or dtype == torch.bfloat16:  # 16-bit norms round their scale before it is used
        torch.testing.assert_close(y.feats, expected.feats, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    else:
        assert torch.equal(y.feats, expected.feats)


def test_what_is_not_a_number_stays_so(engine):
    conv, norm = Conv3d(8, 8), settled(BatchNorm(8))
    feats = FEATS.float().clone()
    feats[3] = torch.nan
    with torch.no_grad():
        y = normalized(conv, norm, SparseTensor(COORDS, feats), ReLU())
    assert y.feats[3].isnan().all()


def seen(module: nn.Module, records: list[Any]) -> None:
    module.register_forward_hook(lambda *args: records.append(args[2]))


def replaced(module: nn.Module, records: list[Any]) -> None:
    original = module.forward
    module.forward = lambda x: records.append(x) or original(x)


@pytest.mark.parametrize("watch", [seen, replaced])
@pytest.mark.parametrize("place", ["conv", "norm", "norm.bn", "relu"])
def test_whoever_watches_a_module_sees_it_called(place: str, watch: Callable[..., None], engine: str):
    network = nn.ModuleDict({"conv": Conv3d(8, 8), "norm": settled(BatchNorm(8)), "relu": ReLU()}).eval()
    records: list[Any] = []
    watch(network.get_submodule(place), records)
    with torch.no_grad():
        y = normalized(network["conv"], network["norm"], input_tensor(), network["relu"])
        expected = in_steps(network["conv"], network["norm"], input_tensor(), network["relu"], None)
    assert len(records) == 2
    assert torch.equal(y.feats, expected.feats)


def test_hooks_on_all_modules_see_every_call(engine: str):
    records: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: records.append(type(module).__name__))
    try:
        with torch.no_grad():
            normalized(Conv3d(8, 8), settled(BatchNorm(8)), input_tensor(), ReLU())
    finally:
        hook.remove()
    assert records == ["Conv3d", "BatchNorm1d", "BatchNorm", "ReLU"]


@pytest.mark.parametrize("kind", [Conv3d, BatchNorm, nn.BatchNorm1d, ReLU])
def test_a_tracer_of_a_class_sees_every_call(kind: type[nn.Module], engine: str, monkeypatch: pytest.MonkeyPatch):
    records: list[Any] = []
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: records.append(x) or original(self, x))
    with torch.no_grad():
        normalized(Conv3d(8, 8), settled(BatchNorm(8)), input_tensor(), ReLU())
    assert len(records) == 1


class Doubling(BatchNorm):
    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.with_sorted_feats(2 * x.sorted_feats)


@pytest.mark.parametrize("case", ["gradients", "training", "statistics of the batch", "subclass", "bias"])
def test_other_cases_go_step_by_step(case: str, engine: str):
    conv, norm = Conv3d(8, 8, bias=case == "bias"), settled(BatchNorm(8))
    if case == "training":
        norm.train()
    if case == "statistics of the batch":
        norm.bn = nn.BatchNorm1d(8, track_running_stats=False)
    if case == "subclass":
        norm = Doubling(8)
    with nullcontext() if case == "gradients" else torch.no_grad():
        y, expected = (step(conv, norm, input_tensor(), None, None) for step in (normalized, in_steps))
    assert y.feats.requires_grad == (case == "gradients")
    assert torch.equal(y.feats, expected.feats)


class Wrapped(nn.Module):
    """A convolution inside another module, as adapters of weights and observers are put there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Conv3d(8, 8)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.inner(x)


@pytest.mark.parametrize("place", ["convolution", "norm", "no norm", "no shift"])
def test_modules_of_other_kinds_in_their_places_are_called(place: str, engine: str):
    conv: nn.Module = Wrapped() if place == "convolution" else Conv3d(8, 8)
    norm = settled(BatchNorm(8))
    if place == "norm":
        norm.bn = nn.LayerNorm(8)  # type: ignore[assignment]
    if place == "no norm":
        norm.bn = nn.Identity()  # type: ignore[assignment]
    if place == "no shift":
        norm.bn.bias = None  # type: ignore[assignment]
    with torch.no_grad():
        y, expected = (step(conv, norm, input_tensor(), ReLU(), None) for step in (normalized, in_steps))
    assert torch.equal(y.feats, expected.feats)


def test_a_sum_or_norm_that_does_not_fit_is_refused_and_not_read_beyond_its_end(engine: str):
    conv, norm, x = Conv3d(8, 8), settled(BatchNorm(8)), input_tensor()
    with torch.no_grad():
        coarse = Conv3d(8, 8, 2, 2)(x)
        with pytest.raises(ValueError, match="The tensors have strides 1 and 2"):
            normalized(conv, norm, x, ReLU(), coarse)
        with pytest.raises(ValueError, match="The tensors come from two different inputs"):
            normalized(conv, norm, x, ReLU(), input_tensor())
        with pytest.raises(RuntimeError, match="running_mean should contain 8 elements"):
            normalized(conv, settled(BatchNorm(4)), x)


def test_under_autocast_a_sum_has_the_dtype_of_the_steps(engine: str):
    conv, norm, x = Conv3d(8, 8), settled(BatchNorm(8)), input_tensor()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = (step(conv, norm, x, ReLU(), x) for step in (normalized, in_steps))
    assert y.dtype == expected.dtype == torch.float32


def test_a_network_calls_no_norm_in_inference_and_every_one_in_training(norms: list[nn.Module], engine: str):
    torch.manual_seed(0)
    network = SRUNet("18A", in_chans=8, width=16)
    x = input_tensor()
    network(x)
    every = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert sorted(map(id, norms)) == sorted(map(id, every))
    norms.clear()
    network.eval()
    with torch.no_grad():
        y = network(x)
        assert not norms
        hook = network.relu.register_forward_hook(lambda *_: None)
        assert torch.equal(y.feats, network(x).feats)
    hook.remove()
    assert len(norms) == 9  # those before the network's own ReLU
