"""Operations against dense torch and slow loops, in double precision, wherever the voxels lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo_pretrain.sparse import SparseTensor, cat, maps, plain
from geo_pretrain.sparse import functional as SF
from tests.sparse.twins import (
    cells,
    coarse_cells,
    dense_convolution,
    dense_transposed,
    on_coarse,
    random_cloud,
    random_kernel,
    rows_at,
    slow_interpolation,
    slow_pool,
    within,
)

pytestmark = pytest.mark.usefixtures("plain")

EXACT = 1e-12  # of the largest magnitude, in double precision
SEEDS = st.integers(0, 2**31)
SIZES = st.sampled_from([(1,), (40,), (60, 7), (5, 40, 1), (90, 90)])


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def same_with_gradients(result: Tensor, expected: Tensor, mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Outputs agree, and the gradients of one random projection."""
    within(EXACT, result, expected)
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((result * weight).sum(), mine)
    wanted = torch.autograd.grad((expected * weight).sum(), theirs)
    for one, other in zip(got, wanted, strict=True):
        within(EXACT, one, other)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sizes=SIZES,
    kernel_size=st.integers(1, 5),
    stride=st.sampled_from([1, 2, 3, 4]),
    dilation=st.sampled_from([1, 2, 3]),
    padded=st.booleans(),
)
def test_convolution_equals_dense_conv3d(
    seed: int, sizes: tuple, kernel_size: int, stride: int, dilation: int, padded: bool
):
    coords, feats = random_cloud(seed, sizes)
    kernel = random_kernel(seed, kernel_size)
    mine, theirs = leaves(feats, kernel), leaves(feats, kernel)
    limit = 1e12 if padded else -1.0  # both ways of multiplying; a few tiles
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plain.PADDING, "cpu", limit)
        patch.setattr(maps, "TILE", 32)
        x = SparseTensor(coords, mine[0])
        y = SF.convolve(x, mine[1], kernel_size=kernel_size, stride=stride, dilation=dilation)
        assert y.stride == stride
        expected = dense_convolution(coords, *theirs, stride, dilation)
        same_with_gradients(rows_at(y, coarse_cells(coords, stride)), expected, mine, theirs)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sizes=SIZES, kernel_size=st.integers(1, 4), tensor_stride=st.sampled_from([2, 3, 4]))
def test_convolution_of_strided_tensors_equals_that_of_their_cells(
    seed: int, sizes: tuple, kernel_size: int, tensor_stride: int
):
    coords, feats = random_cloud(seed, sizes)
    wide = coords * torch.tensor([1, *[tensor_stride] * 3], dtype=torch.int32)
    kernel = random_kernel(seed, kernel_size)
    y = SF.convolve(SparseTensor(wide, feats, tensor_stride), kernel, kernel_size=kernel_size)
    within(EXACT, y.feats, dense_convolution(coords, feats, kernel, 1, 1))
    down = SF.convolve(SparseTensor(wide, feats, tensor_stride), kernel, kernel_size=kernel_size, stride=2)
    places = coarse_cells(coords, 2) * torch.tensor([1, *[tensor_stride] * 3], dtype=torch.int32)
    assert down.stride == 2 * tensor_stride
    within(EXACT, rows_at(down, places), dense_convolution(coords, feats, kernel, 2, 1))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, sizes=SIZES, kernel_size=st.integers(1, 4), stride=st.sampled_from([1, 2, 3, 4]))
def test_transposed_convolution_equals_dense_conv_transpose3d(seed: int, sizes: tuple, kernel_size: int, stride: int):
    coords, feats = random_cloud(seed, sizes)
    coarse, kernel = coarse_cells(coords, stride), random_kernel(seed, kernel_size)
    values = torch.randn(len(coarse), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mine, theirs = leaves(values, kernel), leaves(values, kernel)
    x = on_coarse(SparseTensor(coords, feats), stride, coarse, mine[0])
    y = SF.convolve(x, mine[1], kernel_size=kernel_size, stride=stride, transposed=True)
    assert y.stride == 1
    assert torch.equal(y.coords, coords)
    same_with_gradients(y.feats, dense_transposed(coarse, theirs[0], theirs[1], stride, coords), mine, theirs)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, kernel_size=st.integers(1, 4), stride=st.sampled_from([2, 3]))
