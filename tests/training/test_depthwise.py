"""Quick gradients of depthwise convolutions in bfloat16: the values of torch's own, and used by the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from geo_pretrain.training.depthwise import quick_depthwise
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import Budget, TrainingTask, fit

NAME = "_DepthwiseBackward"  # of autograd's node


def layer(channels: int, taps: Any, **options: Any) -> nn.Conv2d:
    """A depthwise convolution in channels-last order, as the loop has it."""
    conv = nn.Conv2d(channels, channels, taps, groups=channels, **options)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def passes(conv: nn.Conv2d, image: Tensor, grad: Tensor, *, quick: bool) -> tuple[str, list[Tensor]]:
    """The output's node; output and gradients of one pass under autocast."""
    x = image.clone().requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), quick_depthwise(conv) if quick else nullcontext():
        y = conv(x)
    y.backward(grad.to(y.dtype))
    grads = [parameter.grad for parameter in conv.parameters()]
    assert x.grad is not None
    assert y.dtype == torch.bfloat16
    return type(y.grad_fn).__name__, [y.detach(), x.grad, *(one.clone() for one in grads if one is not None)]


def exact(conv: nn.Conv2d, image: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in float64, of the operands as bfloat16 has them."""
    twin = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    ).double()
    twin.load_state_dict({name: value.bfloat16().double() for name, value in conv.state_dict().items()})
    x = image.bfloat16().double().requires_grad_()
    y = twin(x)
    y.backward(grad.bfloat16().double())
    return [one.detach() for one in (y, x.grad, *(p.grad for p in twin.parameters())) if one is not None]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-6))


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 40),
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    taps=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_float64_up_to_rounding(
    channels: int,
    images: int,
    size: tuple[int, int],
    taps: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if any(pixels + 2 * pad < count for pixels, pad, count in zip(size, padding, taps, strict=True)):
        return
    conv = layer(channels, taps, stride=stride, padding=padding, bias=bias)
    image = torch.randn(images, channels, *size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        grad = torch.randn_like(conv(image))
    (node, found), (_, plain) = (passes(conv, image, grad, quick=quick) for quick in (True, False))
    assert (node == NAME) == (max(stride) > 1 or taps[1] > 3 or max(taps) > min(size))
    wanted = exact(conv, image, grad)
    assert len(found) == len(wanted)
    rounding = [4e-3] * len(found)  # bfloat16 keeps 8 bits
    rounding[1] = max(rounding[1], error(plain[1], wanted[1]))  # torch rounds sums on processors without AVX-512
    for one, other, most in zip(found, wanted, rounding, strict=True):
        assert one.shape == other.shape
        assert error(one, other) <= most


@pytest.mark.parametrize(("taps", "stride"), [(5, 1), (5, 2), (7, 1), (3, 2)])
def test_weights_are_not_less_exact_than_by_torch_itself(taps: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = layer(96, taps, stride=stride, padding=taps // 2)
    image = torch.randn(4, 96, 15, 20).to(memory_format=torch.channels_last)
    with torch.no_grad():
        grad = torch.randn_like(conv(image))
    wanted = exact(conv, image, grad)
    (own, found), (theirs, plain) = (passes(conv, image, grad, quick=quick) for quick in (True, False))
    assert own == NAME
    assert theirs != NAME
    for one, other, truth in zip(found, plain, wanted, strict=True):
        assert error(one, truth) <= 1.05 * error(other, truth)
    weight_grad = conv.weight.grad
    assert weight_grad is not None
    assert weight_grad.dtype == torch.float32


@pytest.mark.parametrize(
    "conv",
    [
        layer(8, 3, padding=1),  # oneDNN's own kernels
        layer(8, 5, padding="same"),
        layer(8, 5, padding=4, dilation=2),
        layer(8, 5, padding=2, padding_mode="reflect", dilation=2),
        nn.Conv2d(8, 16, 5, groups=8, stride=2),  # two filters a channel
        nn.Conv2d(8, 8, 5, groups=2, stride=2),
        nn.Conv2d(8, 8, 5, stride=2),
    ],
    ids=str,
)
def test_other_convolutions_stay_torchs(conv: nn.Conv2d) -> None:
    image = torch.randn(2, 8, 12, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), quick_depthwise(nn.Sequential(conv, layer(8, 5))):
        assert type(conv(image).grad_fn).__name__ != NAME


def test_only_where_bfloat16_is_computed_and_gradients_are_wanted() -> None:
    conv, image = layer(8, 5, stride=2), torch.randn(2, 8, 12, 12)
    with quick_depthwise(conv):
        assert type(conv(image).grad_fn).__name__ != NAME
        with torch.autocast("cpu", torch.float16):
            assert type(conv(image).grad_fn).__name__ != NAME
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert conv(image).grad_fn is None
        low = layer(8, 5, stride=2).bfloat16()
        assert type(low(image.bfloat16()).grad_fn).__name__ == NAME
        frozen = layer(8, 3, stride=2).requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen(image).grad_fn is None
            assert type(frozen(image.requires_grad_()).grad_fn).__name__ == NAME
    with torch.autocast("cpu", torch.bfloat16):  # outside again
        assert type(conv(image).grad_fn).__name__ != NAME
    dense = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert isinstance(quick_depthwise(dense), nullcontext)  # a ResNet's calls do not pass through it


def test_taps_that_see_padding_only_get_no_gradient() -> None:
    # torch 2.15 does not write them, so they are what was in memory
    for size, taps, stride in product([(1, 1), (2, 1), (1, 3)], [3, 5, (3, 5), (1, 7), 2], [1, 2]):
        conv = layer(32, taps, stride=stride, padding=1 if taps == 2 else tuple(k // 2 for k in pair(taps)))
        image = torch.randn(2, 32, *size).to(memory_format=torch.channels_last)
        with torch.no_grad():
            grad = torch.randn_like(conv(image))
        wanted = exact(conv, image, grad)[2]
        seen = wanted != 0
        for _ in range(3):
            dirty = [torch.full((4096,), 3e16) for _ in range(8)]
            del dirty
            found = passes(conv, image, grad, quick=True)[1][2]
            assert torch.equal(found != 0, seen), (size, taps, stride)


def test_parametrized_layers_are_not_computed_to_be_looked_at() -> None:
    conv = nn.utils.parametrizations.spectral_norm(layer(8, 3))
    before = conv.parametrizations.weight[0]._u.clone()
    quick_depthwise(conv)
    assert torch.equal(before, conv.parametrizations.weight[0]._u)


def test_torch_func_works_within() -> None:
    conv, images = layer(8, 5, stride=2), torch.randn(3, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16), quick_depthwise(conv):
        mapped = torch.func.vmap(lambda x: conv(x[None])[0])(images)
        assert torch.allclose(mapped.float(), conv(images).float(), atol=0.02)


def test_wrong_types_are_still_told() -> None:
    conv = layer(8, 5, stride=2).bfloat16()
    conv.bias = nn.Parameter(torch.zeros(8))
    with quick_depthwise(conv), pytest.raises(RuntimeError, match="type"):
        conv(torch.randn(1, 8, 9, 9, dtype=torch.bfloat16))


def pair(taps: Any) -> tuple[int, int]:
    return taps if isinstance(taps, tuple) else (taps, taps)


class Regression(TrainingTask):
    """Two steps of a depthwise layer under autocast, noting autograd's nodes."""

    def __init__(self) -> None:
        self.module = layer(8, 5, stride=2)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.budget, self.nodes = Budget(steps=2, batch=1), list[str]()

    def batches(self, start: int) -> Iterator[Any]:
        return iter([torch.ones(1, 8, 9, 9)] * 2)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.module(batch)
        self.nodes.append(type(out.grad_fn).__name__)
        return {"squares": out.float().square().mean()}

    def schedule(self, step: int) -> float:
        return 0.1


def test_the_loop_trains_with_them() -> None:
    task = Regression()
    before = task.module.weight.detach().clone()
    fit(task, World(0, 1, torch.device("cpu")))
    assert task.nodes == [NAME, NAME]
    assert not torch.equal(before, task.module.weight)
