"""Coordinate sets and kernel maps against dictionaries, and that each is made once."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo_pretrain.sparse import SparseTensor, maps
from geo_pretrain.sparse.layers import Conv3d, ConvTranspose3d
from geo_pretrain.sparse.maps import (
    CoordinateIndex,
    CoordinateManager,
    CoordinateMap,
    KernelMap,
    floor_to,
    kernel_offsets,
    morton_order,
)
from tests.sparse.twins import cells, coarse_cells, random_cloud, steps

pytestmark = pytest.mark.usefixtures("plain")

SIZES = st.sampled_from([(1,), (30,), (60, 7), (5, 40, 1), (80, 80)])


def manager_of(coords: Tensor, stride: int = 1) -> CoordinateManager:
    return SparseTensor(coords, torch.ones(len(coords), 1), stride).coordinate_manager


def slow_table(outputs: Tensor, inputs: Tensor, kernel_size: int, step: int) -> list[list[int]]:
    place = {cell: row for row, cell in enumerate(cells(inputs))}
    offsets = [(x, y, z) for z, y, x in product(steps(kernel_size), repeat=3)]
    return [
        [place.get((b, x + i * step, y + j * step, z + k * step), -1) for i, j, k in offsets]
        for b, x, y, z in cells(outputs)
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=SIZES,
    kernel_size=st.integers(1, 5),
    dilation=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2, 3]),
)
def test_neighbors_are_those_of_a_dictionary(seed: int, sizes: tuple, kernel_size: int, dilation: int, stride: int):
    coords, _ = random_cloud(seed, sizes, stride=stride)
    level = manager_of(coords, stride).coordinate_map(stride)
    table = level.kernel_map(kernel_size, dilation).table
    assert table.dtype == torch.int32
    assert table.tolist() == slow_table(level.coords, level.coords, kernel_size, stride * dilation)


@pytest.mark.parametrize("dilation", [31, 32, 63, 64, 65, 1000])
def test_neighbors_may_be_far_away(dilation: int):
    """Wide kernels leave any margin that a search may keep round the bounding box."""
    near, _ = random_cloud(dilation, (12, 9), reach=2)
    moved = [near + torch.tensor([0, *(dilation * d for d in step)]) for step in product((-1, 0, 1), repeat=3)]
    coords = torch.cat([near, *moved[::4]]).int().unique(dim=0)
    level = manager_of(coords).coordinate_map(1)
    table = level.kernel_map(3, dilation).table
    assert table.tolist() == slow_table(level.coords, level.coords, 3, dilation)
    assert (table >= 0).sum() > 2 * len(level)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=SIZES,
    kernel_size=st.integers(1, 4),
    factor=st.sampled_from([2, 3, 4]),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 2]),
)
def test_strided_maps_and_their_reverse_are_those_of_a_dictionary(
    seed: int, sizes: tuple, kernel_size: int, factor: int, stride: int, dilation: int
):
    coords, _ = random_cloud(seed, sizes, stride=stride)
    manager = manager_of(coords, stride)
    kernel_map = manager.kernel_map(stride, factor, kernel_size, dilation)
    fine, coarse = manager.coordinate_map(stride), manager.coordinate_map(stride * factor)
    assert sorted(cells(coarse.coords)) == sorted(cells(coarse_cells(coords, stride * factor)))
    expected = slow_table(coarse.coords, fine.coords, kernel_size, stride * dilation)
    assert kernel_map.table.tolist() == expected
    back = [[-1] * kernel_size**3 for _ in range(len(fine))]
    for row, line in enumerate(expected):
        for k, found in enumerate(line):
            if found >= 0:
                back[found][k] = row
    assert kernel_map.reverse.table.tolist() == back
    assert kernel_map.reverse.reverse.table.tolist() == expected
    assert kernel_map.count == sum(found >= 0 for line in expected for found in line)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kernel_size=st.integers(1, 4), tile=st.sampled_from([1, 16, 70, 1000]))
def test_pairs_tiles_and_reverse_hold_every_entry_of_the_table(seed: int, kernel_size: int, tile: int):
    coords, _ = random_cloud(seed, (50, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "TILE", tile)
        kernel_map = manager_of(coords).kernel_map(1, 1, kernel_size, 1)
        tiles, pairs = kernel_map.tiles, kernel_map.pairs
    entries = {(k, i, o) for o, line in enumerate(kernel_map.table.tolist()) for k, i in enumerate(line) if i >= 0}
    assert [part.start for part, _ in tiles] == list(range(0, 70, tile))
    of_tiles = [(k, i, o + part.start) for part, columns in tiles for k, i, o in entries_of(columns)]
    assert len(of_tiles) == len(entries) == kernel_map.count
    assert set(of_tiles) == set(entries_of(pairs)) == entries
    back = kernel_map.reverse.table.tolist()
    assert {(k, i, o) for i, line in enumerate(back) for k, o in enumerate(line) if o >= 0} == entries


def entries_of(columns: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int, int]]:
    """(offset, input, output) of a list of pairs for each offset."""
    return [
        (k, i, o)
        for k, (inputs, outputs) in enumerate(columns)
        for i, o in zip(inputs.tolist(), outputs.tolist(), strict=True)
    ]


def test_offsets_along_one_axis():
    assert [offset[0] for offset in kernel_offsets(4)[:4]] == [0, 1, 2, 3]
    assert kernel_offsets(1) == [(0, 0, 0)]
    assert kernel_offsets(5)[62] == (0, 0, 0)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments, **named):
            calls[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counted(CoordinateMap, "kernel_map")
    counted(CoordinateMap, "coarser")
    counted(CoordinateManager, "_strided")
    counted(KernelMap, "__init__")
    return calls


def test_maps_are_built_once_and_shared_in_both_directions(monkeypatch: pytest.MonkeyPatch):
    calls = count_calls(monkeypatch)
    coords, feats = random_cloud(0)
    x = SparseTensor(coords, feats.float())
    first, again, dilated = Conv3d(3, 3), Conv3d(3, 3), Conv3d(3, 3, dilation=2)
    down, other_down, up, deep = Conv3d(3, 3, 2, 2), Conv3d(3, 3, 2, 2), ConvTranspose3d(3, 3), Conv3d(3, 3)
    for _ in range(2):
        y = dilated(again(first(x)))
        coarse = deep(deep(down(y))) + other_down(x)
        (up(coarse) + up(coarse)).sorted_feats.sum().backward()
    assert calls["kernel_map"] == 3  # kernel 3 at strides 1 and 2, dilation 2 at stride 1
    assert calls["_strided"] == calls["coarser"] == 1
    assert calls["__init__"] == 2 * (3 + 1)  # each with its reverse
    assert x.coordinate_manager.kernel_map(1, 1, 3, 1) is x.coordinate_manager.kernel_map(1, 1, 3, 1)
    assert x.coordinate_manager.kernel_map(1, 1, 3, 1).reverse is x.coordinate_manager.kernel_map(1, 1, 3, 1).reverse


def test_other_tensors_have_maps_of_their_own():
    coords, feats = random_cloud(0)
    one, other = SparseTensor(coords, feats), SparseTensor(coords, feats)
    assert one.coordinate_manager is not other.coordinate_manager
    assert one.coordinate_manager.kernel_map(1, 1, 3, 1) is not other.coordinate_manager.kernel_map(1, 1, 3, 1)


def test_maps_are_freed_with_the_last_tensor():
    """Without waiting for the cycle collector, which does not know how much memory a GPU's tables take."""
    coords, feats = random_cloud(0)
    x = SparseTensor(coords, feats.float())
    layers = Conv3d(3, 3), Conv3d(3, 3, 2, 2), ConvTranspose3d(3, 3)
    gc.disable()
    try:
        y = x
        for layer in layers:
            y = layer(y)
        y.sorted_feats.sum().backward()
        tables = [
            weakref.ref(m)
            for m in (x.coordinate_manager.kernel_map(1, 1, 3, 1), x.coordinate_manager.kernel_map(1, 2, 2, 1))
        ]
        del x, y
        assert [table() for table in tables] == [None, None]
    finally:
        gc.enable()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=SIZES, shift=st.integers(-5000, 5000), stride=st.sampled_from([1, 2, 4]))
