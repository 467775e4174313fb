"""Kernel maps as other libraries' products read them. Each layout is made once a map and kept on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geo_pretrain.sparse.maps import KernelMap

WORD = 32  # offsets that one mask holds


def padded_pairs(kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """The pairs of a kernel map, int32 [2, K, most pairs], inputs then outputs, -1 behind the last; their numbers [K].

    The result is cached on the map.
    """
    if "padded_pairs" not in kernel_map.__dict__:
        table = kernel_map.table.t()
        offset, outputs = (table >= 0).nonzero(as_tuple=True)
        counts = torch.bincount(offset, minlength=len(table))
        place = torch.arange(len(offset), device=table.device) - (counts.cumsum(0) - counts)[offset]
        pairs = table.new_full((2, len(table), int(counts.max())), -1)
        pairs[0, offset, place], pairs[1, offset, place] = table[offset, outputs], outputs.int()
        kernel_map.__dict__["padded_pairs"] = pairs, counts.int()
    kept: tuple[Tensor, Tensor] = kernel_map.__dict__["padded_pairs"]
    return kept


class MaskedPairs(NamedTuple):
    """A kernel map as implicit GEMM reads it: outputs with the same offsets follow each other."""

    table: Tensor  # int32 [K, N_out], the input row of each offset and output; -1: none
    masks: Tensor  # int32 [N_out, 1], ascending as unsigned: bit k where the output at this place has offset k
    order: Tensor  # int32 [N_out], the output row at each place


def masked_pairs(kernel_map: KernelMap) -> MaskedPairs:
    """The table, masks and order of a kernel map of at most 32 offsets; cached on the map."""
    if "masked_pairs" not in kernel_map.__dict__:
        table = kernel_map.table
        bits = torch.arange(table.shape[1], device=table.device)
        masks, order = ((table >= 0).long() << bits).sum(dim=1).sort(stable=True)
        signed = torch.where(masks >> (WORD - 1) > 0, masks - (1 << WORD), masks).int()
        kernel_map.__dict__["masked_pairs"] = MaskedPairs(table.t().contiguous(), signed[:, None], order.int())
    kept: MaskedPairs = kernel_map.__dict__["masked_pairs"]
    return kept


class ListedPairs(NamedTuple):
    """A kernel map as WarpConvNet reads it: the pairs offset after offset."""

    inputs: Tensor  # int32 [P]
    outputs: Tensor  # int32 [P]
    starts: Tensor  # int32 [K + 1], where each offset starts, and the end
    center: int | None  # the offset at which every voxel meets itself


def listed_pairs(kernel_map: KernelMap) -> ListedPairs:
    """The pairs of a kernel map, offset after offset."""
    table = kernel_map.table.t()
    offset, outputs = (table >= 0).nonzero(as_tuple=True)
    ends = torch.bincount(offset, minlength=len(table)).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends]).int()
    return ListedPairs(table[offset, outputs], outputs.int(), starts, len(table) // 2 if kernel_map.symmetric else None)
