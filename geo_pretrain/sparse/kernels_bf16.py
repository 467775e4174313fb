"""The compiled tasks of convolutions in bfloat16, with sums in float32, for processors with avx512_bf16.

Two bfloat16 that are multiplied and added together lie beside each other, as the halves of one number of 32 bits: a
`pair`. The processor adds the dot products of 16 pairs to 16 sums at once.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import numpy as np

from geo_pretrain.sparse.kernels import (
    ADDRESS,
    INDICES,
    INT64,
    LANES,
    SIZE,
    TASKS,
    accumulate,
    dot,
    float_at,
    int32_at,
    int64_at,
    intrinsic,
    ir,
    next_task,
    numba,
    product_blocks,
    product_task,
    row_at,
    shapes,
    task,
)
from geo_pretrain.sparse.processor import BLOCK, TILE, WIDEST

SHORTS = ir.VectorType(ir.IntType(16), LANES)

TASKS["product_bf16"] = product_task(product_blocks(dot))


@intrinsic
def _interleave(context, low, high, target):
    """Pair the bfloat16 of two vectors."""

    def emit(_context, b, _signature, args):
        low, high, target = args
        halves = [b.zext(b.load(b.inttoptr(address, SHORTS.as_pointer()), align=2), INDICES) for address in (low, high)]
        sixteen = INDICES([16] * LANES)
        paired = b.or_(halves[0], b.shl(halves[1], sixteen))
        b.store(paired, b.inttoptr(target, INDICES.as_pointer()), align=4)
        return INT64(0)

    return SIZE(ADDRESS, ADDRESS, ADDRESS), emit


@intrinsic
def _widen(context, source, target):
    """Pair the bfloat16 of one vector with zeros."""

    def emit(_context, b, _signature, args):
        source, target = args
        low = b.zext(b.load(b.inttoptr(source, SHORTS.as_pointer()), align=2), INDICES)
        b.store(low, b.inttoptr(target, INDICES.as_pointer()), align=4)
        return INT64(0)

    return SIZE(ADDRESS, ADDRESS), emit


@task
def pair_rows(job):
    """Pair the rows of kernel slices bfloat16 [K, Cin, Cout] to [K, Cin / 2, Cout, 2]; Cout a multiple of a vector."""
    g = numba.carray(job, (5,))
    counter, source, target, rows, columns = g[0], g[1], g[2], g[3], g[4]
    while True:
        row = next_task(counter)
        if row >= rows:
            return
        low, there = source + 4 * row * columns, target + 4 * row * columns
        for c in range(0, columns, LANES):
            _interleave(low + 2 * c, low + 2 * (columns + c), there + 4 * c)


@numba.njit(error_model="numpy")
def gather_pairs(source, width, left, right, places, first, stop, target, pairs):
    """Pair the columns from `left` to `right` of rows places[first], places[first + 1]; and so on up to `stop`.

    Of `pairs` rows of pairs the last ones, which have no rows to pair, are zero.
    """
    for p in range(first, stop, 2):
        here = target + 2 * (p - first) * (right - left)
        low = source + 2 * np.int64(places[p]) * width
        if p + 1 < stop:
            high = source + 2 * np.int64(places[p + 1]) * width
            for c in range(left, right, LANES):
                _interleave(low + 2 * c, high + 2 * c, here + 4 * (c - left))
        else:
            for c in range(left, right, LANES):
                _widen(low + 2 * c, here + 4 * (c - left))
    filled = (stop - first + 1) // 2
    if filled < pairs:
        numba.carray(int32_at(target), (pairs, right - left))[filled:] = 0


@intrinsic
def _gradient_block(context, height, count, rows, width, grad, grad_width, pairs, out, out_width):
    """out[r] += rows[p, r] . grad[p] over p < pairs, for r < height, on `count` vectors of columns."""

    def emit(_context, b, _signature, args):
        height, count, rows, width, grad, grad_width, pairs, out, out_width = args
        for block_height, block_count in shapes(b, height, count):

            def step(p, block_height=block_height):
                source = row_at(b, rows, p, width)
                return [b.gep(source, [INT64(r)]) for r in range(block_height)], row_at(b, grad, p, grad_width)

            sums = [row_at(b, out, INT64(r), out_width) for r in range(block_height)]
            accumulate(b, sums, block_count, INT64(0), pairs, step, dot)
        return INT64(0)

    return SIZE(SIZE, SIZE, ADDRESS, SIZE, ADDRESS, SIZE, SIZE, ADDRESS, SIZE), emit


@task
def gradient_bf16(job):
    """Compute some rows of a few kernel slices of the gradient, over the pairs of all tiles, as `gradient` does.

    The rows of a tile and offset are gathered and paired in memory of the thread's own.
    """
    g = numba.carray(job, (16,))
    counter, rows, inputs, outputs, grad, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, share, shares, group = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    memory, threads = g[14], g[15]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    sources, places = numba.carray(int32_at(inputs), (bounds[-1],)), numba.carray(int32_at(outputs), (bounds[-1],))
    result = numba.carray(float_at(out), (offsets, width, columns))
    mine = memory + 2 * TILE * (share + columns) * next_task(threads)
    theirs = mine + 2 * TILE * share
    while True:
        number = next_task(counter)
        k_first, top = number // shares * group, number % shares * share
        if k_first >= offsets:
            return
        k_stop, bottom = min(k_first + group, offsets), min(top + share, width)
        result[k_first:k_stop, top:bottom] = 0
        for tile in range(tiles):
            for k in range(k_first, k_stop):
                first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
                if first == stop:
                    continue
                pairs = (stop - first + 1) // 2
                gather_pairs(rows, width, top, bottom, sources, first, stop, mine, pairs)
                gather_pairs(grad, columns, 0, columns, places, first, stop, theirs, pairs)
                for c in range(0, columns, WIDEST * LANES):
                    count = min(WIDEST, (columns - c) // LANES)
                    for r in range(top, bottom, BLOCK):
                        rest, here = min(BLOCK, bottom - r), out + 4 * ((k * width + r) * columns + c)
                        source = mine + 4 * (r - top)
                        _gradient_block(
                            rest, count, source, bottom - top, theirs + 4 * c, columns, pairs, here, columns
                        )