def test_parents_of_a_level_are_runs_of_the_order(seed: int, sizes: tuple, shift: int, stride: int):
    """Morton order: the voxels of every aligned cell follow each other, so a parent's number never decreases."""
    coords, _ = random_cloud(seed, sizes, stride=stride)
    coords[:, 1:] += shift * stride
    manager = manager_of(coords, stride)
    assert manager.coordinate_map(stride).exact
    for level in range(4):
        now = stride << level
        coarse = manager.coarsen(now, 2)
        parents = [
            cells(coarse.coords).index(cell) for cell in cells(floor_to(manager.coordinate_map(now).coords, 2 * now))
        ]
        assert parents == sorted(parents)
        assert set(parents) == set(range(len(coarse)))


def test_morton_order_keeps_neighbors_near_in_memory():
    coords, _ = random_cloud(0, (8000,), reach=16)

    def far(ordered: Tensor) -> float:
        """How many rows lie between a voxel and its neighbors, typically."""
        table = CoordinateMap(ordered, 1, exact=True).kernel_map(3, 1).table.long()
        return float((table - torch.arange(len(table))[:, None]).abs()[table >= 0].median())

    assert far(coords[morton_order(coords, 1)[0]]) < 0.5 * far(coords.unique(dim=0))


@pytest.mark.parametrize("path", [(2, 3), (3, 2), (4, 2), (6,), (2, 2, 2, 3)])
def test_levels_are_the_floor_of_the_finest_whatever_the_way(path: tuple[int, ...]):
    coords, _ = random_cloud(3, (60, 40), reach=20)
    manager, stride = manager_of(coords), 1
    for factor in path:
        level = manager.coarsen(stride, factor)
        stride *= factor
    assert level is manager.coordinate_map(stride)
    assert sorted(cells(level.coords)) == sorted(cells(coarse_cells(coords, stride)))


