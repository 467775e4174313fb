"""The neighbor search of kernel maps, compiled by numba (extra `fast`): a hash table of voxels on the CPU."""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from geo_pretrain.sparse.compiled import compiled, int32_at, int64_at, next_task, numba, run

VOXELS = 256  # voxels a task


@numba.njit
def _slot(batch, x, y, z, mask):
    """The first slot to search for a cell in the hash table; the eight cells of a cube of two have adjacent slots."""
    mixed = np.uint64(batch) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ np.uint64(x >> 1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29)) ^ np.uint64(y >> 1)) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31)) ^ np.uint64(z >> 1)) * np.uint64(0x9E3779B97F4A7C15)
    return (np.int64(mixed >> np.uint64(29)) * 8 + (x & 1) + 2 * (y & 1) + 4 * (z & 1)) & mask


@compiled
def _hash_tasks(job):
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


@compiled
def _find_tasks(job):
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


def neighbors(coords: Tensor, stride: int, offsets: Sequence[Sequence[int]], *, symmetric: bool) -> Tensor:
    """int32 [N, K]: the row at each offset (x, y, z), in strides, from each row; -1 where there is none.

    `coords` int32 [N, 4] are unique and multiples of `stride`. `symmetric`: the offsets of a centered kernel.
    If b is a's neighbor then a is b's on the other side, which saves half of the search.
    """
    coords, moves = coords.contiguous(), np.array(offsets, np.int64) * stride
    slots = np.empty(1 << max(4, (3 * len(coords)).bit_length()), np.int32)
    table = coords.new_full((len(coords), len(moves)), -1)
    shared = coords.data_ptr(), len(coords), stride, slots.ctypes.data, len(slots)
    run(_hash_tasks, *shared)
    run(_find_tasks, *shared, moves.ctypes.data, len(moves), int(symmetric), table.data_ptr())
    return table