def test_transposed_convolution_without_finer_voxels_reaches_all_children(seed: int, kernel_size: int, stride: int):
    coords, feats = random_cloud(seed, (12, 5), stride=stride)
    kernel = random_kernel(seed, kernel_size)
    mine, theirs = leaves(feats, kernel), leaves(feats, kernel)
    x = SparseTensor(coords, mine[0], stride)
    y = SF.convolve(x, mine[1], kernel_size=kernel_size, stride=stride, transposed=True)
    expected = dense_transposed(coords, theirs[0], theirs[1], stride, y.coords)
    same_with_gradients(y.feats, expected, mine, theirs)
    everything = sum(float(kernel.sum(dim=0)[c].sum() * feats[:, c].sum()) for c in range(3))
    assert float(y.feats.detach().sum()) == pytest.approx(everything)  # no child is missing


POOLS: dict[str, tuple[Callable, Callable[[Tensor], Tensor]]] = {
    "max": (SF.max_pool, lambda rows: rows.amax(dim=0)),
    "avg": (SF.avg_pool, lambda rows: rows.mean(dim=0)),
    "sum": (SF.sum_pool, lambda rows: rows.sum(dim=0)),
}


@pytest.mark.parametrize("name", POOLS)
@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS, sizes=SIZES, kernel_size=st.integers(1, 4), stride=st.sampled_from([1, 2, 3]), shift=st.floats(-9, 9)
)
def test_pools_equal_a_loop_over_windows(
    name: str, seed: int, sizes: tuple, kernel_size: int, stride: int, shift: float
):
    """`shift` makes features all negative or all positive: a maximum must not find zeros of empty neighbors."""
    pool, reduce = POOLS[name]
    coords, feats = random_cloud(seed, sizes)
    mine, theirs = leaves(feats + shift), leaves(feats + shift)
    result = rows_at(pool(SparseTensor(coords, mine[0]), kernel_size, stride), coarse_cells(coords, stride))
    same_with_gradients(result, slow_pool(coords, theirs[0], kernel_size, stride, reduce), mine, theirs)


def test_the_first_of_equal_maxima_gets_the_gradient():
    """As in dense pooling; after a ReLU equal maxima are common."""
    coords = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.int32)
    feats = torch.zeros(3, 1, requires_grad=True)
    SF.max_pool(SparseTensor(coords, feats), 2, 2).feats.sum().backward()
    assert feats.grad.flatten().tolist() == [0, 1, 0]  # x runs fastest


def test_maxima_of_infinite_or_undefined_features_stay_in_their_window():
    coords = torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0], [0, 8, 0, 0], [0, 9, 0, 0], [0, 13, 0, 0]], dtype=torch.int32)
    feats = torch.tensor([[5.0], [-torch.inf], [1.0], [torch.nan], [torch.inf]])
    pooled = rows_at(SF.max_pool(SparseTensor(coords, feats), 2, 2), coarse_cells(coords, 2))
    torch.testing.assert_close(
        pooled, torch.tensor([[5.0], [-torch.inf], [torch.nan], [torch.inf]]), equal_nan=True, rtol=0, atol=0
    )


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, sizes=SIZES, shift=st.floats(-9, 9))
def test_global_pools_equal_a_loop_over_batch_elements(seed: int, sizes: tuple, shift: float):
    coords, feats = random_cloud(seed, sizes)
    for name, (_, reduce) in POOLS.items():
        mine, theirs = leaves(feats + shift), leaves(feats + shift)
        expected = torch.stack([reduce(theirs[0][coords[:, 0] == b]) for b in range(len(sizes))])
        same_with_gradients(SF.global_pool(SparseTensor(coords, mine[0]), name), expected, mine, theirs)


def test_global_pools_of_many_batch_elements_keep_their_order():
    """MinkowskiEngine mixes the rows of nine and more."""
    coords, feats = random_cloud(0, tuple(range(1, 18)))
    x = SparseTensor(coords, feats)
    for name, (_, reduce) in POOLS.items():
        expected = torch.stack([reduce(feats[coords[:, 0] == b]) for b in range(17)])
        within(EXACT, SF.global_pool(x, name), expected)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sizes=SIZES, stride=st.sampled_from([1, 2, 3]))
def test_interpolation_equals_a_sum_of_tents(seed: int, sizes: tuple, stride: int):
    coords, feats = random_cloud(seed, sizes, reach=4, stride=stride)
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(70, 4, generator=generator, dtype=torch.float64) - 0.5) * 12 * stride
    points[:20] = points[:20].floor()
    points[:, 0] = torch.randint(0, len(sizes), (70,), generator=generator)
    points[30:40] = coords[torch.randint(0, len(coords), (10,), generator=generator)].double()
    mine, theirs = leaves(feats), leaves(feats)
    result = SF.interpolate(SparseTensor(coords, mine[0], stride), points)
    same_with_gradients(result, slow_interpolation(coords, theirs[0], stride, points), mine, theirs)


