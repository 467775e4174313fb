"""Scans of streets: SemanticKITTI, Synthia4D and KITTI's objects, from bytes in their layouts and from real samples."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.kitti_object import read_calibration
from geo_pretrain.training.data.labelled.clouds.semantickitti import submission_labels
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from tests.cloud_layouts import write, write_kitti_object, write_semantickitti, write_synthia4d
from tests.training.data.labelled.twins import sample

RAW = {0: 0, 1: 0, 52: 0, 99: 0, 10: 1, 252: 1, 11: 2, 15: 3, 18: 4, 258: 4, 13: 5, 16: 5, 20: 5, 256: 5, 257: 5}
RAW |= {259: 5, 30: 6, 254: 6, 31: 7, 253: 7, 32: 8, 255: 8, 40: 9, 60: 9, 44: 10, 48: 11, 49: 12, 50: 13, 51: 14}
RAW |= {70: 15, 71: 16, 72: 17, 80: 18, 81: 19}
INVERSE = [0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]


def kitti(path, split="train", **options):
    return open_labelled("semantickitti", path, split, task="segmentation3d", options=options)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three sequences with two scans; each raw id once, the last point 60 m away."""
    root, rng = tmp_path_factory.mktemp("kitti") / "dataset", np.random.default_rng(0)
    for sequence in ("00", "08", "11"):
        for number in (0, 7):
            scan = rng.uniform(-20, 20, (len(RAW), 4)).astype(np.float32)
            scan[:, 3] = rng.random(len(RAW))
            scan[-1, :3] = 60, 0, 0
            labels = (list(RAW), range(len(RAW))) if sequence != "11" else ()
            write_semantickitti(root, sequence, number, scan, *labels)
    return root.parent


def test_semantickitti_reads_every_raw_id_and_instance(scans):
    source = kitti(scans, "val")
    assert source.ids() == ["08/000000", "08/000007"]
    assert source.scenes() == ["08"]
    assert len(source.classes) == 19
    assert (source.classes[0], source.classes[8], source.classes[18]) == ("car", "road", "traffic-sign")
    cloud = source.load("08/000007")
    assert cloud.labels.tolist() == list(RAW.values())
    assert cloud.instances.tolist() == list(range(len(RAW)))
    assert cloud.points.shape == (len(RAW), 3)
    assert cloud.colors is None
    assert cloud.intensity.min() >= 0
    stored = np.fromfile(source.item("08/000007").points, "<f4").reshape(-1, 4)
    assert np.array_equal(np.c_[cloud.points, cloud.intensity], stored)


def test_semantickitti_crops_training_scans_only_and_thins_them(scans):
    near, all_points = kitti(scans).load("00/000000"), kitti(scans, max_range=None).load("00/000000")
    assert len(near) == len(all_points) - 1 == len(near.intensity)
    assert near.labels[-1] == RAW[80]
    assert len(kitti(scans, "val", crop_val=True).load("08/000000")) == len(RAW) - 1
    assert kitti(scans, every=2).ids() == ["00/000000"]
    assert kitti(scans, train=["08", "00"]).ids() == ["00/000000", "00/000007", "08/000000", "08/000007"]
    assert kitti(scans, every=2).fingerprint() != kitti(scans).fingerprint()
    with pytest.raises(RecipeError, match=r"data\.options\.train"):
        kitti(scans, train="00")


def test_semantickitti_tests_have_no_labels_and_submissions_have_raw_ids(scans):
    assert kitti(scans, "test").load("11/000000").labels is None
    assert submission_labels(np.arange(20)).tolist() == INVERSE


def test_broken_scans_are_named(scans, tmp_path):
    scan = np.ones((3, 4), np.float32)
    write_semantickitti(tmp_path, "08", 0, scan, [40, 3, 3], [0, 0, 0])
    write_semantickitti(tmp_path, "08", 1, scan, [40, 40], [0, 0])
    write_semantickitti(tmp_path, "08", 2, scan)
    write(tmp_path / "sequences/08/velodyne/000003.bin", b"\0" * 21)
    write_semantickitti(tmp_path, "08", 4, scan * np.nan, [40] * 3, [0] * 3)
    reasons = ["label id 3 in 2 points", "2 labels for 3 points", "label file is missing", "21 bytes", "3 points are"]
    for number, reason in enumerate(reasons):
        with pytest.raises(BadFrame, match=reason):
            kitti(tmp_path, "val").load(f"08/{number:06d}")
    with pytest.raises(DataError, match="No scan of the sequences 00, 01"):
        kitti(tmp_path)
    with pytest.raises(DataError, match="sequences"):
        kitti(scans / "dataset/sequences")


def test_the_real_sample_of_semantickitti():
    cloud = kitti(sample("semantickitti_tiny"), "val", val=["00"]).load("00/000000")
    assert len(cloud) == 50
    assert cloud.labels.min() >= 0
    assert 0 < cloud.labels.max() <= 19
    assert np.linalg.norm(cloud.points, axis=1).max() < 120
    assert 0 <= cloud.intensity.min() <= cloud.intensity.max() <= 1


