"""spconv 2.3 as an engine of `peers`: its products on our kernel maps.

On a GPU it has implicit GEMM, for kernels of up to 32 offsets, and its older "native" way, pair by pair, which is the
only one on a CPU. Both take our pairs as they are: spconv's own search for neighbors, spatial shape and order of voxels
play no part. Its weights are [Cout, K, K, K, Cin], with the offsets in our order.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import GeoPretrainError, require
from geo_pretrain.sparse.backend import INSTALL
from geo_pretrain.sparse.maps import KernelMap
from geo_pretrain.sparse.peer_layouts import WORD, masked_pairs, padded_pairs

IMPLICIT, NATIVE = "implicit GEMM", "native"
ALL_OFFSETS = [np.array([0xFFFFFFFF], dtype=np.uint32)]


class Library(NamedTuple):
    """The parts of spconv that are used."""

    version: str
    functions: Any
    native: Any  # the name of the native way, in spconv's words
    timer: Any  # one that does not run
    has_cuda: bool


@cache
def library() -> Library:
    """Import spconv; MissingDependency, with the line that installs it, where it is absent."""
    spconv: Any = require("spconv", install=INSTALL["spconv"])
    operators: Any = importlib.import_module("spconv.pytorch.ops")
    if not torch.cuda.is_available():  # its backward asks for a CUDA stream even on a CPU, and ignores it
        operators.get_current_stream = lambda: 0
    functions = importlib.import_module("spconv.pytorch.functional")
    has_cuda = not importlib.import_module("spconv.cppconstants").CPU_ONLY_BUILD
    return Library(spconv.__version__, functions, spconv.ConvAlgo.Native, operators.CUDAKernelTimer(False), has_cuda)


def ways(feats: Tensor, offsets: int) -> tuple[str, ...]:
    """The algorithms for such features, best first. GeoPretrainError where this build has no CUDA."""
    if feats.device.type == "cpu":
        return (NATIVE,)
    if not library().has_cuda:
        raise GeoPretrainError(
            f"This spconv is the build for CPUs, the features are on {feats.device}: install "
            f"the one of your CUDA ({INSTALL['spconv']})."
        )
    if feats.dtype == torch.float16:
        return (IMPLICIT,) if offsets <= WORD else ()  # the native way adds up in 16 bits
    return (IMPLICIT, NATIVE) if offsets <= WORD else (NATIVE,)


def convolution(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, way: str) -> Tensor:
    """sum_k feats[table[:, k]] @ kernel[k]: [N_out, Cout], with spconv's gradients."""
    size = round(len(kernel) ** (1 / 3))
    filters = kernel.permute(2, 0, 1).reshape(kernel.shape[2], size, size, size, kernel.shape[1]).contiguous()
    outputs, functions = len(kernel_map.table), library().functions
    if way == NATIVE:
        pairs, counts = padded_pairs(kernel_map)
        function = functions.SubMConvFunction if kernel_map.symmetric else functions.SparseConvFunction
        return function.apply(feats.contiguous(), filters, pairs, counts, outputs, library().native)
    there, back = masked_pairs(kernel_map), masked_pairs(kernel_map.reverse)
    return functions.SparseImplicitGemmFunction.apply(
        feats.contiguous(),
        filters,
        there.table,
        back.table,
        [there.masks],
        [back.masks],
        [there.order],
        [back.order],
        outputs,
        ALL_OFFSETS,
        torch.is_grad_enabled(),
        False,
        library().timer,
        True,
    )
