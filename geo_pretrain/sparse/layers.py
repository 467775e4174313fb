"""Layers on sparse tensors. Parameter names and layouts are MinkowskiEngine 0.5's, so that weights move both ways."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from geo_pretrain.sparse import functional
from geo_pretrain.sparse.backend import LOW_PRECISION
from geo_pretrain.sparse.plain import Finish
from geo_pretrain.sparse.tensor import SparseTensor


class _Convolution(nn.Module):
    """Base class of both convolutions: `kernel` [K, Cin, Cout] ([Cin, Cout] if pointwise), `bias` [1, Cout]."""

    transposed = False

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted: whole numbers from 1 up.")
        self.in_chans, self.out_chans = in_chans, out_chans
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        shape = (in_chans, out_chans) if kernel_size == stride == 1 else (kernel_size**3, in_chans, out_chans)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(1, out_chans)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights uniformly within 1 / sqrt(fan); fan = input channels (transposed: output) times offsets."""
        fan = (self.out_chans if self.transposed else self.in_chans) * self.kernel_size**3
        bound = 1 / math.sqrt(fan)
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: SparseTensor, finish: Finish | None = None) -> SparseTensor:
        """Features [N, in_chans] -> [N', out_chans] on the same (stride 1), coarser or, transposed, finer voxels."""
        y = functional.convolve(
            x,
            self.kernel,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            transposed=self.transposed,
            finish=finish,
        )
        if self.bias is None:
            return y
        return y.with_sorted_feats(y.computed_feats + self.bias.to(y.computed_feats.dtype), dtype=y.dtype)

    def extra_repr(self) -> str:
        """The arguments shown in `repr`."""
        return f"{self.in_chans}, {self.out_chans}, kernel_size={self.kernel_size}, stride={self.stride}"


class Conv3d(_Convolution):
    """Sparse convolution; `stride` > 1 leads to coarser voxels."""


class ConvTranspose3d(_Convolution):
    """Transposed sparse convolution, back onto the voxels that the strided convolution came from."""

    transposed = True

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int = 2, stride: int = 2, bias: bool = False
    ) -> None:
        super().__init__(in_chans, out_chans, kernel_size, stride, 1, bias)


class BatchNorm(nn.Module):
    """Batch normalization over all voxels of all batch elements; the parameters live in `.bn`."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features, eps=eps, momentum=momentum)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features [N, C] -> [N, C]."""
        rows, weight = x.computed_feats, getattr(self.bn, "weight", None)
        if rows.dtype == torch.float32 and weight is not None and weight.dtype in LOW_PRECISION:
            rows = self._in_float32(rows)
        else:
            rows = self.bn(rows)
        return x.with_sorted_feats(rows, dtype=x.dtype)

    def _in_float32(self, rows: Tensor) -> Tensor:
        """Normalize float32 features with parameters of 16 bits, which torch does not mix on a CPU."""
        state = {**dict(self.bn.named_parameters()), **dict(self.bn.named_buffers())}
        wide = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        rows = functional_call(self.bn, wide, rows)
        with torch.no_grad():
            for name, buffer in self.bn.named_buffers():
                buffer.copy_(wide[name])
        return rows


class ReLU(nn.Module):
    """max(0, features); `inplace` overwrites the input's."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features [N, C] -> [N, C]."""
        if not self.inplace:
            return functional.relu(x)
        return x.with_sorted_feats(torch.relu_(x.computed_feats), dtype=x.dtype)


def normalized(
    convolution: Any, norm: Any, x: Any, relu: nn.Module | None = None, residual: SparseTensor | None = None
) -> Any:
    """relu(norm(convolution(x)) + residual), the last two where given.

    In inference on the CPU our layers do it in one pass over the features, unless a module is hooked or replaced.
    """
    if _is_one_pass(convolution, norm, relu, x) and (residual is None or _is_sum(convolution, x, residual)):
        bn, computed = norm.bn, x.computed_feats.dtype
        if computed in LOW_PRECISION:
            computed = torch.float32
        weight, bias, mean, variance = (t.to(computed) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        scale = weight * torch.rsqrt(variance + bn.eps)
        added = None if residual is None else residual.computed_feats.to(computed)
        return convolution(x, Finish(scale, torch.addcmul(bias, mean, scale, value=-1), added, relu is not None))
    y = norm(convolution(x))
    y = y if residual is None else y + residual
    return y if relu is None else relu(y)


FORWARDS = {kind: kind.forward for kind in (Conv3d, ConvTranspose3d, BatchNorm, ReLU, nn.BatchNorm1d)}  # as written


def _is_one_pass(convolution: Any, norm: Any, relu: nn.Module | None, x: Any) -> bool:
    """Whether nobody can tell the difference: no gradients, and no module hooked, replaced or training."""
    if torch.is_grad_enabled() or type(convolution) not in (Conv3d, ConvTranspose3d) or type(norm) is not BatchNorm:
        return False  # also for layers of another library on its own tensors
    bn, width = norm.bn, convolution.kernel.shape[-1]
    modules = [convolution, norm, bn, *([] if relu is None else [relu])]
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or any(
            FORWARDS.get(type(module)) is not type(module).forward  # another class, or a tracer put its own there
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
            for module in modules
        )
    ):
        return False
    if norm.training or bn.training or convolution.bias is not None or x.computed_feats.device.type != "cpu":
        return False
    values = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return all(value is not None and value.shape == (width,) for value in values)  # kernels check no lengths


def _is_sum(convolution: Any, x: SparseTensor, residual: SparseTensor) -> bool:
    """Whether `residual` has the voxels, channels and dtype of the convolution's output; if not, `+` says what is."""
    stride = x.stride // convolution.stride if convolution.transposed else x.stride * convolution.stride
    return (
        residual.coordinate_manager is x.coordinate_manager
        and residual.stride == stride
        and residual.computed_feats.shape[1] == convolution.kernel.shape[-1]
        and residual.dtype == functional.output_dtype(x, convolution.kernel)
    )
