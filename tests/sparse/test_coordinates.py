"""Voxelization against MinkowskiEngine's numbers and a dictionary that anybody can follow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain import voxelize
from geo_pretrain.sparse.coordinates import DENSE, unique_rows

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Quantization cases of MinkowskiEngine 0.5.4 (the `quant.` tensors of its golden file)."""
    return load_file(DATA / "me_quantize.safetensors")


def test_first_point_equals_sparse_quantize(golden: dict[str, Tensor]):
    voxels = voxelize(golden["quant.points"], golden["quant.feats"], 0.05)
    assert voxels.coords.dtype == torch.int32
    assert torch.equal(voxels.coords[:, 1:], golden["quant.sq.coords"])
    assert torch.equal(voxels.coords[:, 0], torch.zeros(415, dtype=torch.int32))
    assert torch.equal(voxels.index, golden["quant.sq.index"])
    assert torch.equal(voxels.inverse, golden["quant.sq.inverse"])
    assert torch.equal(voxels.feats, golden["quant.sq.feats"])
    assert int(voxels.coords.min()) < 0  # the case would not see truncation otherwise


def test_random_subsample_equals_the_first_point(golden: dict[str, Tensor]):
    voxels = voxelize(golden["quant.points"], golden["quant.feats"], 0.05)
    assert torch.equal(voxels.coords, golden["quant.st_random_subsample.coords"])
    assert torch.equal(voxels.feats, golden["quant.st_random_subsample.feats"])


def test_mean_equals_unweighted_average(golden: dict[str, Tensor]):
    voxels = voxelize(golden["quant.points"], golden["quant.feats"], 0.05, reduce="mean")
    assert torch.equal(voxels.coords, golden["quant.st_unweighted_average.coords"])
    assert torch.equal(voxels.inverse, golden["quant.st_unweighted_average.inverse_mapping"])
    limit = 1e-5 * float(golden["quant.st_unweighted_average.feats"].abs().max())
    torch.testing.assert_close(voxels.feats, golden["quant.st_unweighted_average.feats"], rtol=0, atol=limit)
    torch.testing.assert_close(voxels.feats[voxels.inverse], golden["quant.field_avg.sliced_feats"], rtol=0, atol=limit)


def slow(points: Tensor, feats: Tensor, size: float, batch: Tensor) -> tuple[list, list, list, list]:
    members: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(points)):
        cell = [math.floor(float(value)) for value in points[row] / size]
        members.setdefault((int(batch[row]), *cell), []).append(row)
    order = {cell: number for number, cell in enumerate(members)}
    inverse = [0] * len(points)
    for cell, rows in members.items():
        for row in rows:
            inverse[row] = order[cell]
    means = [
        [sum(float(feats[r, c]) for r in rows) / len(rows) for c in range(feats.shape[1])] for rows in members.values()
    ]
    return list(members), [rows[0] for rows in members.values()], inverse, means


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 60),
    reach=st.sampled_from([0.05, 1.0, 30.0]),
    size=st.sampled_from([0.02, 0.05, 1.0]),
)
def test_voxels_slow_twin(seed: int, count: int, reach: float, size: float):
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(count, 3, generator=generator) - 0.5) * reach
    feats = torch.randn(count, 2, generator=generator)
    batch = torch.randint(0, 3, (count,), generator=generator)
    coords, index, inverse, means = slow(points, feats, size, batch)
    voxels = voxelize(points, feats, size, reduce="mean", batch=batch)
    assert [tuple(row) for row in voxels.coords.tolist()] == coords
    assert voxels.index.tolist() == index
    assert voxels.inverse.tolist() == inverse
    torch.testing.assert_close(voxels.feats, torch.tensor(means), rtol=1e-4, atol=1e-5)
    assert len(voxels) == len(coords)


