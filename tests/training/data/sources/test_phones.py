"""Recordings of phones: Polycam's raw data, ARKitScenes and Record3D, what is left out and what is refused."""

from __future__ import annotations

import json
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, MissingDependency
from geo_pretrain.training.data.sources.arkitscenes import pose_of_vector
from geo_pretrain.training.data.sources.record3d import unpacked_depth
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import DataSpec
from tests.dataset_layouts import REASON, lzfse, write_arkitscenes, write_polycam, write_record3d, write_record3d_export
from tests.recording_layouts import golden_frames, write_plain

Z_UP = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # ARKit's world, y up, turned


@pytest.fixture(scope="module")
def frames():
    return golden_frames(3, (24, 32))


def opened(source, root, **options):
    return open_source(DataSpec(source=source, path=str(root), options=options))


def test_polycams_own_cameras_and_sharp_frames_are_options(frames, tmp_path):
    root = write_polycam(tmp_path / "desk", frames)
    source = opened("polycam", root)
    assert source.scenes() == ["desk"]
    first, second, third = source.frame_ids("desk")
    shift = opened("polycam", root, corrected=False).load("desk", first).cam_to_world - Z_UP @ frames[0].cam_to_world
    np.testing.assert_allclose(shift[:3, 3], [0.2, 0, 0], atol=1e-6)
    assert opened("polycam", root, min_blur_score=40.5).frame_ids("desk") == [second, third]
    assert opened("polycam", root / "keyframes").load("keyframes", first).posed
    camera = root / "keyframes" / "corrected_cameras" / f"{second}.json"
    tree = json.loads(camera.read_text())
    for wrong, reason in (
        ({**tree, "fx": "9"}, "fx is '9', expected a number"),
        ({**tree, "width": 0}, "image has the size width=0"),
        ({key: value for key, value in tree.items() if key != "t_23"}, "is no pose of numbers"),
        ([], "expected a camera, a JSON object"),
    ):
        camera.write_text(json.dumps(wrong))
        with pytest.raises(BadFrame, match=rf"{second}\.json: .*{reason}"):
            opened("polycam", root).load("desk", second)
    camera.unlink()
    with pytest.raises(BadFrame, match=r"a camera cannot be read"):
        opened("polycam", root).load("desk", second)
    with pytest.raises(DataError, match="It looks like polycam:"):
        opened("tum", root)


def test_frames_of_arkitscenes_without_a_pose_nearby_are_left_out(frames, tmp_path):
    root = write_arkitscenes(tmp_path / "41048190", frames)
    source = opened("arkitscenes", tmp_path)
    assert source.scenes() == ["41048190"]
    assert len(source.frame_ids("41048190")) == 3
    assert len(opened("arkitscenes", root, max_difference=0.03).frame_ids("41048190")) == 6
    nested = tmp_path / "Training" / "41048190" / "41048190_frames"
    nested.parent.mkdir(parents=True)
    root.rename(nested)
    source = opened("arkitscenes", tmp_path / "Training")
    assert source.scenes() == ["41048190"]
    camera = nested / "lowres_wide_intrinsics" / f"{source.frame_ids('41048190')[1]}.pincam"
    camera.write_text("0 192 200 200 128 96")
    with pytest.raises(BadFrame, match=r"pincam: camera has the size 0x192"):
        opened("arkitscenes", tmp_path / "Training").load("41048190", camera.stem)
    (nested / "lowres_wide.traj").write_text("1 2 3\n")
    with pytest.raises(DataError, match=r"lowres_wide\.traj:1: is no line of time, axis times angle"):
        opened("arkitscenes", tmp_path / "Training")
    (nested / "lowres_wide.traj").unlink()
    assert opened("arkitscenes", tmp_path / "Training").unposed() == ["41048190"]


def test_a_rotation_vector_turns_about_its_axis_by_its_length():
    quarter = pose_of_vector(np.array([0, 0, np.pi / 2]), np.array([1.0, 2, 3]))
    np.testing.assert_allclose(quarter, [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], atol=1e-12)
    np.testing.assert_array_equal(pose_of_vector(np.zeros(3), np.zeros(3)), np.eye(4))
    assert np.isnan(pose_of_vector(np.array([np.nan, 0, 0]), np.zeros(3))).any()


