"""A convolution of an enlarged map, computed on the small map: the same result from fewer products.

Bilinear enlarging mixes places and a convolution mixes channels, tap by tap, so the two commute: every tap is
multiplied at the small size, and the products are enlarged, shifted and added by two small matrices, across and down.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as modules

LARGEST = 1 << 21  # products of all taps that are held at a time: 8 MB in float32, which caches hold
BAND = 16  # rows of an enlarging matrix that share the range of columns that they read
HOOKS = "forward", "forward_pre", "backward", "backward_pre"  # of all modules, which torch keeps by these names
MOVED = 96  # multiply-adds that take as long as writing a value and reading it again; fits R18's and R50's levels


class Band(NamedTuple):
    """Some rows of a matrix, cut to the columns in which they have values."""

    matrix: Tensor
    columns: slice


class Shape(NamedTuple):
    """The sizes along both axes, and how many taps a kernel has along each."""

    small: tuple[int, int]
    large: tuple[int, int]
    taps: int


def convolve_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv2d(interpolate(x, size, bilinear, align_corners), weight, padding=K // 2)`, computed at the size of `x`.

    x [B, C, h, w], weight [O, C, K, K] with K odd, `size` (H, W) -> [B, O, H, W] in channels-last order. Under autocast
    in its precision, as a convolution. Right for any sizes; `pays` tells where it is quicker, too. Beside the result it
    holds twice at most `LARGEST` values, or as many as the weight has, or one image's K * O * h * W where that is more;
    for the backward pass it keeps `x` and the weight alone.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    found: Tensor = _ConvolveEnlarged.apply(x.to(dtype), weight, _shape(x, weight, size))
    return found


def stands_for(conv: nn.Module) -> bool:
    """Whether `convolve_enlarged` by the weight of `conv` computes all that a call of this module would.

    Not for a replaced or parametrized convolution, nor for one with a bias (BatchNorm folded in), other geometry, hooks
    (older pruning and weight normalization) or a forward of its own.
    """
    if type(conv) is not nn.Conv2d or conv.bias is not None or "forward" in vars(conv):
        return False
    taps = conv.kernel_size[0]
    geometry = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    if taps % 2 == 0 or geometry != ((taps, taps), (taps // 2, taps // 2), (1, 1), (1, 1), 1, "zeros"):
        return False
    hooks = conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks
    return not any(hooks) and not any(getattr(modules, f"_global_{kind}_hooks") for kind in HOOKS)


def pays(x: Tensor, weight: Tensor, size: tuple[int, int]) -> bool:
    """Whether `convolve_enlarged` is quicker here than enlarging first, by the sizes alone; False off the CPU.

    Also False where calls are recorded or transformed, so that graphs hold the plain operations for any size.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or is_transformed():
        return False
    if weight.dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
        return False  # a convolution explains it
    return len(x) > 0 and _costs_less(len(x), weight.shape[1], _shape(x, weight, size))


@lru_cache(maxsize=512)
def _costs_less(batch: int, in_chans: int, shape: Shape) -> bool:
    """Compare what both ways cost for one output channel."""
    small, plain = _costs(batch, in_chans, shape)
    return small < plain


def _costs(batch: int, in_chans: int, shape: Shape) -> tuple[float, float]:
    """Multiply-adds of the small and the plain way, values that are moved counted as `MOVED` each.

    Moved are the products of all taps, the same enlarged across, and the kernel, which must be reordered.
    """
    (height, width), (large_height, large_width), taps = shape
    across, down = (sum(band.matrix.numel() for band in bands) for bands in _both_bands(shape, torch.float32))
    mixed = taps * height * across + large_width * down
    moved = taps * height * (taps * width + large_width)
    kernel = taps * taps * in_chans
    return batch * (
        height * width * kernel + mixed + MOVED * moved
    ) + MOVED * kernel, batch * large_height * large_width * kernel


