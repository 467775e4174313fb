"""The sparse tensor: voxels with features, and the grid they share with everything computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from geo_pretrain.sparse.coordinates import unique_rows
from geo_pretrain.sparse.maps import Grid, Level, has_duplicates, morton_order


class SparseTensor:
    """Features [N, C] on occupied voxels; coordinates are int32 rows (batch, x, y, z), multiples of `stride`.

    Rows keep the caller's order; where a coordinate occurs twice its first row is kept and `inverse` [N_given] tells
    where every given row went. Batch elements are numbered from 0 and none may be empty. Tensors that layers compute
    from this one share its `grid`: coordinates of all strides, and kernel maps, are built once. Strided tensors have
    an order of their own: compare them by coordinate.

    Inside, rows lie along a Z-curve, in which the layers work: `rows` are the features in that order.

    >>> x = SparseTensor(torch.tensor([[0, 1, 2, 3], [0, -1, 2, 3]], dtype=torch.int32), torch.tensor([[1.0], [2.0]]))
    >>> x.with_rows(x.rows * 10).feats.tolist()
    [[10.0], [20.0]]
    """

    def __init__(self, coords: Tensor, feats: Tensor, stride: int = 1) -> None:
        _check(coords, feats, stride)
        self.inverse: Tensor | None = None
        order = morton_order(coords, stride)
        if has_duplicates(coords, *order):
            index, inverse = unique_rows(coords.long())
            if len(index) < len(coords):
                coords, feats, self.inverse = coords[index], feats[index], inverse
                order = morton_order(coords, stride)
        self.grid = Grid(coords, stride, *order)
        self.stride = stride
        self.rows = feats[self.grid.order]

    def with_rows(self, rows: Tensor, *, stride: int | None = None) -> SparseTensor:
        """A tensor on the same grid (at another stride) with features in the engine's order."""
        other = object.__new__(SparseTensor)
        other.grid, other.rows, other.inverse = self.grid, rows, self.inverse
        other.stride = self.stride if stride is None else stride
        if len(rows) != len(other.level):
            raise ValueError(
                f"Got {len(rows)} rows of features for {len(other.level)} voxels of stride {other.stride}."
            )
        return other

    def with_feats(self, feats: Tensor) -> SparseTensor:
        """The same voxels with other features, in the order of `coords`."""
        if len(feats) != len(self):
            raise ValueError(f"Got {len(feats)} rows of features for {len(self)} voxels of stride {self.stride}.")
        return self.with_rows(feats[self.grid.order] if self.stride == self.grid.base else feats)

    @property
    def level(self) -> Level:
        """This tensor's set of voxels."""
        return self.grid.level(self.stride)

    @property
    def coords(self) -> Tensor:
        """int32 [N, 4]."""
        coords = self.level.coords
        return coords[self.grid.rank] if self.stride == self.grid.base else coords

    @property
    def feats(self) -> Tensor:
        """[N, C], row by row those of `coords`."""
        return self.rows[self.grid.rank] if self.stride == self.grid.base else self.rows

    @property
    def batch_size(self) -> int:
        """Number of batch elements."""
        return self.grid.batch_size

    @property
    def batch(self) -> Tensor:
        """The batch number of each of `rows`: int64 [N]."""
        return self.level.coords[:, 0].long()

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: SparseTensor) -> SparseTensor:
        _check_together((self, other))
        return self.with_rows(self.rows + other.rows)

    def __repr__(self) -> str:
        return (
            f"SparseTensor({len(self)} voxels x {self.rows.shape[1]} channels, stride {self.stride}, "
            f"batch {self.batch_size}, {self.rows.dtype}, {self.rows.device})"
        )


def cat(*tensors: SparseTensor) -> SparseTensor:
    """Channels of tensors on the same voxels side by side, in the order given."""
    _check_together(tensors)
    return tensors[0].with_rows(torch.cat([t.rows for t in tensors], dim=1))


def _check_together(tensors: tuple[SparseTensor, ...]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        if other.grid is not first.grid:
            raise ValueError(
                "The tensors come from two different inputs, so their rows do not correspond; accepted: tensors "
                "computed from one SparseTensor. x.with_feats(feats) gives its voxels other features."
            )
        if other.stride != first.stride:
            raise ValueError(f"The tensors have strides {first.stride} and {other.stride}; accepted: equal strides.")


def _check(coords: Tensor, feats: Tensor, stride: int) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords are {tuple(coords.shape)}; accepted: [N, 4] with rows (batch, x, y, z).")
    if coords.dtype != torch.int32:
        hint = "voxelize(points, feats, voxel_size) makes them from meters" if coords.is_floating_point() else ".int()"
        raise ValueError(f"coords are {coords.dtype}; accepted: torch.int32 ({hint}).")
    if feats.ndim != 2 or len(feats) != len(coords) or not feats.is_floating_point():
        raise ValueError(
            f"feats are {feats.dtype} {tuple(feats.shape)}; accepted: floating point [N, C] with N = {len(coords)}."
        )
    if feats.device != coords.device:
        raise ValueError(f"coords are on {coords.device}, feats on {feats.device}; accepted: one device.")
    if not len(coords):
        raise ValueError("A sparse tensor needs at least one voxel; got none.")
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride is {stride!r}; accepted: whole numbers from 1 up.")
    if stride > 1 and (coords[:, 1:] % stride != 0).any():
        raise ValueError(f"coords at stride {stride} must be multiples of it; coords * stride turns cell numbers so.")
    _check_batches(coords[:, 0])


def _check_batches(batch: Tensor) -> None:
    low, high = int(batch.min()), int(batch.max())
    if low < 0:
        raise ValueError(f"Batch numbers (the first column of coords) begin at {low}; accepted: 0, 1, 2, ...")
    if high >= len(batch) or not bool(batch.bincount(minlength=high + 1).all()):
        numbers = set(batch.unique().tolist())
        missing = next(number for number in range(high + 1) if number not in numbers)
        raise ValueError(
            f"Batch element {missing} of {high + 1} has no voxels; accepted: every number from 0 to {high} occurs. "
            "Is the batch number the first column?"
        )
