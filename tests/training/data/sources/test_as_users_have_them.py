"""Recordings as users have them: with files missing, broken, hidden, elsewhere, or called otherwise."""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, HubError
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.mining_jobs import estimate
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.sens import SensFile, index_frames
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import write_polycam, write_record3d
from tests.recording_layouts import (
    golden_frames,
    write_colmap,
    write_plain,
    write_redwood,
    write_sens,
    write_transforms,
)

ABOVE = "\0\x05\x16\x07\0\x02\0\0Mac OS X"  # how a ._NAME of macOS begins


@pytest.fixture(scope="module")
def frames():
    """Four frames of a recording, 64x48."""
    return golden_frames(4, (48, 64))


def spec(layout, root, **options):
    return DataSpec(source=layout, path=str(root), options=options, measure="voxels", overlap=(0.2, 1.0))


def opened(layout, root, **options):
    return open_source(spec(layout, root, **options))


def matches(frame, want):
    """Whether depth and pose are those of a frame."""
    return np.allclose(frame.depth, want.depth, atol=0.0006) and np.allclose(
        frame.cam_to_world, want.cam_to_world, atol=2e-5
    )


def renumber(root, kinds, form):
    """Rename the images 0, 1, ... of folders; `form`: number -> new stem, None: the image is deleted."""
    for kind in kinds:
        for path in sorted((root / kind).iterdir(), key=lambda path: -int(path.stem)):
            stem = form(int(path.stem), kind)
            path.unlink() if stem is None else path.rename(path.with_stem(stem))


def test_images_of_equal_names_belong_together_though_others_lack_their_twin(frames, tmp_path):
    """One file is missing on each side: by position the depth of all frames would be another's."""
    root = write_redwood(tmp_path / "r", frames)
    (root / "color" / "00003.jpg").unlink()
    (root / "depth" / "00000.png").unlink()
    lines = (root / "trajectory.log").read_text().splitlines()
    (root / "trajectory.log").write_text("\n".join(lines[:-5]))
    source = opened("redwood", root)
    assert matches(source.load("r", "00001"), frames[1])
    assert matches(source.load("r", "00002"), frames[2])
    with pytest.raises(BadFrame, match=r"00000\.png: depth image is missing"):
        source.load("r", "00000")


def test_images_with_times_for_names_belong_together_by_position(frames, tmp_path):
    root = write_redwood(tmp_path / "r", frames)
    renumber(root, ("color", "depth"), lambda number, kind: f"{number + 1:07d}-{1000 * number + (kind == 'depth')}")
    first = root / "depth" / "0000001-1.png"
    first.rename(first.with_stem("0000001-0"))  # both begin at 0
    source = opened("redwood", root)
    assert all(matches(source.load("r", id), want) for id, want in zip(source.frame_ids("r"), frames, strict=True))


def test_a_trajectory_of_a_whole_recording_goes_to_the_numbers_of_its_part(frames, tmp_path):
    root = write_redwood(tmp_path / "r", frames)
    renumber(root, ("color", "depth"), lambda number, _: None if number == 1 else f"{number:05d}")
    source = opened("redwood", root)
    assert matches(source.load("r", "00002"), frames[2])
    assert matches(source.load("r", "00003"), frames[3])
    lines = (root / "trajectory.log").read_text().splitlines()
    (root / "trajectory.log").write_text("\n".join(lines[5:15]))  # of frames 1 and 2: positions, or numbers?
    with pytest.raises(
        DataError, match=r"poses of 2 frames, and the numbers of the 3 images have gaps: poses of frames"
    ):
        opened("redwood", root)
    lines[10:] = [line.replace("2 2 3", "1 1 2").replace("3 3 4", "2 2 3") for line in lines[10:]]
    (root / "trajectory.log").write_text("\n".join(lines[:5] + lines[10:]))  # of frames 0, 1, 2: positions
    source = opened("redwood", root)
    assert [matches(source.load("r", f"{k:05d}"), frames[k]) for k in (0, 2, 3)] == [True] * 3


def test_places_on_a_map_are_counted_from_near_the_first_frame(frames, tmp_path):
    """In float32 a meter of UTM has two steps."""
    far = [replace(frame, cam_to_world=frame.cam_to_world.copy()) for frame in frames]
    for frame in far:
        frame.cam_to_world[:3, 3] += [512_345.5, 5_203_000.25, 431]
    here, there = (opened("folder", write_plain(tmp_path / name, own, poses="each")) for name, own in (
        ("here", frames), ("there", far)))  # fmt: skip
    for path in (tmp_path / "there" / "pose").iterdir():
        np.savetxt(path, far[int(path.stem)].cam_to_world, fmt="%.17g")
    one, other = ([source.load(source.scenes()[0], str(k)).cam_to_world for k in range(4)] for source in (here, there))
    for near, moved in zip(one, other, strict=True):
        np.testing.assert_allclose(np.linalg.inv(one[0]) @ near, np.linalg.inv(other[0]) @ moved, atol=1e-5)
        assert np.abs(moved[:2, 3]).max() < 100
        assert moved[2, 3] == pytest.approx(near[2, 3] + 431, abs=1e-5)


