"""Coordinate maps and kernel maps: which voxel meets which at each offset of a kernel.

A `CoordinateManager` holds one set of voxels and the coarser and finer sets made from it. Every set lies in Morton
order, so that neighbors in space are near in memory; every kernel map is built once and shared by all layers, in both
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from geo_pretrain.sparse import backend
from geo_pretrain.sparse.coordinates import inverted, unique_rows

ALIGNED = 1024  # Morton codes count from a multiple of this, so that cells of strides up to it are runs of the order
KEY_BITS = 62
TILE = 8192  # output rows worked on at once by a CPU
MARGIN = 64  # cells round the bounding box within which a neighbor's key is found by adding to one's own


def kernel_offsets(kernel_size: int) -> list[tuple[int, int, int]]:
    """Offsets (x, y, z) of a cubic kernel's slices, x fastest: centered for odd sizes, from 0 for even ones.

    MinkowskiEngine's order for `RegionType.HYPER_CUBE`, so that its weights need no permutation.
    """
    low = -(kernel_size // 2) if kernel_size % 2 else 0
    steps = range(low, low + kernel_size)
    return [(x, y, z) for z in steps for y in steps for x in steps]


class KernelMap:
    """The input voxel of every output voxel and kernel offset: `table` int32 [N_out, K], -1 = none.

    Voxels are numbered in the Morton order of their coordinate maps.
    """

    def __init__(self, table: Tensor, inputs: int, *, symmetric: bool = False) -> None:
        """`symmetric`: a centered kernel on one set of voxels; the reverse map is then the same with K flipped."""
        self.table, self.inputs, self.symmetric = table, inputs, symmetric
        self._origin: ref[KernelMap] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the table alone, which all else is computed from."""
        return {"table": self.table, "inputs": self.inputs, "symmetric": self.symmetric, "_origin": None}

    @cached_property
    def tiles(self) -> list[tuple[slice, list[tuple[Tensor, Tensor]]]]:
        """Output rows tile by tile, and for each kernel offset (input rows, output rows within the tile), int64.

        A tile's sums fit the cache. No row occurs twice in either list of an offset.
        """
        step = TILE if self.table.device.type == "cpu" else len(self.table)
        tiles = []
        for start in range(0, len(self.table), step):
            part = self.table[start : start + step]
            offset, outputs = (part.t() >= 0).nonzero(as_tuple=True)
            counts = torch.bincount(offset, minlength=part.shape[1]).tolist()
            inputs = part[outputs, offset].long()
            pairs = list(zip(inputs.split(counts), outputs.split(counts), strict=True))
            tiles.append((slice(start, start + len(part)), pairs))
        return tiles

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """For each kernel offset (input rows, output rows)."""
        columns = zip(*(pairs for _, pairs in self.tiles), strict=True)
        starts = [tile.start for tile, _ in self.tiles]
        return [
            (torch.cat([i for i, _ in parts]), torch.cat([o + s for s, (_, o) in zip(starts, parts, strict=True)]))
            for parts in columns
        ]

    @cached_property
    def count(self) -> int:
        """The number of pairs (input voxel, output voxel), over all offsets."""
        return int((self.table >= 0).sum())

    @property
    def reverse(self) -> KernelMap:
        """The map from outputs to inputs, used by transposed convolutions and by the gradient of the input."""
        origin = self.origin
        return self._reversed if origin is None else origin

    @property
    def origin(self) -> KernelMap | None:
        """The map this one was reversed from; None once it is garbage-collected (a weak reference)."""
        return self._origin() if self._origin is not None else None

    @cached_property
    def _reversed(self) -> KernelMap:
        if self.symmetric:
            reverse = KernelMap(self.table.flip(1), len(self.table), symmetric=True)
        else:
            table = self.table.new_full((self.inputs, self.table.shape[1]), -1)
            for k, (inputs, outputs) in enumerate(self.pairs):
                table[inputs, k] = outputs.int()
            reverse = KernelMap(table, len(self.table))
        reverse._origin = ref(self)  # weak: tables of a GPU do not wait for Python to find a circle
        return reverse


