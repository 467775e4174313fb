"""Gradients of depthwise convolutions in bfloat16 on a CPU, by those kernels of oneDNN that were made for them.

For a depthwise convolution oneDNN has kernels of its own where the weight's gradient is of 3x3 taps (and a stride of at
most 3), and where the input's needs no stride or is float32. Anything else goes to kernels for groups of many channels,
which take 5 to 100 times as long (oneDNN 3.13; EfficientNets spend half of a step in them). So larger weights get their
gradient in windows of 3x3 taps, with the same sums, and an input under a stride in float32, rounded at the end.

On maps smaller than the weight torch 2.15 leaves taps that see padding only as it finds them in memory, huge numbers at
times; here they are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from geo_pretrain.backbones.enlarged import is_transformed

WINDOW, STRIDE = 3, 3  # taps of each axis and the largest stride of depthwise kernels of the weight's gradient

Pair = tuple[int, int]


def quick_depthwise(network: nn.Module) -> AbstractContextManager[object]:
    """Within the context, forward passes of `network` lead to quick gradients of its depthwise `Conv2d` layers.

    Can be entered again and again. Does nothing beyond bfloat16, under torch.func, or for a network that has no such
    layer on a CPU. The gradients cannot be differentiated in turn.
    """
    return _QuickDepthwise() if any(map(_is_depthwise, network.modules())) else nullcontext()


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer may be one of those that are slow; on a GPU none is."""
    if not (isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1):
        return False
    # not `layer.weight`, which a parametrization computes, some of them moving buffers
    return all(parameter.device.type == "cpu" for parameter in layer.parameters())


class _QuickDepthwise(TorchFunctionMode):
    """Replaces the calls of `torch.conv2d` for which `_Depthwise` is quicker."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and torch.is_grad_enabled():
            x, weight, bias, stride, padding, _, _ = args
            if _is_of_depthwise_bf16(*args) and _is_slow(x, weight, stride):
                x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
                bias = None if bias is None else bias.to(torch.bfloat16)
                return _Depthwise.apply(x, weight, bias, tuple(stride), tuple(padding))
        return func(*args, **(kwargs or {}))


def _is_of_depthwise_bf16(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether `torch.conv2d` called so is a depthwise convolution computed in bfloat16 on a CPU, as modules call it."""
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if not (x.dim() == 4 and 1 < groups == weight.shape[0] == x.shape[1]) or is_transformed():
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    accepted = {torch.bfloat16, torch.float32} if autocast else {torch.bfloat16}
    if not all(tensor.device.type == "cpu" and tensor.dtype in accepted for tensor in tensors):
        return False
    # numbers and names ("same") are left to torch
    return all(isinstance(value, tuple) for value in (stride, padding, dilation)) and set(dilation) == {1}


def _is_slow(x: Tensor, weight: Tensor, stride: Pair) -> bool:
    """Whether oneDNN has no depthwise kernel for a gradient that is wanted, or torch leaves some of it undefined."""
    taps, steps = weight.shape[2:], max(stride)
    of_weight = taps[1] > WINDOW or steps > STRIDE or min(x.shape[2:]) < max(taps)
    return (x.requires_grad and steps > 1) or (weight.requires_grad and of_weight)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of x [B, C, H, W] by weight [C, 1, h, w], all in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, 1, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        if needed[0]:
            dtype = torch.float32 if max(ctx.stride) > 1 else x.dtype
            shaped = torch.empty_like(x, dtype=dtype)  # for this gradient only its shape matters
            operands = (grad.to(dtype), shaped, weight.to(dtype))
            found[0] = _gradients(*operands, ctx.stride, ctx.padding, (True, False))[0].to(x.dtype)
        if needed[1]:
            windowed = min(weight.shape[2:]) >= WINDOW and max(ctx.stride) <= STRIDE
            gradient = _in_windows if windowed else _in_float32
            found[1] = gradient(grad, x, weight, ctx.stride, ctx.padding)
        if needed[2]:
            found[2] = grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype)
        return tuple(found)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight that are wanted."""
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), x.shape[1], (*wanted, False)
    )
    return x_grad, weight_grad


def _in_float32(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of the weight where bfloat16 has no quick kernel: rounded at the end."""
    operands = (grad.float(), x.float(), weight.float())
    return _gradients(*operands, stride, padding, (False, True))[1].to(weight.dtype)


def _in_windows(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of a weight of at least 3x3 taps: of each 3x3 of them, it is that of a 3x3 weight on a shifted map.

    The last window of an axis overlaps with the one before where the number of taps is no multiple of three. Padding is
    written out, so that each tap sees some values.
    """
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    starts = [sorted({min(k, taps - WINDOW) for k in range(0, taps, WINDOW)}) for taps in weight.shape[2:]]
    height, width = ((size - 1) * step + WINDOW for size, step in zip(grad.shape[2:], stride, strict=True))
    whole, window = torch.empty_like(weight), weight.new_empty(weight.shape[0], 1, WINDOW, WINDOW)
    for top, left in product(*starts):
        seen = padded[:, :, top : top + height, left : left + width]
        found = _gradients(grad, seen, window, stride, (0, 0), (False, True))[1]
        whole[:, :, top : top + WINDOW, left : left + WINDOW] = found
    return whole
