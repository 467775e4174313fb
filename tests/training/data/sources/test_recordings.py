"""Every layout of recorders gives back the frames that were written in it, and says what is wrong with others."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.files import read_color, read_depth
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.colmap_model import (
    find_model,
    read_cameras,
    read_images,
    read_observations,
)
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.tum import associate
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import ALL_LAYOUTS, NAMES
from tests.recording_layouts import (
    FLIP,
    Twin,
    four,
    golden_frames,
    write_colmap,
    write_plain,
    write_redwood,
    write_transforms,
    write_tum,
)

FLOATS = ("colmap", "colmap binary", "megadepth", "record3d", "record3d export")  # layouts whose depth is in float
OPENGL = ("polycam", "record3d", "record3d export", "transforms")
UP = {"kitti": "-y", "polycam": "y", "record3d": "y", "record3d export": "y"}  # of other worlds than z
TILT = {"z": 0.0, "y": np.pi / 2, "-y": -np.pi / 2, "-z": np.pi}  # about x, after which z points up
INVERTED = ("arkitscenes", "colmap", "colmap binary", "megadepth")  # layouts with world-to-camera poses


@pytest.fixture(scope="module")
def frames():
    """Four frames of a recording, 64x48."""
    return golden_frames(4, (48, 64))


def opened(layout, root, **options):
    return open_source(DataSpec(source=layout.split()[0], path=str(root), options=options))


def upright(frame, up):
    """The frame in a world whose axis `up` has become z."""
    turn = np.eye(4)
    cosine, sine = np.cos(TILT[up]), np.sin(TILT[up])
    turn[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
    return replace(frame, cam_to_world=turn @ frame.cam_to_world)


def assert_is(frame, want, atol=0.0006):
    np.testing.assert_allclose(frame.depth, want.depth, atol=atol)
    np.testing.assert_allclose(frame.intrinsics, want.intrinsics, atol=1e-4)
    np.testing.assert_allclose(frame.cam_to_world, want.cam_to_world, atol=2e-5)
    assert np.abs(frame.color.astype(int) - want.color).mean() < 4  # JPEG
    assert frame.posed


def test_the_sweep_has_a_writer_for_each_layout_of_recordings():
    from geo_pretrain.training.data.sources.registry import SOURCES

    assert {layout.split()[0] for layout in ALL_LAYOUTS} <= SOURCES.keys()
    assert len(ALL_LAYOUTS) >= 5


@pytest.mark.parametrize("layout", NAMES)
def test_a_layout_is_read_as_it_was_written(layout, frames, tmp_path):
    source = opened(layout, ALL_LAYOUTS[layout](tmp_path / "desk", frames, Twin()))
    (scene,) = source.scenes()
    ids = source.frame_ids(scene)
    assert len(ids) == len(frames)
    for frame_id, want in zip(ids, [upright(frame, UP.get(layout, "z")) for frame in frames], strict=True):
        assert_is(source.load(scene, frame_id), want, 0.002 if layout == "kitti" else 0.0006)
    assert source.raw_depth(scene, ids[0]).dtype.kind == ("f" if layout in FLOATS else "u")
    before = source.fingerprint(), source.content()
    assert (opened(layout, tmp_path / "desk").fingerprint(), source.content()) == before
    assert opened(layout, tmp_path / "desk", pose_scale=2.0).fingerprint() != before[0]


@pytest.mark.parametrize("layout", NAMES)
def test_options_undo_what_a_recorder_does_otherwise(layout, frames, tmp_path):
    own = opened(layout, ALL_LAYOUTS[layout](tmp_path / "right", frames, Twin())).conventions
    unit = {"tum": 5000, "kitti": 256}.get(layout, 1 if layout in FLOATS else 1000)
    axes = "opengl" if layout in OPENGL else "opencv"
    assert (own.depth_scale, own.camera_axes) == (unit, axes)
    assert own.pose_convention == ("world_to_camera" if layout in INVERTED else "camera_to_world")
    other = "opencv" if layout in OPENGL else "opengl"
    direction = "camera_to_world" if layout in INVERTED else "world_to_camera"
    twin = Twin(depth=2.0, inverted=True, flipped=True, millimeters=True)
    root = ALL_LAYOUTS[layout](tmp_path / "twin", frames, twin)
    options = {
        "depth_scale": 2 * unit, "pose_convention": direction, "camera_axes": other, "pose_scale": 1000,
        "world_up": "z", "intrinsics": four(frames[0]),
    }  # fmt: skip
    source = opened(layout, root, **options)
    scene = source.scenes()[0]
    assert_is(source.load(scene, source.frame_ids(scene)[-1]), frames[-1], 0.002 if layout == "kitti" else 0.0006)
    assert source.conventions.camera_axes == other


def test_poses_of_a_plain_folder_are_lines_files_or_quaternions(frames, tmp_path):
    assert_is(opened("folder", write_plain(tmp_path / "a", frames, poses="each")).load("a", "2"), frames[2])
    root = write_plain(tmp_path / "b", frames)
    lines = (root / "poses.txt").read_text().splitlines()[1:]
    (root / "poses.txt").write_text("\n".join(",".join(line.split()[:12]) for line in lines))
    assert_is(opened("folder", root).load("b", "1"), frames[1])
    half = "0 0 3 0 0.7071068 0 0.7071068"  # a quarter turn about y: the camera looks along the world's x
    (root / "poses.txt").write_text("\n".join([half, f"3.5 {half}", half.replace("0.7071068", "0.5"), "nan " * 16]))
    source = opened("folder", root)
    turned = [[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 3], [0, 0, 0, 1]]
    for name in ("0", "1"):
        np.testing.assert_allclose(source.load("b", name).cam_to_world, turned, atol=1e-6)
    for name, reason in (("2", r"poses\.txt:3: pose has a quaternion of the length 0\.707"), ("3", "not finite")):
        with pytest.raises(BadFrame, match=reason):
            source.load("b", name)


def test_links_to_recordings_are_followed_and_those_that_lead_back_are_not(frames, tmp_path):
    write_plain(tmp_path / "elsewhere" / "b", frames)
    write_plain(tmp_path / "root" / "a", frames)
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root")
    assert opened("folder", tmp_path / "root").scenes() == ["a", "b"]


def test_numbers_in_names_are_ordered_as_numbers_and_recordings_may_be_nested(frames, tmp_path):
    for place in ("house/kitchen", "house/attic"):
        root = write_plain(tmp_path / place, [frames[k % 4] for k in range(11)])
    source = opened("folder", tmp_path)
    assert source.scenes() == ["house/attic", "house/kitchen"]
    assert source.frame_ids("house/attic") == [str(k) for k in range(11)]
    assert_is(source.load("house/kitchen", "10"), frames[2])
    (root / "color" / "11.jpg").write_bytes((root / "color" / "3.jpg").read_bytes())
    with pytest.raises(BadFrame, match=r"poses\.txt: 11 poses for 12 images in color/"):
        opened("folder", tmp_path).load("house/attic", "3")


def test_frames_without_poses_serve_single_frames_only_and_say_so(frames, tmp_path):
    spec = DataSpec(source="folder", path=str(write_plain(tmp_path / "a", frames, poses="none")))
    source = open_source(spec)
    frame = source.load("a", "0")
    assert not frame.posed
    assert (frame.cam_to_world @ [0, -1, 0, 0] == [0, 0, 1, 0]).all()  # up as the camera was held, down its y axis
    assert "1 of 1 scenes have no poses" in source.note
    assert len(find_pairs(source, replace(spec, units="frames"), skips=SkippedFrames())) == 4
    with pytest.raises(DataError, match=r"scene has no poses: .*single frames \(PPKT"):
        find_pairs(source, spec, skips=SkippedFrames())
    with pytest.raises(DataError, match=r"a: scene has no poses.*fuse a surface"):
        Surfaces(source, cache_dir=tmp_path).load("a")


def test_intrinsics_are_never_guessed(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    fx, fy, cx, cy = four(frames[0])
    own = root / "intrinsics.txt"
    for text, reason in (
        ("0 0 0 0", r"intrinsics\.txt: intrinsics have the focal lengths 0 0"),
        (f"{fx} 0 0 0 {fy} 0 {cx} {cy} 1", "intrinsics have the last row"),  # transposed
        ("nan 50 32 24", "are not finite"),
        ("50 50 32", "3 numbers; accepted is fx fy cx cy"),
    ):
        own.write_text(text)
        with pytest.raises(DataError, match=f"No frame in .* has intrinsics: .*{reason}.*Give them: --set"):
            opened("folder", root)
    own.write_text(f"{10 * fx} {10 * fy} {10 * cx} {10 * cy}")
    with pytest.raises(
        BadFrame, match=r"principal point \(.*\), outside of this image .*intrinsics_of=color.* Then this"
    ) as told:
        opened("folder", root).load("a", "0")
    here = told.value.reason.rpartition("intrinsics=")[2]
    numbers = opened("folder", root, intrinsics=json.loads(here)).load("a", "0").intrinsics
    np.testing.assert_allclose(numbers[:2].ravel(), [fx, 0, cx, 0, fy, cy], rtol=0.03)  # the size is not known
    own.write_text(f"{fx} {fy} {cx + 64} {cy}")
    with pytest.raises(BadFrame, match=r"outside of this image of 64x48 .*intrinsics_of=color"):
        opened("folder", root).load("a", "0")
    own.unlink()
    with pytest.raises(DataError, match=r"intrinsics\.txt: file is missing.*Give them"):
        opened("folder", root)
    for path in (root / "color").iterdir():
        Image.open(path).resize((128, 96)).save(path)
    double = tmp_path / "k.txt"
    double.write_text(f"{2 * fx} 0 {2 * cx + 0.5} 0 {2 * fy} {2 * cy + 0.5} 0 0 1")
    source = opened("folder", root, intrinsics=str(double), intrinsics_of="color")
    np.testing.assert_allclose(source.load("a", "1").intrinsics, frames[1].intrinsics, atol=1e-9)
    double.rename(own)  # the folder's own file may hold for color, too
    source = opened("folder", root, intrinsics_of="color")
    np.testing.assert_allclose(source.load("a", "1").intrinsics, frames[1].intrinsics, atol=1e-9)
    redwood = write_redwood(tmp_path / "r", frames)
    (redwood / "camera_intrinsic.json").unlink()
    with pytest.raises(BadFrame, match="64x48 pixels and no intrinsics; the sensor's nominal ones hold for 640x480"):
        opened("redwood", redwood).load("r", "00000")


def test_options_that_contradict_or_cannot_be_are_refused(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    for options, reason in (
        ({"depth_scale": 0}, "depth_scale' is 0.0, accepted is a number above 0"),
        ({"pose_convention": "c2w"}, "camera_to_world, world_to_camera"),
        ({"registered": True, "registration": "x.json"}, "Accepted is one of the two"),
        ({"intrinsics": [1, 0, 3, 4]}, "accepted is .fx, fy, cx, cy. in pixels"),
        ({"intrinsics": "nowhere.txt"}, "data.options.intrinsics: nowhere.txt: file is missing"),
        ({"scale": 3}, "depth_scale|pose_scale"),
    ):
        with pytest.raises(RecipeError, match=reason):
            opened("folder", root, **options)


def test_images_that_do_not_fit_each_other_are_bad_frames(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    color = root / "color" / "0.jpg"
    image = Image.open(color)
    image.load()
    for size, reason in (
        ((48, 64), "color is 48x64, depth 64x48: one of them is turned"),
        ((96, 54), "another aspect"),
    ):
        image.resize(size).save(color)
        with pytest.raises(BadFrame, match=rf"0\.jpg: .*{reason}"):
            opened("folder", root).load("a", "0")
    tags = Image.Exif()
    tags[0x0112] = 6
    image.save(color, exif=tags)
    with pytest.raises(BadFrame, match="EXIF orientation 6"):
        opened("folder", root).load("a", "0")
    image.resize((129, 97)).save(color)  # 0.3 % off, as ScanNet's cameras
    assert opened("folder", root).load("a", "0").color.shape == (48, 64, 3)


@pytest.mark.parametrize("kind", ["png", "tif", "jp2"])
def test_color_of_more_than_8_bits_is_refused_not_clipped(kind, tmp_path):
    Image.fromarray(np.full((6, 8), 4095, np.uint16)).save(tmp_path / f"x.{kind}")
    with pytest.raises(BadFrame, match="more than 8 bits a channel"):
        read_color(tmp_path / f"x.{kind}")


def test_float_depth_is_read_where_its_unit_is_declared(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    depth = frames[0].depth.copy()
    depth[0, :3] = np.nan, np.inf, -1
    Image.fromarray(depth).save(root / "depth" / "0.tif")
    (root / "depth" / "0.png").unlink()
    np.save(root / "depth" / "1.npy", frames[1].depth.astype(np.float16)[None] * 100)
    (root / "depth" / "1.png").unlink()
    with pytest.raises(BadFrame, match=r"0\.tif: depth is in float; say its unit: depth_scale=1 for meters"):
        opened("folder", root).load("a", "0")
    read = opened("folder", root, depth_scale=1).load("a", "0").depth
    assert (read[0, :3] == 0).all()
    np.testing.assert_allclose(read[1:], frames[0].depth[1:])
    centimeters = opened("folder", root, depth_scale=100).load("a", "1").depth
    np.testing.assert_allclose(centimeters, frames[1].depth, rtol=1e-3)
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4)))
    with pytest.raises(BadFrame, match=r"depth is an array .2, 3, 4. of float64"):
        read_depth(tmp_path / "x.npy", floats=True)


def test_a_registration_moves_depth_into_the_color_camera_of_any_layout(frames, tmp_path):
    root = write_plain(tmp_path / "a", frames)
    shift = np.eye(4)
    shift[0, 3] = 0.5
    tree = {"color_intrinsics": frames[0].intrinsics.tolist(), "depth_to_color": shift.tolist()}
    (tmp_path / "r.json").write_text(json.dumps(tree))
    source = opened("folder", root, registration=str(tmp_path / "r.json"))
    moved = source.load("a", "0")
    np.testing.assert_allclose(moved.cam_to_world, frames[0].cam_to_world @ np.linalg.inv(shift), atol=1e-5)
    assert source.note == "depth registered to the color camera"
    assert "not registered" in opened("folder", root, registered=False).note


def test_times_are_paired_as_the_benchmark_does():
    rng = np.random.default_rng(0)
    first, second = np.sort(rng.uniform(0, 1, 40)), np.sort(rng.uniform(0, 1, 30))
    near = sorted((abs(a - b), i, j) for i, a in enumerate(first) for j, b in enumerate(second) if abs(a - b) < 0.02)
    left, right, want = set(range(40)), set(range(30)), []
    for _, i, j in near:  # the released script, slowly
        if i in left and j in right:
            left.remove(i)
            right.remove(j)
            want.append((i, j))
    assert associate(list(first), list(second), 0.02) == sorted(want)
    assert len(want) > 10


def test_tum_without_a_pose_near_in_time_is_a_bad_frame_and_its_cameras_are_known(frames, tmp_path):
    root = write_tum(tmp_path / "rgbd_dataset_freiburg2_desk", frames)
    lines = (root / "groundtruth.txt").read_text().splitlines()
    (root / "groundtruth.txt").write_text("\n".join(lines[:-3]))
    source = opened("tum", root)
    scene = source.scenes()[0]
    with pytest.raises(BadFrame, match=r"groundtruth\.txt: 1305031102\.290304: has no pose within 0.02 s"):
        source.load(scene, source.frame_ids(scene)[-1])
    (root / "groundtruth.txt").unlink()
    assert opened("tum", root).unposed() == [scene]
    (root / "intrinsics.txt").unlink()
    with pytest.raises(BadFrame, match="nominal ones hold for 640x480"):
        opened("tum", root).load(scene, source.frame_ids(scene)[0])
    with pytest.raises(DataError, match=r"intrinsics\.txt: file is missing"):
        opened("tum", root.rename(tmp_path / "desk"))


def test_a_log_tells_which_frame_a_pose_is_of(frames, tmp_path):
    root = write_redwood(tmp_path / "a", frames)
    log = root / "trajectory.log"
    blocks = log.read_text().splitlines()
    log.write_text("\n".join(blocks[10:]))  # the first two frames were not tracked
    source = opened("redwood", root)
    assert_is(source.load("a", "00003"), frames[3])
    with pytest.raises(BadFrame, match=r"00001\.jpg: has no pose in the trajectory"):
        source.load("a", "00001")
    log.write_text("\n".join(["9 9 10", *blocks[1:5]]))
    with pytest.raises(DataError, match="has a pose of frame 9, counted from 0; there are 4 images"):
        opened("redwood", root)
    log.write_text("\n".join(blocks[:7]))
    with pytest.raises(DataError, match=r"trajectory\.log:6: expected three numbers"):
        opened("redwood", root)
    log.unlink()
    with pytest.raises(DataError, match=r"has no trajectory\.log"):
        opened("redwood", root)


def test_transforms_say_units_scales_and_what_is_missing(frames, tmp_path):
    root = write_transforms(tmp_path / "a", frames)
    path = root / "transforms.json"
    tree = json.loads(path.read_text())

    def changed(**facts):
        path.write_text(json.dumps({**tree, **facts}))
        return opened("transforms", root)

    scaled = [{**each, "transform_matrix": (np.array(each["transform_matrix"]) * [1, 1, 1, 0.5]).tolist()}
              for each in tree["frames"]]  # fmt: skip
    for each in scaled:
        each["transform_matrix"][3][3] = 1
    assert_is(changed(applied_scale=0.5, frames=scaled).load("a", "images/frame_00002"), frames[1])
    assert changed(integer_depth_scale=0.0002).conventions.depth_scale == pytest.approx(5000)
    assert changed(k1=0.01).note == "lens distortion is not undone"
    bare = [{key: value for key, value in each.items() if key != "transform_matrix"} for each in tree["frames"]]
    assert changed(frames=bare).unposed() == ["a"]
    flat = [{key: each[key] for key in ("file_path", "depth_file_path", "transform_matrix")} for each in tree["frames"]]
    angle = 2 * float(np.arctan(128 / 2 / (2 * frames[0].intrinsics[0, 0])))
    np.testing.assert_allclose(
        changed(frames=flat, camera_angle_x=angle).load("a", "images/frame_00001").intrinsics[0, 0],
        frames[0].intrinsics[0, 0],
    )
    for facts, reason in (
        ({"camera_model": "OPENCV_FISHEYE"}, "undistort the images"),
        ({"frames": flat}, 'has neither "fl_x" nor'),
        ({"frames": [{"file_path": "x.png"}]}, "has no frame with a .depth_file_path.: export with depth"),
        ({"frames": 3}, "a list of objects"),
        ({"applied_scale": "x"}, "applied_scale is 'x', expected a number"),
    ):
        with pytest.raises(DataError, match=reason):
            changed(**facts)


def test_colmap_names_what_it_cannot_use(frames, tmp_path):
    root = write_colmap(tmp_path / "a", frames)
    assert "units of the reconstruction" in opened("colmap", root).note
    assert opened("colmap", root, depth_scale=1).note == ""
    path = root / "stereo" / "depth_maps" / "a" / "2.jpg.geometric.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadFrame, match=r"2\.jpg\.geometric\.bin: has 12286 bytes of values, expected 64x48"):
        opened("colmap", root).load("a", "a/2")
    cameras = root / "sparse" / "cameras.txt"
    cameras.write_text("1 OPENCV 64 48 50 50 32 24 0.1 0 0 0\n")
    with pytest.raises(DataError, match=r"camera has the model OPENCV; .* run colmap image_undistorter"):
        opened("colmap", root)
    cameras.write_text("2 SIMPLE_PINHOLE 64 48 50 32 24\n")
    with pytest.raises(DataError, match=r"has camera 1, which cameras\.txt lacks"):
        opened("colmap", root)
    (root / "sparse" / "images.txt").write_text("1 1 0 0 0\n\n")
    with pytest.raises(BadFrame, match=r"images\.txt:1: is no line 'id qw"):
        opened("colmap", root)


def test_a_binary_model_of_colmap_is_read_like_the_text(frames, tmp_path):
    text = find_model(write_colmap(tmp_path / "text", frames), ["sparse"])
    root = write_colmap(tmp_path / "binary", frames, binary=True)
    binary = find_model(root, ["", "sparse"])
    assert (text.images.name, binary.images.name) == ("images.txt", "images.bin")
    for one, other in zip(read_images(text.images), read_images(binary.images), strict=True):
        assert (one.name, one.camera) == (other.name, other.camera)
        np.testing.assert_allclose(one.pose, other.pose, atol=1e-8)
        for file, image in ((text.images, one), (binary.images, other)):
            ids, xy = read_observations(file, image)
            odd = one.name in ("a/1.jpg", "a/3.jpg")  # the writer's points, one of which is of no 3D point
            assert (ids.tolist(), xy.tolist()) == (([12], [[6.5, 7.5]]) if odd else ([], [])), file
    data = binary.images.read_bytes()
    for wrong, reason in (
        (data[:-1], "ends within an image; it states 4 of them"),
        (data + b"abc", "has 3 bytes behind"),
    ):
        binary.images.write_bytes(wrong)
        with pytest.raises(BadFrame, match=rf"images\.bin: {reason}"):
            opened("colmap", root)
    cameras = root / "sparse" / "cameras.bin"
    cameras.write_bytes(struct.pack("<QiiQQ4d", 1, 1, 2, 64, 48, 50, 32, 24, 0.1))
    (model,) = read_cameras(cameras).values()
    assert "camera 1: camera has the model SIMPLE_RADIAL" in str(model)
    cameras.write_bytes(struct.pack("<QiiQQ4d", 1, 1, 11, 64, 48, 50, 32, 24, 0.1))
    with pytest.raises(BadFrame, match="model number 11; accepted are PINHOLE and SIMPLE_PINHOLE"):
        read_cameras(cameras)


def test_a_folder_of_another_layout_is_told_by_its_name(frames, tmp_path):
    write_tum(tmp_path, frames)
    with pytest.raises(
        DataError, match=r"No frame in .*: expected color/, depth/ .*intrinsics\.txt, .* looks like tum:"
    ):
        opened("folder", tmp_path)
    with pytest.raises(DataError, match=r"No scans in .* It looks like tum:"):
        opened("scannet", tmp_path)
    with pytest.raises(DataError, match=r"No folder .*: expected one with color/, depth/"):
        opened("folder", tmp_path / "x")


def test_opengl_axes_are_turned_not_mirrored():
    assert np.linalg.det(FLIP) == 1