@pytest.mark.parametrize("scale", [2**20, 2**30])
def test_large_coordinates_stay_apart(scale: int):
    """2^20 on every axis still packs into one key; 2^30 does not and takes the other way."""
    corners = torch.tensor([[-scale, -scale, -scale], [scale - 1, scale - 1, scale - 1], [-scale, scale - 1, 0]])
    points = corners.double().repeat(3, 1) + 0.5
    voxels = voxelize(points, torch.arange(9.0)[:, None], 1.0)
    assert torch.equal(voxels.coords[:, 1:].long(), corners)
    assert voxels.inverse.tolist() == [0, 1, 2] * 3
    assert voxels.index.tolist() == [0, 1, 2]


def test_rows_are_grouped_alike_by_a_table_by_keys_and_by_rows():
    rows = torch.randint(-2, 2, (200, 4), generator=torch.Generator().manual_seed(0))
    assert 4**4 <= DENSE * len(rows) < 2**30  # of which the first has a table, the last is too wide for one key
    for step in (2**10, 2**28):
        far = rows.clone()
        far[:, 1:] *= step
        for one, other in zip(unique_rows(rows), unique_rows(far), strict=True):
            assert torch.equal(one, other)


def test_rows_at_the_ends_of_64_bits_stay_apart():
    ends = torch.tensor([[-(2**63)], [2**63 - 1], [0], [-(2**63)]])
    assert [part.tolist() for part in unique_rows(ends)] == [[0, 1, 2], [0, 1, 2, 0]]


def test_finite_points_whose_sum_is_not_are_accepted():
    points = torch.full((40, 3), 1e4, dtype=torch.float16)
    assert not torch.isfinite(points.sum())
    assert len(voxelize(points, torch.ones(40, 1), 1.0)) == 1


def test_coordinates_beyond_32_bits_are_refused():
    edge = torch.tensor([[2.0**31 - 1, -(2.0**31), 0.0]], dtype=torch.float64)
    assert voxelize(edge, torch.ones(1, 1), 1.0).coords.tolist() == [[0, 2**31 - 1, -(2**31), 0]]
    for value in (2.0**31, -(2.0**31) - 1, 1e30):
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and value == -(2.0**31) - 1:
                continue  # rounds to the last accepted value
            with pytest.raises(ValueError, match="32-bit integers are accepted"):
                voxelize(torch.tensor([[value, 0, 0]], dtype=dtype), torch.ones(1, 1), 1.0)


def test_no_points_give_no_voxels():
    voxels = voxelize(torch.zeros(0, 3), torch.zeros(0, 5), 0.05, reduce="mean")
    assert voxels.coords.shape == (0, 4)
    assert voxels.feats.shape == (0, 5)
    assert len(voxels.inverse) == len(voxels.index) == 0


def test_gradients_reach_the_features():
    feats = torch.ones(3, 1, requires_grad=True)
    points = torch.tensor([[0.1, 0, 0], [0.2, 0, 0], [5.0, 0, 0]])
    voxelize(points, feats, 1.0, reduce="mean").feats.sum().backward()
    assert feats.grad.flatten().tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(4, 1), 0.1), r"accepted: float \[N, 3\]"),
        ((torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 1), 0.1), "torch.int64"),
        ((torch.zeros(4, 3), torch.zeros(3, 1), 0.1), r"accepted: \[N, C\] with N = 4"),
        ((torch.zeros(4, 3), torch.zeros(4, 1), 0.0), "voxel_size is 0.0"),
        ((torch.zeros(4, 3), torch.zeros(4, 1), float("nan")), "voxel_size is nan"),
        ((torch.tensor([[float("nan"), 0, 0]]), torch.zeros(1, 1), 0.1), "1 of 1 points are not finite"),
    ],
)
def test_wrong_input_is_explained(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        voxelize(*arguments)
    with pytest.raises(ValueError, match="batch is"):
        voxelize(torch.zeros(4, 3), torch.zeros(4, 1), 0.1, batch=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduce is 'sum'; accepted: 'first', 'mean'"):
        voxelize(torch.zeros(4, 3), torch.zeros(4, 1), 0.1, reduce="sum")  # type: ignore[arg-type]
