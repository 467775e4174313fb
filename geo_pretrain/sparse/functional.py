"""Operations on sparse tensors in plain torch: convolution, pooling, interpolation. Any device, any float type.

Convolutions follow MinkowskiEngine 0.5 (Choy et al., CVPR 2019): out[u] = sum_k in[u + offset_k] @ kernel[k], a
correlation, outputs at every occupied (coarse) cell.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from geo_pretrain.sparse import engines
from geo_pretrain.sparse.maps import KernelMap, floor_to
from geo_pretrain.sparse.tensor import SparseTensor

# A small map is quicker as one product with padding than offset by offset. What padding may cost, in multiply-adds an
# offset: about the time of three calls, at the speed of the device.
PADDING = {"cpu": 1.5e6, "cuda": 2e8}
PADDED_BYTES = 1 << 28


def convolve(
    x: SparseTensor, kernel: Tensor, *, kernel_size: int, stride: int = 1, dilation: int = 1, transposed: bool = False
) -> SparseTensor:
    """Sparse convolution with kernel [kernel_size^3, Cin, Cout], or [Cin, Cout] for a pointwise one.

    `stride` > 1 leads to the coarser voxels; `transposed` back to the finer ones (all children where none are known).
    """
    _check_kernel(x, kernel, kernel_size, stride)
    rows, kernel = _autocast(x.rows, kernel)
    if kernel.ndim == 2:
        return x.with_rows(rows @ kernel)
    if transposed:
        if x.stride % stride:
            raise ValueError(
                f"A transposed convolution of stride {stride} cannot refine a tensor of stride {x.stride}."
            )
        target = x.stride // stride
        if dilation > 1 and target not in x.grid.levels:
            raise ValueError(f"dilation is {dilation}; accepted is 1 where a transposed convolution makes new voxels.")
        if stride > 1:
            x.grid.refine(x.stride, stride, kernel_size)
        kernel_map = x.grid.kernel_map(target, stride, kernel_size, dilation).reverse
    else:
        target = x.stride * stride
        kernel_map = x.grid.kernel_map(x.stride, stride, kernel_size, dilation)
    return x.with_rows(_Convolution.apply(rows, kernel, kernel_map), stride=target)


class _Convolution(torch.autograd.Function):
    """Rows [N_in, Cin] and kernel [K, Cin, Cout] through a map; gathers are repeated, not kept, for the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.kernel_map, ctx.origin = kernel_map, kernel_map.origin  # kept: the backward pass would make it again
        return engines.current(rows).products(rows, kernel, kernel_map)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, kernel = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_rows = _Convolution.apply(grad, kernel.transpose(1, 2), ctx.kernel_map.reverse)
        if ctx.needs_input_grad[1]:
            grad_kernel = _KernelGradient.apply(rows, grad, ctx.kernel_map)
        return grad_rows, grad_kernel, None


