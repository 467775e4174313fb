"""The sparse convolution and its weight gradient in plain torch: any device, any float type, nothing to compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from geo_pretrain.sparse.maps import KernelMap


class Finish(NamedTuple):
    """What follows a convolution of inference, done as its results are stored: a norm [, a sum] [, a ReLU]."""

    scale: Tensor  # [Cout]
    shift: Tensor  # [Cout]
    residual: Tensor | None = None  # [N_out, Cout]
    relu: bool = False

    def contiguous(self) -> Finish:
        """The same with every tensor contiguous, as compiled code reads them."""
        residual = None if self.residual is None else self.residual.contiguous()
        return Finish(self.scale.contiguous(), self.shift.contiguous(), residual, self.relu)

    def apply(self, rows: Tensor) -> Tensor:
        """Change rows [N_out, Cout] in place."""
        torch.addcmul(self.shift, rows, self.scale, out=rows)
        if self.residual is not None:
            rows += self.residual
        return rows.relu_() if self.relu else rows


# A small map is quicker as one product with padding than offset by offset. What padding may cost, in multiply-adds an
# offset: about the time of three calls, at the speed of the device.
PADDING = {"cpu": 1.5e6, "cuda": 2e8}
PADDED_BYTES = 1 << 28


def sparse_conv_forward(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, finish: Finish | None = None) -> Tensor:
    """sum_k feats[table[:, k]] @ kernel[k]: [N_out, Cout], offset by offset or, for small maps, in one product."""
    out = _products(feats, kernel.to(feats.dtype), kernel_map)
    return out if finish is None else finish.apply(out)


def _products(feats: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    outputs, offsets = kernel_map.table.shape
    size = kernel.shape[1] * kernel.shape[2]
    padding = (outputs - kernel_map.count / offsets) * size
    padded_bytes = outputs * offsets * kernel.shape[1] * feats.element_size()
    if padding < PADDING.get(feats.device.type, PADDING["cpu"]) and padded_bytes <= PADDED_BYTES:
        return _gather_padded(feats, kernel_map.table) @ kernel.reshape(-1, kernel.shape[2])
    # The center of a symmetric map, where every voxel meets itself, fills the sums; without one they begin at 0.
    center = offsets // 2 if kernel_map.symmetric else None
    if center is None:
        total = torch.zeros(outputs, kernel.shape[2], dtype=accumulator(feats.dtype), device=feats.device)
    else:
        total = torch.mm(feats, kernel[center]).to(accumulator(feats.dtype))
    longest = max(len(inputs) for _, pairs in kernel_map.tiles for inputs, _ in pairs)
    gathered, products = feats.new_empty(longest, feats.shape[1]), feats.new_empty(longest, kernel.shape[2])
    for tile, pairs in kernel_map.tiles:
        part = total[tile]
        for k, (inputs, into) in enumerate(pairs):
            if k != center and len(inputs):
                taken = torch.index_select(feats, 0, inputs, out=gathered[: len(inputs)])
                product = torch.mm(taken, kernel[k], out=products[: len(inputs)])
                part.index_add_(0, into, product.to(total.dtype))
    return total.to(feats.dtype)


def sparse_conv_wgrad(feats: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """The gradient [K, Cin, Cout] of `sparse_conv_forward` with respect to its kernel; `grad` [N_out, Cout]."""
    shape = (kernel_map.table.shape[1], feats.shape[1], grad.shape[1])
    total = torch.zeros(shape, dtype=accumulator(feats.dtype), device=feats.device)
    for tile, pairs in kernel_map.tiles:
        part = grad[tile]
        for k, (inputs, outputs) in enumerate(pairs):
            if len(inputs):
                total[k] += feats.index_select(0, inputs).t() @ part.index_select(0, outputs)
    return total.to(feats.dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: 27 or 125 offsets are too many for the 8 bits of bfloat16's mantissa."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _gather_padded(feats: Tensor, table: Tensor) -> Tensor:
    """[N_out, K * C]: the features each output meets at each offset, zeros where there are none."""
    padded = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])
    index = torch.where(table >= 0, table, len(feats)).long()
    return padded.index_select(0, index.reshape(-1)).reshape(len(table), -1)