class CoordinateMap:
    """The voxels at one tensor stride: unique int32 coordinates [N, 4], multiples of the stride."""

    def __init__(self, coords: Tensor, stride: int, *, exact: bool) -> None:
        """`exact`: rows are in full Morton order, so that the voxels of every aligned cell follow each other."""
        self.coords, self.stride, self.exact = coords, stride, exact

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def index(self) -> CoordinateIndex:
        """Finds rows by coordinate; built when first used."""
        return CoordinateIndex(self.coords, self.stride)

    def kernel_map(self, kernel_size: int, dilation: int) -> KernelMap:
        """The kernel map of a convolution with stride 1."""
        offsets = [(x * dilation, y * dilation, z * dilation) for x, y, z in kernel_offsets(kernel_size)]
        symmetric = kernel_size % 2 == 1
        if backend.is_fast(self.coords):
            from geo_pretrain.sparse.fast import neighbors  # needs the extra `fast`

            table = neighbors(self.coords, self.stride, offsets, symmetric=symmetric)
        else:
            table = self.index.neighbors(offsets, symmetric=symmetric)
        return KernelMap(table, len(self), symmetric=symmetric)

    def coarser(self, factor: int) -> tuple[CoordinateMap, Tensor]:
        """The coordinate map at stride * factor, and the row in it of the coarse voxel around each of our voxels."""
        span = self.stride * factor
        coords = floor_to(self.coords, span)
        if self.exact and factor & (factor - 1) == 0 and ALIGNED % span == 0:
            first = torch.ones(len(coords), dtype=torch.bool, device=coords.device)
            first[1:] = (coords[1:] != coords[:-1]).any(dim=1)
            return CoordinateMap(coords[first], span, exact=True), first.cumsum(0) - 1
        index, group = unique_rows(coords.long())
        kept = coords[index]
        order, exact = morton_order(kept, span)
        return CoordinateMap(kept[order], span, exact=exact), inverted(order)[group]


