"""Functions on sparse tensors: convolution, pooling, interpolation, on any device and in any float type.

Convolutions follow MinkowskiEngine 0.5 (Choy et al., CVPR 2019): out[u] = sum_k in[u + offset_k] @ kernel[k], a
correlation, outputs at every occupied (coarse) cell.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import product
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from geo_pretrain.sparse import backend, plain
from geo_pretrain.sparse.maps import KernelMap, floor_to
from geo_pretrain.sparse.plain import Finish, accumulator
from geo_pretrain.sparse.tensor import SparseTensor

FEW = 24  # pairs an offset on average: with fewer, rounding the kernel takes longer than its products save


def convolve(
    x: SparseTensor,
    kernel: Tensor,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    transposed: bool = False,
    finish: Finish | None = None,
) -> SparseTensor:
    """Sparse convolution with kernel [kernel_size^3, Cin, Cout], or [Cin, Cout] for a pointwise one.

    `stride` > 1 leads to the coarser voxels; `transposed` back to the finer ones (all children where none are known).
    `finish` is what follows, in inference only: it has no gradient.
    """
    _check_kernel(x, kernel, kernel_size, stride)
    dtype = output_dtype(x, kernel)
    rows, kernel = _operands(x, kernel, dtype)
    if kernel.ndim == 2:
        with _as_given(rows):
            rows = rows @ kernel.to(rows.dtype)
        return x.with_sorted_feats(rows if finish is None else finish.apply(rows), dtype=dtype)
    if transposed:
        if x.stride % stride:
            raise ValueError(
                f"A transposed convolution of stride {stride} cannot refine a tensor of stride {x.stride}."
            )
        target = x.stride // stride
        if dilation > 1 and target not in x.coordinate_manager.coordinate_maps:
            raise ValueError(f"dilation is {dilation}; accepted is 1 where a transposed convolution makes new voxels.")
        if stride > 1:
            x.coordinate_manager.refine(x.stride, stride, kernel_size)
        kernel_map = x.coordinate_manager.kernel_map(target, stride, kernel_size, dilation).reverse
    else:
        target = x.stride * stride
        kernel_map = x.coordinate_manager.kernel_map(x.stride, stride, kernel_size, dilation)
    rows = _products(rows, kernel, kernel_map, finish, backend.product_dtype(rows.device.type, dtype))
    return x.with_sorted_feats(rows, stride=target, dtype=dtype)


def _products(
    rows: Tensor, kernel: Tensor, kernel_map: KernelMap, finish: Finish | None, multiplied: torch.dtype
) -> Tensor:
    """Convolve by the other library's engine that was chosen, where it can, else by ours.

    `multiplied`: the dtype to which ours round what they multiply, where it is not that of the rows.
    """
    name = backend.peer(rows.device.type, rows.dtype)
    if name is not None and kernel_map.count:
        from geo_pretrain.sparse import peers

        way = peers.way(name, rows, kernel)
        if way is not None:
            out = peers.convolve(name, way, rows, kernel, kernel_map)
            return out if finish is None else finish.apply(out)
    if multiplied != rows.dtype and not _repays_rounding(kernel_map):
        multiplied = rows.dtype
    result: Tensor = _Convolution.apply(rows, kernel, kernel_map, finish, multiplied)
    return result


def _repays_rounding(kernel_map: KernelMap) -> bool:
    """Whether a map has so many pairs that products of rounded numbers save more time than rounding takes."""
    from geo_pretrain.sparse.fast import Pairs  # the only kernels that round

    return len(Pairs.of(kernel_map).inputs) >= FEW * kernel_map.table.shape[1]


class _Convolution(torch.autograd.Function):
    """Convolution of features [N_in, Cin] with a kernel [K, Cin, Cout]; gathered features are not kept for backward.

    Features may be float32 where the kernel has 16 bits. If they are to be multiplied in bfloat16 they are rounded
    here, as are gradients on the way back, each once; results stay float32.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, kernel: Tensor, kernel_map: KernelMap, finish: Finish | None, multiplied: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.kernel_map, ctx.origin = kernel_map, kernel_map.origin  # kept: the backward pass would make it again
        given, rows = rows, rows.to(multiplied)
        ctx.multiplied, ctx.rounded = multiplied, None if rows is given else rows
        with _as_given(rows):
            return _kernels(rows).sparse_conv_forward(rows, kernel, kernel_map, finish)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, kernel = ctx.saved_tensors
        grad = grads[0].contiguous().to(ctx.multiplied)
        grad_rows = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_rows = _Convolution.apply(grad, kernel.transpose(1, 2), ctx.kernel_map.reverse, None, ctx.multiplied)
        if ctx.needs_input_grad[1]:
            if ctx.rounded is not None and not torch.is_grad_enabled():  # else the rounding has a gradient, too
                rows = ctx.rounded
            ctx.rounded = None  # is freed as saved tensors are; a second time rows are rounded again
            grad_kernel = _KernelGradient.apply(rows, grad, ctx.kernel_map).to(kernel.dtype)
        return grad_rows, grad_kernel, None, None, None


