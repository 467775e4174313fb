"""Converting SUN RGB-D: the release's own files written by scipy, points and boxes by loops over pixels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import CLASSES
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d_raw import (
    LISTS,
    SPLITS,
    V1,
    V2,
    SUNRGBDConversion,
    image_points,
)
from geo_pretrain.training.data.labelled.convert import convert_data
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.samples.cloud_boxes import box_rows

io = pytest.importorskip("scipy.io")
SERVER = "/n/fs/sun3d/data/"
SIZE = 6, 8
K = np.array([[5.0, 0, 4.2], [0, 5.5, 3.1], [0, 0, 1]])
TILT = np.array([[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]])


def box(name, center, halves, orientation):
    return {"classname": name, "centroid": np.array([center]), "coeffs": np.array([halves]), "orientation": orientation}


BOXES = [  # of the three images; half lengths are sometimes negative in the files
    [
        box("bed", [0.5, 3, -0.4], [-1.0, 1.2, 0.5], [0.6, 0.8, 0.0]),
        box("lamp", [1, 2, 0], [0.2, 0.2, 0.4], [1.0, 0, 0]),
    ],
    [
        box("chair", [1, 2, 0], [0.3, 0.4, 0.5], [0.0, -1.0, 0.0]),
        box("desk", [1, 2, 1], [0.5, 0.9, 0.4], [1.0, 0.0, 0]),
    ],
    [],
]


def structs(rows):
    """A MATLAB struct array [1, K] as scipy writes it."""
    names = list(rows[0]) if rows else ["classname"]
    table = np.empty((1, len(rows)), [(name, object) for name in names])
    for k, row in enumerate(rows):
        table[0, k] = tuple(row[name] for name in names)
    return table


def depth_of(number):
    rng = np.random.default_rng(number)
    depth = rng.integers(500, 9500, SIZE)
    depth[0, :3] = 0
    return depth


def write_release(root, flat=(2, 2, 0)):
    """Three images as the release has them; `flat`: number of 2D boxes of each."""
    images = []
    for number in range(1, 4):
        folder = f"SUNRGBD/kv1/NYUdata/NYU{number:04d}"
        depth = depth_of(number)
        stored = ((depth << 3) | (depth >> 13)).astype(np.uint16)
        for kind in ("depth", "image"):
            (root / folder / kind).mkdir(parents=True)
        Image.fromarray(stored).save(root / folder / "depth" / "0.png")
        color = np.random.default_rng(number).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(color).save(root / folder / "image" / "0.png")
        images.append({
            "depthpath": f"{SERVER}{folder}/depth/0.png",
            "rgbpath": f"{SERVER}{folder}/image/0.png",
            "K": K,
            "Rtilt": TILT,
            "groundtruth3DBB": structs(BOXES[number - 1]),
            "groundtruth2DBB": structs([{"gtBb2D": np.array([[1, 2, 3, 4]])}] * flat[number - 1]),
        })  # fmt: skip
    for name in (V1, V2):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        io.savemat(root / name, {"SUNRGBDMeta": structs(images)})
    (root / SPLITS).parent.mkdir(parents=True)
    cells = [
        np.array([[f"{SERVER}SUNRGBD/kv1/NYUdata/NYU{n:04d}"] for n in numbers], object) for numbers in ([2, 3], [1])
    ]
    io.savemat(root / SPLITS, {"alltrain": cells[0].T, "alltest": cells[1].T})
    return root


def slow_points(number):
    depth, rows = depth_of(number), []
    color = np.random.default_rng(number).integers(0, 256, (*SIZE, 3)) / 255
    for v in range(SIZE[0]):
        for u in range(SIZE[1]):
            if depth[v, u]:
                z = min(depth[v, u] / 1000, 8)
                x, y = (u + 1 - K[0, 2]) * z / K[0, 0], (v + 1 - K[1, 2]) * z / K[1, 1]
                rows.append([*(TILT @ [x, z, -y]), *color[v, u]])
    return np.array(rows)


def opened(root, split):
    return open_labelled("sunrgbd3d", root, split, task="detection3d")


def test_the_release_becomes_clouds_with_boxes(tmp_path):
    raw = write_release(tmp_path / "raw")
    done = convert_data("sunrgbd3d", raw, tmp_path / "out", settings=SUNRGBDConversion(points=500))
    assert sorted(done.made) == ["train/000002", "train/000003", "val/000001"]
    assert not done.skips.reasons
    train, val = opened(tmp_path / "out", "train"), opened(tmp_path / "out", "val")
    assert (train.ids(), val.ids()) == (["000002", "000003"], ["000001"])
    cloud, expected = val.load("000001"), slow_points(1)
    assert len(cloud) == 500
    distances = np.abs(cloud.points[:, None] - expected[None, :, :3]).max(2)
    assert distances.min(1).max() < 1e-5  # every point is one of the image's, and every one of these is there
    assert distances.min(0).max() < 1e-5
    np.testing.assert_allclose(cloud.colors / 255, expected[distances.argmin(1), 3:], atol=1e-6)
    assert [CLASSES[c - 1] for c in cloud.boxes.classes] == ["bed"]
    np.testing.assert_allclose(box_rows(cloud.boxes), [[0.5, 3, -0.4, 2.4, 2.0, 1.0, np.arctan2(0.8, 0.6)]], atol=1e-6)
    assert [CLASSES[c - 1] for c in train.load("000002").boxes.classes] == ["chair", "desk"]
    assert len(train.load("000003").boxes) == 0
    again = convert_data("sunrgbd3d", raw, tmp_path / "out", settings=SUNRGBDConversion(points=500))
    assert (again.made, sorted(again.present)) == ([], sorted(done.made))


def test_the_released_script_ends_at_a_missing_2d_box(tmp_path):
    raw = write_release(tmp_path / "raw", flat=(2, 1, 0))
    released = SUNRGBDConversion(points=20, match_released_code=True)
    done = convert_data("sunrgbd3d", raw, tmp_path / "cut", settings=released)
    assert done.remarks == {"train/000002": ["1 of 2 boxes left out: box 1 has no 2D box"]}
    assert len(opened(tmp_path / "cut", "train").load("000002").boxes) == 1
    convert_data("sunrgbd3d", raw, tmp_path / "all", settings=SUNRGBDConversion(points=20))
    assert len(opened(tmp_path / "all", "train").load("000002").boxes) == 2


def test_what_the_matlab_scripts_leave_is_converted_to_the_same(tmp_path):
    raw = tmp_path / "sunrgbd_trainval"
    for folder in ("depth", "label_v1"):
        (raw / folder).mkdir(parents=True)
    io.savemat(raw / "depth" / "000001.mat", {"instance": slow_points(1)}, do_compression=True)
    line = "bed 1 2 3 4 0.5 3.0 -0.4 1.0 1.2 0.5 0.6 0.8\nlamp 1 2 3 4 1 2 0 1 1 1 1 0\nchair 1 2 3 4 1 2\n"
    (raw / "label_v1" / "000001.txt").write_text(line)
    (raw / LISTS["train"]).write_text("2\n")
    (raw / LISTS["val"]).write_text("1\n")
    done = convert_data("sunrgbd3d", raw, tmp_path / "out", settings=SUNRGBDConversion(points=500))
    assert done.made == ["val/000001"]
    assert done.skips.reasons == {str(raw / "depth" / "000002.mat"): "is missing"}
    assert "line 3 of 000001.txt cannot be used" in done.remarks["val/000001"][0]
    convert_data(
        "sunrgbd3d", write_release(tmp_path / "raw"), tmp_path / "other", settings=SUNRGBDConversion(points=500)
    )
    first, second = (opened(tmp_path / name, "val").load("000001") for name in ("out", "other"))
    np.testing.assert_allclose(first.points, second.points, atol=1e-6)
    np.testing.assert_allclose(box_rows(first.boxes), box_rows(second.boxes), atol=1e-6)


def test_what_is_missing_or_broken_is_said(tmp_path):
    raw = write_release(tmp_path / "raw")
    (raw / "SUNRGBD/kv1/NYUdata/NYU0002/depth/0.png").write_bytes(b"\x89PNG\r\n")
    done = convert_data("sunrgbd3d", raw, tmp_path / "out", settings=SUNRGBDConversion(points=20))
    assert len(done.made) == 2
    assert list(done.skips.reasons) == [str(raw / "SUNRGBD/kv1/NYUdata/NYU0002/depth/0.png")]
    (raw / SPLITS).unlink()
    with pytest.raises(DataError, match=r"lacks SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat. Expected layout: "):
        convert_data("sunrgbd3d", raw, tmp_path / "other")
    (raw / SPLITS).write_bytes(b"not a file of MATLAB" * 20)
    with pytest.raises(DataError, match=r"allsplit.mat: cannot be read as MATLAB's"):
        convert_data("sunrgbd3d", raw, tmp_path / "other")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("K", K * 0, "K: intrinsics have the last row 0 0 0"),
        ("K", K * [[-1], [1], [1]], "K: intrinsics have the focal lengths -5 5.5"),
        ("K", K * np.nan, "K: intrinsics are not finite"),
        ("Rtilt", TILT * 2, "Rtilt: pose is not a rotation"),
        ("Rtilt", TILT * [[-1], [1], [1]], "Rtilt: pose is not a rotation"),
    ],
)
def test_cameras_and_tilts_that_are_none_are_bad_frames(tmp_path, field, value, reason):
    raw = write_release(tmp_path / "raw")
    below = f"{SERVER}SUNRGBD/kv1/NYUdata/NYU0001"
    facts = {"depthpath": f"{below}/depth/0.png", "rgbpath": f"{below}/image/0.png", "K": K, "Rtilt": TILT}
    assert len(image_points(raw, SimpleNamespace(**facts))) == np.count_nonzero(depth_of(1))
    with pytest.raises(BadFrame, match=rf"NYU0001/depth/0\.png: {reason}"):
        image_points(raw, SimpleNamespace(**facts | {field: value}))