class CoordinateManager:
    """The coordinate maps of one input at all strides, and the kernel maps between them."""

    def __init__(self, coords: Tensor, stride: int, order: Tensor, exact: bool) -> None:
        """`coords`: unique int32 [N, 4], rows (batch, x, y, z); `order`, `exact`: their `morton_order`."""
        self.base_stride = stride
        self.order = order  # the caller's row of each voxel in Morton order
        self.rank = inverted(order)
        self.batch_size = int(coords[:, 0].max()) + 1
        self.coordinate_maps = {stride: CoordinateMap(coords[order], stride, exact=exact)}
        self._parents: dict[tuple[int, int], Tensor] = {}
        self._kernel_maps: dict[tuple[int, int, int, int], KernelMap] = {}
        self._moved: WeakValueDictionary[torch.device, CoordinateManager] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the voxels of all strides and how they lie in each other. Kernel maps are built anew."""
        maps = {s: CoordinateMap(m.coords, s, exact=m.exact) for s, m in self.coordinate_maps.items()}
        return self.__dict__ | {"coordinate_maps": maps, "_kernel_maps": {}, "_moved": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_moved": WeakValueDictionary()}

    def to(self, device: torch.device) -> CoordinateManager:
        """The same voxels on a device; for one device always the same object, so that its tensors belong together."""
        if self.rank.device == device:
            return self
        if device not in self._moved:
            other = object.__new__(CoordinateManager)
            other.__setstate__(self.__getstate__())
            other.__dict__ |= {"order": self.order.to(device), "rank": self.rank.to(device)}
            other.coordinate_maps = {
                s: CoordinateMap(m.coords.to(device), s, exact=m.exact) for s, m in self.coordinate_maps.items()
            }
            other._parents = {key: parent.to(device) for key, parent in self._parents.items()}
            self._moved[device] = other
            other._moved[self.rank.device] = self
        return self._moved[device]

    def coordinate_map(self, stride: int) -> CoordinateMap:
        """The voxels at a stride. KeyError when no layer has made them yet."""
        return self.coordinate_maps[stride]

    def coarsen(self, stride: int, factor: int) -> CoordinateMap:
        """The coordinate map at stride * factor, made from the one at `stride` if it does not exist yet."""
        key = (stride, stride * factor)
        if stride * factor not in self.coordinate_maps or key not in self._parents:
            fine = self.coordinate_maps[stride]
            coarse, parent = fine.coarser(factor)
            if stride * factor in self.coordinate_maps:  # made from another stride: the same voxels, maybe reordered
                coarse = self.coordinate_maps[stride * factor]
                parent = coarse.index.find(floor_to(fine.coords, stride * factor)).long()
            self.coordinate_maps[stride * factor], self._parents[key] = coarse, parent
        return self.coordinate_maps[stride * factor]

    def refine(self, stride: int, factor: int, kernel_size: int) -> CoordinateMap:
        """The coordinate map at stride / factor; if there is none, every voxel gets all children of the kernel."""
        fine = stride // factor
        if fine not in self.coordinate_maps:
            coarse = self.coordinate_maps[stride].coords
            offsets = coarse.new_tensor([(0, *offset) for offset in kernel_offsets(kernel_size)]) * fine
            rows = (coarse[:, None] + offsets).reshape(-1, 4)
            index, _ = unique_rows(rows.long())
            order, exact = morton_order(rows[index], fine)
            self.coordinate_maps[fine] = CoordinateMap(rows[index][order], fine, exact=exact)
        return self.coordinate_maps[fine]

    def kernel_map(self, stride: int, factor: int, kernel_size: int, dilation: int) -> KernelMap:
        """The kernel map of a convolution from the voxels at `stride` to those at stride * factor."""
        key = (stride, factor, kernel_size, dilation)
        if key not in self._kernel_maps:
            if factor == 1:
                self._kernel_maps[key] = self.coordinate_maps[stride].kernel_map(kernel_size, dilation)
            else:
                self._kernel_maps[key] = self._strided(stride, factor, kernel_size, dilation)
        return self._kernel_maps[key]

    def _strided(self, stride: int, factor: int, kernel_size: int, dilation: int) -> KernelMap:
        coarse, fine = self.coarsen(stride, factor), self.coordinate_maps[stride]
        parent = self._parents.get((stride, stride * factor))
        if kernel_size == factor and dilation == 1 and kernel_size % 2 == 0 and parent is not None:
            # Each fine voxel lies in one cell, at one offset in it: no search.
            rows = (parent >= 0).nonzero()[:, 0]
            cell = (fine.coords[rows, 1:] - coarse.coords[parent[rows], 1:]) // stride
            k = cell[:, 0] + kernel_size * (cell[:, 1] + kernel_size * cell[:, 2])
            table = fine.coords.new_full((len(coarse), kernel_size**3), -1)
            table[parent[rows], k.long()] = rows.int()
        else:
            offsets = [(x * dilation, y * dilation, z * dilation) for x, y, z in kernel_offsets(kernel_size)]
            table = torch.stack([fine.index.find(coarse.coords, offset) for offset in offsets], dim=1)
        return KernelMap(table, len(fine))


class CoordinateIndex:
    """Finds int32 coordinates [N, 4], multiples of `stride`, by binary search; exact whatever their extent.

    A cell's key is its number in the bounding box, if that fits an int64; else its column (batch, x, y) is searched
    first, and then z within the column. A margin round the box keeps the keys of neighbors outside it apart.
    """

    def __init__(self, coords: Tensor, stride: int) -> None:
        self.stride = stride
        self.coords = coords
        cells = self._cells(coords)
        margin = cells.new_tensor((0, MARGIN, MARGIN, MARGIN))
        self.low, self.high = cells.amin(dim=0) - margin, cells.amax(dim=0) + margin
        self.extent = (self.high - self.low + 1).tolist()
        columns = self.extent[0] * self.extent[1] * self.extent[2]
        if columns >> KEY_BITS:
            raise ValueError(
                f"Coordinates span {' x '.join(map(str, self.extent))} (batch, x, y, z); accepted: batch x X x Y up to "
                f"2^{KEY_BITS}. Is a point far outside, or the voxel size too small?"
            )
        column = self._column(cells)
        self.columns: Tensor | None = None
        if (columns * self.extent[3]) >> KEY_BITS:
            self.columns, column = torch.unique(column, return_inverse=True)
        self.keys, self.rows = (column * self.extent[3] + cells[:, 3] - self.low[3]).sort()

    def find(self, coords: Tensor, offset: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
        """The row of each coordinate [M, 4] moved by `offset` (x, y, z) strides: int32 [M], -1 where there is none.

        The coordinates are multiples of the stride too.
        """
        cells = self._cells(coords) + self.low.new_tensor((0, *offset))
        found = ((cells >= self.low) & (cells <= self.high)).all(dim=1)
        column = self._column(cells)
        if self.columns is not None:
            position, same = _search(self.columns, column)
            column, found = position, found & same
        position, same = _search(self.keys, column * self.extent[3] + cells[:, 3] - self.low[3])
        return torch.where(found & same, self.rows[position], -1).int()

    def neighbors(self, offsets: Sequence[tuple[int, int, int]], *, symmetric: bool) -> Tensor:
        """int32 [N, K]: the row at each offset (x, y, z), in strides, from each row; -1 where there is none.

        `symmetric`: the offsets of a centered kernel. If b is a's neighbor then a is b's on the other side, which saves
        half of the search.
        """
        half = len(offsets) // 2 if symmetric else len(offsets)
        # Positions in the sorted keys are searched for, in their order, which is quick; they become rows at the end.
        positions = torch.full((len(offsets), len(self.coords)), -1, dtype=torch.int32, device=self.coords.device)
        own = torch.arange(len(self.coords), dtype=torch.int32, device=self.coords.device)
        for k, offset in enumerate(offsets[:half]):
            positions[k] = self._neighbor(offset)
            if symmetric:
                hit = positions[k] >= 0
                positions[-1 - k, positions[k][hit].long()] = own[hit]
        if symmetric:
            positions[half] = own
        table = torch.empty_like(positions.t(), memory_format=torch.contiguous_format)
        table[self.rows] = torch.where(positions >= 0, self.rows[positions.clamp(min=0)].int(), -1).t()
        return table

    def _neighbor(self, offset: tuple[int, int, int]) -> Tensor:
        """For each key, in sorted order, the position among the keys of the cell `offset` cells away; -1 for none."""
        x, y, z = offset
        if self.columns is None and max(map(abs, offset)) <= MARGIN:
            position, same = _search(self.keys, self.keys + (x * self.extent[2] + y) * self.extent[3] + z)
            return torch.where(same, position, -1)
        found = self.find(self.coords[self.rows], offset).long()
        return torch.where(found >= 0, inverted(self.rows)[found.clamp(min=0)], -1)

    def _cells(self, coords: Tensor) -> Tensor:
        wide = coords.to(torch.int64, copy=True)
        if self.stride > 1:
            wide[:, 1:] //= self.stride
        return wide

    def _column(self, cells: Tensor) -> Tensor:
        moved = cells - self.low
        return (moved[:, 0] * self.extent[1] + moved[:, 1]) * self.extent[2] + moved[:, 2]


def _search(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The position of each wanted number among sorted keys (searchsorted), and whether it is there."""
    position = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return position, keys[position] == wanted


