"""The sparse convolution and its weight gradient on the CPU in float32, compiled by numba (extra `fast`).

The same functions as in `plain`, their twins in torch. What makes these fast:

* Pairs (input row, output row) are listed once a map, by tile of output rows and then by offset. A tile belongs to one
  thread: no atomics on features, no locks, and results do not depend on the number of threads.
* A block of pairs is multiplied straight from the rows where they lie, with its sums in registers: nothing is gathered
  into memory. The block is written in LLVM's vectors, because compilers do not find it by themselves.
* Rows lie in Morton order (see `maps`), so that the rows of a tile's pairs are in cache.

Functions named `_..._tasks` are tasks, see `compiled`.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.sparse.backend import LOW_PRECISION
from geo_pretrain.sparse.compiled import (
    ADDRESS,
    INT64,
    SIZE,
    compiled,
    float_at,
    int32_at,
    int64_at,
    intrinsic,
    next_task,
    numba,
    run,
)

if TYPE_CHECKING:
    from geo_pretrain.sparse.maps import KernelMap

cgutils = numba.core.cgutils
ir = cgutils.ir
Value = Any  # of LLVM

TILE = 256  # output rows a task: their sums stay in the second-level cache
BLOCK = 6  # rows of a register block
COLUMNS, HEIGHT = 64, 48  # what a task takes of a kernel slice's columns and rows where it does not take all
FEATURES = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[2]
# Floats of a vector and vectors of a register block's row: the sums of 6 rows fill 24 of 32 registers, or 12 of 16.
LANES, WIDEST = (16, 4) if "+avx512f" in FEATURES else (8, 2) if "+avx" in FEATURES else (4, 4)

FLOAT, INT32 = ir.FloatType(), ir.IntType(32)
VECTOR, INDICES = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)


# ---- Register blocks: LLVM instructions -----------------------------------------------------------------------------


def _row(b: Value, base: Value, row: Value, width: Value) -> Value:
    """Pointer to a row of the float matrix at an integer address."""
    return b.gep(b.inttoptr(base, FLOAT.as_pointer()), [b.mul(row, width)])


def _entry(b: Value, rows: Value, index: Value) -> Value:
    """rows[index] of int32 rows, as int64."""
    return b.sext(b.load(b.gep(b.inttoptr(rows, INT32.as_pointer()), [index])), INT64)


def _vectors(b: Value, row: Value, count: int) -> list[Value]:
    """Pointers to the first vectors of a row."""
    return [b.bitcast(b.gep(row, [INT64(v * LANES)]), VECTOR.as_pointer()) for v in range(count)]


def _shapes(b: Value, height: Value, width: Value) -> Iterator[tuple[int, int]]:
    """Emit a switch with one case for each height and width (in vectors) of a block; iterate over the cases."""
    end = b.append_basic_block("end")
    switch = b.switch(b.add(b.mul(height, INT64(WIDEST)), width), end)
    for rows in range(1, BLOCK + 1):
        for vectors in range(1, WIDEST + 1):
            case = b.append_basic_block("shape")
            switch.add_case(INT64(rows * WIDEST + vectors), case)
            b.position_at_end(case)
            yield rows, vectors
            b.branch(end)
    b.position_at_end(end)


def _accumulate(b: Value, sums: list[Value], count: int, first: Value, stop: Value, step: Callable[..., Any]) -> None:
    """sums[r] += scalars[r] * row over all i from `first` to `stop` (at least one), where step(i) = (scalars, row).

    Rows are `count` vectors wide. Sums are loaded before the loop and stored after it.
    """
    signature = ir.FunctionType(VECTOR, [VECTOR] * 3)
    muladd = cgutils.get_or_insert_function(b.module, signature, f"llvm.fmuladd.v{LANES}f32")
    places = [place for row in sums for place in _vectors(b, row, count)]
    start = [b.load(place, align=4) for place in places]
    before, body, after = b.block, b.append_basic_block("sum"), b.append_basic_block("store")
    b.branch(body)
    b.position_at_end(body)
    i, totals = b.phi(INT64), [b.phi(VECTOR) for _ in places]
    scalars, row = step(i)
    factors = [b.load(place, align=4) for place in _vectors(b, row, count)]
    following, undefined = [], VECTOR(ir.Undefined)
    for r, scalar in enumerate(scalars):
        spread = b.insert_element(undefined, b.load(scalar), INT32(0))
        spread = b.shuffle_vector(spread, undefined, INDICES([0] * LANES))
        following += [
            b.call(muladd, [spread, f, t]) for f, t in zip(factors, totals[r * count : (r + 1) * count], strict=True)
        ]
    i_next = b.add(i, INT64(1))
    for phi, entering, returning in zip([i, *totals], [first, *start], [i_next, *following], strict=True):
        phi.add_incoming(entering, before)
        phi.add_incoming(returning, body)
    b.cbranch(b.icmp_signed("<", i_next, stop), body, after)
    b.position_at_end(after)
    for place, value in zip(places, following, strict=True):
        b.store(value, place, align=4)


@intrinsic
def _product_block(context, height, count, rows, width, inputs, outputs, p, kernel, kernel_width, out, out_width):
    """out[outputs[p + r]] += rows[inputs[p + r]] @ kernel for r < height, on `count` vectors of columns."""

    def emit(_context, b, _signature, args):
        height, count, rows, width, inputs, outputs, p, kernel, kernel_width, out, out_width = args
        for block_height, block_count in _shapes(b, height, count):
            places = [b.add(p, INT64(r)) for r in range(block_height)]
            sources = [_row(b, rows, _entry(b, inputs, place), width) for place in places]
            sums = [_row(b, out, _entry(b, outputs, place), out_width) for place in places]

            def step(c, sources=sources):
                return [b.gep(source, [c]) for source in sources], _row(b, kernel, c, kernel_width)

            _accumulate(b, sums, block_count, INT64(0), width, step)
        return INT64(0)

    return SIZE(SIZE, SIZE, ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, SIZE, ADDRESS, SIZE), emit


@intrinsic
def _gradient_block(context, height, count, rows, width, inputs, outputs, first, stop, grad, grad_width, out):
    """out[r] += rows[inputs[p], r] * grad[outputs[p]] over p in [first, stop), for r < height, on `count` vectors."""

    def emit(_context, b, _signature, args):
        height, count, rows, width, inputs, outputs, first, stop, grad, grad_width, out = args
        for block_height, block_count in _shapes(b, height, count):

            def step(p, block_height=block_height):
                source = _row(b, rows, _entry(b, inputs, p), width)
                scalars = [b.gep(source, [INT64(r)]) for r in range(block_height)]
                return scalars, _row(b, grad, _entry(b, outputs, p), grad_width)

            sums = [_row(b, out, INT64(r), grad_width) for r in range(block_height)]
            _accumulate(b, sums, block_count, first, stop, step)
        return INT64(0)

    return SIZE(SIZE, SIZE, ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS, SIZE, ADDRESS), emit


@intrinsic
def _transpose_block(context, source, source_width, target, target_width):
    """target[j, i] = source[i, j] for a square of one vector's width."""

    def emit(_context, b, _signature, args):
        source, source_width, target, target_width = args
        rows = [b.load(_vectors(b, _row(b, source, INT64(i), source_width), 1)[0], align=4) for i in range(LANES)]
        step = 1
        while step < LANES:  # swap the two squares of `step` that lie off the diagonal of each square twice as large
            low = INDICES([j if j & step == 0 else j - step + LANES for j in range(LANES)])
            high = INDICES([j + step if j & step == 0 else j + LANES for j in range(LANES)])
            for i in (i for i in range(LANES) if i & step == 0):
                above, below = rows[i], rows[i + step]
                rows[i], rows[i + step] = b.shuffle_vector(above, below, low), b.shuffle_vector(above, below, high)
            step *= 2
        for j, row in enumerate(rows):
            b.store(row, _vectors(b, _row(b, target, INT64(j), target_width), 1)[0], align=4)
        return INT64(0)

    return SIZE(ADDRESS, SIZE, ADDRESS, SIZE), emit


