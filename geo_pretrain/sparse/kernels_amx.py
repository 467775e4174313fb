"""The compiled tasks of convolutions in bfloat16 on AMX, which multiplies tiles of 16 rows of 64 bytes.

A tile of 16 x 32 bfloat16 times one of 32 x 16, its rows in pairs, is added to 16 x 16 sums in float32. Tiles are read
at equal distances: rows that a convolution gathers are copied beside each other first, and its products added to the
rows where they belong. All tiles are whole; what pads them is never read or is zero.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import numpy as np

from geo_pretrain.sparse.kernels import (
    ADDRESS,
    INT64,
    SIZE,
    VECTOR,
    cgutils,
    finish_tile,
    float_at,
    int32_at,
    int64_at,
    intrinsic,
    ir,
    next_task,
    numba,
    task,
    transpose_block,
)
from geo_pretrain.sparse.kernels_bf16 import gather_pairs
from geo_pretrain.sparse.processor import SIDE, TILE

BYTE = ir.IntType(8)
POINTER = BYTE.as_pointer()
SUMS = 4 * SIDE  # bytes from one row of a pair of tiles of sums to the next, as `product_amx` stores them
_rows, _columns = 4, 6  # tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 columns


def _tile(b, name, *values):
    """Call one of LLVM's instructions on tile registers, which are named by constants."""
    kinds = [value.type for value in values]
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")
    b.call(function, values)


def _moved(b, name, number, address, stride):
    _tile(b, name, BYTE(number), b.inttoptr(address, POINTER), stride)


@intrinsic
def _configure(context, address):
    """Set up the tile registers of this thread, as 64 bytes say."""

    def emit(_context, b, _signature, args):
        _tile(b, "ldtilecfg", b.inttoptr(args[0], POINTER))
        return INT64(0)

    return SIZE(ADDRESS), emit


@intrinsic
def _release(context):
    """Give the tile registers back."""

    def emit(_context, b, _signature, args):
        _tile(b, "tilerelease")
        return INT64(0)

    return SIZE(), emit


