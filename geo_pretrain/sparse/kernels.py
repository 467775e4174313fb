"""The compiled tasks of the fast kernels, in numba; imported only where they are compiled (see `compiled`).

A task is a function of one job, an array of addresses and sizes that begins with the address of a counter; the threads
draw numbers from the counter and return when none are left.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from geo_pretrain.errors import require
from geo_pretrain.sparse.processor import BLOCK, LANES, TILE, VOXELS, WIDEST

numba = require("numba", "fast")
types, intrinsic = numba.types, numba.extending.intrinsic
cgutils = numba.core.cgutils
ir = cgutils.ir
Value = Any  # of LLVM
Multiply = Callable[[Value, Value, Value, Value], Value]
TASKS: dict[str, Callable[[Any], None]] = {}

INT64, INT32, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
VECTOR, INDICES = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
ADDRESS, SIZE = types.uint64, types.int64


def task(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Register a task under its name."""
    TASKS[function.__name__] = function
    return function


def assembly(name: str) -> tuple[str, str]:
    """Compile a task: its LLVM assembly and the name of its C function there."""
    signature = types.void(types.CPointer(types.int64))
    # Divisions by zero raise nothing: no task calls Python.
    function = numba.cfunc(signature, error_model="numpy")(TASKS[name])
    return function.inspect_llvm(), function.native_name


# ---- Addresses and counters -----------------------------------------------------------------------------------------


@intrinsic
def next_task(context, counter):
    """Return the counter's value and increment it atomically: threads draw their tasks from it."""

    def emit(_context, b, _signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], INT64.as_pointer()), INT64(1), "monotonic")

    return SIZE(ADDRESS), emit


def _pointer_cast(kind: Any) -> Any:
    @intrinsic
    def cast(context, address):
        def emit(_context, b, signature, args):
            return b.inttoptr(args[0], _context.get_value_type(signature.return_type))

        return types.CPointer(kind)(ADDRESS), emit

    return cast


int32_at, int64_at, float_at = (_pointer_cast(kind) for kind in (types.int32, types.int64, types.float32))


# ---- Register blocks: LLVM instructions -----------------------------------------------------------------------------


def row_at(b: Value, base: Value, row: Value, width: Value) -> Value:
    """Pointer to a row of the float matrix at an integer address."""
    return b.gep(b.inttoptr(base, FLOAT.as_pointer()), [b.mul(row, width)])


def _entry(b: Value, rows: Value, index: Value) -> Value:
    """rows[index] of int32 rows, as int64."""
    return b.sext(b.load(b.gep(b.inttoptr(rows, INT32.as_pointer()), [index])), INT64)


def _vectors(b: Value, row: Value, count: int) -> list[Value]:
    """Pointers to the first vectors of a row."""
    return [b.bitcast(b.gep(row, [INT64(v * LANES)]), VECTOR.as_pointer()) for v in range(count)]


def shapes(b: Value, height: Value, width: Value) -> Iterator[tuple[int, int]]:
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