# ---- Convolution ----------------------------------------------------------------------------------------------------


@compiled
def _product_tasks(job):
    """Compute output tiles, each for all columns or, where there are few tiles, for some."""
    g = numba.carray(job, (14,))
    counter, rows, inputs, outputs, kernel, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, height, share, shares = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    result = numba.carray(float_at(out), (height, columns))
    while True:
        task = next_task(counter)
        if task >= tiles * shares:
            return
        tile, left = task % tiles, task // tiles * share
        right = min(left + share, columns)
        result[tile * TILE : min(tile * TILE + TILE, height), left:right] = 0
        for k in range(offsets):
            first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
            for c in range(left, right, WIDEST * LANES):
                count = min(WIDEST, (right - c) // LANES)
                here, there = kernel + 4 * (k * width * columns + c), out + 4 * c
                for p in range(first, stop, BLOCK):
                    rest = min(BLOCK, stop - p)
                    _product_block(rest, count, rows, width, inputs, outputs, p, here, columns, there, columns)


@compiled
def _gradient_tasks(job):
    """Compute some rows of a few kernel slices of the gradient, over the pairs of all tiles."""
    g = numba.carray(job, (14,))
    counter, rows, inputs, outputs, grad, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, share, shares, group = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    result = numba.carray(float_at(out), (offsets, width, columns))
    while True:
        task = next_task(counter)
        k_first, top = task // shares * group, task % shares * share
        if k_first >= offsets:
            return
        k_stop, bottom = min(k_first + group, offsets), min(top + share, width)
        result[k_first:k_stop, top:bottom] = 0
        for tile in range(tiles):
            for k in range(k_first, k_stop):
                first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
                if first == stop:
                    continue
                for c in range(0, columns, WIDEST * LANES):
                    count, there = min(WIDEST, (columns - c) // LANES), grad + 4 * c
                    for r in range(top, bottom, BLOCK):
                        rest, here = min(BLOCK, bottom - r), out + 4 * ((k * width + r) * columns + c)
                        source = rows + 4 * r
                        _gradient_block(rest, count, source, width, inputs, outputs, first, stop, there, columns, here)


@compiled
def _transpose_tasks(job):
    """Transpose kernel slices [K, Cin, Cout] to [K, Cout, Cin]; both widths are multiples of a vector."""
    g = numba.carray(job, (6,))
    counter, source, target, offsets, width, columns = g[0], g[1], g[2], g[3], g[4], g[5]
    while True:
        task = next_task(counter)
        k, i = task // (width // LANES), task % (width // LANES) * LANES
        if k >= offsets:
            return
        here, there = source + 4 * (k * width + i) * columns, target + 4 * (k * columns * width + i)
        for j in range(0, columns, LANES):
            _transpose_block(here + 4 * j, columns, there + 4 * j * width, width)


@compiled
def _list_tasks(job):
    """Count the pairs of every tile and offset or, if `pairs` is not 0, list them from the given positions on."""
    g = numba.carray(job, (9,))
    counter, height, offsets, tiles, pairs = g[0], g[5], g[6], g[7], g[8]
    table = numba.carray(int32_at(g[1]), (height, offsets))
    inputs, outputs = numba.carray(int32_at(g[2]), (pairs,)), numba.carray(int32_at(g[3]), (pairs,))
    places = numba.carray(int64_at(g[4]), (tiles, offsets))
    while True:
        tile = next_task(counter)
        if tile >= tiles:
            return
        for row in range(tile * TILE, min(tile * TILE + TILE, height)):
            for k in range(offsets):
                if table[row, k] >= 0:
                    if pairs:
                        inputs[places[tile, k]] = table[row, k]
                        outputs[places[tile, k]] = row
                    places[tile, k] += 1


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
        run(_list_tasks, table.data_ptr(), 0, 0, counts.ctypes.data, height, offsets, tiles, 0)
        np.cumsum(counts, out=counts)
        places, pairs = starts[:-1].copy(), int(starts[-1])
        inputs, outputs = np.empty((2, pairs), np.int32)
        addresses = inputs.ctypes.data, outputs.ctypes.data, places.ctypes.data
        if pairs:
            run(_list_tasks, table.data_ptr(), *addresses, height, offsets, tiles, pairs)
        listed = kernel_map.__dict__["tiled_pairs"] = cls(inputs, outputs, starts, tiles)
        return listed


def sparse_conv_forward(feats: Tensor, kernel: Tensor, kernel_map: KernelMap) -> Tensor:
    """sum_k feats[table[:, k]] @ kernel[k]: [N_out, Cout]. The kernel may be a transposed view, and of 16 bits."""
    kernel = _in_float32(kernel)
    _check(feats, kernel, kernel_map.inputs)
    height, (offsets, width, columns) = len(kernel_map.table), kernel.shape
    pairs = Pairs.of(kernel_map)
    excess = -columns % LANES
    if excess:
        kernel = torch.nn.functional.pad(kernel, (0, excess))
    elif width % LANES == 0 and kernel.transpose(1, 2).is_contiguous():
        kernel = _transposed(kernel)
    feats, kernel, padded = feats.contiguous(), kernel.contiguous(), columns + excess
    out = feats.new_empty(height, padded)
    share = padded if pairs.tiles >= 4 * torch.get_num_threads() else min(COLUMNS, padded)
    addresses = feats.data_ptr(), pairs.inputs.ctypes.data, pairs.outputs.ctypes.data, kernel.data_ptr(), out.data_ptr()
    sizes = pairs.tiles, offsets, width, padded, height, share, -(-padded // share)
    run(_product_tasks, *addresses, pairs.starts.ctypes.data, *sizes)
    return out[:, :columns].contiguous() if excess else out


def sparse_conv_wgrad(feats: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """The gradient [K, Cin, Cout] of `sparse_conv_forward` with respect to its kernel; `grad` [N_out, Cout]."""
    _check(feats, grad, kernel_map.inputs)
    offsets, width, columns = kernel_map.table.shape[1], feats.shape[1], grad.shape[1]
    pairs = Pairs.of(kernel_map)
    padded = columns + -columns % LANES
    feats, grad = feats.contiguous(), torch.nn.functional.pad(grad, (0, padded - columns)).contiguous()
    out = feats.new_empty(offsets, width, padded)
    shares = -(-width // HEIGHT)
    # Offsets that a task takes together share features in cache; but every thread needs a few tasks.
    group = min(max(offsets * shares // (3 * torch.get_num_threads()), 1), 9)
    addresses = feats.data_ptr(), pairs.inputs.ctypes.data, pairs.outputs.ctypes.data, grad.data_ptr(), out.data_ptr()
    sizes = pairs.tiles, offsets, width, padded, HEIGHT, shares, group
    run(_gradient_tasks, *addresses, pairs.starts.ctypes.data, *sizes)
    return out[..., :columns].contiguous() if padded > columns else out


def _check(rows: Tensor, other: Tensor, inputs: int) -> None:
    """Check dtypes, devices and the number of rows, which compiled code does not."""
    kinds = [f"{tensor.dtype} on {tensor.device.type}" for tensor in (rows, other)]
    if kinds != ["torch.float32 on cpu"] * 2:
        raise ValueError(f"The fast backend got {' and '.join(kinds)}; accepted: torch.float32 on cpu.")
    if len(rows) != inputs:
        raise ValueError(f"The kernel map is for {inputs} rows; got {len(rows)}.")


_scratch = threading.local()


def _memory(name: str, shape: torch.Size) -> Tensor:
    """Memory for a kernel [K, Cin, Cout] in another layout, which all layers of a thread share under this name."""
    size = shape.numel()
    if not hasattr(_scratch, name) or getattr(_scratch, name).numel() < size:
        setattr(_scratch, name, torch.empty(size))
    memory: Tensor = getattr(_scratch, name)[:size]
    return memory.view(shape)


def _transposed(kernel: Tensor) -> Tensor:
    """Copy a transposed view of a kernel to contiguous memory."""
    copy = _memory("transposed", kernel.shape)
    offsets, columns, width = kernel.shape
    run(_transpose_tasks, kernel.data_ptr(), copy.data_ptr(), offsets, width, columns)
    return copy


def _in_float32(kernel: Tensor) -> Tensor:
    """Convert a kernel of 16 bits; a transposed view stays one."""
    if kernel.dtype not in LOW_PRECISION:
        return kernel
    if kernel.is_contiguous():
        return _memory("float32", kernel.shape).copy_(kernel)
    return _memory("float32", kernel.mT.shape).copy_(kernel.mT).mT
