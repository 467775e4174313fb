"""Readers on files in the real formats: values, both invalid depths, registration, and every kind of broken frame."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.training.data.frame import resize_frame
from geo_pretrain.training.data.sources.registry import list_sources, open_source
from geo_pretrain.training.data.sources.scannet import CONSTANT_640, ScanNet, ScanNetConfig
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes, SevenScenesConfig
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import ALL_LAYOUTS
from tests.training.conftest import golden_views, write_recording

KITCHEN = Path(__file__).parents[5] / "shared" / "data" / "seven_scenes_kitchen"


@pytest.fixture
def folder(tmp_path):
    return write_recording(tmp_path / "kitchen")


def test_seven_scenes_frame_holds_what_the_files_hold(folder):
    source = SevenScenes(folder)
    assert source.scenes() == ["kitchen"]
    assert source.frame_ids("kitchen") == [f"{k:06d}" for k in range(0, 60, 10)]
    frame = source.load("kitchen", "000020")
    depth, pose = golden_views()[2]
    np.testing.assert_allclose(frame.depth, depth / 1000, rtol=1e-6)
    np.testing.assert_allclose(frame.cam_to_world, pose, atol=1e-6)
    assert frame.intrinsics[0].tolist() == [146.25, 0, 79.5]
    assert frame.color.shape == (120, 160, 3)
    assert frame.color.dtype == np.uint8


def test_nested_sequences_are_scenes(tmp_path):
    for name in ("seq-01", "seq-02"):
        write_recording(tmp_path / "chess" / name, suffix=".jpg")
    source = SevenScenes(tmp_path)
    assert source.scenes() == ["chess/seq-01", "chess/seq-02"]
    assert source.load("chess/seq-02", "000000").scene == "chess/seq-02"


def test_what_lies_above_several_sequences_belongs_to_each(tmp_path):
    """As 3DMatch has it: a camera for each place, whose sequences are folders below."""
    folder = write_recording(tmp_path / "elsewhere" / "chess" / "seq-01")
    intrinsics = np.loadtxt(folder / "camera-intrinsics.txt")
    intrinsics[0, 0] = 570
    (folder / "camera-intrinsics.txt").unlink()
    np.savetxt(folder.parent / "camera-intrinsics.txt", intrinsics)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "chess").symlink_to(folder.parent)
    (tmp_path / "root" / "latest").symlink_to(tmp_path / "root" / "chess" / "seq-01")  # once, where a link led first
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root")
    source = SevenScenes(tmp_path / "root")
    assert source.scenes() == ["chess/seq-01"]
    assert source.load("chess/seq-01", "000000").intrinsics[0, 0] == 570
    before = source.fingerprint()
    np.savetxt(folder.parent / "camera-intrinsics.txt", intrinsics * 2)
    assert source.fingerprint() != before
    (folder / "frame-000000.color.png").unlink()
    (folder / "frame-000000.color.png").symlink_to(tmp_path / "nothing")  # as of data that are fetched in part
    assert source.fingerprint()
    with pytest.raises(BadFrame):
        source.load("chess/seq-01", "000000")


def test_frames_whose_numbers_have_no_zeros_in_front_are_in_order_of_time(folder):
    for path in folder.glob("frame-*"):
        number = int(path.name[len("frame-") :].partition(".")[0])
        path.rename(path.with_name(path.name.replace(f"{number:06d}", str(number if number < 50 else 100))))
    assert SevenScenes(folder).frame_ids("kitchen") == ["0", "10", "20", "30", "40", "100"]


def test_a_folder_whose_name_is_no_utf8_has_a_fingerprint(folder):
    odd = folder.parent / os.fsdecode(b"K\xfcche")
    folder.rename(odd)
    assert len(SevenScenes(odd.parent).fingerprint()) == len(SevenScenes(odd.parent).content()) == 64


def test_both_invalid_depths_become_zero(folder):
    path = folder / "frame-000000.depth.png"
    depth = np.array(Image.open(path))
    depth[10:20, 10:20] = 65535
    Image.fromarray(depth).save(path)
    frame = SevenScenes(folder).load("kitchen", "000000")
    assert (frame.depth[10:20, 10:20] == 0).all()
    assert frame.depth.max() < 10
    assert (frame.depth == 0).sum() >= 100 + (golden_views()[0][0] == 0).sum() - 100


def break_pose(value):
    def change(folder):
        path = folder / "frame-000000.pose.txt"
        pose = np.loadtxt(path)
        pose[0, 3] = value
        np.savetxt(path, pose)

    return change


def rewrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


def save_depth(array):
    return lambda folder: Image.fromarray(array).save(folder / "frame-000000.depth.png")


@pytest.mark.parametrize(
    "change, file, reason",
    [
        (break_pose(float("nan")), "pose.txt", "not finite"),
        (break_pose(float("-inf")), "pose.txt", "not finite"),
        (rewrite("frame-000000.pose.txt", b"1 2 3"), "pose.txt", "3 numbers, expected 4x4"),
        (rewrite("frame-000000.pose.txt", b"a " * 16), "pose.txt", "not a matrix"),
        (rewrite("frame-000000.pose.txt", b"2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1"), "pose.txt", "not a rotation"),
        (lambda f: (f / "frame-000000.color.png").unlink(), "color.png", "missing"),
        (lambda f: (f / "frame-000000.depth.png").unlink(), "depth.png", "missing"),
        (rewrite("frame-000000.color.png", b"no image"), "color.png", "cannot be read"),
        (truncate("frame-000000.color.png"), "color.png", "cannot be read"),
        (truncate("frame-000000.depth.png"), "depth.png", "cannot be read"),
        (save_depth(np.ones((60, 80), np.uint16)), "depth.png", "depth is 80x60, the color image 160x120"),
        (save_depth(np.zeros((120, 160), np.uint16)), "depth.png", "no pixel has a valid depth"),
        (save_depth(np.full((120, 160), 65535, np.uint16)), "depth.png", "no pixel has a valid depth"),
        (save_depth(np.ones((120, 160, 3), np.uint8)), "depth.png", "image mode RGB"),
    ],
)
def test_broken_frame_is_refused_with_path_and_reason(folder, change, file, reason):
    change(folder)
    with pytest.raises(BadFrame) as error:
        SevenScenes(folder).load("kitchen", "000000")
    assert error.value.path.endswith(f"frame-000000.{file}")
    assert reason in error.value.reason
    SevenScenes(folder).load("kitchen", "000010")


def test_registration_moves_depth_and_pose_into_the_color_camera(folder, tmp_path):
    """A surface point must have the same world position, read through either camera."""
    shift = np.eye(4)
    shift[0, 3] = -0.03
    color_intrinsics = [[140.0, 0, 80], [0, 140.0, 60], [0, 0, 1]]
    file = tmp_path / "registration.json"
    file.write_text(json.dumps({"color_intrinsics": color_intrinsics, "depth_to_color": shift.tolist()}))
    plain = SevenScenes(folder).load("kitchen", "000000")
    moved = SevenScenes(folder, SevenScenesConfig(str(file))).load("kitchen", "000000")
    assert moved.intrinsics.tolist() == color_intrinsics

    def world(frame, row, column):
        z = frame.depth[row, column]
        k = frame.intrinsics
        point = [(column - k[0, 2]) * z / k[0, 0], (row - k[1, 2]) * z / k[1, 1], z, 1]
        return (frame.cam_to_world @ point)[:3], z

    checked = 0
    for row, column in np.argwhere(plain.depth > 0)[::97]:
        point, z = world(plain, row, column)
        x, y, z2, _ = np.linalg.inv(moved.cam_to_world) @ [*point, 1]
        c, r = int(np.floor(x / z2 * 140 + 80.5)), int(np.floor(y / z2 * 140 + 60.5))
        if 0 <= r < 120 and 0 <= c < 160 and abs(moved.depth[r, c] - z2) < 1e-4:
            seen, _ = world(moved, r, c)
            assert np.linalg.norm(seen - point) < 0.71 * z / 140 + 1e-3  # half a pixel's footprint
            checked += 1
    assert checked > 100
    assert SevenScenes(folder).fingerprint() != SevenScenes(folder, SevenScenesConfig(str(file))).fingerprint()


@pytest.mark.parametrize(
    "text, part",
    [("{", "JSONDecodeError"), ("{}", "KeyError"), ('{"color_intrinsics": [1], "depth_to_color": [1]}', "shape")],
)
def test_broken_registration_says_what_is_expected(folder, tmp_path, text, part):
    file = tmp_path / "registration.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match=part):
        SevenScenes(folder, SevenScenesConfig(str(file)))


def test_registration_that_leaves_no_depth_and_one_that_is_not_finite_are_refused(folder, tmp_path):
    file = tmp_path / "registration.json"
    away, matrix = np.eye(4), [[140.0, 0, 80], [0, 140.0, 60], [0, 0, 1]]
    away[0, 3] = 1000
    file.write_text(json.dumps({"color_intrinsics": matrix, "depth_to_color": away.tolist()}))
    source = SevenScenes(folder, SevenScenesConfig(str(file)))
    assert source.note == "depth registered to the color camera"
    with pytest.raises(BadFrame, match="no depth is left after registration"):
        source.load("kitchen", "000000")
    away[0, 3] = float("nan")
    file.write_text(json.dumps({"color_intrinsics": matrix, "depth_to_color": away.tolist()}))
    with pytest.raises(RecipeError, match="finite numbers"):
        SevenScenes(folder, SevenScenesConfig(str(file)))


def test_intrinsics_are_those_of_the_scene_then_of_the_root_then_for_its_size_only_a_kinects(folder):
    kept = (folder / "camera-intrinsics.txt").rename(folder.parent / "camera-intrinsics.txt")
    assert SevenScenes(folder.parent).load("kitchen", "000000").intrinsics[0].tolist() == [146.25, 0, 79.5]
    kept.unlink()
    with pytest.raises(BadFrame, match=r"160x120 pixels and no intrinsics; .* hold for 640x480: give them"):
        SevenScenes(folder.parent).load("kitchen", "000000")
    for image in folder.glob("frame-000000.*.png"):
        Image.open(image).resize((640, 480), Image.Resampling.NEAREST).save(image)
    plain = SevenScenes(folder.parent).load("kitchen", "000000").intrinsics
    assert plain.tolist() == [[585, 0, 320], [0, 585, 240], [0, 0, 1]]


def test_without_registration_the_source_says_so(folder):
    assert "not registered" in SevenScenes(folder).note


def test_recorded_frames_are_read():
    if not KITCHEN.exists():
        pytest.skip("the recorded 7-Scenes excerpt is for local use only and not here")
    source = SevenScenes(KITCHEN)
    frame = source.load(source.scenes()[0], "000300")
    assert len(source.frame_ids(source.scenes()[0])) == 60
    assert frame.depth.shape == (480, 640)
    assert 0.8 < frame.depth[frame.depth > 0].min() < frame.depth.max() < 3.7


def write_scan(root, name="scene0000_00"):
    """The golden views as an exported ScanNet scan: big JPEG color, 16-bit depth, 4x4 intrinsics, an -inf pose."""
    scan = root / name
    for part in ("color", "depth", "pose", "intrinsic"):
        (scan / part).mkdir(parents=True)
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = load_file(Path(__file__).parents[3] / "data" / "geometry.safetensors")["intrinsics"]
    np.savetxt(scan / "intrinsic" / "intrinsic_depth.txt", intrinsics)
    for number, (depth, pose) in enumerate(golden_views()):
        if number == 5:
            pose = np.full((4, 4), -np.inf)
        Image.fromarray(depth.astype(np.uint16)).save(scan / "depth" / f"{25 * number}.png")
        Image.new("RGB", (324, 242), (number, 100, 100)).save(scan / "color" / f"{25 * number}.jpg", quality=100)
        np.savetxt(scan / "pose" / f"{25 * number}.txt", pose)
    return root


def test_scannet_export_is_read(tmp_path):
    source = ScanNet(write_scan(tmp_path))
    assert source.frame_ids("scene0000_00") == ["0", "25", "50", "75", "100", "125"]
    frame = source.load("scene0000_00", "100")
    assert frame.color.shape == (120, 160, 3)
    np.testing.assert_allclose(frame.depth, golden_views()[4][0] / 1000, rtol=1e-6)
    assert frame.intrinsics[0].tolist() == [146.25, 0, 79.5]
    with pytest.raises(BadFrame, match="not finite"):
        source.load("scene0000_00", "125")
    constant = ScanNet(tmp_path, ScanNetConfig(constant_intrinsics=True)).load("scene0000_00", "0")
    assert constant.intrinsics[0, 0] == CONSTANT_640[0, 0] / 4  # at 160x120
    full = replace(
        constant,
        intrinsics=CONSTANT_640,
        color=np.zeros((480, 640, 3), np.uint8),
        depth=np.ones((480, 640), np.float32),
    )
    pri3d = [[288.9353025, 0, 159.5], [0, 288.9353025, 119.5], [0, 0, 1]]
    np.testing.assert_allclose(resize_frame(full, (240, 320)).intrinsics, pri3d, rtol=1e-12)


def test_part_of_the_frames_can_be_held_out(folder):
    halves = [
        open_source(DataSpec(source="seven_scenes", path=str(folder), frames=part)) for part in ((0, 0.5), (0.5, 1))
    ]
    ids = [half.frame_ids("kitchen") for half in halves]
    assert ids[0] == ["000000", "000010", "000020"]
    assert ids[0] + ids[1] == SevenScenes(folder).frame_ids("kitchen")
    assert halves[0].fingerprint() != halves[1].fingerprint()


def test_fingerprint_changes_when_a_frame_does(folder):
    before = SevenScenes(folder).fingerprint()
    assert before == SevenScenes(folder).fingerprint()
    (folder / "frame-000000.color.png").unlink()
    assert before != SevenScenes(folder).fingerprint()


def test_fingerprint_changes_with_the_camera(folder):
    before = SevenScenes(folder).fingerprint()
    (folder / "camera-intrinsics.txt").write_text("500 0 80 0 500 60 0 0 1  ")
    assert before != SevenScenes(folder).fingerprint()


def test_wrong_sources_and_folders_are_explained(tmp_path, folder):
    with pytest.raises(UnknownName, match="'seven_scenes'"):
        open_source(DataSpec(source="7scenes"))
    with pytest.raises(RecipeError, match="needs a folder"):
        open_source(DataSpec(source="seven_scenes"))
    with pytest.raises(RecipeError, match=r"data.options.registrations.*registration"):
        open_source(DataSpec(source="seven_scenes", path=str(folder), options={"registrations": 1}))
    with pytest.raises(DataError, match="No folder"):
        open_source(DataSpec(source="seven_scenes", path=str(tmp_path / "nowhere")))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="No frames"):
        SevenScenes(folder)
    with pytest.raises(DataError, match="No scans"):
        ScanNet(folder)
    assert {*(layout.split()[0] for layout in ALL_LAYOUTS), "rooms", "seven_scenes"} <= set(list_sources())


def test_the_table_of_data_md_has_a_row_for_each_source():
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text("utf-8")
    table = "| source | `--data` |" + page.partition("| source | `--data` |")[2].partition("\n\n")[0]
    named = {row.split("`")[1].partition(":")[0] for row in table.splitlines()[2:]}
    assert named == set(list_sources())