@pytest.mark.parametrize("low", [-3000, 1024, 1500, 5000])
def test_cells_wider_than_the_alignment_of_the_order_are_whole(low: int):
    coords, _ = random_cloud(3, (60, 40), reach=20)
    coords[:, 1:] = coords[:, 1:] * 100 + 2000 + low
    manager = manager_of(coords)
    for level in range(13):
        coarse = manager.coarsen(1 << level, 2)
        assert sorted(cells(coarse.coords)) == sorted(cells(coarse_cells(coords, 2 << level)))
    assert coarse.stride == 8192


def test_one_level_reached_in_two_ways_is_one():
    coords, _ = random_cloud(4, (60, 40), reach=20)
    manager = manager_of(coords)
    direct = manager.coarsen(1, 6)
    manager.coarsen(1, 3)
    assert manager.coarsen(3, 2) is direct
    manager.coarsen(1, 2)
    fine, table = manager.coordinate_map(2), manager.kernel_map(2, 3, 3, 1).table
    assert manager.coordinate_map(6) is direct
    assert table.tolist() == slow_table(direct.coords, fine.coords, 3, 2)


@pytest.mark.parametrize("fine", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_refining_makes_all_children_once(kernel_size: int, fine: int):
    coords, _ = random_cloud(5, (20, 9), stride=2 * fine)
    manager = manager_of(coords, 2 * fine)
    level = manager.refine(2 * fine, 2, kernel_size)
    offsets = [tuple(fine * step for step in offset) for offset in product(steps(kernel_size), repeat=3)]
    children = {(b, x + i, y + j, z + k) for b, x, y, z in cells(coords) for i, j, k in offsets}
    assert len(level) == len(children)
    assert set(cells(level.coords)) == children
    assert manager.refine(2 * fine, 2, 5) is level
    assert manager.coarsen(fine, 2) is manager.coordinate_map(2 * fine)
    table = manager.kernel_map(fine, 2, kernel_size, 1).table
    assert (table >= 0).all()  # every child of every voxel is there
    assert table.tolist() == slow_table(manager.coordinate_map(2 * fine).coords, level.coords, kernel_size, fine)


SPREAD = {"one key": 2**18, "columns": 2**20, "int32": 2**29}


@pytest.mark.parametrize("reach", SPREAD.values(), ids=SPREAD)
def test_search_is_exact_at_any_extent(reach: int):
    coords, _ = random_cloud(6, (30, 20, 10), reach=3)
    coords = torch.cat([coords + torch.tensor([0, *corner]) * reach for corner in ((-1, 1, -1), (0, 0, 0), (1, -1, 1))])
    coords = coords.int()[torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))]
    if reach == 2**29:
        coords = coords[coords[:, 0] < 2]
    index = CoordinateIndex(coords, 1)
    assert (index.columns is None) == (reach == 2**18)
    assert index.find(coords).tolist() == list(range(len(coords)))
    place = {cell: row for row, cell in enumerate(cells(coords))}
    for offset in product((-1, 0, 2), repeat=3):
        moved = [(b, x + offset[0], y + offset[1], z + offset[2]) for b, x, y, z in cells(coords)]
        assert index.find(coords, offset).tolist() == [place.get(cell, -1) for cell in moved]
    far = torch.tensor([[0, 2**31 - 1, -(2**31), 0], [7, 0, 0, 0], [-1, 0, 0, 0]], dtype=torch.int32)
    assert index.find(far).tolist() == [-1, -1, -1]


