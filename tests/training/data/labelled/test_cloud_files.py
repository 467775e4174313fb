"""Files of clouds written by other code: what they hold comes back, and what is wrong with them is said."""

from __future__ import annotations

import struct
import sys
import warnings

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, MissingDependency, RecipeError
from geo_pretrain.training.data.labelled.clouds.classes import read_classes
from geo_pretrain.training.data.labelled.clouds.files import CloudFields, file_columns, read_cloud

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(-3, 3, (40, 3)).astype(np.float32)
COLORS = RNG.integers(0, 256, (40, 3)).astype(np.uint8)
LABELS = RNG.integers(0, 4, 40)
THINGS = RNG.integers(0, 5, 40)


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\nfloor\nchair\n")
    return read_classes(tmp_path / "classes.txt")


def ascii_ply(path, names, rows):
    """PLY as text, after the format's description."""
    kinds = dict.fromkeys("xyzXYZ", "float") | dict.fromkeys(("red", "green", "blue"), "uchar")
    header = ["ply", "format ascii 1.0", f"element vertex {len(rows)}"]
    header += [f"property {kinds.get(name, 'int')} {name}" for name in names]
    lines = [" ".join(f"{value:.9g}" for value in row) for row in rows]
    path.write_text("\n".join([*header, "end_header", *lines, ""]))


def table():
    return np.column_stack([POINTS, COLORS, LABELS, THINGS])


