"""Convolutions by engines of other libraries, on our voxels, kernel maps and weights: spconv, WarpConvNet.

An engine is a module with three functions: `library()` imports it; `ways(feats, offsets)` are the algorithms that it
has for such features, best first; `convolution(feats, kernel, kernel_map, way)` is differentiable once. What it lacks,
torch does.

Before an engine first computes on a device, in a dtype, with a kernel size, a small convolution of it and its gradients
are compared with plain torch's. Pairs or kernels in another order, of another version or on a device where nobody tried
it, are thus an error and not wrong features.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.sparse import backend, plain
from geo_pretrain.sparse.maps import CoordinateManager, KernelMap, morton_order

MODULES = {"spconv": "geo_pretrain.sparse.peer_spconv", "warpconvnet": "geo_pretrain.sparse.peer_warpconvnet"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest
ALIGNED = 8  # engines have other kernels for channels that are no multiple of this


def way(name: str, feats: Tensor, kernel: Tensor) -> str | None:
    """The algorithm by which an engine convolves such features; None where torch does it.

    Raises GeoPretrainError where the engine's results are not plain torch's.
    """
    aligned = kernel.shape[1] % ALIGNED == kernel.shape[2] % ALIGNED == 0
    return _way(name, feats.device, feats.dtype, len(kernel), aligned)


def convolve(name: str, way: str, rows: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    """sum_k rows[table[:, k]] @ kernel[k]: [N_out, Cout], by an engine of another library; differentiable once."""
    result: Tensor = _Convolution.apply(rows, kernel, kernel_map, engine(name), way)
    return result


@cache
def engine(name: str) -> ModuleType:
    """The module that drives an engine; MissingDependency, with the line that installs it, where it is absent."""
    module = importlib.import_module(MODULES[name])
    module.library()
    return module


class _Convolution(torch.autograd.Function):
    """An engine's convolution as one step: what it keeps for its gradients is freed with the step."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, kernel_map: KernelMap, engine: Any, way: str) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        given = [t.detach().requires_grad_(need) for t, need in zip((rows, kernel), needed, strict=True)]
        with torch.set_grad_enabled(any(needed)), torch.autocast(rows.device.type, enabled=False):
            out: Tensor = engine.convolution(given[0], given[1].to(rows.dtype), kernel_map, way)
        if any(needed):
            ctx.save_for_backward(out, *given)
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, *given = ctx.saved_tensors
        wanted = [t for t in given if t.requires_grad]
        with torch.autocast(out.device.type, enabled=False):
            results = iter(torch.autograd.grad(out, wanted, grads[0].contiguous(), retain_graph=True))
        return (*(next(results) if t.requires_grad else None for t in given), None, None, None)


# ---- Comparison with plain torch ------------------------------------------------------------------------------------


@cache
def _way(name: str, device: torch.device, dtype: torch.dtype, offsets: int, aligned: bool) -> str | None:
    feats, module = torch.empty(0, dtype=dtype, device=device), engine(name)
    release, wrong = f"{name} {module.library().version}", []
    for way in module.ways(feats, offsets):
        try:
            with torch.inference_mode(False):
                difference = _difference(module, way, feats, offsets, aligned)
        except Exception as error:  # of any library: it has no kernel for this
            backend.say_once(f"{release} cannot do this ({way}: {error}); torch does it.")
            continue
        if difference <= TOLERANCE[dtype]:
            return str(way)
        wrong.append(f"{way}: {difference:.1e} of the largest value")
    if wrong:
        raise GeoPretrainError(
            f"{release} on {device} does not give plain torch's features and gradients for kernels of {offsets} "
            f"offsets in {dtype} ({'; '.join(wrong)}; accepted: {TOLERANCE[dtype]:g}). Choose another: "
            "use('auto'), use('plain')."
        )
    return None


def _difference(module: ModuleType, way: str, feats: Tensor, offsets: int, aligned: bool) -> float:
    """The largest difference, over the largest value, of features and both gradients on small random maps."""
    generator = torch.Generator().manual_seed(offsets)
    shape = (offsets, 16, 32) if aligned else (offsets, 3, 5)
    kernel = torch.randn(shape, generator=generator).to(feats)
    worst = 0.0
    for kernel_map in _small_maps(offsets, feats.device):
        rows = torch.randn(kernel_map.inputs, shape[1], generator=generator).to(feats)
        grad = torch.randn(len(kernel_map.table), shape[2], generator=generator).to(feats)
        expected = (
            plain.sparse_conv_forward(rows, kernel, kernel_map),
            plain.sparse_conv_forward(grad, kernel.transpose(1, 2), kernel_map.reverse),
            plain.sparse_conv_wgrad(rows, grad, kernel_map),
        )
        given = rows.requires_grad_(), kernel.detach().requires_grad_()
        with torch.enable_grad():
            out = _Convolution.apply(*given, kernel_map, module, way)
        for value, right in zip((out, *torch.autograd.grad(out, given, grad)), expected, strict=True):
            worst = max(worst, float((value.detach() - right).abs().max() / right.abs().max()))
    return worst


def _small_maps(offsets: int, device: torch.device) -> list[KernelMap]:
    """Maps of a few hundred voxels: within one stride for odd kernels; to a coarser stride and back for even ones."""
    size = round(offsets ** (1 / 3))
    cells = torch.randperm(9**3, generator=torch.Generator().manual_seed(0))[:300]
    places = torch.stack([cells % 2, cells // 81, cells // 9 % 9, cells % 9], dim=1).int()
    coords = places.unique(dim=0).to(device)
    manager = CoordinateManager(coords, 1, *morton_order(coords, 1))
    if size % 2:
        return [manager.kernel_map(1, 1, size, 1)]
    strided = manager.kernel_map(1, size, size, 1)
    return [strided, strided.reverse]