def test_full_boxes_do_not_wrap_round_into_the_next_column_or_batch():
    box = torch.tensor(list(product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2))), dtype=torch.int32)
    level = manager_of(box).coordinate_map(1)
    assert level.kernel_map(3, 1).table.tolist() == slow_table(level.coords, level.coords, 3, 1)
    assert level.kernel_map(5, 1).table.tolist() == slow_table(level.coords, level.coords, 5, 1)
    for offset in product(range(-4, 5), repeat=3):
        found = level.index.find(level.coords, offset)
        inside = ((level.coords[:, 1:] + torch.tensor(offset) - 1).abs() <= 1).all(dim=1)
        assert torch.equal(found >= 0, inside)


def test_steps_as_long_as_the_box_do_not_wrap_either():
    """Keys number the cells of a box with a margin: a step that long ends in the next column, or batch element."""
    box = torch.tensor(list(product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2))), dtype=torch.int32)
    level = manager_of(box).coordinate_map(1)
    length = 3 + 2 * maps.MARGIN
    for step in range(length - 4, length + 5):
        assert (level.kernel_map(3, step).table >= 0).sum() == len(box)
        for axis, sign in product(range(3), (-1, 1)):
            offset = [0, 0, 0]
            offset[axis] = sign * step
            assert (level.index.find(level.coords, tuple(offset)) < 0).all()
    other = level.coords + torch.tensor([2, 0, 0, 0], dtype=torch.int32)
    for batch in (other, other - 4, other + 2**30):
        assert (level.index.find(batch.int()) < 0).all()


def test_searching_changes_nothing():
    coords, _ = random_cloud(7, stride=2)
    index, wanted = CoordinateIndex(coords, 2), coords.long()
    index.find(wanted, (1, 0, 0))
    assert torch.equal(wanted, coords.long())


def test_extents_beyond_the_keys_are_refused():
    edges = torch.tensor([[0, -(2**31), -(2**31), 0], [0, 2**31 - 1, 2**31 - 1, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"Coordinates span 1 x 42949\d* x 42949\d* x \d+ \(batch, x, y, z\)"):
        CoordinateIndex(edges, 1)
    with pytest.raises(ValueError, match=r"accepted: batch x X x Y up to 2\^62\. Is a point far outside, or the voxel"):
        CoordinateIndex(edges, 1)
    with pytest.raises(ValueError, match="Coordinates span"):
        Conv3d(1, 1)(SparseTensor(edges, torch.ones(2, 1)))
    assert len(SparseTensor(edges, torch.ones(2, 1))) == 2  # they may be held, only not searched
