"""16-bit features and weights on the CPU are computed in float32 by the same kernels and handed out as asked.

So it is on processors that do not multiply bfloat16, as which this one is treated; `test_bf16` is about those that do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse import SparseTensor, backend, cat, plain
from geo_pretrain.sparse import functional as SF
from geo_pretrain.sparse.layers import BatchNorm, Conv3d
from tests.sparse.twins import random_cloud

COORDS, FEATS = random_cloud(8, (300, 150), reach=6)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_multiplies_bf16", lambda: False)


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


def small_network(normalize: bool = False) -> SRUNet:
    torch.manual_seed(0)
    return SRUNet("18A", width=8, out_chans=6, normalize=normalize)


def run(network: nn.Module, feats: Tensor, context: AbstractContextManager[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and gradients of a training step."""
    with context:
        features = network(SparseTensor(COORDS, feats)).feats
    features.float().square().mean().backward()
    return features.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def differ(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).norm() / expected.norm())


class Products(TorchDispatchMode):
    """Counts torch's own matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(engine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Counts of products and kernel gradients that the engine's kernels computed since the last call."""
    kernels: Any = plain
    if engine == "fast":
        from geo_pretrain.sparse import fast as kernels
    names, counts = ("sparse_conv_forward", "sparse_conv_wgrad"), [0, 0]

    def count(number: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(feats: Tensor, *others: Any) -> Tensor:
            assert feats.dtype == torch.float32
            counts[number] += 1
            return original(feats, *others)

        return counted

    for number, name in enumerate(names):
        monkeypatch.setattr(kernels, name, count(number, getattr(kernels, name)))

    def since() -> tuple[int, int]:
        products, gradients = counts
        counts[:] = [0, 0]
        return products, gradients

    return since


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_autocast_runs_the_kernels_of_float32(dtype: torch.dtype, normalize: bool, calls: Callable[[], Any]):
    low, full = small_network(normalize), small_network(normalize)
    expected, wanted = run(full, FEATS.float(), nullcontext())
    counted = calls()
    assert min(counted) > 20
    with Products() as products:
        features, gradients = run(low, FEATS.float(), autocast(dtype))
    assert calls() == counted
    assert products.dtypes <= {torch.float32}
    assert features.dtype == dtype
    assert 0 < differ(features, expected) < 0.01
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert differ(gradient, wanted[name]) < 0.01 or wanted[name].norm() < 1e-5, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_networks_of_16_bits_run_the_kernels_of_float32(dtype: torch.dtype, training: bool, calls: Callable[[], Any]):
    """Against the same rounded weights in a float32 network: weights, statistics and features of 16 bits."""
    low = small_network().train(training).to(dtype)
    low.load_state_dict({key: value.to(dtype) for key, value in low.state_dict().items()})
    full, feats = copy.deepcopy(low).float(), FEATS.to(dtype)
    expected, wanted = run(full, feats.float(), nullcontext())
    counted = calls()
    with Products() as products:
        features, gradients = run(low, feats, nullcontext())
    assert calls() == counted
    assert products.dtypes <= {torch.float32}
    assert features.dtype == dtype
    assert 0 < differ(features, expected) < 0.01
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # float16 keeps nothing below 6e-8: a loss this small is scaled up in real training
        assert differ(gradient, wanted[name]) < 0.02 or wanted[name].abs().max() < 1e-3, name
    for (name, ours), theirs in zip(low.state_dict().items(), full.state_dict().values(), strict=True):
        assert differ(ours, theirs.float()) < 0.01 or not theirs.any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_hand_on_what_is_not_rounded(dtype: torch.dtype, engine: str):
    x = SparseTensor(COORDS, FEATS.float())
    with autocast(dtype):
        y = Conv3d(3, 8, bias=True)(x)
        for z in (y, BatchNorm(8)(y), SF.relu(y), y + y, cat(y, y)):
            assert z.dtype == z.feats.dtype == z.sorted_feats.dtype == dtype
            assert z.computed_feats.dtype == torch.float32
            assert str(dtype) in repr(z)
    assert (x + y.with_sorted_feats(y.computed_feats[:, :3], dtype=dtype)).dtype == torch.float32
    assert torch.equal(y.feats, y.with_feats(y.feats).feats)


def test_features_and_kernels_of_different_dtypes_are_refused(engine: str):
    x = SparseTensor(COORDS, FEATS.float())
    with pytest.raises(
        ValueError, match=r"features are torch.float32, the kernel is torch.bfloat16; accepted: the same"
    ):
        Conv3d(3, 8).bfloat16()(x)


def test_what_runs_can_be_asked_and_is_said_once(engine: str):
    kernels = {"plain": "plain torch", "fast": "numba's kernels"}[engine]
    assert backend.describe() == f"torch.float32 on cpu: computed by {kernels}"
    assert backend.describe(torch.float16) == f"torch.float16 on cpu: computed in torch.float32 by {kernels}"
    assert backend.describe(torch.float64) == "torch.float64 on cpu: computed by plain torch"
    assert backend.computed_dtype("cuda", torch.bfloat16) == torch.bfloat16
    backend.warn_once.cache_clear()
    layer, x = Conv3d(3, 8).bfloat16(), SparseTensor(COORDS, FEATS.bfloat16())
    with pytest.warns(UserWarning, match=f"torch.bfloat16 on cpu: computed in torch.float32 by {kernels}"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