def synthia(path, part="train", **options):
    return open_labelled("synthia4d", path, part, task="segmentation3d", options=options)


@pytest.fixture
def streets(tmp_path):
    """A frame of each split: points in cm, y up, two of them in one cell of 7.5 cm."""
    points = np.array([[0, 0, 0], [1, 1, 1], [100, 200, 300], [-50, 0, 20]], np.float32)
    colors = np.arange(12).reshape(4, 3) * 20
    for split, sequence in {"train": "04-RAINNIGHT", "val": "05-FOG", "test": "06-SUNSET"}.items():
        line = write_synthia4d(tmp_path, f"SYNTHIA-SEQS-{sequence}", 3, points, colors, [2, 2, 15, 13])
        write(tmp_path / f"{split}_cvpr19.txt", f"{line}\n\n".encode())
    return tmp_path


def test_synthia_is_in_meters_with_z_up(streets):
    source = synthia(streets)
    assert source.ids() == ["SYNTHIA-SEQS-04-RAINNIGHT/000003"]
    assert len(source.classes) == 12
    cloud = source.load(source.ids()[0])
    assert np.allclose(cloud.points, [[0, 0, 0], [1, -3, 2], [-0.5, -0.2, 0]])  # (x, -z, y)
    assert cloud.labels.tolist() == [1, 12, 0]
    assert cloud.colors.tolist() == [
        [0, 20, 40],
        [120, 140, 160],
        [180, 200, 220],
    ]
    down = synthia(streets, y="down", grid=None).load(source.ids()[0])
    assert np.allclose(down.points[2], [1, 3, -2])
    assert len(down) == 4
    assert synthia(streets, "val").scenes() == ["SYNTHIA-SEQS-06-SUNSET"]  # the test frames are what is reported
    assert synthia(streets, "val", measure="val").scenes() == ["SYNTHIA-SEQS-05-FOG"]


def test_synthia_says_what_is_missing(streets):
    with pytest.raises(DataError, match=r"train_raw\.txt of chrischoy/SpatioTemporalSegmentation"):
        synthia(streets, split="raw")
    source = synthia(streets)
    path = source.item(source.ids()[0]).points
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadFrame, match=path.name):
        source.load(source.ids()[0])
    fields = "".join(f"property {'double' if name in 'xyz' else 'int'} {name}\n" for name in "xyzrgbl")
    write(path, f"ply\nformat ascii 1.0\nelement vertex 1\n{fields}end_header\n0 1e300 0 1 2 3 1\n".encode())
    with pytest.raises(BadFrame, match=r"1e\+300 m from the origin"):
        source.load(source.ids()[0])
    write(path, b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n")
    with pytest.raises(BadFrame, match="vertices have no y, z, r, g, b, l"):
        source.load(source.ids()[0])
    path.unlink()
    with pytest.raises(DataError, match="None of the 1 frames"):
        synthia(streets)


CAMERA = np.array([[0, -1.0, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]])  # x right, y down, z forward
CALIBRATION = {"P2": np.array([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]]), "R0_rect": np.eye(3)}
CALIBRATION |= {"Tr_velo_to_cam": CAMERA}
CAR = "Car 0.00 0 1.5 10 10 20 20 1.50 1.60 4.00 2.00 1.70 20.00 {angle}"


def objects3d(path, split="train", **options):
    return open_labelled("kitti_object", path, split, task="detection3d", options=options)


def test_boxes_of_kitti_stand_in_the_frame_of_the_scanner(tmp_path):
    scan = [[20, -2, -1, 0.5], [-20, 0, 0, 0.1], [20, 30, 0, 0.2]]
    others = ["DontCare -1 -1 -10 1 1 2 2 -1 -1 -1 -1000 -1000 -1000 -10", "Van 0 0 0 1 1 2 2 1 1 1 0 0 9 0"]
    lines = [CAR.format(angle=-1.57079633), *others, CAR.format(angle=0.3).replace("Car", "Cyclist")]
    for number in (4, 5):
        write_kitti_object(tmp_path, number, scan, lines, CALIBRATION)
    scans = tmp_path / "training" / "velodyne"
    (scans / "000004_copy.bin").write_bytes((scans / "000004.bin").read_bytes())  # no frame's number
    with pytest.warns(UserWarning, match="even frames train"):
        source = objects3d(tmp_path)
    assert source.ids() == ["000004"]
    assert source.classes == ("Car", "Pedestrian", "Cyclist")
    cloud = source.load("000004")
    assert cloud.points.tolist() == [[20, -2, -1]]  # the others lie behind the camera and beside its image
    boxes = cloud.boxes
    assert boxes.classes.tolist() == [1, 3]
    assert np.allclose(boxes.sizes, [[4, 1.6, 1.5]] * 2)
    assert np.allclose(boxes.centers, [[20, -2, -1.7 + 0.75]] * 2)  # a label has the middle of the box's bottom
    assert np.allclose(boxes.headings, [0, -0.3 - np.pi / 2], atol=1e-6)  # -90 degrees about y: ahead
    with pytest.warns(UserWarning, match="even frames"):
        assert len(objects3d(tmp_path, in_view=False).load("000004")) == 3


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        ("P2", {(0, 0): 0.0}, "focal lengths 0 700"),
        ("P2", {(1, 1): -700.0}, "focal lengths 700 -700"),
        ("P2", {(2, 2): 0.0}, "last row 0 0 0"),
        ("P2", {(0, 2): np.inf}, "not finite"),
        ("P2", {(0, 3): 1e300}, "no offset in pixels"),
        ("Tr_velo_to_cam", {(0, 3): 1e300}, r"1e\+300 m from the origin"),
        ("Tr_velo_to_cam", {(0, 1): 1.0}, "not a rotation"),
        ("R0_rect", {(0, 0): np.nan}, "not finite"),
        ("R0_rect", {(0, 0): 0.0}, "not a rotation"),
    ],
)
def test_calibrations_of_kitti_that_are_none_are_bad_frames(tmp_path, key, change, reason):
    matrix = np.array(CALIBRATION[key], float)
    for place, value in change.items():
        matrix[place] = value
    write_kitti_object(tmp_path, 1, np.ones((2, 4)), [], CALIBRATION | {key: matrix})
    with pytest.raises(BadFrame, match=rf"000001\.txt: calibration.*({reason})"):
        read_calibration(tmp_path / "training/calib/000001.txt")


