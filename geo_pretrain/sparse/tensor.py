"""The sparse tensor: features on voxels, whose coordinates and kernel maps all tensors computed from it share."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from geo_pretrain.errors import InputError, renamed
from geo_pretrain.inputs import described
from geo_pretrain.sparse.coordinates import unique_rows
from geo_pretrain.sparse.maps import CoordinateManager, CoordinateMap, has_duplicates, morton_order


class SparseTensor:
    """Features [N, C] on occupied voxels; coordinates are int32 rows (batch, x, y, z), multiples of `stride`.

    Rows keep the caller's order; where a coordinate occurs twice its first row is kept and `inverse` [N_given] tells
    where every given row went. Batch elements are numbered from 0 and none may be empty. Tensors that layers compute
    from this one share its `coordinate_manager`: coordinates of all strides, and kernel maps, are built once. Strided
    tensors have an order of their own: compare them by coordinate.

    Layers work in Morton order (along a Z-curve): `sorted_feats` are the features in that order. Where 16-bit features
    are computed in float32 (on a CPU), layers hand on `computed_feats`, not rounded; `feats` and `sorted_feats` are
    rounded to `dtype`.

    Pickles and copies hold voxels and features; kernel maps are built anew where they are needed. As with torch's
    tensors, what was computed with gradients is detached before it is copied.

    >>> x = SparseTensor(torch.tensor([[0, 1, 2, 3], [0, -1, 2, 3]], dtype=torch.int32), torch.tensor([[1.0], [2.0]]))
    >>> x.with_sorted_feats(x.sorted_feats * 10).feats.tolist()
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
        self.coordinate_manager = CoordinateManager(coords, stride, *order)
        self.stride = stride
        self.computed_feats, self.dtype = feats[self.coordinate_manager.order], feats.dtype

    rows = renamed("rows", "sorted_feats")
    with_rows = renamed("with_rows", "with_sorted_feats")
    grid = renamed("grid", "coordinate_manager")

    @property
    def sorted_feats(self) -> Tensor:
        """Features [N, C] in Morton order."""
        return self.computed_feats.to(self.dtype)

    def with_sorted_feats(
        self, sorted_feats: Tensor, *, stride: int | None = None, dtype: torch.dtype | None = None
    ) -> SparseTensor:
        """The same voxels, or those at another stride, with other features in Morton order.

        `dtype` is what readers get the features in, their own if it is None.
        """
        other = object.__new__(SparseTensor)
        other.coordinate_manager, other.inverse = self.coordinate_manager, self.inverse
        other.computed_feats, other.dtype = sorted_feats, dtype or sorted_feats.dtype
        other.stride = self.stride if stride is None else stride
        voxels = len(other.coordinate_map)
        if len(sorted_feats) != voxels:
            raise ValueError(f"Got {len(sorted_feats)} rows of features for {voxels} voxels of stride {other.stride}.")
        return other

    def with_feats(self, feats: Tensor) -> SparseTensor:
        """The same voxels with other features, in the order of `coords`."""
        if len(feats) != len(self):
            raise ValueError(f"Got {len(feats)} rows of features for {len(self)} voxels of stride {self.stride}.")
        return self.with_sorted_feats(
            feats[self.coordinate_manager.order] if self.stride == self.coordinate_manager.base_stride else feats
        )

    @property
    def coordinate_map(self) -> CoordinateMap:
        """The voxels at this tensor's stride, in Morton order."""
        return self.coordinate_manager.coordinate_map(self.stride)

    @property
    def coords(self) -> Tensor:
        """Voxel coordinates, int32 [N, 4]."""
        return self._in_given_order(self.coordinate_map.coords)

    @property
    def feats(self) -> Tensor:
        """Features [N, C], row by row those of `coords`."""
        return self._in_given_order(self.sorted_feats)

    @property
    def batch_size(self) -> int:
        """Number of batch elements."""
        return self.coordinate_manager.batch_size

    @property
    def batch(self) -> Tensor:
        """The batch number of each row of `sorted_feats`: int64 [N]."""
        return self.coordinate_map.coords[:, 0].long()

    @property
    def device(self) -> torch.device:
        """Where coordinates and features lie."""
        return self.computed_feats.device

    def to(
        self, device: torch.device | str | Tensor | SparseTensor | None = None, dtype: torch.dtype | None = None
    ) -> SparseTensor:
        """The tensor on a device, or with features of another floating point type, or both; itself if nothing changes.

        Tensors that were computed from each other belong together on the new device, too.
        """
        if isinstance(device, torch.dtype):  # x.to(torch.float16), as with tensors
            device, dtype = None, device
        elif isinstance(device, Tensor | SparseTensor):  # x.to(other): its device and type
            dtype, device = device.dtype, device.device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; accepted: floating point types.")
        place = self.device if device is None else torch.empty(0, device=device).device
        dtype = dtype or self.dtype
        if place == self.device and dtype == self.dtype:
            return self
        rows = self.computed_feats if dtype == self.dtype else self.sorted_feats.to(dtype)
        return self._with_rows(rows.to(place), dtype)

    def cpu(self) -> SparseTensor:
        """The tensor in the memory of the CPU."""
        return self.to("cpu")

    def cuda(self) -> SparseTensor:
        """The tensor on the current GPU."""
        return self.to("cuda")

    def detach(self) -> SparseTensor:
        """The same voxels and features, without their history."""
        return self._with_rows(self.computed_feats.detach(), self.dtype)

    def _with_rows(self, rows: Tensor, dtype: torch.dtype) -> SparseTensor:
        other = object.__new__(SparseTensor)
        other.__dict__ |= self.__dict__ | {"computed_feats": rows, "dtype": dtype}
        other.coordinate_manager = self.coordinate_manager.to(rows.device)
        other.inverse = None if self.inverse is None else self.inverse.to(rows.device)
        return other

    def _in_given_order(self, rows: Tensor) -> Tensor:
        """Rows in Morton order, put into the order of the caller's voxels; strided tensors keep their own order."""
        return rows[self.coordinate_manager.rank] if self.stride == self.coordinate_manager.base_stride else rows

    def __len__(self) -> int:
        return len(self.computed_feats)

    def __add__(self, other: SparseTensor) -> SparseTensor:
        _check_together((self, other))
        return self.with_sorted_feats(self.computed_feats + other.computed_feats, dtype=_common_dtype(self, other))

    def __repr__(self) -> str:
        return (
            f"SparseTensor({len(self)} voxels x {self.computed_feats.shape[1]} channels, stride {self.stride}, "
            f"batch {self.batch_size}, {self.dtype}, {self.computed_feats.device})"
        )