class _KernelGradient(torch.autograd.Function):
    """The gradient of a convolution's kernel, itself differentiable, so that derivatives of any order exist.

    `grad` has the dtype in which is multiplied.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, grad)
        ctx.kernel_map = kernel_map
        with _as_given(rows):
            return _kernels(grad).sparse_conv_wgrad(rows.to(grad.dtype), grad, kernel_map)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, grad = ctx.saved_tensors
        kernel, reverse, dtype = grads[0], ctx.kernel_map.reverse, grad.dtype
        grad_rows = _Convolution.apply(grad, kernel.transpose(1, 2), reverse, None, dtype)
        return grad_rows, _Convolution.apply(rows, kernel, ctx.kernel_map, None, dtype), None


def max_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """Max pooling over the occupied voxels of each window."""
    kernel_map = x.coordinate_manager.kernel_map(x.stride, stride, kernel_size, 1)
    rows, table = x.sorted_feats.detach(), kernel_map.table
    first = table.gather(1, (table >= 0).int().argmax(dim=1, keepdim=True)).clamp(min=0).long()
    best, source = rows[first[:, 0]], first.repeat(1, rows.shape[1])
    for inputs, outputs in kernel_map.pairs:
        values, before = rows[inputs], best[outputs]
        higher = (values > before) | values.isnan()
        best[outputs] = torch.where(higher, values, before)
        source[outputs] = torch.where(higher, inputs[:, None], source[outputs])
    return x.with_sorted_feats(_or_zero(x.sorted_feats.gather(0, source), kernel_map), stride=x.stride * stride)


def avg_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """Average pooling over the occupied voxels of each window."""
    pooled = sum_pool(x, kernel_size, stride)
    table = x.coordinate_manager.kernel_map(x.stride, stride, kernel_size, 1).table
    return pooled.with_sorted_feats(pooled.sorted_feats / (table >= 0).sum(dim=1, keepdim=True).clamp(min=1))


def sum_pool(x: SparseTensor, kernel_size: int, stride: int) -> SparseTensor:
    """Sum pooling over each window."""
    kernel_map = x.coordinate_manager.kernel_map(x.stride, stride, kernel_size, 1)
    rows = x.sorted_feats.to(accumulator(x.sorted_feats.dtype))
    total = rows.new_zeros(len(kernel_map.table), rows.shape[1])
    for inputs, outputs in kernel_map.pairs:
        total = total.index_add(0, outputs, rows[inputs])
    return x.with_sorted_feats(total.to(x.sorted_feats.dtype), stride=x.stride * stride)


def global_pool(x: SparseTensor, reduce: Literal["avg", "max", "sum"] = "avg") -> Tensor:
    """Pool all voxels of each batch element: [B, C], a plain tensor in batch order."""
    if reduce not in ("avg", "max", "sum"):
        raise ValueError(f"reduce is {reduce!r}; accepted: 'avg', 'max', 'sum'.")
    if reduce == "max":
        index = x.batch[:, None].expand_as(x.sorted_feats)
        start = x.sorted_feats.new_full((x.batch_size, x.sorted_feats.shape[1]), -torch.inf)
        return start.scatter_reduce(0, index, x.sorted_feats, reduce="amax", include_self=False)
    rows = x.sorted_feats.to(accumulator(x.sorted_feats.dtype))
    total = rows.new_zeros(x.batch_size, rows.shape[1]).index_add(0, x.batch, rows)
    if reduce == "avg":
        total = total / x.batch.bincount(minlength=x.batch_size)[:, None]
    return total.to(x.sorted_feats.dtype)


def interpolate(x: SparseTensor, points: Tensor) -> Tensor:
    """Interpolate features trilinearly, [M, C], at `points` [M, 4], rows (batch, x, y, z) in voxels of stride 1.

    A corner's weight is the product over axes of 1 - distance / stride; unoccupied corners count as zero and weights
    are not renormalized, as in MinkowskiEngine. Voxel coordinates are the corners.
    """
    _check_places("points", points, "floating point")
    cell = torch.floor(points[:, 1:] / x.stride) * x.stride
    dtype = accumulator(x.sorted_feats.dtype)
    fraction = ((points[:, 1:] - cell) / x.stride).to(dtype)
    base = torch.cat([points[:, :1], cell], dim=1).to(torch.int32)
    result = x.sorted_feats.new_zeros(len(points), x.sorted_feats.shape[1], dtype=dtype)
    for corner in product((0, 1), (0, 1), (0, 1)):
        found = x.coordinate_map.index.find(base, corner).long()
        near = fraction.new_tensor(corner)
        weight = (near * fraction + (1 - near) * (1 - fraction)).prod(dim=1) * (found >= 0)
        result = result + x.sorted_feats[found.clamp(min=0)] * weight[:, None]
    return result.to(x.sorted_feats.dtype)


def point_rows(x: SparseTensor, coords: Tensor) -> Tensor:
    """The row of `x.feats` whose voxel contains each coordinate [M, 4] of stride 1: int64 [M], -1 for none."""
    _check_places("coords", coords, "integers")
    found = x.coordinate_map.index.find(floor_to(coords, x.stride)).long()
    if x.stride != x.coordinate_manager.base_stride:
        return found
    return torch.where(found >= 0, x.coordinate_manager.order[found.clamp(min=0)], -1)


def relu(x: SparseTensor) -> SparseTensor:
    """max(0, features)."""
    return x.with_sorted_feats(torch.relu(x.computed_feats), dtype=x.dtype)


def _kernels(feats: Tensor) -> ModuleType:
    """The module whose `sparse_conv_forward` and `sparse_conv_wgrad` compute with such features."""
    if backend.is_fast(feats):
        from geo_pretrain.sparse import fast  # numba compiles as this is imported

        return fast
    return plain


def output_dtype(x: SparseTensor, kernel: Tensor) -> torch.dtype:
    """The dtype of a convolution's output: autocast's, or else the dtype of features and kernel."""
    device = x.computed_feats.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # as torch: doubles stay
        return torch.get_autocast_dtype(device)
    if x.dtype != kernel.dtype:
        raise ValueError(
            f"The features are {x.dtype}, the kernel is {kernel.dtype}; accepted: the same dtype, or autocast."
        )
    return x.dtype


def _operands(x: SparseTensor, kernel: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features in the dtype in which their device computes a convolution with results of `dtype`, and its kernel."""
    computed = backend.computed_dtype(x.computed_feats.device.type, dtype)
    if computed == dtype:
        return x.computed_feats.to(dtype), kernel.to(dtype)
    if backend.product_dtype(x.computed_feats.device.type, dtype) != dtype:
        backend.warn_once(dtype)
    return x.computed_feats.to(computed), kernel