def floor_to(coords: Tensor, span: int) -> Tensor:
    """Round x, y, z of coordinates [N, 4] down, towards minus infinity, to multiples of `span`."""
    down = torch.div(coords, span, rounding_mode="floor") * span
    down[:, 0] = coords[:, 0]
    return down


def has_duplicates(coords: Tensor, order: Tensor, exact: bool) -> bool:
    """Whether a coordinate occurs twice; True also where the Morton order is not exact and nothing is known."""
    sorted_rows = coords[order]
    return not exact or bool((sorted_rows[1:] == sorted_rows[:-1]).all(dim=1).any())


def morton_order(coords: Tensor, stride: int) -> tuple[Tensor, bool]:
    """The Morton order [N] of coordinates [N, 4], batch by batch, and whether it is exact.

    It is not exact when the extent needs more than 63 bits: nearby voxels are still near each other.
    """
    cells = torch.div(coords, stride, rounding_mode="floor").long()
    cells[:, 0] = coords[:, 0]
    low = torch.div(cells.amin(dim=0), ALIGNED, rounding_mode="floor") * ALIGNED
    cells -= low
    top = cells.amax(dim=0).tolist()
    bits, batch_bits = max(top[1:]).bit_length(), int(top[0]).bit_length()
    excess = max(0, bits - min(21, (63 - batch_bits) // 3))
    code = _spread(cells[:, 1] >> excess) | _spread(cells[:, 2] >> excess) << 1 | _spread(cells[:, 3] >> excess) << 2
    code |= cells[:, 0] << 3 * (bits - excess)
    return code.argsort(stable=True), excess == 0


def _spread(value: Tensor) -> Tensor:
    """Move bit i of numbers of up to 21 bits to bit 3 i."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        value = (value | value << shift) & mask
    return value