def _muladd(b: Value) -> Value:
    """LLVM's a * b + c of vectors."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32")


def muladd(b: Value, factor: Value, other: Value, total: Value) -> Value:
    """factor * other + total, of vectors."""
    return b.call(_muladd(b), [factor, other, total])


def dot(b: Value, factor: Value, other: Value, total: Value) -> Value:
    """Total + the dot products of pairs of bfloat16, which lie in the floats of two vectors (avx512_bf16)."""
    # The types are those of LLVM 15, which later ones take over.
    kind = ir.FunctionType(VECTOR, [VECTOR, INDICES, INDICES])
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}")
    return b.call(function, [total, b.bitcast(factor, INDICES), b.bitcast(other, INDICES)])


def accumulate(
    b: Value, sums: list[Value], count: int, first: Value, stop: Value, step: Callable[..., Any], multiply: Multiply
) -> None:
    """sums[r] += scalars[r] * row over all i from `first` to `stop` (at least one), where step(i) = (scalars, row).

    Rows are `count` vectors wide. Sums are loaded before the loop and stored after it.
    """
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
            multiply(b, spread, f, t) for f, t in zip(factors, totals[r * count : (r + 1) * count], strict=True)
        ]
    i_next = b.add(i, INT64(1))
    for phi, entering, returning in zip([i, *totals], [first, *start], [i_next, *following], strict=True):
        phi.add_incoming(entering, before)
        phi.add_incoming(returning, body)
    b.cbranch(b.icmp_signed("<", i_next, stop), body, after)
    b.position_at_end(after)
    for place, value in zip(places, following, strict=True):
        b.store(value, place, align=4)


def product_blocks(multiply: Multiply) -> Any:
    """Make the intrinsic that multiplies a block of gathered rows with a kernel slice."""

    @intrinsic
    def block(context, height, count, rows, width, inputs, outputs, p, kernel, kernel_width, out, out_width):
        """out[outputs[p + r]] += rows[inputs[p + r]] @ kernel for r < height, on `count` vectors of columns."""

        def emit(_context, b, _signature, args):
            height, count, rows, width, inputs, outputs, p, kernel, kernel_width, out, out_width = args
            for block_height, block_count in shapes(b, height, count):
                places = [b.add(p, INT64(r)) for r in range(block_height)]
                sources = [row_at(b, rows, _entry(b, inputs, place), width) for place in places]
                sums = [row_at(b, out, _entry(b, outputs, place), out_width) for place in places]

                def step(c, sources=sources):
                    return [b.gep(source, [c]) for source in sources], row_at(b, kernel, c, kernel_width)

                accumulate(b, sums, block_count, INT64(0), width, step, multiply)
            return INT64(0)

        return SIZE(SIZE, SIZE, ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, SIZE, ADDRESS, SIZE), emit

    return block


@intrinsic
def _gradient_block(context, height, count, rows, width, inputs, outputs, first, stop, grad, grad_width, out):
    """out[r] += rows[inputs[p], r] * grad[outputs[p]] over p in [first, stop), for r < height, on `count` vectors."""

    def emit(_context, b, _signature, args):
        height, count, rows, width, inputs, outputs, first, stop, grad, grad_width, out = args
        for block_height, block_count in shapes(b, height, count):

            def step(p, block_height=block_height):
                source = row_at(b, rows, _entry(b, inputs, p), width)
                scalars = [b.gep(source, [INT64(r)]) for r in range(block_height)]
                return scalars, row_at(b, grad, _entry(b, outputs, p), grad_width)

            sums = [row_at(b, out, INT64(r), grad_width) for r in range(block_height)]
            accumulate(b, sums, block_count, first, stop, step, muladd)
        return INT64(0)

    return SIZE(SIZE, SIZE, ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS, SIZE, ADDRESS), emit


@intrinsic
def transpose_block(context, source, source_width, target, target_width):
    """target[j, i] = source[i, j] for a square of one vector's width."""

    def emit(_context, b, _signature, args):
        source, source_width, target, target_width = args
        rows = [b.load(_vectors(b, row_at(b, source, INT64(i), source_width), 1)[0], align=4) for i in range(LANES)]
        step = 1
        while step < LANES:  # swap the two squares of `step` that lie off the diagonal of each square twice as large
            low = INDICES([j if j & step == 0 else j - step + LANES for j in range(LANES)])
            high = INDICES([j + step if j & step == 0 else j + LANES for j in range(LANES)])
            for i in (i for i in range(LANES) if i & step == 0):
                above, below = rows[i], rows[i + step]
                rows[i], rows[i + step] = b.shuffle_vector(above, below, low), b.shuffle_vector(above, below, high)
            step *= 2
        for j, row in enumerate(rows):
            b.store(row, _vectors(b, row_at(b, target, INT64(j), target_width), 1)[0], align=4)
        return INT64(0)

    return SIZE(ADDRESS, SIZE, ADDRESS, SIZE), emit