class _KernelGradient(torch.autograd.Function):
    """The gradient of a convolution's kernel; linear in both arguments, so that derivatives of any order exist."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, grad)
        ctx.kernel_map = kernel_map
        return engines.current(rows).kernel_gradient(rows, grad, kernel_map)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, grad = ctx.saved_tensors
        grad_rows = _Convolution.apply(grad, grads[0].transpose(1, 2), ctx.kernel_map.reverse)
        return grad_rows, _Convolution.apply(rows, grads[0], ctx.kernel_map), None


def max_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """The largest feature in each window, over occupied voxels only."""
    kernel_map = x.grid.kernel_map(x.stride, stride, kernel_size, 1)
    rows, table = x.rows.detach(), kernel_map.table
    first = table.gather(1, (table >= 0).int().argmax(dim=1, keepdim=True)).clamp(min=0).long()
    best, source = rows[first[:, 0]], first.repeat(1, rows.shape[1])
    for inputs, outputs in kernel_map.pairs:
        values, before = rows[inputs], best[outputs]
        higher = (values > before) | values.isnan()
        best[outputs] = torch.where(higher, values, before)
        source[outputs] = torch.where(higher, inputs[:, None], source[outputs])
    return x.with_rows(_or_zero(x.rows.gather(0, source), kernel_map), stride=x.stride * stride)


def avg_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """The mean feature of each window, over occupied voxels only."""
    pooled = sum_pool(x, kernel_size, stride)
    table = x.grid.kernel_map(x.stride, stride, kernel_size, 1).table
    return pooled.with_rows(pooled.rows / (table >= 0).sum(dim=1, keepdim=True).clamp(min=1))


def sum_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """The sum of the features in each window."""
    kernel_map = x.grid.kernel_map(x.stride, stride, kernel_size, 1)
    rows = x.rows.to(_accumulator(x.rows.dtype))
    total = rows.new_zeros(len(kernel_map.table), rows.shape[1])
    for inputs, outputs in kernel_map.pairs:
        total = total.index_add(0, outputs, rows[inputs])
    return x.with_rows(total.to(x.rows.dtype), stride=x.stride * stride)


def global_pool(x: SparseTensor, reduce: Literal["avg", "max", "sum"] = "avg") -> Tensor:
    """One row for each batch element: [B, C]."""
    if reduce not in ("avg", "max", "sum"):
        raise ValueError(f"reduce is {reduce!r}; accepted: 'avg', 'max', 'sum'.")
    if reduce == "max":
        index = x.batch[:, None].expand_as(x.rows)
        start = x.rows.new_full((x.batch_size, x.rows.shape[1]), -torch.inf)
        return start.scatter_reduce(0, index, x.rows, reduce="amax", include_self=False)
    rows = x.rows.to(_accumulator(x.rows.dtype))
    total = rows.new_zeros(x.batch_size, rows.shape[1]).index_add(0, x.batch, rows)
    if reduce == "avg":
        total = total / x.batch.bincount(minlength=x.batch_size)[:, None]
    return total.to(x.rows.dtype)


def interpolate(x: SparseTensor, points: Tensor) -> Tensor:
    """Trilinear features [M, C] at `points` [M, 4], rows (batch, x, y, z) in voxels of stride 1.

    A corner's weight is the product over axes of 1 - distance / stride; unoccupied corners count as zero and weights
    are not renormalized, as in MinkowskiEngine. Voxel coordinates are the corners.
    """
    _check_places("points", points, "floating point")
    cell = torch.floor(points[:, 1:] / x.stride) * x.stride
    fraction = ((points[:, 1:] - cell) / x.stride).to(x.rows.dtype)
    base = torch.cat([points[:, :1], cell], dim=1).to(torch.int32)
    result = x.rows.new_zeros(len(points), x.rows.shape[1])
    for corner in product((0, 1), (0, 1), (0, 1)):
        found = x.level.index.find(base, corner).long()
        near = fraction.new_tensor(corner)
        weight = (near * fraction + (1 - near) * (1 - fraction)).prod(dim=1) * (found >= 0)
        result = result + x.rows[found.clamp(min=0)] * weight[:, None]
    return result


def point_rows(x: SparseTensor, coords: Tensor) -> Tensor:
    """For voxel coordinates [M, 4] of stride 1 the row of `x.feats` whose voxel contains each: int64, -1 for none."""
    _check_places("coords", coords, "integers")
    found = x.level.index.find(floor_to(coords, x.stride)).long()
    if x.stride != x.grid.base:
        return found
    return torch.where(found >= 0, x.grid.order[found.clamp(min=0)], -1)


def relu(x: SparseTensor) -> SparseTensor:
    """max(0, features)."""
    return x.with_rows(torch.relu(x.rows))


def products(rows: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    """sum_k rows[table[:, k]] @ kernel[k]: [N_out, Cout], offset by offset or, for small maps, in one product."""
    outputs, offsets = kernel_map.table.shape
    size = kernel.shape[1] * kernel.shape[2]
    padding = (outputs - kernel_map.count / offsets) * size
    padded_bytes = outputs * offsets * kernel.shape[1] * rows.element_size()
    if padding < PADDING.get(rows.device.type, PADDING["cpu"]) and padded_bytes <= PADDED_BYTES:
        return _gather_padded(rows, kernel_map.table) @ kernel.reshape(-1, kernel.shape[2])
    # The center of a symmetric map, where every row meets itself, fills the sums; without one they begin at 0.
    center = offsets // 2 if kernel_map.symmetric else None
    if center is None:
        total = torch.zeros(outputs, kernel.shape[2], dtype=_accumulator(rows.dtype), device=rows.device)
    else:
        total = torch.mm(rows, kernel[center]).to(_accumulator(rows.dtype))
    longest = max(len(inputs) for _, pairs in kernel_map.tiles for inputs, _ in pairs)
    gathered, product = rows.new_empty(longest, rows.shape[1]), rows.new_empty(longest, kernel.shape[2])
    for tile, pairs in kernel_map.tiles:
        part = total[tile]
        for k, (inputs, into) in enumerate(pairs):
            if k != center and len(inputs):
                taken = torch.index_select(rows, 0, inputs, out=gathered[: len(inputs)])
                made = torch.mm(taken, kernel[k], out=product[: len(inputs)])
                part.index_add_(0, into, made.to(total.dtype))
    return total.to(rows.dtype)


def kernel_gradient(rows: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """d loss / d kernel [K, Cin, Cout] of `products`, given that of its output."""
    shape = (kernel_map.table.shape[1], rows.shape[1], grad.shape[1])
    total = torch.zeros(shape, dtype=_accumulator(rows.dtype), device=rows.device)
    for tile, pairs in kernel_map.tiles:
        part = grad[tile]
        for k, (inputs, outputs) in enumerate(pairs):
            if len(inputs):
                total[k] += rows.index_select(0, inputs).t() @ part.index_select(0, outputs)
    return total.to(rows.dtype)


def _gather_padded(rows: Tensor, table: Tensor) -> Tensor:
    """[N_out, K * C]: the rows that each output meets, zeros where there is none."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    index = torch.where(table >= 0, table, len(rows)).long()
    return padded.index_select(0, index.reshape(-1)).reshape(len(table), -1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums over up to 27 or 125 offsets are not kept in 8 bits of mantissa."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _autocast(rows: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    kind = rows.device.type
    if torch.is_autocast_enabled(kind) and rows.dtype != torch.float64:  # as torch: doubles stay
        dtype = torch.get_autocast_dtype(kind)
        return rows.to(dtype), kernel.to(dtype)
    return rows, kernel


def _or_zero(rows: Tensor, kernel_map: KernelMap) -> Tensor:
    """Zero rows where a window is empty (a stride larger than the kernel)."""
    return torch.where((kernel_map.table >= 0).any(dim=1, keepdim=True), rows, 0)


def _check_kernel(x: SparseTensor, kernel: Tensor, kernel_size: int, stride: int) -> None:
    pointwise = kernel.ndim == 2 and kernel_size == stride == 1
    if not pointwise and (kernel.ndim != 3 or len(kernel) != kernel_size**3):
        raise ValueError(
            f"kernel is {tuple(kernel.shape)}; accepted: [{kernel_size**3}, Cin, Cout] for kernel_size {kernel_size}."
        )
    if x.rows.shape[1] != kernel.shape[-2]:
        raise ValueError(f"This convolution takes {kernel.shape[-2]} channels; got {x!r}.")


def _check_places(name: str, places: Tensor, accepted: str) -> None:
    if places.ndim != 2 or places.shape[1] != 4 or places.is_floating_point() != accepted.startswith("float"):
        raise ValueError(
            f"{name} are {places.dtype} {tuple(places.shape)}; accepted: {accepted} [M, 4] with rows (batch, x, y, z)."
        )
