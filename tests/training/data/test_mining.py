"""Pairs: the overlap of every two frames, the range, the cap, the cache, and scenes without any."""

from __future__ import annotations

import dataclasses
import json
import os
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from geo_pretrain import geometry
from geo_pretrain.errors import DataError
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import PairCounts, find_pairs
from geo_pretrain.training.data.overlap import (
    cell_overlap_matrix,
    cloud_overlap,
    cloud_overlap_matrix,
    occupied_cells,
    overlap_matrix,
    thin_cloud,
)
from geo_pretrain.training.data.sources.registry import FrameRange
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.recipe import DataSpec
from tests.training.conftest import GOLDEN, write_recording

SPEC = DataSpec(source="seven_scenes", size=(120, 160), overlap=(0.2, 1.0))


def frames_of(source):
    scene = source.scenes()[0]
    return [source.load(scene, frame) for frame in source.frame_ids(scene)]


def test_overlap_of_the_golden_pairs_is_near_the_papers(recording):
    ratios = overlap_matrix(frames_of(SevenScenes(recording)))
    golden = load_file(GOLDEN)
    for pair, (i, j) in {"pair80": (0, 1), "pair50": (2, 3), "pair30": (4, 5)}.items():
        assert ratios[i, j] == pytest.approx(float(golden[f"{pair}.overlap_paper"][0]), abs=0.08)


def test_batched_overlap_equals_one_pair_at_a_time(recording):
    frames = frames_of(SevenScenes(recording))
    ratios = overlap_matrix(frames)
    for i, j in combinations(range(6), 2):
        d1, k1, p1, d2, k2, p2 = (
            torch.from_numpy(np.asarray(a, np.float64))[None]
            for f in (frames[i], frames[j])
            for a in (f.depth, f.intrinsics, f.cam_to_world)
        )
        there = geometry.match_pixels(d1, d2, k1, k2, p1, p2)
        back = geometry.match_pixels(d2, d1, k2, k1, p2, p1)
        want = ((there >= 0).sum() + (back >= 0).sum()) / ((d1 > 0).sum() + (d2 > 0).sum())
        assert ratios[i, j] == ratios[j, i] == pytest.approx(want.item(), abs=1e-4)
    np.testing.assert_allclose(overlap_matrix(frames[:2]), ratios[:2, :2], atol=1e-6)  # two frames: a single pair


def test_pairs_have_an_overlap_in_the_range_and_are_ordered(recording):
    source = SevenScenes(recording)
    every = find_pairs(source, dataclasses.replace(SPEC, overlap=(0.0, 1.0)), skips=SkippedFrames())
    assert len(every) == 15
    some = find_pairs(source, SPEC, skips=SkippedFrames())
    assert some == [pair for pair in every if pair.overlap >= 0.2]
    assert 3 <= len(some) < 15
    assert all(pair.frame1 < pair.frame2 for pair in every)
    high = find_pairs(source, dataclasses.replace(SPEC, overlap=(0.7, 1.0)), skips=SkippedFrames())
    assert [(p.frame1, p.frame2) for p in high] == [("000000", "000010")]


def test_cap_spreads_over_the_pairs_of_a_scene(recording):
    source = SevenScenes(recording)
    every = find_pairs(source, SPEC, skips=SkippedFrames())
    few = find_pairs(source, dataclasses.replace(SPEC, max_pairs_per_scene=3), skips=SkippedFrames())
    assert few[0] == every[0]
    assert few[-1] == every[-1]
    assert len(few) == 3


def test_frames_are_pairs_with_themselves_and_nothing_is_read(tmp_path):
    write_recording(tmp_path / "a")
    write_recording(tmp_path / "b")
    source = SevenScenes(tmp_path)
    for depth in tmp_path.glob("b/*.depth.png"):
        depth.write_bytes(b"broken")  # found when its sample is drawn
    spec = dataclasses.replace(SPEC, units="frames", max_pairs_per_scene=3)
    ids = [f"{number:06d}" for number in (0, 20, 50)]  # of 0, 10, ..., 50, spread evenly
    assert find_pairs(source, spec, skips=SkippedFrames(), cache_dir=tmp_path / "cache") == [
        Pair(scene, id, id, 1.0) for scene in ("a", "b") for id in ids
    ]
    assert not (tmp_path / "cache").exists()
    whole = dataclasses.replace(spec, max_pairs_per_scene=None)
    assert len(find_pairs(source, whole, skips=SkippedFrames())) == 12
    with pytest.raises(DataError, match="has no frame"):
        find_pairs(FrameRange(source, 0.98, 0.99), spec, skips=SkippedFrames())