def _as_given(rows: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: operands have the right dtype already and would be cast again."""
    device = rows.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _or_zero(rows: Tensor, kernel_map: KernelMap) -> Tensor:
    """Set rows to zero where the window is empty (a stride larger than the kernel)."""
    return torch.where((kernel_map.table >= 0).any(dim=1, keepdim=True), rows, 0)


def _check_kernel(x: SparseTensor, kernel: Tensor, kernel_size: int, stride: int) -> None:
    pointwise = kernel.ndim == 2 and kernel_size == stride == 1
    if not pointwise and (kernel.ndim != 3 or len(kernel) != kernel_size**3):
        raise ValueError(
            f"kernel is {tuple(kernel.shape)}; accepted: [{kernel_size**3}, Cin, Cout] for kernel_size {kernel_size}."
        )
    if x.computed_feats.shape[1] != kernel.shape[-2]:
        raise ValueError(f"This convolution takes {kernel.shape[-2]} channels; got {x!r}.")


def _check_places(name: str, places: Tensor, accepted: str) -> None:
    if places.ndim != 2 or places.shape[1] != 4 or places.is_floating_point() != accepted.startswith("float"):
        raise ValueError(
            f"{name} are {places.dtype} {tuple(places.shape)}; accepted: {accepted} [M, 4] with rows (batch, x, y, z)."
        )
