"""WarpConvNet 1.8 (NVIDIA) as an engine of `peers`: its products on our kernel maps, on CUDA only.

It takes lists of pairs, offset after offset, and kernels [K, Cin, Cout] as ours. Its own layers count offsets with z
fastest, so that their kernels are ours with the axes reversed; here our pairs come in our order, and nothing is moved.

Its quickest kernels compute float32 features in float16. Here float32 stays float32: only its exact algorithms are
asked for. For 16 bits it tries what it has and keeps the quickest, with sums in float32.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo_pretrain.errors import require
from geo_pretrain.sparse.backend import INSTALL
from geo_pretrain.sparse.maps import KernelMap
from geo_pretrain.sparse.peer_layouts import listed_pairs

EXACT, QUICKEST = "explicit and implicit GEMM", "auto"
ALGORITHMS: dict[str, Any] = {EXACT: ["explicit_gemm", "explicit_gemm_grouped", "implicit_gemm"], QUICKEST: "auto"}


class Library(NamedTuple):
    """The parts of WarpConvNet that are used."""

    version: str
    functions: Any
    pairs: Any  # what its search gives


@cache
def library() -> Library:
    """Import WarpConvNet; MissingDependency, with the line that installs it, where it is absent."""
    version = str(getattr(require("warpconvnet", install=INSTALL["warpconvnet"]), "__version__", "of unknown version"))
    functions = importlib.import_module("warpconvnet.nn.functional.sparse_conv")
    search: Any = importlib.import_module("warpconvnet.geometry.coords.search.search_results")
    return Library(version, functions, search.IntSearchResult)


def ways(feats: Tensor, offsets: int) -> tuple[str, ...]:
    """The algorithms for such features."""
    return (EXACT,) if feats.dtype == torch.float32 else (QUICKEST,)


def convolution(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, way: str) -> Tensor:
    """sum_k feats[table[:, k]] @ kernel[k]: [N_out, Cout], with WarpConvNet's gradients."""
    operands = feats.contiguous(), kernel.contiguous(), searched(kernel_map), len(kernel_map.table), feats.dtype
    if way == EXACT and len(kernel_map.table) != len(feats):
        # Where outputs are other voxels and the algorithms are named, it would measure them anew in every call.
        return library().functions.SpatiallySparseConvExplicitGEMMFunction.apply(*operands)
    algorithms = [ALGORITHMS[way]] * 3  # forward, gradient of the input, gradient of the kernel
    return library().functions.UnifiedSpatiallySparseConvFunction.apply(
        *operands[:4], *algorithms, feats.dtype, None, None
    )


def searched(kernel_map: KernelMap) -> Any:
    """The pairs of a kernel map as WarpConvNet's search gives them; cached on the map."""
    if "warpconvnet_pairs" not in kernel_map.__dict__:
        kernel_map.__dict__["warpconvnet_pairs"] = library().pairs(*listed_pairs(kernel_map))
    return kernel_map.__dict__["warpconvnet_pairs"]
