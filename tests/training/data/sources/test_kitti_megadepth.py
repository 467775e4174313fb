"""KITTI and MegaDepth: which files make frames, and the pairs that Pri3D forms of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geo_pretrain.errors import BadFrame, DataError, MissingDependency, RecipeError
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.data.files import read_raw_depth
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.mining_jobs import estimate
from geo_pretrain.training.data.overlap import SparseFrame, sparse_overlap
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import REASON, hdf5, write_kitti, write_kitti_raw, write_megadepth
from tests.recording_layouts import golden_frames

DRIVE = "2011_09_30_drive_0028_sync"


@pytest.fixture(scope="module")
def frames():
    return golden_frames(5, (48, 64))


def opened(source, root, **options):
    return open_source(DataSpec(source=source, path=str(root), options=options))


def relative(poses):
    return [np.linalg.inv(poses[0]) @ pose for pose in poses]


def test_sequence_08_of_kitti_begins_at_frame_1100_of_its_drive(frames, tmp_path):
    root = write_kitti(tmp_path, frames)
    source = opened("kitti", root, odometry=True)
    assert source.frame_ids(DRIVE) == [f"{1105 + k:010d}" for k in range(5)]
    with pytest.raises(DataError, match="No frame in"):  # drive frame 1105 is none of the sequence's 11 poses
        opened("kitti", root, match_released_code=True)


def test_kittis_raw_data_have_poses_from_oxts(frames, tmp_path):
    source = opened("kitti", write_kitti_raw(tmp_path, frames))
    (scene,) = source.scenes()
    read = [source.load(scene, id) for id in source.frame_ids(scene)]
    assert scene == "2011_09_26_drive_0001_sync"
    # the world is that of the first inertial unit, level with its camera but for the calibration's half degree or so
    np.testing.assert_allclose(read[0].cam_to_world[:3, :3] @ [0, -1, 0], [0, 0, 1], atol=0.03)
    for got, want, moved, pose in zip(
        read,
        frames,
        relative([frame.cam_to_world for frame in read]),
        relative([frame.cam_to_world for frame in frames]),
        strict=True,
    ):
        np.testing.assert_allclose(moved, pose, atol=1e-6)
        np.testing.assert_array_equal(got.color, want.color)
        np.testing.assert_allclose(got.intrinsics, want.intrinsics, atol=1e-6)
    with pytest.raises(DataError, match="has no annotated depth"):
        opened("kitti", tmp_path, odometry=True)
    oxts = tmp_path / "raw/2011_09_26/2011_09_26_drive_0001_sync/oxts/data"
    (oxts / "0000000006.txt").write_text("91 " + "0 " * 29)
    (oxts / "0000000007.txt").unlink()
    source = opened("kitti", tmp_path)
    for number, reason in ((6, "states no place on earth"), (7, "file is missing")):
        with pytest.raises(BadFrame, match=rf"{number}\.txt: {reason}"):
            source.load(scene, f"{number:010d}")
    (tmp_path / "raw/2011_09_26/calib_imu_to_velo.txt").write_text("R: 1 0 0 0 1 0 0 0 2\nT: 0 0 0\n")
    with pytest.raises(BadFrame, match=r"calib_imu_to_velo\.txt:1: R: is no rotation"):
        opened("kitti", tmp_path).load(scene, f"{5:010d}")
    for path in oxts.parent.rglob("*"):
        path.rename(tmp_path / path.name)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert opened("kitti", tmp_path).unposed() == [scene]  # no poses, no pairs, but single frames


def test_kitti_without_its_parts_says_what_is_expected(frames, tmp_path):
    with pytest.raises(DataError, match=r"has no annotated depth; expected annotated depth \(train/DRIVE_sync"):
        opened("kitti", tmp_path)
    root = write_kitti(tmp_path, frames)
    (root / "odometry/dataset/poses/08.txt").rename(root / "08.txt")
    with pytest.raises(DataError, match=f"has no images of {DRIVE} and 0 others"):
        opened("kitti", root)
    (root / "08.txt").rename(root / "odometry/dataset/poses/08.txt")
    (root / "odometry/data_odometry_color/dataset/sequences/08/calib.txt").write_text("P2: 1 2 3\n")
    with pytest.raises(DataError, match=r"calib\.txt:1: P2: is not followed by 12 numbers"):
        opened("kitti", root)


def test_a_broken_drive_of_kitti_is_left_out_and_named(frames, tmp_path):
    root = write_kitti(tmp_path, frames)
    write_kitti_raw(tmp_path, frames)
    (root / "odometry/dataset/poses/08.txt").write_bytes(b"\xff\x00")
    with pytest.warns(UserWarning, match=r"1 of 2 recordings are left out: .*08\.txt:"):
        source = opened("kitti", tmp_path)
    assert source.scenes() == ["2011_09_26_drive_0001_sync"]


def thin(frame, share):
    """A frame with depth at a part of its pixels, as a laser's."""
    kept = np.random.default_rng(0).random(frame.depth.shape) < share
    return replace(frame, depth=np.where(kept, frame.depth, 0).astype(np.float32))