def is_transformed() -> bool:
    """Whether calls are recorded for other sizes and machines, or differentiated or mapped by torch.func."""
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return recorded or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _shape(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Shape:
    return Shape((x.shape[2], x.shape[3]), size, weight.shape[-1])


def _plain(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    enlarged = F.interpolate(x, size=shape.large, mode="bilinear", align_corners=True)
    return F.conv2d(enlarged, weight.to(x.dtype), padding=shape.taps // 2)


class _ConvolveEnlarged(torch.autograd.Function):
    """Keeps the small map and the weight alone; products of all taps are made for some images at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, weight, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        with torch.autocast(x.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return *_backward(x, weight, grad, ctx.shape, needed), None
            leaves = [tensor for tensor, wanted in zip((x, weight), needed, strict=True) if wanted]
            grads = iter(torch.autograd.grad(_plain(x, weight, ctx.shape), leaves, grad, create_graph=True))
            return next(grads) if needed[0] else None, next(grads) if needed[1] else None, None


def _forward(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    (height, width), (large_height, large_width), taps = shape
    rows, kernel = x.permute(0, 2, 3, 1).flatten(0, 1).contiguous(), _kernel(weight, x.dtype)
    out_chans = len(weight)
    out = x.new_empty(len(x), large_height, large_width * out_chans)
    across, down = _both_bands(shape, x.dtype)
    for images, stripes in _parts(len(x), weight, shape):
        wide = x.new_empty(len(out[images]) * height, taps, large_width, out_chans)
        for held, stripe in stripes:
            products = (rows[stripe].flatten(0, 1) @ kernel.t()).view(-1, width * taps, taps * out_chans)
            for columns, part in zip(wide[held].split(BAND, dim=2), _mix(across, products), strict=True):
                columns.copy_(part.view(len(part), -1, taps, out_chans).transpose(1, 2))
        parts = _mix(down, wide.view(-1, height * taps, large_width * out_chans))
        for large_rows, part in zip(out[images].split(BAND, dim=1), parts, strict=True):
            large_rows.copy_(part)
    return out.view(len(x), large_height, large_width, out_chans).permute(0, 3, 1, 2)


def _backward(
    x: Tensor, weight: Tensor, grad: Tensor, shape: Shape, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    (height, width), (_, large_width), taps = shape
    rows, kernel = x.permute(0, 2, 3, 1).flatten(0, 1).contiguous(), _kernel(weight, x.dtype)
    grad = grad.permute(0, 2, 3, 1).flatten(2)
    across, down = _both_bands(shape, x.dtype, transposed=True)
    grad_rows = torch.empty_like(rows)
    grad_kernel: Tensor | None = None
    summed = torch.promote_types(weight.dtype, torch.float32)
    for images, stripes in _parts(len(x), weight, shape):
        wide = torch.cat(_mix(down, grad[images]), dim=1).view(-1, taps, large_width, len(weight))
        for held, stripe in stripes:
            mixed = wide[held].transpose(1, 2).flatten(2)
            products = torch.cat(_mix(across, mixed), dim=1).view(-1, kernel.shape[0])
            if needed[0]:
                grad_rows[stripe] = (products @ kernel).view(-1, width, kernel.shape[1])
            if needed[1]:
                part = products.t() @ rows[stripe].flatten(0, 1)
                grad_kernel = part if grad_kernel is None else grad_kernel.to(summed).add_(part)
    grad_x = grad_rows.view(len(x), height, width, kernel.shape[1]).permute(0, 3, 1, 2)
    if grad_kernel is None:  # not needed, or no images
        return grad_x if needed[0] else None, torch.zeros_like(weight) if needed[1] else None
    grad_weight = grad_kernel.view(taps, taps, *weight.shape[:2]).permute(2, 3, 1, 0)
    return grad_x if needed[0] else None, torch.empty_like(weight).copy_(grad_weight)


def _kernel(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [O, C, K, K] -> [K (across) * K (down) * O, C]."""
    taps = weight.permute(3, 2, 0, 1).to(dtype, memory_format=torch.contiguous_format)
    return taps.reshape(-1, weight.shape[1])


def _parts(batch: int, weight: Tensor, shape: Shape) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Images that are enlarged together, and stripes of their rows: among these images' rows and among all."""
    (height, width), (_, large_width), taps = shape
    limit = max(LARGEST, weight.numel())
    at_once = max(1, limit // (height * taps * large_width * len(weight)))
    step = max(1, limit // (width * taps * taps * len(weight)))
    for first in range(0, batch, at_once):
        begin, count = first * height, (min(first + at_once, batch) - first) * height
        bounds = [(row, min(row + step, count)) for row in range(0, count, step)]
        stripes = [(slice(row, end), slice(begin + row, begin + end)) for row, end in bounds]
        yield slice(first, first + at_once), stripes


def _mix(bands: tuple[Band, ...], values: Tensor) -> list[Tensor]:
    """The products of a matrix in bands with values [N, columns, M]: parts of [N, rows, M]."""
    return [torch.matmul(band.matrix, values[:, band.columns]) for band in bands]


@lru_cache(maxsize=256)
def _both_bands(shape: Shape, dtype: torch.dtype, *, transposed: bool = False) -> tuple[tuple[Band, ...], ...]:
    """The matrices that enlarge across and down, or their transposes, in bands."""
    return tuple(_bands(shape.small[axis], shape.large[axis], shape.taps, dtype, transposed) for axis in (1, 0))


def _bands(small: int, large: int, taps: int, dtype: torch.dtype, transposed: bool) -> tuple[Band, ...]:
    # Kept for later calls, so not tensors of inference mode, nor of any mode or device that a caller has set.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        matrix = _taps(small, large, taps)
        bands = []
        for rows in matrix.t().split(BAND * taps) if transposed else matrix.split(BAND):
            used = rows.any(0).nonzero()[:, 0].tolist() or [0]
            columns = slice(used[0], used[-1] + 1)
            bands.append(Band(rows[:, columns].to(dtype).contiguous(), columns))
        return tuple(bands)


def _taps(small: int, large: int, taps: int) -> Tensor:
    """Along an axis, what place i of the enlarged map takes from place j of the small one by tap k: [large, small * K].

    Taps beyond the enlarged map's border take nothing, as padding with zeros does.
    """
    places = torch.eye(small, dtype=torch.float64, device="cpu")[None, None]
    enlarge = F.interpolate(places, size=(large, small), mode="bilinear", align_corners=True)[0, 0]
    padded = F.pad(enlarge, (0, 0, taps // 2, taps // 2))
    return torch.stack([padded[tap : tap + large] for tap in range(taps)], dim=2).flatten(1)
