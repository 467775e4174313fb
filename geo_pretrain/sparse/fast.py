"""Sparse convolution, its weight gradient and neighbor search on the CPU, compiled by numba (extra `fast`).

The functions of a convolution are those of `plain`, their twins in torch, in float32. Where the processor multiplies
bfloat16 itself they take features of bfloat16, too, with sums and results in float32. What makes these fast:

* Pairs (input row, output row) are listed once a map, by tile of output rows and then by offset. A tile belongs to one
  thread: no atomics on features, no locks, and results do not depend on the number of threads.
* A block of pairs is multiplied straight from the rows where they lie, with its sums in registers: nothing is gathered
  into memory. The block is written in LLVM's vectors, because compilers do not find it by themselves.
* Rows lie in Morton order (see `maps`), so that the rows of a tile's pairs are in cache.

The compiled tasks stand in `kernels`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.sparse.backend import LOW_PRECISION
from geo_pretrain.sparse.compiled import run
from geo_pretrain.sparse.packed import packed
from geo_pretrain.sparse.plain import Finish
from geo_pretrain.sparse.processor import AMX, BF16, LANES, SIDE, TILE

if TYPE_CHECKING:
    from geo_pretrain.sparse.maps import KernelMap

COLUMNS, HEIGHT = 64, 48  # what a task takes of a kernel slice's columns and rows where it does not take all


class Pairs(NamedTuple):
    """The pairs (input row, output row) of a kernel map, by tile of TILE output rows and then by offset."""

    inputs: np.ndarray  # int32 [P]
    outputs: np.ndarray  # int32 [P], ascending within a tile and offset
    starts: np.ndarray  # int64 [tiles * K + 1], where each tile and offset starts
    tiles: int

    @classmethod
    def of(cls, kernel_map: KernelMap) -> Pairs:
        """List the pairs of a kernel map; the result is cached on the map."""
        if "tiled_pairs" in kernel_map.__dict__:
            kept: Pairs = kernel_map.__dict__["tiled_pairs"]
            return kept
        table = kernel_map.table.contiguous()
        height, offsets = table.shape
        tiles = -(-height // TILE)
        starts = np.zeros(tiles * offsets + 1, np.int64)
        counts = starts[1:]
        run("list_pairs", table.data_ptr(), 0, 0, counts.ctypes.data, height, offsets, tiles, 0)
        np.cumsum(counts, out=counts)
        places, pairs = starts[:-1].copy(), int(starts[-1])
        inputs, outputs = np.empty((2, pairs), np.int32)
        addresses = inputs.ctypes.data, outputs.ctypes.data, places.ctypes.data
        if pairs:
            run("list_pairs", table.data_ptr(), *addresses, height, offsets, tiles, pairs)
        listed = kernel_map.__dict__["tiled_pairs"] = cls(inputs, outputs, starts, tiles)
        return listed


def sparse_conv_forward(feats: Tensor, kernel: Tensor, kernel_map: KernelMap, finish: Finish | None = None) -> Tensor:
    """sum_k feats[table[:, k]] @ kernel[k]: [N_out, Cout]. The kernel may be a transposed view, and of 16 bits.

    With features of bfloat16 the kernel is rounded to bfloat16; the results are float32. `finish` is done on each tile
    while it is in cache.
    """
    _check(feats, kernel, kernel_map.inputs)
    low, columns = feats.dtype == torch.bfloat16, kernel.shape[2]
    rows, kernel = _paired(feats, kernel) if low else _single(feats, kernel)
    height, (offsets, width, padded) = len(kernel_map.table), kernel.shape
    pairs = Pairs.of(kernel_map)
    out = rows.new_empty(height, padded, dtype=torch.float32)
    share = padded if pairs.tiles >= 4 * torch.get_num_threads() else min(COLUMNS, padded)
    addresses = rows.data_ptr(), pairs.inputs.ctypes.data, pairs.outputs.ctypes.data, kernel.data_ptr(), out.data_ptr()
    sizes = pairs.tiles, offsets, width, padded, height, share, -(-padded // share)
    last: tuple[int, ...] = (0, 0, 0, 0)
    if finish is not None and padded == columns:
        finish = finish.contiguous()
        residual = 0 if finish.residual is None else finish.residual.data_ptr()
        last = finish.scale.data_ptr(), finish.shift.data_ptr(), residual, int(finish.relu)
    every = *addresses, pairs.starts.ctypes.data, *sizes, *last
    if low and width % LANES == 0 and has_tiles():
        _run_tiles("product_amx", every, TILE * width + SIDE * SIDE)
    else:
        run("product_bf16" if low else "product", *every)
    if padded == columns:
        return out
    out = out[:, :columns].contiguous()
    return out if finish is None else finish.apply(out)


def sparse_conv_wgrad(feats: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """The gradient [K, Cin, Cout] of `sparse_conv_forward` with respect to its kernel, float32; `grad` [N_out, Cout].

    Both are float32 or both bfloat16.
    """
    _check(feats, grad, kernel_map.inputs)
    low, width, columns = feats.dtype == torch.bfloat16, feats.shape[1], grad.shape[1]
    offsets, pairs = kernel_map.table.shape[1], Pairs.of(kernel_map)
    feats, grad = _whole_vectors(feats) if low else feats.contiguous(), _whole_vectors(grad)
    height, padded = feats.shape[1], grad.shape[1]
    out = feats.new_empty(offsets, height, padded, dtype=torch.float32)
    share = SIDE if low and has_tiles() else HEIGHT
    shares = -(-height // share)
    # Offsets that a task takes together share features in cache; but every thread needs a few tasks.
    group = min(max(offsets * shares // (3 * torch.get_num_threads()), 1), 9)
    addresses = feats.data_ptr(), pairs.inputs.ctypes.data, pairs.outputs.ctypes.data, grad.data_ptr(), out.data_ptr()
    every = *addresses, pairs.starts.ctypes.data, pairs.tiles, offsets, height, padded, share, shares, group
    if low and has_tiles():
        _run_tiles("gradient_amx", every, TILE // 2 * (2 * share + padded))
    elif low:
        _run_with_memory("gradient_bf16", every, TILE // 2 * (share + padded))
    else:
        run("gradient", *every)
    return out if out.shape[1:] == (width, columns) else out[:, :width, :columns].contiguous()


@cache
def has_tiles() -> bool:
    """Whether AMX multiplies bfloat16: the kernels are compiled for it and the system lets this process use it."""
    return AMX and torch.cpu._init_amx()


def _run_tiles(name: str, job: tuple[int, ...], size: int) -> None:
    """Run a task that multiplies tiles of 16 rows of 64 bytes; `size`: see `_run_with_memory`."""
    setting = np.zeros(64, np.uint8)
    setting[0] = 1  # palette
    setting[16:32:2] = 64  # bytes of a row of each of the eight tiles
    setting[48:56] = 16  # rows
    _run_with_memory(name, job, size, setting.ctypes.data)


def _run_with_memory(name: str, job: tuple[int, ...], size: int, *others: int) -> None:
    """Run a task with `size` numbers of 32 bits for each thread, which takes its part by a counter."""
    memory = torch.empty(torch.get_num_threads() * size, dtype=torch.int32, device="cpu")
    counter = np.zeros(1, np.int64)
    run(name, *job, memory.data_ptr(), counter.ctypes.data, *others)


def neighbors(coords: Tensor, stride: int, offsets: Sequence[Sequence[int]], *, symmetric: bool) -> Tensor:
    """int32 [N, K]: the row at each offset (x, y, z), in strides, from each row; -1 where there is none.

    `coords` int32 [N, 4] are unique and multiples of `stride`; they are searched for in a hash table. `symmetric`: the
    offsets of a centered kernel. If b is a's neighbor then a is b's on the other side, which saves half of the search.
    """
    coords, moves = coords.contiguous(), np.array(offsets, np.int64) * stride
    slots = np.empty(1 << max(4, (3 * len(coords)).bit_length()), np.int32)
    table = coords.new_full((len(coords), len(moves)), -1)
    shared = coords.data_ptr(), len(coords), stride, slots.ctypes.data, len(slots)
    run("insert", *shared)
    run("find", *shared, moves.ctypes.data, len(moves), int(symmetric), table.data_ptr())
    return table


def _check(rows: Tensor, other: Tensor, inputs: int) -> None:
    """Check dtypes, devices and the number of rows, which compiled code does not. A kernel may have 16 bits."""
    kinds = [f"{tensor.dtype} on {tensor.device.type}" for tensor in (rows, other)]
    accepted = ["torch.float32 on cpu", *(["torch.bfloat16 on cpu"] if BF16 else [])]
    is_kernel = other.ndim == 3 and other.device.type == "cpu" and other.dtype in (torch.float32, *LOW_PRECISION)
    if kinds[0] not in accepted or not (is_kernel or kinds[0] == kinds[1]):
        raise ValueError(f"The fast backend got {' and '.join(kinds)}; accepted: {' or '.join(accepted)}.")
    if len(rows) != inputs:
        raise ValueError(f"The kernel map is for {inputs} rows; got {len(rows)}.")


def _single(feats: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Features and kernel in float32, contiguous, the kernel padded to whole vectors of columns."""
    kernel = _in_float32(kernel)
    _, width, columns = kernel.shape
    if columns % LANES:
        kernel = torch.nn.functional.pad(kernel, (0, -columns % LANES))
    elif width % LANES == 0 and kernel.transpose(1, 2).is_contiguous():
        kernel = _transposed(kernel)
    return feats.contiguous(), kernel.contiguous()