def test_the_overlap_of_sparse_frames_is_that_of_matched_pixels(frames):
    one, two = thin(frames[0], 0.4), thin(frames[2], 0.6)
    batch = [torch.from_numpy(np.asarray(value))[None] for frame in (one, two) for value in
             (frame.depth, frame.intrinsics.astype(np.float32), frame.cam_to_world)]  # fmt: skip
    depth1, camera1, pose1, depth2, camera2, pose2 = batch
    matches = int((match_pixels(depth1, depth2, camera1, camera2, pose1, pose2, tolerance=0.5) >= 0).sum())
    wanted = matches / ((one.depth > 0).sum() + (two.depth > 0).sum() - matches)
    assert 0.05 < wanted < 0.5
    assert sparse_overlap(SparseFrame.of(one), SparseFrame.of(two)) == pytest.approx(wanted, abs=2e-3)


def test_pairs_of_kitti_are_at_most_100_frames_apart(frames, tmp_path):
    root = write_kitti(tmp_path, [frames[0]] * 5)
    folder = root / "depth/train" / DRIVE / "proj_depth/groundtruth/image_02"
    (folder / f"{1109:010d}.png").rename(folder / f"{1206:010d}.png")
    poses = root / "odometry/dataset/poses/08.txt"
    poses.write_text("\n".join([*poses.read_text().splitlines()[:9], *["1 0 0 0 0 1 0 0 0 0 1 0"] * 100]))
    images = root / "odometry/data_odometry_color/dataset/sequences/08/image_2"
    (images / "000009.png").rename(images / "000106.png")
    source = opened("kitti", root)
    ids = source.frame_ids(DRIVE)
    assert source.tests(DRIVE, ids) == 6 + 3  # 1105 and 1206 are 101 frames apart
    tested = [(a[-4:], b[-4:]) for a, b, _ in source.overlaps(DRIVE, ids, SkippedFrames())]
    assert len(tested) == 9
    assert ("1105", "1206") not in tested
    (folder / f"{1106:010d}.png").write_bytes(b"")
    skips = SkippedFrames()
    spec = DataSpec(source="kitti", path=str(root), measure="source", overlap=(0.9, 1.0))
    pairs = find_pairs(open_source(spec), spec, skips=skips)
    assert [(pair.frame1[-4:], pair.frame2[-4:]) for pair in pairs] == [
        ("1105", "1107"), ("1105", "1108"), ("1107", "1108")
    ]  # fmt: skip
    assert len(skips.reasons) == 1
    expected = estimate(open_source(spec), spec)
    assert (expected.frames, expected.pairs, expected.kept) == (5, 9, round(9 * 3 / 5))


def test_other_sources_have_no_rule_of_their_own(tmp_path, frames):
    from tests.recording_layouts import write_plain

    spec = DataSpec(source="folder", path=str(write_plain(tmp_path, frames)), measure="source")
    with pytest.raises(RecipeError, match="'folder' has no rule of its own for pairs; accepted are projective"):
        find_pairs(open_source(spec), spec, skips=SkippedFrames())
    with pytest.raises(RecipeError, match="no rule of its own"):
        estimate(open_source(spec), spec)


@pytest.mark.parametrize("binary", [True, False])
def test_pairs_of_megadepth_share_points_of_the_reconstruction(binary, frames, tmp_path):
    spec = DataSpec(source="megadepth", path=str(write_megadepth(tmp_path, frames, binary=binary)), measure="source")
    source = open_source(spec)
    assert source.frame_ids("0022") == ["0_b", "1_o", "2_b", "3_o", "4_b"]  # the sixth has a mask for a depth
    for frame1, frame2, ratio in source.overlaps("0022", source.frame_ids("0022"), SkippedFrames()):
        assert ratio == {0: 1.0, 1: 0.5}.get(abs(int(frame1[0]) - int(frame2[0])), 0.0)
    pairs = find_pairs(source, spec, skips=SkippedFrames())
    assert len(pairs) == 8  # neighbors, in either order
    assert {pair.overlap for pair in pairs} == {0.5}
    rows = source.common_points("0022", "1_o", "0_b")
    np.testing.assert_array_equal(rows, [[7.5 + k, 3.5 + 10 + k] * 2 for k in range(10)])
    assert not len(source.common_points("0022", "0_b", "3_o"))
    assert "units of each scene's reconstruction" in source.note


def test_a_depth_file_of_megadepth_is_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py", reason=REASON)
    depth = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "a.h5"
    path.write_bytes(hdf5(depth))
    np.testing.assert_array_equal(read_raw_depth(path), depth)
    with h5py.File(tmp_path / "b.h5", "w") as file:  # as the release stores it
        file.create_dataset("depth", data=depth.astype(np.float16), compression="gzip", chunks=True)
        file.create_dataset("other", data=depth)
    np.testing.assert_array_equal(read_raw_depth(tmp_path / "b.h5"), depth)
    for wrong, reason in (
        (hdf5(depth)[:1100], "depth cannot be read"),
        (hdf5(depth).replace(b"depth\0", b"other\0"), "depth cannot be read"),
        (hdf5(depth.reshape(1, 12))[:-4], "depth cannot be read"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(BadFrame, match=rf"a\.h5: {reason}"):
            read_raw_depth(path)
    with pytest.raises(BadFrame, match="depth image is missing"):
        read_raw_depth(tmp_path / "c.h5")


def test_without_h5py_the_install_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[datasets\]'"):
        read_raw_depth(tmp_path / "a.h5")
