"""The neighbor search of kernel maps (extra `fast`): a hash table of voxels on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from geo_pretrain.sparse.compiled import run


def neighbors(coords: Tensor, stride: int, offsets: Sequence[Sequence[int]], *, symmetric: bool) -> Tensor:
    """int32 [N, K]: the row at each offset (x, y, z), in strides, from each row; -1 where there is none.

    `coords` int32 [N, 4] are unique and multiples of `stride`. `symmetric`: the offsets of a centered kernel.
    If b is a's neighbor then a is b's on the other side, which saves half of the search.
    """
    coords, moves = coords.contiguous(), np.array(offsets, np.int64) * stride
    slots = np.empty(1 << max(4, (3 * len(coords)).bit_length()), np.int32)
    table = coords.new_full((len(coords), len(moves)), -1)
    shared = coords.data_ptr(), len(coords), stride, slots.ctypes.data, len(slots)
    run("insert", *shared)
    run("find", *shared, moves.ctypes.data, len(moves), int(symmetric), table.data_ptr())
    return table