def _paired(feats: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Features of bfloat16 with whole pairs of columns, and the packed kernel."""
    if feats.shape[1] % 2:
        feats = torch.nn.functional.pad(feats, (0, 1))
    return feats.contiguous(), packed(kernel)


def _whole_vectors(rows: Tensor) -> Tensor:
    """Contiguous rows, padded with zeros to whole vectors of columns."""
    excess = -rows.shape[1] % LANES
    return torch.nn.functional.pad(rows, (0, excess)) if excess else rows.contiguous()


_scratch = threading.local()


def _memory(name: str, shape: torch.Size) -> Tensor:
    """Memory for a kernel [K, Cin, Cout] in another layout, which all layers of a thread share under this name."""
    size = shape.numel()
    if not hasattr(_scratch, name) or getattr(_scratch, name).numel() < size:
        with torch.inference_mode(False):  # the next call may be in another mode, dtype or device than this one
            setattr(_scratch, name, torch.empty(size, dtype=torch.float32, device="cpu"))
    memory: Tensor = getattr(_scratch, name)[:size]
    return memory.view(shape)


def _transposed(kernel: Tensor) -> Tensor:
    """Copy a transposed view of a kernel to contiguous memory."""
    copy = _memory("transposed", kernel.shape)
    offsets, columns, width = kernel.shape
    run("transpose", kernel.data_ptr(), copy.data_ptr(), offsets, width, columns)
    return copy


def _in_float32(kernel: Tensor) -> Tensor:
    """Convert a kernel of 16 bits; a transposed view stays one."""
    if kernel.dtype not in LOW_PRECISION:
        return kernel
    if kernel.is_contiguous():
        return _memory("float32", kernel.shape).copy_(kernel)
    return _memory("float32", kernel.mT.shape).copy_(kernel.mT).mT