def _finishing(with_residual: bool) -> Any:
    """Make the intrinsic that changes one vector of results, in the order and rounding of torch's own operations."""

    @intrinsic
    def finish(context, out, scale, shift, residual, floor):
        """out = max(out * scale + shift [+ residual], floor), not a number where it was."""

        def emit(_context, b, _signature, args):
            out, scale, shift, residual, floor = args
            place, *others = [b.inttoptr(address, VECTOR.as_pointer()) for address in (out, scale, shift, residual)]
            value, factor, term = (b.load(pointer, align=4) for pointer in (place, *others[:2]))
            value = b.call(_muladd(b), [value, factor, term])
            if with_residual:
                value = b.fadd(value, b.load(others[2], align=4))
            undefined = VECTOR(ir.Undefined)
            least = b.shuffle_vector(b.insert_element(undefined, floor, INT32(0)), undefined, INDICES([0] * LANES))
            b.store(b.select(b.fcmp_ordered("<", value, least), least, value), place, align=4)
            return INT64(0)

        return SIZE(ADDRESS, ADDRESS, ADDRESS, ADDRESS, types.float32), emit

    return finish


_finish, _finish_with_residual = _finishing(False), _finishing(True)


# ---- Convolution ----------------------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def finish_tile(out, top, bottom, left, right, columns, scale, shift, residual, relu):
    """Scale and shift results, add the residual if there is one, and so on, while they are in cache."""
    floor = np.float32(0) if relu else np.float32(-np.inf)
    for row in range(top, bottom):
        for c in range(left, right, LANES):
            place = 4 * (row * columns + c)
            if residual:
                _finish_with_residual(out + place, scale + 4 * c, shift + 4 * c, residual + place, floor)
            else:
                _finish(out + place, scale + 4 * c, shift + 4 * c, 0, floor)


def product_task(block: Any) -> Callable[[Any], None]:
    """Make the task of a convolution from the intrinsic that multiplies its blocks."""

    def product(job):
        """Compute output tiles, each for all columns or, where there are few tiles, for some.

        Where `scale` is not 0 they are scaled, shifted and so on while they are in cache.
        """
        g = numba.carray(job, (18,))
        counter, rows, inputs, outputs, kernel, out = g[0], g[1], g[2], g[3], g[4], g[5]
        starts, tiles, offsets, width = g[6], g[7], g[8], g[9]
        columns, height, share, shares = g[10], g[11], g[12], g[13]
        bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
        result = numba.carray(float_at(out), (height, columns))
        while True:
            number = next_task(counter)
            if number >= tiles * shares:
                return
            tile, left = number % tiles, number // tiles * share
            right = min(left + share, columns)
            top, bottom = tile * TILE, min(tile * TILE + TILE, height)
            result[top:bottom, left:right] = 0
            for k in range(offsets):
                first, stop = bounds[tile * offsets + k], bounds[tile * offsets + k + 1]
                for c in range(left, right, WIDEST * LANES):
                    count = min(WIDEST, (right - c) // LANES)
                    here, there = kernel + 4 * (k * width * columns + c), out + 4 * c
                    for p in range(first, stop, BLOCK):
                        rest = min(BLOCK, stop - p)
                        block(rest, count, rows, width, inputs, outputs, p, here, columns, there, columns)
            if g[14]:
                finish_tile(out, top, bottom, left, right, columns, g[14], g[15], g[16], g[17])

    return product


TASKS["product"] = product_task(product_blocks(muladd))


@task
def gradient(job):
    """Compute some rows of a few kernel slices of the gradient, over the pairs of all tiles."""
    g = numba.carray(job, (14,))
    counter, rows, inputs, outputs, grad, out = g[0], g[1], g[2], g[3], g[4], g[5]
    starts, tiles, offsets, width, columns, share, shares, group = g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13]
    bounds = numba.carray(int64_at(starts), (tiles * offsets + 1,))
    result = numba.carray(float_at(out), (offsets, width, columns))
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
                for c in range(0, columns, WIDEST * LANES):
                    count, there = min(WIDEST, (columns - c) // LANES), grad + 4 * c
                    for r in range(top, bottom, BLOCK):
                        rest, here = min(BLOCK, bottom - r), out + 4 * ((k * width + r) * columns + c)
                        source = rows + 4 * r
                        _gradient_block(rest, count, source, width, inputs, outputs, first, stop, there, columns, here)


@task
def transpose(job):
    """Transpose kernel slices [K, Cin, Cout] to [K, Cout, Cin]; both widths are multiples of a vector."""
    g = numba.carray(job, (6,))
    counter, source, target, offsets, width, columns = g[0], g[1], g[2], g[3], g[4], g[5]
    while True:
        number = next_task(counter)
        k, i = number // (width // LANES), number % (width // LANES) * LANES
        if k >= offsets:
            return
        here, there = source + 4 * (k * width + i) * columns, target + 4 * (k * columns * width + i)
        for j in range(0, columns, LANES):
            transpose_block(here + 4 * j, columns, there + 4 * j * width, width)


@task
def list_pairs(job):
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


# ---- Neighbor search -------------------------------------------------------------------------------------------------


@numba.njit
def _slot(batch, x, y, z, mask):
    """The first slot to search for a cell in the hash table; the eight cells of a cube of two have adjacent slots."""
    mixed = np.uint64(batch) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ np.uint64(x >> 1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29)) ^ np.uint64(y >> 1)) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31)) ^ np.uint64(z >> 1)) * np.uint64(0x9E3779B97F4A7C15)
    return (np.int64(mixed >> np.uint64(29)) * 8 + (x & 1) + 2 * (y & 1) + 4 * (z & 1)) & mask