def test_boxes_and_points_of_kitti_that_are_none_are_bad_frames(tmp_path):
    write(tmp_path / "ImageSets/train.txt", b"000001\n")
    for old, new, reason in (
        ("4.00", "nan", "not finite"),
        ("4.00", "0", "length of 0 or less"),
        ("2.00", "1e300", "more than 1e.07 m away"),
    ):
        write_kitti_object(tmp_path, 1, np.ones((2, 4)), [CAR.format(angle=0).replace(old, new, 1)], CALIBRATION)
        with pytest.raises(BadFrame, match=rf"000001\.txt: a box is.*{reason}"):
            objects3d(tmp_path).load("000001")
    for row, reason in (([1e30, 0, 0, 1], r"1e\+30 m"), ([0, 0, 0, np.nan], "remissions of 1 points")):
        write_kitti_object(tmp_path, 1, [row], [], CALIBRATION)
        with pytest.raises(BadFrame, match=rf"000001\.bin: .*{reason}"):
            objects3d(tmp_path).load("000001")


def test_remissions_in_bytes_are_brought_to_1(tmp_path):
    write(tmp_path / "ImageSets/train.txt", b"000001\n000002\n")
    for number, remissions in ((1, [0, 51, 255]), (2, [0, 0.2, 1])):
        rows = [[10 + k, 0, 0, remission] for k, remission in enumerate(remissions)]
        write_kitti_object(tmp_path, number, rows, [], CALIBRATION)
    one, other = (objects3d(tmp_path, in_view=False).load(f"{number:06d}") for number in (1, 2))
    np.testing.assert_allclose(one.intensity, [0, 0.2, 1], atol=1e-6)
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_allclose(one.intensity, other.intensity, atol=1e-6)


def test_lists_of_kitti_and_broken_frames(tmp_path):
    write_kitti_object(tmp_path, 1, np.ones((2, 4)), ["Car 1 2 3"], CALIBRATION)
    write_kitti_object(tmp_path, 2, np.ones((2, 4)), [], CALIBRATION | {"P2": np.eye(3)})
    write(tmp_path / "ImageSets/train.txt", b"000001\n000002\n")
    write(tmp_path / "ImageSets/val.txt", b"000009\n")
    source = objects3d(tmp_path)
    with pytest.raises(BadFrame, match="15 columns"):
        source.load("000001")
    with pytest.raises(BadFrame, match="other sizes than 3x4"):
        source.load("000002")
    with pytest.raises(DataError, match="names 1 frames; 1 are not in"):
        objects3d(tmp_path, "val")
    assert subset(source, 0.5).ids() in (["000001"], ["000002"])


def test_the_real_sample_of_kitti_objects():
    """Points inside the annotated boxes, turned with them, lie on their surfaces: boxes are where the objects are."""
    root = sample("kitti_object")
    with pytest.warns(UserWarning, match="even frames"):
        cloud = objects3d(root).load("000000")
    assert len(cloud) == 20285  # as an overlay showed
    boxes = cloud.boxes
    assert boxes.classes.tolist() == [2]  # one pedestrian
    turn = -boxes.headings[0]
    local = (cloud.points - boxes.centers[0]) @ [
        [np.cos(turn), np.sin(turn), 0],
        [-np.sin(turn), np.cos(turn), 0],
        [0, 0, 1],
    ]
    inside = (np.abs(local) <= boxes.sizes[0] / 2).all(1)
    assert inside.sum() > 100
    assert 0.7 * boxes.sizes[0, 2] < np.ptp(local[inside, 2])
    assert read_calibration(root / "training/calib/000000.txt").projection.shape == (3, 4)