def _blocks(high, wide, begins_at_zero):
    """Make the intrinsic that multiplies `high` tiles below each other with `wide` tiles side by side (1 or 2 each)."""

    @intrinsic
    def block(context, rows, rows_stride, columns, columns_stride, steps, out, out_stride):
        """out (+)= rows @ columns over `steps` tiles; the strides are bytes from a tile's row to the next."""

        def emit(_context, b, _signature, args):
            rows, rows_stride, columns, columns_stride, steps, out, out_stride = args
            down = b.mul(rows_stride, INT64(16))
            places = [
                (2 * i + j, b.add(b.add(out, b.mul(out_stride, INT64(16 * i))), INT64(64 * j)))
                for i in range(high)
                for j in range(wide)
            ]
            for number, place in places:
                if begins_at_zero:
                    _tile(b, "tilezero", BYTE(number))
                else:
                    _moved(b, "tileloadd64", number, place, out_stride)
            before, body, after = b.block, b.append_basic_block("tiles"), b.append_basic_block("store")
            b.branch(body)
            b.position_at_end(body)
            step = b.phi(INT64)
            left, above = b.add(rows, b.mul(step, INT64(64))), b.mul(b.mul(step, INT64(16)), columns_stride)
            for i in range(high):
                _moved(b, "tileloadd64", _rows + i, b.add(left, b.mul(down, INT64(i))), rows_stride)
            for j in range(wide):
                _moved(b, "tileloadd64", _columns + j, b.add(b.add(columns, above), INT64(64 * j)), columns_stride)
            for number, _ in places:
                _tile(b, "tdpbf16ps", BYTE(number), BYTE(_rows + number // 2), BYTE(_columns + number % 2))
            following = b.add(step, INT64(1))
            step.add_incoming(INT64(0), before)
            step.add_incoming(following, body)
            b.cbranch(b.icmp_signed("<", following, steps), body, after)
            b.position_at_end(after)
            for number, place in places:
                _moved(b, "tilestored64", number, place, out_stride)
            return INT64(0)

        return SIZE(ADDRESS, SIZE, ADDRESS, SIZE, SIZE, ADDRESS, SIZE), emit

    return block


_new_11, _new_12, _new_21, _new_22 = (_blocks(*shape, True) for shape in ((1, 1), (1, 2), (2, 1), (2, 2)))
_more_11, _more_12, _more_21, _more_22 = (_blocks(*shape, False) for shape in ((1, 1), (1, 2), (2, 1), (2, 2)))


@intrinsic
def _copy(context, source, target):
    """Copy 64 bytes."""

    def emit(_context, b, _signature, args):
        source, target = (b.inttoptr(address, VECTOR.as_pointer()) for address in args)
        b.store(b.load(source, align=2), target, align=4)
        return INT64(0)

    return SIZE(ADDRESS, ADDRESS), emit


@intrinsic
def _add(context, source, target):
    """target += source, one vector of float32 each."""

    def emit(_context, b, _signature, args):
        source, target = (b.inttoptr(address, VECTOR.as_pointer()) for address in args)
        b.store(b.fadd(b.load(target, align=4), b.load(source, align=4)), target, align=4)
        return INT64(0)

    return SIZE(ADDRESS, ADDRESS), emit


@numba.njit(error_model="numpy")
def _new_products(height, count, rows, rows_stride, columns, columns_stride, steps, sums):
    """Store the products of up to 32 rows with `count` (1 or 2) tiles of columns."""
    if height > 16:
        if count == 2:
            _new_22(rows, rows_stride, columns, columns_stride, steps, sums, SUMS)
        else:
            _new_21(rows, rows_stride, columns, columns_stride, steps, sums, SUMS)
    elif count == 2:
        _new_12(rows, rows_stride, columns, columns_stride, steps, sums, SUMS)
    else:
        _new_11(rows, rows_stride, columns, columns_stride, steps, sums, SUMS)


@numba.njit(error_model="numpy")
def _more_products(height, count, rows, rows_stride, columns, columns_stride, steps, sums, sums_stride):
    """Add the products of 16 or 32 rows with `count` (1 or 2) tiles of columns."""
    if height > 16:
        if count == 2:
            _more_22(rows, rows_stride, columns, columns_stride, steps, sums, sums_stride)
        else:
            _more_21(rows, rows_stride, columns, columns_stride, steps, sums, sums_stride)
    elif count == 2:
        _more_12(rows, rows_stride, columns, columns_stride, steps, sums, sums_stride)
    else:
        _more_11(rows, rows_stride, columns, columns_stride, steps, sums, sums_stride)


@task
def product_amx(job):
    """Compute output tiles as `product` does; features' columns are a multiple of 32, a kernel's of 16.

    `width` counts pairs of features' columns. The thread's memory holds gathered rows, then a block's products.
    """
    g = numba.carray(job, (21,))
    counter, rows, inputs, outputs, kernel, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, height, share, shares = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    sources, places = numba.carray(int32_at(inputs), (bounds[-1],)), numba.carray(int32_at(outputs), (bounds[-1],))
    result = numba.carray(float_at(out), (height, columns))
    gathered = g[18] + (4 * TILE * width + SUMS * SIDE) * next_task(g[19])
    sums = gathered + 4 * TILE * width
    _configure(g[20])
    while True:
        number = next_task(counter)
        if number >= tiles * shares:
            _release()
            return
        tile, left = number % tiles, number // tiles * share
        right = min(left + share, columns)
        top, bottom = tile * TILE, min(tile * TILE + TILE, height)
        result[top:bottom, left:right] = 0
        for k in range(offsets):
            first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
            for p in range(first, stop):
                source, target = rows + 4 * np.int64(sources[p]) * width, gathered + 4 * (p - first) * width
                for c in range(0, width, 16):
                    _copy(source + 4 * c, target + 4 * c)
            for c in range(left, right, SIDE):
                count, slice_ = min(2, (right - c) // 16), kernel + 4 * (k * width * columns + c)
                for p in range(first, stop, SIDE):
                    rest, these = min(SIDE, stop - p), gathered + 4 * (p - first) * width
                    _new_products(rest, count, these, 4 * width, slice_, 4 * columns, width // 16, sums)
                    for r in range(rest):
                        target = out + 4 * (np.int64(places[p + r]) * columns + c)
                        for v in range(count):
                            _add(sums + SUMS * r + 64 * v, target + 64 * v)
        if g[14]:
            finish_tile(out, top, bottom, left, right, columns, g[14], g[15], g[16], g[17])


@task
def gradient_amx(job):
    """Compute some rows of a few kernel slices of the gradient, as `gradient_bf16` does; shares are multiples of 16."""
    g = numba.carray(job, (17,))
    counter, rows, inputs, outputs, grad, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, share, shares, group = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    sources, places = numba.carray(int32_at(inputs), (bounds[-1],)), numba.carray(int32_at(outputs), (bounds[-1],))
    result = numba.carray(float_at(out), (offsets, width, columns))
    paired = g[14] + 2 * TILE * (2 * share + columns) * next_task(g[15])
    turned, theirs = paired + 2 * TILE * share, paired + 4 * TILE * share
    _configure(g[16])
    while True:
        number = next_task(counter)
        k_first, top = number // shares * group, number % shares * share
        if k_first >= offsets:
            _release()
            return
        k_stop, bottom = min(k_first + group, offsets), min(top + share, width)
        result[k_first:k_stop, top:bottom] = 0
        for tile in range(tiles):
            for k in range(k_first, k_stop):
                first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
                if first == stop:
                    continue
                steps = (stop - first + 31) // 32
                gather_pairs(rows, width, top, bottom, sources, first, stop, paired, 16 * steps)
                gather_pairs(grad, columns, 0, columns, places, first, stop, theirs, 16 * steps)
                for p in range(0, 16 * steps, 16):
                    for r in range(0, bottom - top, 16):
                        here, there = paired + 4 * (p * (bottom - top) + r), turned + 4 * (r * (TILE // 2) + p)
                        transpose_block(here, bottom - top, there, TILE // 2)
                for c in range(0, columns, SIDE):
                    count = min(2, (columns - c) // 16)
                    for r in range(top, bottom, SIDE):
                        _more_products(
                            min(SIDE, bottom - r),
                            count,
                            turned + 2 * TILE * (r - top),
                            2 * TILE,
                            theirs + 4 * c,
                            4 * columns,
                            steps,
                            out + 4 * ((k * width + r) * columns + c),
                            4 * columns,
                        )