@task
def insert(job):
    """Insert every row into the hash table; a single task, since slots are taken one after another."""
    g = numba.carray(job, (6,))
    count, stride, size = g[2], g[3], g[5]
    if next_task(g[0]) > 0:
        return
    coords, slots = numba.carray(int32_at(g[1]), (count, 4)), numba.carray(int32_at(g[4]), (size,))
    slots[:] = -1
    for row in range(count):
        c = coords[row]
        slot = _slot(c[0], c[1] // stride, c[2] // stride, c[3] // stride, size - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        slots[slot] = row


@task
def find(job):
    """Look up the neighbor of each row at each offset; half of a symmetric table is searched, the rest mirrored."""
    g = numba.carray(job, (10,))
    counter, count, stride, size, offsets, symmetric = g[0], g[2], g[3], g[5], g[7], g[8]
    coords, slots = numba.carray(int32_at(g[1]), (count, 4)), numba.carray(int32_at(g[4]), (size,))
    moves, table = numba.carray(int64_at(g[6]), (offsets, 3)), numba.carray(int32_at(g[9]), (count, offsets))
    searched = offsets // 2 if symmetric else offsets
    while True:
        first = next_task(counter) * VOXELS
        if first >= count:
            return
        for row in range(first, min(first + VOXELS, count)):
            batch = coords[row, 0]
            for k in range(searched):
                # int64: a move may leave int32, where nothing lies
                x, y, z = coords[row, 1] + moves[k, 0], coords[row, 2] + moves[k, 1], coords[row, 3] + moves[k, 2]
                slot = _slot(batch, x // stride, y // stride, z // stride, size - 1)
                found = slots[slot]
                while found >= 0:
                    c = coords[found]
                    if c[1] == x and c[2] == y and c[3] == z and c[0] == batch:
                        table[row, k] = found
                        if symmetric:
                            table[found, offsets - 1 - k] = row
                        break
                    slot = (slot + 1) & (size - 1)
                    found = slots[slot]
            if symmetric:
                table[row, searched] = row