def test_interpolation_far_outside_is_zero():
    x = SparseTensor(torch.tensor([[0, 3, 0, 0]], dtype=torch.int32), torch.ones(1, 1, dtype=torch.float64))
    far = torch.tensor([[0, v, 0, 0] for v in (2.0**32 + 3, -(2.0**32) + 3, 2.0**31, 1e20)], dtype=torch.float64)
    assert SF.interpolate(x, far).flatten().tolist() == [0, 0, 0, 0]
    assert SF.interpolate(x, torch.tensor([[1.0, 3, 0, 0], [-1.0, 3, 0, 0], [0, 3, 0, 0]])).flatten().tolist() == [
        0,
        0,
        1,
    ]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sizes=SIZES, stride=st.sampled_from([1, 2, 3, 4]), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_point_rows_are_the_voxels_that_contain_them(seed: int, sizes: tuple, stride: int, dtype: torch.dtype):
    coords, feats = random_cloud(seed, sizes)
    x = SparseTensor(coords, feats)
    if stride > 1:
        x = SF.avg_pool(x, 2, stride)
    generator = torch.Generator().manual_seed(seed)
    asked = torch.cat([coords, torch.randint(-9, 9, (50, 4), generator=generator)]).to(dtype)
    place = {cell: row for row, cell in enumerate(cells(x.coords))}
    expected = [place.get((b, *(v // stride * stride for v in xyz)), -1) for b, *xyz in asked.tolist()]
    before = asked.clone()
    rows = SF.point_rows(x, asked)
    assert rows.dtype == torch.int64
    assert rows.tolist() == expected
    assert torch.equal(asked, before)


def network(x: SparseTensor, seed: int = 0) -> dict[str, SparseTensor]:
    """A bit of everything, down to stride 4 and back."""
    kernels = [random_kernel(seed + k, size, 3, 3) for k, size in enumerate((3, 2, 3, 3, 3, 2))]
    a = SF.relu(SF.convolve(x, kernels[0], kernel_size=3))
    b = SF.convolve(a, kernels[1], kernel_size=2, stride=2)
    c = SF.convolve(SF.convolve(b, kernels[2], kernel_size=3, stride=2), kernels[3], kernel_size=3, dilation=2)
    d = SF.convolve(c, kernels[4], kernel_size=3, stride=2, transposed=True) + b
    e = SF.convolve(d, kernels[5], kernel_size=2, stride=2, transposed=True)
    return {
        "fine": cat(a, e),
        "coarse": c,
        "max": SF.max_pool(a, 3, 2),
        "avg": SF.avg_pool(d, 2, 2),
        "sum of threes": SF.sum_pool(x, 3, 3),
    }


def equal_by_coordinate(one: SparseTensor, other: SparseTensor, shift: Tensor) -> None:
    within(EXACT, rows_at(one, other.coords + shift.int()), other.feats)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, sizes=SIZES)
def test_results_do_not_depend_on_the_order_of_rows(seed: int, sizes: tuple):
    coords, feats = random_cloud(seed, sizes)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed))
    x, shuffled = SparseTensor(coords, feats), SparseTensor(coords[order], feats[order])
    within(EXACT, network(shuffled)["fine"].feats, network(x)["fine"].feats[order])
    for name, y in network(x).items():
        equal_by_coordinate(network(shuffled)[name], y, torch.zeros(4))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, sizes=SIZES, shift=st.tuples(*[st.integers(-(2**18), 2**18)] * 3))
def test_results_move_with_the_voxels(seed: int, sizes: tuple, shift: tuple[int, int, int]):
    """By multiples of the strides, 4 and 3; as far as 3 * 2^20."""
    coords, feats = random_cloud(seed, sizes)
    move = torch.tensor([0, *(12 * s for s in shift)], dtype=torch.int32)
    x, moved = SparseTensor(coords, feats), SparseTensor(coords + move, feats)
    for name, y in network(x).items():
        equal_by_coordinate(network(moved)[name], y, move)
    points = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 8 - 4
    points[:, 0] = 0
    there, here = SF.interpolate(moved, points + move), SF.interpolate(x, points)
    # So far out points are rounded to 2^-32, of features as large as they are before their weights make them small.
    torch.testing.assert_close(there, here, rtol=0, atol=1e-8 * float(feats.abs().max()))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, sizes=SIZES)