def test_coordinates_in_few_bits_are_told_where_they_are_coarse(tmp_path):
    np.save(tmp_path / "near.npy", POINTS.astype(np.float16))  # up to 3 m: steps of 2 mm
    np.save(tmp_path / "far.npy", (POINTS * 20).astype(np.float16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_cloud(tmp_path / "near.npy")
        np.save(tmp_path / "map.npy", POINTS + np.array([5e5, 5.2e6, 0]))
        assert np.abs(np.ptp(read_cloud(tmp_path / "map.npy").points, axis=0) - np.ptp(POINTS, axis=0)).max() < 1e-5
    np.save(tmp_path / "map32.npy", (POINTS + np.array([5e5, 5.2e6, 0])).astype(np.float32))
    with pytest.warns(UserWarning, match=r"Coordinates are float32, which has steps of 0\.5 m where they lie"):
        read_cloud(tmp_path / "map32.npy")
    with pytest.warns(UserWarning, match=r"Coordinates are float16, which has steps of 0\.031 m"):
        read_cloud(tmp_path / "far.npy")


@pytest.mark.parametrize("kind", [np.longdouble, np.complex64, "U8"])
def test_coordinates_that_nothing_writes_are_refused(tmp_path, kind):
    np.save(tmp_path / "a.npy", POINTS.astype(kind))
    with pytest.raises(BadFrame, match=r"coordinates are .*; accepted: whole numbers, or floats up to float64"):
        read_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "kind, highest, limit",
    [
        (np.uint8, 255, 255),
        (np.uint8, 9, 255),
        (np.uint16, 4095, 65535),
        (np.int32, 255, 255),
        (np.int64, 4095, 65535),
        (np.float32, 1, 1),
        (np.float32, 1.02, 1),
        (np.float32, 255, 255),
        (np.float64, 4095.5, 65535),
    ],
)
def test_intensities_have_the_range_that_their_values_show(tmp_path, kind, highest, limit):
    given = np.linspace(0, highest, 40).astype(kind)
    for shape in (40, (40, 1)):
        np.savez(tmp_path / "a.npz", points=POINTS, intensity=given.reshape(shape))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cloud = read_cloud(tmp_path / "a.npz")
        np.testing.assert_allclose(cloud.intensity, np.clip(given / limit, 0, 1), atol=1e-6)
        guessed = highest > 2 and kind not in (np.uint8, np.uint16)
        assert [f"divided by {limit}" in str(warning.message) for warning in told] == [True] * guessed


def test_intensities_of_no_known_range_need_a_scale(tmp_path):
    np.savez(tmp_path / "a.npz", points=POINTS, intensity=np.linspace(0, 1e6, 40))
    with pytest.warns(UserWarning, match=r"are not read; data\.options\.intensity_scale"):
        assert read_cloud(tmp_path / "a.npz").intensity is None
    scaled = read_cloud(tmp_path / "a.npz", CloudFields(intensity_scale=1e-6))
    np.testing.assert_allclose(scaled.intensity, np.linspace(0, 1, 40), atol=1e-6)


def test_coarse_steps_are_those_of_meters(tmp_path):
    np.save(tmp_path / "a.npy", (POINTS * 1000 + 70_000).astype(np.float32))  # millimeters: steps of 8 micrometers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_cloud(tmp_path / "a.npy", CloudFields(scale=0.001))


@pytest.mark.parametrize("kind", [np.uint32, np.uint64, np.int64])
def test_minus_one_stays_none_without_its_sign(tmp_path, classes, kind):
    things = (THINGS.astype(np.int64) - 1).astype(kind)  # objects from 0, -1 for none
    np.savez(tmp_path / "a.npz", points=POINTS, label=LABELS, instance=things)
    cloud = read_cloud(tmp_path / "a.npz", CloudFields(no_instance=-1), classes)
    np.testing.assert_array_equal(cloud.instances, THINGS)


@pytest.mark.parametrize("most", [2**33, 2**62, 2**64 - 2])
def test_hashes_are_numbers_of_objects(tmp_path, classes, most):
    """They would overflow int64, or its product with a label."""
    things = np.array([0, 7, 2**31, most - 5, most], np.uint64)[THINGS]
    np.savez(tmp_path / "a.npz", points=POINTS, label=LABELS, instance=things)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npz", classes=classes).instances, THINGS)
    np.savez(tmp_path / "b.npz", points=POINTS, label=np.full(40, most, np.uint64))
    with pytest.raises(DataError, match=r"label"):
        read_cloud(tmp_path / "b.npz", classes=classes)


NAMES = ("x", "y", "z", "red", "green", "blue", "label", "instance")


def write_ply(folder):
    ascii_ply(folder / "a.ply", NAMES, table())
    return folder / "a.ply"


def write_named_ply(folder):
    ascii_ply(folder / "b.PLY", ("X", "Y", "Z", "R", "G", "B", "scalar_Label", "scalar_instance"), table())
    return folder / "b.PLY"


def write_npy(folder):
    np.save(folder / "c.npy", table())
    return folder / "c.npy"


def write_structured_npy(folder):
    rows = np.zeros(40, [("xyz", "f4", 3), ("rgb", "u1", 3), ("class", "u2"), ("instance_id", "i4")])
    rows["xyz"], rows["rgb"], rows["class"], rows["instance_id"] = POINTS, COLORS, LABELS, THINGS
    np.save(folder / "d.npy", rows)
    return folder / "d.npy"


def write_npz(folder):
    np.savez(
        folder / "e.npz",
        coord=POINTS,
        color=COLORS / 255,
        semantic=LABELS.astype(float),
        instance=THINGS[:, None][:, 0],
        pose=np.eye(4),
    )
    return folder / "e.npz"


def write_las(folder, name="f.las"):
    laspy = pytest.importorskip("laspy", reason="LAS needs laspy: pip install 'geo_pretrain[las]'")
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = [1e-7] * 3
    las = laspy.LasData(header)
    las.x, las.y, las.z = POINTS.astype(np.float64).T
    las.red, las.green, las.blue = COLORS.astype(np.uint16).T * 257
    las.classification = LABELS
    las.add_extra_dim(laspy.ExtraBytesParams(name="instance", type=np.int32))
    las.instance = THINGS
    las.intensity = np.full(40, 65535, np.uint16)
    las.write(folder / name)
    return folder / name


def write_laz(folder):
    pytest.importorskip("lazrs", reason="LAZ needs lazrs: pip install 'geo_pretrain[las]'")
    return write_las(folder, "g.laz")


@pytest.mark.parametrize(
    "write", [write_ply, write_named_ply, write_npy, write_structured_npy, write_npz, write_las, write_laz]
)
def test_every_kind_of_file_gives_the_same_cloud(write, tmp_path, classes):
    path = write(tmp_path)
    cloud = read_cloud(path, classes=classes, need=("label", "instance"))
    assert cloud.id == path.stem
    np.testing.assert_allclose(cloud.points, POINTS, atol=1e-6)
    assert (cloud.points.dtype, cloud.colors.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_array_equal(cloud.labels, LABELS)
    np.testing.assert_array_equal(cloud.instances, THINGS)
    assert (cloud.labels.dtype, cloud.instances.dtype) == (np.int64, np.int64)
    if write in (write_las, write_laz):
        np.testing.assert_array_equal(cloud.intensity, np.ones(40, np.float32))
    else:
        assert cloud.intensity is None
    bare = read_cloud(path, id="other")
    assert (bare.id, bare.labels, bare.instances) == ("other", None, None)
    np.testing.assert_array_equal(bare.points, cloud.points)
    assert len(file_columns(path)) >= 4


def test_binary_ply_of_another_writer_is_read(tmp_path, classes):
    """Big endian with doubles and a list of faces, packed by hand."""
    header = (
        "ply\nformat binary_big_endian 1.0\ncomment by hand\nelement vertex 2\nproperty double x\nproperty double y\n"
        "property double z\nproperty short label\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = struct.pack(">dddh", 1.5, -2, 0.25, 3) + struct.pack(">dddh", 0, 7, 1, -1) + struct.pack(">Biii", 3, 0, 1, 0)
    (tmp_path / "a.ply").write_bytes(header.encode() + body)
    cloud = read_cloud(tmp_path / "a.ply", classes=classes)
    assert cloud.points.tolist() == [[1.5, -2, 0.25], [0, 7, 1]]
    assert cloud.labels.tolist() == [3, 0]
    assert cloud.colors is None


def test_named_fields_units_and_ranges(tmp_path, classes):
    shade = np.stack([np.linspace(0, 65535, 40)] * 3, axis=1).astype(np.uint16)
    np.savez(tmp_path / "a.npz", points=POINTS * 1000, shade=shade, kind=LABELS, number=THINGS - 1, power=np.arange(40))
    fields = CloudFields(
        label="kind", instance="number", color="shade", intensity="power", intensity_scale=0.1, scale=0.001,
        no_instance=-1,
    )  # fmt: skip
    cloud = read_cloud(tmp_path / "a.npz", fields, classes)
    np.testing.assert_allclose(cloud.points, POINTS, rtol=1e-5)
    np.testing.assert_array_equal(cloud.colors, shade >> 8)
    np.testing.assert_array_equal(cloud.instances, THINGS)
    np.testing.assert_allclose(cloud.intensity, (np.arange(40) * 0.1).clip(0, 1))
    np.save(tmp_path / "b.npy", np.column_stack([LABELS, POINTS, COLORS]))
    fields = CloudFields(columns=("label", "x", "y", "z", "a", "b", "c"), color="c, b, a")
    cloud = read_cloud(tmp_path / "b.npy", fields, classes)
    np.testing.assert_array_equal(cloud.colors, COLORS[:, ::-1])
    np.testing.assert_array_equal(cloud.labels, LABELS)
    assert read_cloud(tmp_path / "b.npy", CloudFields(columns=fields.columns, color="none")).colors is None
    with pytest.raises(RecipeError, match=r"data.options.scale' is 0"):
        CloudFields(scale=0)


def test_coordinates_of_maps_keep_their_millimeters(tmp_path):
    there = np.array([500_000.25, 5_200_000.75, 310.5]) + np.arange(30).reshape(10, 3) * 0.001
    np.save(tmp_path / "a.npy", there)
    cloud = read_cloud(tmp_path / "a.npy")
    np.testing.assert_allclose(cloud.points - cloud.points[0], there - there[0], atol=5e-5)
    assert np.abs(cloud.points[:, :2]).max() < 2
    np.testing.assert_allclose(cloud.points[:, 2], there[:, 2], atol=1e-4)
    np.testing.assert_array_equal(file_columns(tmp_path / "a.npy")["y"], there[:, 1])


def broken(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **{"points": POINTS, "label": LABELS} | arrays)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"points": POINTS[:0], "label": LABELS[:0]}, "the cloud has no point"),
        ({"points": np.where(np.arange(40)[:, None] < 3, np.nan, POINTS)}, "of 3 of 40 points are not finite"),
        ({"points": np.where(np.arange(40)[:, None] < 3, 1e300, POINTS.astype(float))}, r"1e\+300 m from the origin"),
        ({"points": np.where(np.arange(40)[:, None] < 3, 1e8, POINTS.astype(float))}, r"1e\+08 m from the origin"),
        ({"label": LABELS[:9]}, "label has 9 rows, the points have 40"),
        ({"label": LABELS + 0.5}, "label of 40 points is no whole number: "),
        ({"label": LABELS * 7}, r"label 7 at \d+ points is no class; classes.txt has -1, 0, 1, 2, 3 "),
        ({"label": np.array(["a"] * 40)}, "label is <U1; accepted: whole numbers"),
        ({"colors": np.full((40, 3), 300.0)}, "colors are from 300 to 300; accepted: 0 to 255, finite"),
        ({"colors": COLORS[:5]}, "color has 5 rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_file(arrays, reason, tmp_path, classes):
    path = broken(tmp_path, **arrays)
    with pytest.raises(BadFrame, match=reason) as error:
        read_cloud(path, classes=classes)
    assert error.value.path == str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_points_that_are_not_finite_are_dropped_by_the_line_that_is_told(suffix, tmp_path, classes):
    points = np.where(np.arange(40)[:, None] < 3, np.nan, POINTS)
    path = tmp_path / f"it's{suffix}"
    if suffix == ".npy":
        np.save(path, np.column_stack([points, LABELS]))
    else:
        np.savez(path, points=points, label=LABELS)
    with pytest.raises(BadFrame, match="3 of 40 points are not finite; this drops them: ") as error:
        read_cloud(path, classes=classes)
    exec(error.value.reason.partition("drops them: ")[2], {"numpy": np})
    assert np.array_equal(read_cloud(path, classes=classes).points, POINTS[3:].astype(np.float32))
    np.savez(tmp_path / "a.npz", x=points[:, 0], y=points[:, 1], z=points[:, 2])
    with pytest.raises(BadFrame, match="3 of 40 points are not finite; drop those rows"):
        read_cloud(tmp_path / "a.npz", need=())


def test_missing_fields_name_those_that_there_are(tmp_path, classes):
    np.savez(tmp_path / "a.npz", points=POINTS, lable=LABELS)
    with pytest.raises(BadFrame, match=r"no field label or labels or .*\(data.options.label\); it has points, lable"):
        read_cloud(tmp_path / "a.npz", classes=classes)
    assert read_cloud(tmp_path / "a.npz", classes=classes, need=()).labels is None
    with pytest.raises(BadFrame, match=r"no field labels .*it has points, lable; nearest 'lable'"):
        read_cloud(tmp_path / "a.npz", CloudFields(label="labels"), classes, need=())
    with pytest.raises(BadFrame, match=r"no field instance or .*\(data.options.instance\)"):
        read_cloud(tmp_path / "a.npz", CloudFields(label="lable"), classes, need=("label", "instance"))
    np.savez(tmp_path / "b.npz", where=POINTS)
    with pytest.raises(BadFrame, match=r"no coordinates x y z or points \[N, 3\]; it has where"):
        read_cloud(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.zeros((4, 5)))
    with pytest.raises(BadFrame, match=r"5 columns, but their meaning is not known; accepted: data.options.columns"):
        read_cloud(tmp_path / "c.npy")
    with pytest.raises(BadFrame, match=r"5 columns, but 3 are named"):
        read_cloud(tmp_path / "c.npy", CloudFields(columns=("x", "y", "z")))


@pytest.mark.parametrize("write", [write_ply, write_npy, write_structured_npy, write_npz, write_las, write_laz])
def test_files_that_are_cut_off_empty_or_missing_are_bad_frames(write, tmp_path):
    path = write(tmp_path)
    data = path.read_bytes()
    for size in (len(data) - 50, 100, 3, 0):
        path.write_bytes(data[:size])
        with pytest.raises(BadFrame) as error:
            read_cloud(path)
        assert error.value.path == str(path)
    path.unlink()
    with pytest.raises(BadFrame, match="file is missing"):
        read_cloud(path)


def test_other_files_and_a_missing_library_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"accepted are files of points that end in .ply, .npy, .npz, .las, .laz"):
        read_cloud(tmp_path / "a.obj")
    (tmp_path / "a.las").write_bytes(b"LASF")
    monkeypatch.setitem(sys.modules, "laspy", None)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[las\]'"):
        read_cloud(tmp_path / "a.las")