def test_threads_agree_on_the_place_that_is_counted_from(frames, tmp_path, monkeypatch):
    far = [replace(frame, cam_to_world=frame.cam_to_world.copy()) for frame in frames]
    for frame in far:
        frame.cam_to_world[:3, 3] += [512_345, 5_203_000, 0]
    source = opened("folder", write_plain(tmp_path / "there", far))
    slow = source._cam_to_world

    def waiting(view):
        time.sleep(0.01)
        return slow(view)

    monkeypatch.setattr(source, "_cam_to_world", waiting)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda id: source.load("there", id).cam_to_world, [*"0123"] * 4))
    assert max(np.abs(pose[:3, 3]).max() for pose in found) < 1000


def test_a_far_world_is_part_of_the_fingerprint(frames, tmp_path):
    source = opened("folder", write_plain(tmp_path / "a", frames))
    before = source.fingerprint()
    source._origins = {"a": np.array([512_345.0, 0, 0])}
    assert source.fingerprint() != before


def test_every_frame_without_a_pose_counts(frames, tmp_path):
    nan = " ".join(["nan"] * 16)
    plain = write_plain(tmp_path / "plain", frames)
    lines = [line for line in (plain / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    (plain / "poses.txt").write_text("\n".join([lines[0], nan, nan, nan]))
    polycam = write_polycam(tmp_path / "polycam", frames)
    for path in sorted((polycam / "keyframes" / "corrected_cameras").iterdir())[:2]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "t_00": float("nan")}))
    transforms = write_transforms(tmp_path / "transforms", frames)
    tree = json.loads((transforms / "transforms.json").read_text())
    for entry in tree["frames"][:2]:
        entry["transform_matrix"][0][0] = float("nan")
    (transforms / "transforms.json").write_text(json.dumps(tree))
    for layout, root, broken in (("folder", plain, 3), ("polycam", polycam, 2), ("transforms", transforms, 2)):
        skips = SkippedFrames()
        source = opened(layout, root)
        for scene in source.scenes():
            for id in source.frame_ids(scene):
                try:
                    source.load(scene, id)
                except BadFrame as bad:
                    skips.add(bad)
        assert list(skips.counts().values()) == [broken], layout
        assert all("finite" in reason for reason in skips.reasons.values())


def test_pairs_of_frames_that_can_be_read_are_estimated(frames, tmp_path):
    root = write_plain(tmp_path / "plain", [frames[0]] * 8)
    lines = [line for line in (root / "poses.txt").read_text().splitlines() if not line.startswith("#")]
    (root / "poses.txt").write_text("\n".join(lines[:4] + [" ".join(["nan"] * 16)] * 4))
    here = spec("folder", root)
    source = open_source(here)
    assert estimate(source, here).kept == 7  # a quarter of 28; 6 are there
    assert len(find_pairs(source, here, skips=SkippedFrames())) == 6


def test_broken_frames_of_a_sens_file_are_counted_one_by_one(frames, tmp_path):
    path = write_sens(tmp_path, frames, step=1) / "scene0000_00" / "scene0000_00.sens"
    index = index_frames(SensFile(path).header)
    data = bytearray(path.read_bytes())
    for number in (0, 2):  # the color of one, the depth of the other
        start = int(index["offsets"][number]) + 96 + (int(index["bytes"][number][0]) if number else 0)
        data[start : start + 8] = b"\xff" * 8
    data_of_three = int(index["offsets"][3]) + 96
    data[data_of_three : data_of_three + 8] = b"\xff" * 8
    path.write_bytes(data)
    source, skips = opened("scannet", tmp_path, every=1), SkippedFrames()
    for id in source.frame_ids("scene0000_00"):
        try:
            source.load("scene0000_00", id)
        except BadFrame as bad:
            skips.add(bad)
    assert [path.rpartition(": ")[2] for path in skips.reasons] == ["frame 0", "frame 2", "frame 3"]
    assert len(skips.counts()) == 2  # reasons


