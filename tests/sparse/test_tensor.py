"""The sparse tensor: order of rows, duplicates, what fits together, and errors that explain themselves."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo_pretrain.sparse import SparseTensor, cat
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d
from tests.sparse.twins import cells, random_cloud, rows_at

pytestmark = pytest.mark.usefixtures("plain")

INT = torch.int32


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    repeats=st.integers(0, 60),
    scale=st.sampled_from([1, 2**19, 2**28]),
    stride=st.sampled_from([1, 2]),
)
def test_rows_keep_the_callers_order_and_the_first_of_duplicates(seed: int, repeats: int, scale: int, stride: int):
    """`scale` spreads the voxels until their Morton codes, and then their keys, no longer fit."""
    coords, _ = random_cloud(seed, (20, 12), reach=3, stride=stride)
    coords[:, 1:] *= scale
    generator = torch.Generator().manual_seed(seed)
    coords = coords[torch.randint(0, len(coords), (len(coords) + repeats,), generator=generator)]
    coords = torch.cat([coords, torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]], dtype=INT)])
    feats = torch.arange(len(coords), dtype=torch.float64)[:, None]
    first: dict[tuple[int, ...], int] = {}
    for row, cell in enumerate(cells(coords)):
        first.setdefault(cell, row)
    x = SparseTensor(coords, feats, stride)
    assert cells(x.coords) == list(first)
    assert x.feats.flatten().tolist() == list(first.values())
    assert len(x) == len(first)
    if len(first) < len(coords):
        assert x.inverse is not None
        assert torch.equal(x.coords[x.inverse], coords)
    else:
        assert x.inverse is None or x.inverse.tolist() == list(range(len(coords)))


def test_features_leave_in_the_order_in_which_they_came():
    coords, feats = random_cloud(1)
    x = SparseTensor(coords, feats)
    assert torch.equal(x.coords, coords)
    assert torch.equal(x.feats, feats)
    assert not torch.equal(x.sorted_feats, feats)  # the order inside is another one, or this test sees nothing
    assert torch.equal(x.with_feats(2 * feats).feats, 2 * feats)
    assert torch.equal(x.with_sorted_feats(2 * x.sorted_feats).feats, 2 * feats)
    assert torch.equal(x.coordinate_map.coords[x.coordinate_manager.rank], coords)
    assert torch.equal(x.batch, x.coordinate_map.coords[:, 0].long())


def test_gradients_return_to_the_kept_rows():
    coords = torch.tensor([[0, 5, 5, 5], [0, -5, 0, 0], [0, 5, 5, 5], [0, 0, 0, 0]], dtype=INT)
    feats = torch.zeros(4, 1, requires_grad=True)
    x = SparseTensor(coords, feats)
    (x.feats * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert feats.grad.flatten().tolist() == [1, 2, 0, 3]


def test_features_read_without_gradients_have_them_afterwards():
    coords, feats = random_cloud(6)
    x = SparseTensor(coords, feats.requires_grad_())
    with torch.no_grad():
        assert not x.feats.requires_grad
    assert x.feats.requires_grad


def test_strided_tensors_have_an_order_of_their_own():
    coords, feats = random_cloud(2)
    y = Conv3d(3, 2, 2, 2).double()(SparseTensor(coords, feats))
    assert torch.equal(y.feats, y.sorted_feats)
    again = y.with_feats(y.feats + 1)
    assert torch.equal(again.coords, y.coords)
    assert torch.equal(again.feats, y.feats + 1)
    assert torch.equal(rows_at(again, y.coords), again.feats)


def test_description_and_sizes():
    coords, feats = random_cloud(3, (9, 4, 1))
    x = SparseTensor(coords, feats)
    assert (len(x), x.batch_size, x.stride) == (14, 3, 1)
    assert repr(x) == "SparseTensor(14 voxels x 3 channels, stride 1, batch 3, torch.float64, cpu)"


def test_sums_and_concatenations_row_by_row():
    coords, feats = random_cloud(4)
    x = SparseTensor(coords, feats)
    y = x.with_feats(feats[:, :1] * 10)
    assert torch.equal(cat(x, y, x).feats, torch.cat([feats, feats[:, :1] * 10, feats], dim=1))
    assert torch.equal((x + x.with_feats(feats * 10)).feats, feats + feats * 10)


def two_levels() -> tuple[SparseTensor, SparseTensor]:
    coords, feats = random_cloud(5)
    x = SparseTensor(coords, feats.float())
    return x, Conv3d(3, 3, 2, 2)(x)


def test_tensors_of_two_inputs_do_not_mix():
    x, coarse = two_levels()
    other = SparseTensor(x.coords, x.feats)  # equal voxels, but nobody has compared them
    for together in (cat, lambda a, b: a + b):
        with pytest.raises(
            ValueError, match=r"come from two different inputs.*computed from one SparseTensor.*with_feats"
        ):
            together(x, other)
        with pytest.raises(ValueError, match=r"strides 1 and 2; accepted: equal strides"):
            together(x, coarse)
    with pytest.raises(ValueError, match="two different inputs"):
        cat(x, x, other)
    up = ConvTranspose3d(3, 3)(coarse)
    assert torch.equal((x + up).coords, x.coords)


def test_feature_rows_must_be_as_many_as_the_voxels():
    x, coarse = two_levels()
    count = len(x)
    with pytest.raises(ValueError, match=f"Got 7 rows of features for {count} voxels of stride 1"):
        x.with_sorted_feats(torch.zeros(7, 3))
    with pytest.raises(ValueError, match=f"Got 7 rows of features for {count} voxels of stride 1"):
        x.with_feats(torch.zeros(7, 3))
    with pytest.raises(ValueError, match=f"Got {count} rows of features for {len(coarse)} voxels of stride 2"):
        x.with_sorted_feats(x.sorted_feats, stride=2)


GOOD = torch.tensor([[0, 0, 0, 0], [0, 2, 0, -2], [1, 0, 0, 0]], dtype=INT)
ONES = torch.ones(3, 2)


def batches(*numbers: int) -> Tensor:
    return torch.tensor([[number, row, 0, 0] for row, number in enumerate(numbers)], dtype=INT)


@pytest.mark.parametrize(
    ("coords", "feats", "stride", "message"),
    [
        (GOOD[:, 1:], ONES, 1, "coords are (3, 3); accepted: [N, 4] with rows (batch, x, y, z)."),
        (GOOD[0], ONES, 1, "coords are (4,); accepted: [N, 4]"),
        (GOOD.long(), ONES, 1, "coords are torch.int64; accepted: torch.int32 (.int())."),
        (GOOD.float(), ONES, 1, "coords are torch.float32; accepted: torch.int32 (voxelize(points, feats, voxel_size)"),
        (GOOD, ONES[:2], 1, "feats are torch.float32 (2, 2); accepted: floating point [N, C] with N = 3."),
        (GOOD, ONES[:, 0], 1, "feats are torch.float32 (3,); accepted: floating point [N, C]"),
        (GOOD, ONES.int(), 1, "feats are torch.int32 (3, 2); accepted: floating point"),
        (GOOD, ONES.to("meta"), 1, "coords are on cpu, feats on meta; accepted: one device."),
        (GOOD[:0], ONES[:0], 1, "A sparse tensor needs at least one voxel; got none."),
        (GOOD, ONES, 0, "stride is 0; accepted: whole numbers from 1 up."),
        (GOOD, ONES, 2.0, "stride is 2.0; accepted: whole numbers"),
        (GOOD, ONES, 4, "coords at stride 4 must be multiples of it; coords * stride turns cell numbers so."),
        (batches(0, -1, 1), ONES, 1, "Batch numbers (the first column of coords) begin at -1; accepted: 0, 1, 2, ..."),
        (batches(0, 2, 2), ONES, 1, "Batch element 1 of 3 has no voxels; accepted: every number from 0 to 2 occurs."),
        (batches(1, 1, 1), ONES, 1, "Batch element 0 of 2 has no voxels"),
        (batches(0, 1, 2**31 - 1), ONES, 1, "Batch element 2 of 2147483648 has no voxels"),
    ],
)
def test_wrong_input_is_explained(coords: Tensor, feats: Tensor, stride: int, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseTensor(coords, feats, stride)


def test_good_input_at_a_stride_is_accepted():
    x = SparseTensor(GOOD, ONES, 2)
    assert x.stride == 2
    assert torch.equal(x.coords, GOOD)


def test_inverse_is_none_without_duplicates_however_far_apart_the_voxels_lie():
    coords = torch.tensor([[0, 0, 0, 0], [0, 1 << 25, 0, 0]], dtype=torch.int32)  # too far for an exact Morton code
    assert SparseTensor(coords, torch.ones(2, 1)).inverse is None
    twice = SparseTensor(coords[[0, 1, 0]], torch.tensor([[1.0], [2.0], [3.0]]))
    assert twice.inverse.tolist() == [0, 1, 0]
    assert twice.feats.tolist() == [[1.0], [2.0]]


def test_former_names_still_work_and_warn():
    x = SparseTensor(torch.zeros(1, 4, dtype=INT), torch.ones(1, 2))
    with pytest.warns(FutureWarning, match="'rows' is now 'sorted_feats'"):
        assert torch.equal(x.rows, x.sorted_feats)
    with pytest.warns(FutureWarning, match="'with_rows' is now 'with_sorted_feats'"):
        assert torch.equal(x.with_rows(x.sorted_feats * 2).feats, x.feats * 2)
    with pytest.warns(FutureWarning, match="'grid' is now 'coordinate_manager'"):
        assert x.grid is x.coordinate_manager