def test_batch_elements_do_not_mix(seed: int, sizes: tuple):
    coords, feats = random_cloud(seed, sizes, reach=3)
    together = network(SparseTensor(coords, feats))
    for b in range(len(sizes)):
        mine = coords[:, 0] == b
        number = torch.tensor([b, 0, 0, 0], dtype=torch.int32)
        alone = network(SparseTensor(coords[mine] - number, feats[mine]))
        for name, y in together.items():
            part = y.feats[y.coords[:, 0] == b]
            within(EXACT, rows_at(alone[name], y.coords[y.coords[:, 0] == b] - number), part)


FAR = {"one key": (2**18, 3), "near 2^20": (2**20, 1), "columns": (2**20, 3), "2^29": (2**29, 1)}


@pytest.mark.parametrize("place", FAR)
def test_voxels_far_apart_are_computed_as_if_alone(place: str):
    """Clusters at both ends of every axis: the keys and Morton codes of 63 bits run out, the results do not change."""
    distance, batch_size = FAR[place]
    coords, feats = random_cloud(1, (40, 20, 9)[:batch_size])
    near = network(SparseTensor(coords, feats))
    moves = [
        torch.tensor([0, *corner]).int() * 12 * (distance // 12) for corner in ((-1, 1, -1), (0, 0, 0), (1, -1, 1))
    ]
    x = SparseTensor(torch.cat([coords + move for move in moves]), feats.repeat(3, 1))
    assert x.coordinate_map.exact == (place == "one key")
    assert (x.coordinate_map.index.columns is None) == (place == "one key")
    far = network(x)
    for name, y in near.items():
        places = {cell: row for row, cell in enumerate(cells(far[name].coords))}
        assert len(places) == len(far[name]) == 3 * len(y)
        for move in moves:
            rows = [places[cell] for cell in cells(y.coords + move)]
            within(EXACT, far[name].feats[rows], y.feats)


def test_one_outlier_at_2_to_the_30_changes_nothing_else():
    coords, feats = random_cloud(2)
    outlier = torch.tensor([[0, 2**30, -(2**30) + 2**20, 2**30]], dtype=torch.int32)
    x = SparseTensor(coords, feats)
    with_outlier = SparseTensor(torch.cat([coords, outlier]), torch.cat([feats, torch.ones(1, 3).double()]))
    for name, y in network(x).items():
        far = network(with_outlier)[name]
        assert len(far) > len(y)
        places = {cell: row for row, cell in enumerate(cells(far.coords))}
        within(EXACT, far.feats[[places[cell] for cell in cells(y.coords)]], y.feats)


def test_wrong_arguments_are_explained():
    coords, feats = random_cloud(3)
    x = SparseTensor(coords, feats)
    with pytest.raises(
        ValueError, match=r"This convolution takes 5 channels; got SparseTensor\(65 voxels x 3 channels"
    ):
        SF.convolve(x, random_kernel(0, 3, 5), kernel_size=3)
    with pytest.raises(ValueError, match="transposed convolution of stride 2 cannot refine a tensor of stride 1"):
        SF.convolve(x, random_kernel(0, 2), kernel_size=2, stride=2, transposed=True)
    coarse = SparseTensor(coords * coords.new_tensor((1, 2, 2, 2)), feats, stride=2)
    with pytest.raises(ValueError, match="dilation is 2; accepted is 1 where a transposed convolution makes new vox"):
        SF.convolve(coarse, random_kernel(0, 2), kernel_size=2, stride=2, dilation=2, transposed=True)
    with pytest.raises(ValueError, match="reduce is 'mean'; accepted: 'avg', 'max', 'sum'"):
        SF.global_pool(x, "mean")  # type: ignore[arg-type]
    for kernel, size in ((random_kernel(0, 3), 2), (random_kernel(0, 2), 3), (random_kernel(0, 1)[0], 3)):
        with pytest.raises(ValueError, match=rf"accepted: \[{size**3}, Cin, Cout\] for kernel_size {size}"):
            SF.convolve(x, kernel, kernel_size=size)
    with pytest.raises(ValueError, match=r"accepted: \[1, Cin, Cout\]"):
        SF.convolve(x, random_kernel(0, 1)[0], kernel_size=1, stride=2)
    with pytest.raises(
        ValueError, match=r"points are torch.float32 \(5, 3\); accepted: floating point \[M, 4\] with rows"
    ):
        SF.interpolate(x, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"points are torch.int64 \(5, 4\); accepted: floating point \[M, 4\]"):
        SF.interpolate(x, torch.zeros(5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"coords are torch.float32 \(5, 4\); accepted: integers \[M, 4\]"):
        SF.point_rows(x, torch.zeros(5, 4))