@pytest.mark.parametrize("layout", ["scannet", "record3d", "transforms", "redwood", "colmap"])
def test_a_broken_recording_is_left_out_and_named(layout, frames, tmp_path):
    if layout == "scannet":
        write_sens(tmp_path, frames)
        (tmp_path / "scene0001_00").mkdir()
        broken = tmp_path / "scene0001_00" / "scene0001_00.sens"
        name = "scene0000_00"
    else:
        writers = {
            "record3d": partial(write_record3d, packed=False),
            "transforms": write_transforms,
            "redwood": write_redwood,
        }
        write = (writers | {"colmap": write_colmap})[layout]
        write(tmp_path / "good", frames)
        bad = write(tmp_path / "bad", frames)
        inner = {
            "record3d": "room.r3d",
            "transforms": "transforms.json",
            "redwood": "depth/0.heic",
            "colmap": "sparse/images.txt",
        }
        broken = bad / inner[layout]
        name = "good/room" if layout == "record3d" else "good"
        if layout == "redwood":
            shutil.rmtree(broken.parent)
            broken.parent.mkdir()
    broken.write_bytes(b"1 2 3")
    with pytest.warns(UserWarning, match=r"1 of 2 recordings are left out: .*(bad|scene0001_00)"):
        source = opened(layout, tmp_path)
    assert source.scenes() == [name]
    source.load(name, source.frame_ids(name)[0])


def test_files_that_a_listing_names_elsewhere_count_in_the_fingerprint(frames, tmp_path):
    root = write_transforms(tmp_path / "images", frames)
    tree = json.loads((root / "transforms.json").read_text())
    for entry in tree["frames"]:
        for key in ("file_path", "depth_file_path"):
            entry[key] = str(root / entry[key])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "transforms.json").write_text(json.dumps(tree))
    source = opened("transforms", elsewhere)
    before = source.fingerprint(), source.content()
    depth = sorted((root / "depth").iterdir())[0]
    Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(depth)
    again = opened("transforms", elsewhere)
    assert again.fingerprint() != before[0]
    assert again.content() != before[1]


def test_hidden_files_of_macos_are_no_recordings(frames, tmp_path):
    layouts = {
        "record3d": (partial(write_record3d, packed=False), "._room.r3d"),
        "redwood": (write_redwood, "._trajectory.log"),
        "folder": (write_plain, "color/._0.jpg"),
    }
    for layout, (write, hidden) in layouts.items():
        root = write(tmp_path / layout, frames)
        (root / hidden).write_text(ABOVE)
        if layout == "redwood":
            (root / "._camera_intrinsic.json").write_text(ABOVE)
        source = opened(layout, root)
        (scene,) = source.scenes()
        assert len(source.frame_ids(scene)) == 4, layout
        assert np.isfinite(source.load(scene, source.frame_ids(scene)[0]).cam_to_world).all()
    scan = tmp_path / "scannet" / "scene0000_00"
    for kind, ending in (("pose", "txt"), ("color", "jpg"), ("depth", "png")):
        (scan / kind).mkdir(parents=True)
        (scan / kind / f"._0.{ending}").write_text(ABOVE)
    np.savetxt(scan / "pose" / "0.txt", np.eye(4))
    assert opened("scannet", scan.parent).frame_ids("scene0000_00") == ["0"]


def test_endings_in_capitals_are_endings(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames, poses="each")
    (root / "color" / "0.jpg").rename(root / "color" / "0.JPEG")
    (root / "depth" / "1.png").rename(root / "depth" / "1.Png")
    (root / "pose").rename(root / "poses")
    source = opened("folder", root)
    assert source.frame_ids("a") == ["0", "1", "2", "3"]
    assert all(matches(source.load("a", str(k)), want) for k, want in enumerate(frames))
    archive = write_record3d(tmp_path / "b", frames) / "room.r3d"
    archive.rename(archive.with_suffix(".R3D"))
    assert opened("record3d", archive.parent).scenes() == ["room"]


def test_a_folder_of_files_that_are_not_read_says_which(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    for path in (root / "depth").iterdir():
        path.rename(path.with_suffix(".npz"))
    with pytest.raises(BadFrame, match=r"depth: holds files \.npz; accepted are \.png, .*\.exr"):
        opened("folder", root)


def test_json_with_a_byte_order_mark_is_json(frames, tmp_path):
    root = write_redwood(tmp_path / "r", frames)
    camera = root / "camera_intrinsic.json"
    camera.write_bytes(b"\xef\xbb\xbf" + camera.read_bytes())
    assert matches(opened("redwood", root).load("r", "00000"), frames[0])


@pytest.mark.skipif(sys.platform == "win32", reason="there ~NAME is a folder beside one's own")
def test_the_home_of_nobody_is_told():
    with pytest.raises(HubError, match="'~nobody_at_all/scans': this system does not know that home folder"):
        opened("folder", "~nobody_at_all/scans")