def cat(*tensors: SparseTensor) -> SparseTensor:
    """Concatenate the channels of tensors on the same voxels."""
    _check_together(tensors)
    rows = torch.cat([t.computed_feats for t in tensors], dim=1)
    return tensors[0].with_sorted_feats(rows, dtype=_common_dtype(*tensors))


def _common_dtype(*tensors: SparseTensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def _check_together(tensors: tuple[SparseTensor, ...]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        if other.coordinate_manager is not first.coordinate_manager:
            raise ValueError(
                "The tensors come from two different inputs, so their rows do not correspond; accepted: tensors "
                "computed from one SparseTensor. x.with_feats(feats) gives its voxels other features."
            )
        if other.stride != first.stride:
            raise ValueError(f"The tensors have strides {first.stride} and {other.stride}; accepted: equal strides.")


def _check(coords: Tensor, feats: Tensor, stride: int) -> None:
    for name, given in (("coords", coords), ("feats", feats)):
        if not isinstance(given, Tensor):
            line = "SparseTensor(torch.as_tensor(coords), torch.as_tensor(feats)) for arrays, or encode_points(points)"
            raise InputError(f"{name} are {described(given)}; accepted: a tensor. {line}.")
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise InputError(f"coords are {tuple(coords.shape)}; accepted: [N, 4] with rows (batch, x, y, z).")
    if coords.dtype != torch.int32:
        hint = "voxelize(points, feats, voxel_size) makes them from meters" if coords.is_floating_point() else ".int()"
        raise InputError(f"coords are {coords.dtype}; accepted: torch.int32 ({hint}).")
    if feats.ndim != 2 or len(feats) != len(coords) or not feats.is_floating_point():
        raise InputError(
            f"feats are {feats.dtype} {tuple(feats.shape)}; accepted: floating point [N, C] with N = {len(coords)}."
        )
    if feats.device != coords.device:
        raise InputError(f"coords are on {coords.device}, feats on {feats.device}; accepted: one device.")
    if not len(coords):
        raise InputError("A sparse tensor needs at least one voxel; got none.")
    if not isinstance(stride, int) or stride < 1:
        raise InputError(f"stride is {stride!r}; accepted: whole numbers from 1 up.")
    if stride > 1 and (coords[:, 1:] % stride != 0).any():
        raise InputError(f"coords at stride {stride} must be multiples of it; coords * stride turns cell numbers so.")
    _check_batches(coords[:, 0])


def _check_batches(batch: Tensor) -> None:
    low, high = int(batch.min()), int(batch.max())
    if low < 0:
        raise InputError(f"Batch numbers (the first column of coords) begin at {low}; accepted: 0, 1, 2, ...")
    if high >= len(batch) or not bool(batch.bincount(minlength=high + 1).all()):
        numbers = set(batch.unique().tolist())
        missing = next(number for number in range(high + 1) if number not in numbers)
        raise InputError(
            f"Batch element {missing} of {high + 1} has no voxels; accepted: every number from 0 to {high} occurs. "
            "Is the batch number the first column?"
        )