def test_mined_pairs_are_kept_and_go_stale_with_the_data(tmp_path, recording):
    folder = write_recording(tmp_path / "kitchen")
    (folder / "frame-000050.depth.png").write_bytes(b"broken")
    first = SkippedFrames()
    pairs = find_pairs(SevenScenes(folder), SPEC, skips=first, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache" / "pairs").iterdir()
    tree = read_sealed(cached)
    write_sealed(cached, json.loads(json.dumps(tree).replace('"000000"', '"999999"')))
    again = SkippedFrames()
    from_cache = find_pairs(SevenScenes(folder), SPEC, skips=again, cache_dir=tmp_path / "cache")
    assert from_cache[0].frame1 == "999999"
    assert again == first
    assert len(again.reasons) == 1
    other = dataclasses.replace(SPEC, overlap=(0.3, 1.0))
    assert (
        find_pairs(SevenScenes(folder), other, skips=SkippedFrames(), cache_dir=tmp_path / "cache")[0].frame1
        == "000000"
    )
    (folder / "frame-000050.depth.png").write_bytes(b"broken otherwise")
    assert find_pairs(SevenScenes(folder), SPEC, skips=SkippedFrames(), cache_dir=tmp_path / "cache") == pairs


SPOILS = {
    "empty": lambda text: "",
    "cut": lambda text: text[:60],
    "binary": lambda text: "\udcff",
    "another frame": lambda text: text.replace('"000000"', '"999999"'),
    "another overlap": lambda text: text.replace(", 0.", ", 9.", 1),
    "a pair is gone": lambda text: text.replace(text[text.index("], [") : text.index("], [", 99)], ""),
    "no object": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "of another version": lambda text: '{"pairs": [1]}',
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.filterwarnings("ignore:.*of an older version")
def test_a_damaged_cache_is_named_and_pairs_are_found_anew(tmp_path, recording, spoil):
    def find():
        return find_pairs(SevenScenes(recording), SPEC, skips=SkippedFrames(), cache_dir=tmp_path)

    pairs = find()
    (cached,) = (tmp_path / "pairs").iterdir()
    good = cached.read_text()
    cached.write_bytes(SPOILS[spoil](good).encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=f"{cached.name} cannot be used .* found anew"):
        assert find() == pairs
    assert cached.read_text() == good


def test_a_cache_without_digest_is_used_and_said_so(tmp_path, recording):
    pairs = find_pairs(SevenScenes(recording), SPEC, skips=SkippedFrames(), cache_dir=tmp_path)
    (cached,) = (tmp_path / "pairs").iterdir()
    cached.write_text(json.dumps(read_sealed(cached)))
    with pytest.warns(UserWarning, match="older version, without a digest"):
        assert find_pairs(SevenScenes(recording), SPEC, skips=SkippedFrames(), cache_dir=tmp_path) == pairs


def test_pairs_are_found_anew_where_a_pose_was_altered_at_equal_size_and_time(tmp_path):
    write_recording(tmp_path / "kitchen")

    def find():
        return find_pairs(SevenScenes(tmp_path / "kitchen"), SPEC, skips=SkippedFrames(), cache_dir=tmp_path / "cache")

    find()
    pose = max((tmp_path / "kitchen").rglob("*.pose.txt"))
    before, content = pose.stat(), pose.read_text()
    pose.write_text(content.replace("0.", "9.", 1))
    os.utime(pose, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (pose.read_text() != content, pose.stat().st_size) == (True, before.st_size)
    find()
    assert len(list((tmp_path / "cache" / "pairs").iterdir())) == 2


def test_pairs_are_found_anew_where_the_folder_that_names_the_scene_was_renamed(tmp_path, recording):
    write_recording(tmp_path / "kitchen")

    def find(name):
        return find_pairs(SevenScenes(tmp_path / name), SPEC, skips=SkippedFrames(), cache_dir=tmp_path / "cache")

    pairs = find("kitchen")
    (tmp_path / "kitchen").rename(tmp_path / "kitchen_2024")
    assert find("kitchen_2024") == [dataclasses.replace(pair, scene="kitchen_2024") for pair in pairs]


def golden_frames(golden, pair):
    """In float64: one voxel of pair50 is decided beyond float32."""
    blank, k = np.zeros((120, 160, 3), np.uint8), golden["intrinsics"].astype(np.float64)
    return [
        Frame("s", str(n), blank, golden[f"{pair}.depth{n}_mm"] / 1000, k, golden[f"{pair}.pose{n}"].astype(np.float64))
        for n in (1, 2)
    ]


@pytest.mark.parametrize("pair", ["pair80", "pair50", "pair30"])
def test_exact_measure_is_the_number_that_the_released_script_writes(pair):
    golden = load_file(GOLDEN)
    clouds = [thin_cloud(frame) for frame in golden_frames(golden, pair)]
    assert [len(cloud) for cloud in clouds] == golden[f"{pair}.overlap_pointcontrast_voxels"].tolist()
    larger, of_second, of_first = golden[f"{pair}.overlap_pointcontrast"].tolist()
    assert cloud_overlap(*clouds) == pytest.approx((of_first, of_second), abs=1e-7)
    assert cloud_overlap_matrix(clouds)[0, 1] == pytest.approx(larger, abs=1e-7)


def test_exact_measure_of_apart_clouds_is_zero_and_of_a_cloud_with_itself_one(recording):
    cloud = thin_cloud(frames_of(SevenScenes(recording))[0])
    matrix = cloud_overlap_matrix([cloud, cloud + 20, cloud])
    assert matrix[0].tolist() == [1, 0, 1]
    assert (matrix == matrix.T).all()


def test_neighbors_of_the_exact_measure_are_less_than_seven_and_a_half_centimeters_apart():
    points = [torch.tensor([[x, 0.0, 0.0], [x, 3.0, 0.0]], dtype=torch.float64) for x in (0, 0.0749, 0.0751)]
    assert cloud_overlap_matrix(points)[0].tolist() == [1, 1, 0]
    assert cloud_overlap(points[0], points[1][:1]) == (0.5, 1.0)


def test_recipe_chooses_the_measure_and_the_cache_keeps_them_apart(tmp_path, recording):
    """A pair at 30 % by projection is at 46 % by the released script, so it selects more pairs."""
    source, cache = SevenScenes(recording), tmp_path / "cache"
    exact = dataclasses.replace(SPEC, measure="match_released_code")
    projective = find_pairs(source, SPEC, skips=SkippedFrames(), cache_dir=cache)
    released = find_pairs(source, exact, skips=SkippedFrames(), cache_dir=cache)
    assert len(list((cache / "pairs").iterdir())) == 2
    overlaps = {(p.frame1, p.frame2): p.overlap for p in released}
    golden = load_file(GOLDEN)
    for pair, names in {"pair80": ("000000", "000010"), "pair30": ("000040", "000050")}.items():
        assert overlaps[names] == pytest.approx(float(golden[f"{pair}.overlap_pointcontrast"][0]), abs=1e-3)
    assert len(released) >= len(projective)
    assert find_pairs(source, exact, skips=SkippedFrames(), cache_dir=cache) == released


def test_scene_without_a_pair_is_skipped_and_counted(tmp_path):
    write_recording(tmp_path / "a")
    write_recording(tmp_path / "b")
    for frame in range(10, 60, 10):
        (tmp_path / "b" / f"frame-{frame:06d}.pose.txt").unlink()
    skips = SkippedFrames()
    pairs = find_pairs(SevenScenes(tmp_path), SPEC, skips=skips)
    assert {pair.scene for pair in pairs} == {"a"}
    assert "no pair with an overlap in [0.2, 1]" in skips.reasons["b"]


def test_nothing_left_is_an_error_that_counts_the_pairs_and_lists_the_reasons(recording):
    spec = dataclasses.replace(SPEC, path=str(recording), overlap=(0.99, 1.0))
    ratios = overlap_matrix([resize_frame(frame, (60, 80)) for frame in frames_of(SevenScenes(recording))])
    largest = max(ratios[i, j] for i, j in combinations(range(6), 2))
    with pytest.raises(DataError, match=r"No pair of frames(.|\n)*overlap in \[0.99, 1\]") as raised:
        find_pairs(SevenScenes(recording), spec, skips=SkippedFrames())
    assert f"Of 15 pairs 15 overlap by less than 0.99 (at most {largest:.2g})." in str(raised.value)
    assert f"`geo-pretrain data check seven_scenes:{recording}`" in str(raised.value)


def test_pairs_below_and_above_the_range_are_counted_apart():
    tested = PairCounts()
    tested.add(np.array([[1, 0.1, 0.6], [0.1, 1, 0.9], [0.6, 0.9, 1]]), (0.5, 0.8))
    tested.add(np.eye(1), (0.5, 0.8))
    assert tested == PairCounts(pairs=3, below=1, above=1, largest=0.1)
    message = str(tested.no_pair(dataclasses.replace(SPEC, overlap=(0.5, 0.8)), SkippedFrames()))
    assert "Of 3 pairs 1 overlap by less than 0.5 (at most 0.1) and 1 by more than 0.8." in message
    assert "No two frames could be compared" in str(PairCounts().no_pair(SPEC, SkippedFrames()))


def test_resized_frame_keeps_the_rays(recording):
    """Every pixel of the small frame is a pixel of the large one, seen along the same ray."""
    big = frames_of(SevenScenes(recording))[0]
    small = resize_frame(big, (30, 40))
    assert small.depth.shape == (30, 40)
    assert small.color.shape == (30, 40, 3)
    for row, column in ((0, 0), (7, 31), (29, 39)):
        ray = [
            (column - small.intrinsics[0, 2]) / small.intrinsics[0, 0],
            (row - small.intrinsics[1, 2]) / small.intrinsics[1, 1],
        ]
        u, v = (
            ray[0] * big.intrinsics[0, 0] + big.intrinsics[0, 2],
            ray[1] * big.intrinsics[1, 1] + big.intrinsics[1, 2],
        )
        assert abs(u - round(u)) < 1e-9
        assert small.depth[row, column] == big.depth[round(v), round(u)]
        assert (small.color[row, column] == big.color[round(v), round(u)]).all()
    assert resize_frame(big, (120, 160)) is big


def test_labels_are_resized_with_the_image():
    labels = np.arange(16, dtype=np.int16).reshape(4, 4)
    frame = Frame("s", "0", np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.float32), np.eye(3), np.eye(4), labels)
    assert resize_frame(frame, (2, 2)).semantic.tolist() == [[5, 7], [13, 15]]


def test_pair_is_plain_data():
    assert Pair("s", "a", "b", 0.5) == Pair("s", "a", "b", 0.5)


def slow_cell_overlap(cells1, cells2):
    """Cell by cell: the larger share of cells that are, or touch by a face, a cell of the other frame."""

    def share(cells, others):
        return np.mean(
            [min(sum(abs(a - b) for a, b in zip(cell, o, strict=True)) for o in others) <= 1 for cell in cells]
        )

    first, second = cells1.tolist(), cells2.tolist()
    return max(share(first, second), share(second, first))


def test_quick_measure_equals_its_slow_twin():
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randint(-3, 4, (count, 3), generator=generator).unique(dim=0) for count in (30, 9, 60)]
    matrix = cell_overlap_matrix([*frames, frames[0] + 100])
    for i, j in combinations(range(3), 2):
        assert matrix[i, j] == matrix[j, i] == pytest.approx(slow_cell_overlap(frames[i], frames[j]))
    assert matrix[3].tolist() == [0, 0, 0, 1]
    assert (cell_overlap_matrix([]).shape, cell_overlap_matrix([frames[0][:0]] * 2).tolist()) == (
        (0, 0),
        [[1, 0], [0, 1]],
    )
    with pytest.raises(DataError, match="too far to compare"):
        cell_overlap_matrix([torch.tensor([[0, 0, 0], [1 << 22] * 3])])


def test_quick_measure_is_near_the_released_one(recording):
    frames = frames_of(SevenScenes(recording))
    quick = cell_overlap_matrix([occupied_cells(frame) for frame in frames])
    released = cloud_overlap_matrix([thin_cloud(frame) for frame in frames])
    assert np.abs(quick - released).max() < 0.05
    assert np.abs(quick - overlap_matrix(frames)).max() > 0.1
    chosen = find_pairs(SevenScenes(recording), dataclasses.replace(SPEC, measure="voxels"), skips=SkippedFrames())
    assert [pair.overlap for pair in chosen] == [
        ratio for i, j in combinations(range(6), 2) if (ratio := quick[i, j]) >= 0.2
    ]