def test_record3d_archives_are_read_packed_and_unpacked(frames, tmp_path):
    root = write_record3d(tmp_path / "phone", frames, packed=False)
    with zipfile.ZipFile(root / "room.r3d") as archive:
        archive.extractall(tmp_path / "phone" / "unpacked")
    source = opened("record3d", root)
    assert source.scenes() == ["room", "unpacked"]
    assert opened("record3d", root / "room.r3d").scenes() == ["room"]
    for scene in source.scenes():
        frame = source.load(scene, "2")
        np.testing.assert_allclose(frame.depth, frames[2].depth, atol=1e-6)
        np.testing.assert_allclose(frame.cam_to_world, Z_UP @ frames[2].cam_to_world, atol=1e-6)
        np.testing.assert_allclose(frame.intrinsics, frames[2].intrinsics, atol=1e-6)
    metadata = root / "unpacked" / "metadata"
    tree = json.loads(metadata.read_text())
    for change, reason in (
        ({"poses": []}, 'holds no "poses"'),
        ({"dw": 0}, "metadata has dw=0"),
        ({"w": None}, "metadata has w=None"),
        ({"K": [1], "perFrameIntrinsicCoeffs": []}, 'has no intrinsics: "K"'),
        ({"poses": [[0] * 6] * 3}, "0 numbers; a pose has"),
    ):
        metadata.write_text(json.dumps({**tree, **change}))
        with pytest.raises(DataError, match=reason):
            opened("record3d", root / "unpacked")
    metadata.write_text(json.dumps({**tree, "perFrameIntrinsicCoeffs": []}))  # K alone
    source = opened("record3d", root / "unpacked")
    np.testing.assert_allclose(source.load("unpacked", "0").intrinsics, frames[0].intrinsics, atol=1e-6)
    (root / "unpacked" / "rgbd" / "1.depth").unlink()
    with pytest.raises(BadFrame, match=r"rgbd/1\.depth: file is missing"):
        source.load("unpacked", "1")
    (root / "room.r3d").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"1 of 2 recordings are left out: .*room\.r3d: metadata cannot be read"):
        assert opened("record3d", root).scenes() == ["unpacked"]
    with pytest.raises(BadFrame, match=r"room\.r3d: metadata cannot be read"):
        opened("record3d", root / "room.r3d")
    with pytest.raises(DataError, match=r"No recording in .*expected \*\.r3d"):
        opened("record3d", write_plain(tmp_path / "other", frames))


def test_without_the_library_of_lzfse_the_install_line_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "liblzfse", None)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[datasets\]'"):
        unpacked_depth(tmp_path, b"bvx-", (2, 3))


def test_an_export_of_record3d_needs_openexr(frames, tmp_path, monkeypatch):
    root = write_record3d_export(tmp_path / "room", frames)
    source = opened("record3d", tmp_path)
    assert source.scenes() == ["room"]
    assert source.frame_ids("room") == ["0", "1", "2"]
    (root / "depth" / "1.exr").write_bytes(b"no image")
    with pytest.raises(BadFrame, match=r"1\.exr: is no OpenEXR image"):
        source.load("room", "1")
    (root / "depth" / "2.exr").unlink()
    with pytest.raises(BadFrame, match=r"2\.exr: depth image is missing"):
        source.load("room", "2")
    monkeypatch.setitem(__import__("sys").modules, "OpenEXR", None)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[datasets\]'"):
        source.load("room", "0")


@pytest.mark.skipif(find_spec("liblzfse") is None, reason=REASON)
def test_depth_of_record3d_is_packed_by_lzfse(tmp_path):
    import liblzfse

    depth = np.linspace(0, 3, 300, dtype=np.float32).reshape(15, 20)
    for data in (lzfse(depth.tobytes()), liblzfse.compress(depth.tobytes())):
        np.testing.assert_array_equal(unpacked_depth(tmp_path, data, (15, 20)), depth)
    for data, reason in ((b"bvxx" + bytes(9), "depth cannot be unpacked"), (lzfse(bytes(8)), "depth has 8 bytes")):
        with pytest.raises(BadFrame, match=reason):
            unpacked_depth(tmp_path, data, (15, 20))
