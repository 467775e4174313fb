"""ScanNet's scans as labelled clouds: what is read is what was written; what is missing or broken is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, UnknownName
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from geo_pretrain.training.data.sources.scannet_files import ScanObject, vertex_objects
from tests.indoor_layouts import Scan, made_scan, write_scan, write_scannet_release
from tests.training.data.labelled.twins import NYU40_20, mapped

SCAN = "scene0001_00"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder, {scan: what it holds}); read-only."""
    root = tmp_path_factory.mktemp("scannet")
    return root, write_scannet_release(root)


@pytest.fixture
def copy(release, tmp_path):
    root = shutil.copytree(release[0], tmp_path / "copy")
    return root, root / "scans" / SCAN


def opened(root, split="train", task="segmentation3d", **options):
    return open_labelled("scannet3d", root, split, task=task, options=options)


def load(root, task="segmentation3d", **options):
    return opened(root, task=task, **options).load(SCAN)


@pytest.mark.parametrize("labels", ["vertices", "objects"])
def test_scans_are_the_vertices_with_the_classes_of_the_benchmark(release, labels):
    root, scans = release
    source = opened(root, labels=labels)
    assert source.ids() == ["scene0000_00", "scene0001_00", "scene0002_00"]
    assert opened(root / "scans", "val").ids() == ["scene0003_00"]
    assert len(source.classes) == 20
    for id in source.ids():
        cloud = source.load(id)
        assert cloud.id == source.scene_of(id) == id
        assert np.array_equal(cloud.points, scans[id].points)
        assert np.array_equal(cloud.colors, scans[id].colors)
        assert np.array_equal(cloud.labels, mapped(scans[id].ids, NYU40_20))
        assert cloud.labels.dtype == np.int64
        assert cloud.instances is cloud.boxes is None
    assert {source.classes[k - 1] for k in np.unique(cloud.labels) if k} == {"wall", "floor", "chair", "table"}


def test_known_wrong_labels_are_no_labels(tmp_path, release):
    made = made_scan("scene0384_00", 5)
    ids = made.ids.copy()
    wrong = np.flatnonzero(made.numbers == 0)[:9]
    ids[wrong] = 149
    for name in ("scene0384_00", "scene0270_00"):
        write_scan(tmp_path / "scans", Scan(name, made.points, made.colors, ids, made.numbers, made.alignment))
    (tmp_path / "scannetv2_val.txt").write_text("scene0384_00 scene0270_00")
    source = opened(tmp_path, "val")
    assert (source.load("scene0384_00").labels[wrong] == 0).all()
    with pytest.raises(BadFrame, match="label id 149 in 9 vertices"):
        source.load("scene0270_00")


def test_objects_are_those_of_the_18_classes(release):
    root, scans = release
    source = opened(root, task="instances3d")
    cloud = source.load(SCAN)
    labels = mapped(scans[SCAN].ids, NYU40_20)
    assert source.stuff == ("wall", "floor") == source.classes[:2]
    assert np.array_equal(cloud.labels, labels)
    assert np.array_equal(cloud.instances, np.where(labels > 2, scans[SCAN].numbers, 0))
    assert len(np.unique(cloud.instances)) == 1 + 3  # a table and two chairs; a lamp is none of the 18


def test_a_later_object_takes_over_the_segments_of_an_earlier_one():
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 40, 200) * 11
    objects = [ScanObject(number, "chair", rng.integers(0, 50, 12) * 11) for number in (0, 1, 4, 3)]
    expected = np.zeros(200, int)
    for each in objects:
        for row, segment in enumerate(segments):
            if segment in each.segments.tolist():
                expected[row] = each.number + 1
    assert np.array_equal(vertex_objects(segments, objects), expected)
    assert len(np.unique(expected)) == 5
    assert not vertex_objects(segments, []).any()


@pytest.mark.parametrize("scan", ["scene0000_00", "scene0001_00", "scene0002_00"])
def test_detection_has_aligned_points_and_boxes_of_all_vertices(release, scan):
    root, scans = release
    made = scans[scan]
    source = opened(root, task="detection3d")
    cloud = source.load(scan)
    aligned = np.array([made.alignment[:3, :3] @ p + made.alignment[:3, 3] for p in made.points.astype(float)])
    labels = mapped(made.ids, NYU40_20[2:])
    assert source.classes[:3] == ("cabinet", "bed", "chair")
    assert np.allclose(cloud.points, aligned, atol=1e-6)
    assert np.array_equal(cloud.labels, labels)
    assert np.array_equal(cloud.instances, np.where(labels > 0, made.numbers, 0))
    numbers = [n for n in np.unique(made.numbers) if n and labels[made.numbers == n][0] > 0]
    assert len(cloud.boxes) == len(numbers) == 3
    for k, number in enumerate(numbers):
        inside = aligned[made.numbers == number]
        assert np.allclose(cloud.boxes.centers[k], (inside.max(0) + inside.min(0)) / 2, atol=1e-5)
        assert np.allclose(cloud.boxes.sizes[k], inside.max(0) - inside.min(0), atol=1e-5)
        assert cloud.boxes.classes[k] == labels[made.numbers == number][0]
    assert (cloud.boxes.headings == 0).all()


def test_large_scans_are_thinned_out_always_alike(release):
    root, _ = release
    whole, few = load(root, "detection3d"), load(root, "detection3d", max_points=100)
    rows = [np.flatnonzero((whole.points == point).all(1))[0] for point in few.points]
    assert len(set(rows)) == 100 < len(whole)
    for name in ("colors", "labels", "instances"):
        assert np.array_equal(getattr(few, name), getattr(whole, name)[rows])
    assert np.array_equal(few.boxes.sizes, whole.boxes.sizes)
    assert np.array_equal(load(root, "detection3d", max_points=100).points, few.points)
    assert len(load(root, "instances3d", max_points=100)) == len(whole)


@pytest.mark.parametrize("task", ["segmentation3d", "instances3d", "detection3d"])
def test_scans_of_the_test_split_have_no_labels(release, task, tmp_path):
    root, scans = release
    source = opened(root, "test", task)
    assert source.ids() == ["scene0004_00"]
    cloud = source.load("scene0004_00")
    assert np.array_equal(cloud.points, scans["scene0004_00"].points)
    assert cloud.labels is cloud.instances is cloud.boxes is None
    (tmp_path / "mine.txt").write_text("scene0004_00\n")
    assert opened(root, "test", task, split_file=str(tmp_path / "mine.txt")).ids() == ["scene0004_00"]


def edited(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


FAR = "axisAlignment = 1 0 0 1e300 0 1 0 0 0 0 1 0 0 0 0 1\n"
FAULTS = [
    ("_vh_clean_2.ply", lambda path: path.unlink(), "segmentation3d", "No mesh"),
    ("_vh_clean_2.ply", lambda path: path.write_bytes(path.read_bytes()[:900]), "segmentation3d", "cut off"),
    ("_vh_clean_2.labels.ply", lambda path: path.unlink(), "segmentation3d", "cannot be read"),
    (
        "_vh_clean_2.labels.ply",
        lambda path: path.write_bytes(path.read_bytes().replace(b"ushort label", b"ushort lapel")),
        "segmentation3d",
        "no 16-bit label for each of the mesh's 360 vertices",
    ),
    (
        "_vh_clean_2.0.010000.segs.json",
        lambda path: edited(path, lambda tree: tree | {"segIndices": tree["segIndices"][:-1]}),
        "instances3d",
        "has 359 segments, expected one for each of the mesh's 360 vertices",
    ),
    (".aggregation.json", lambda path: path.write_text('{"segGroups": [{'), "instances3d", "objects cannot be read"),
    (
        ".aggregation.json",
        lambda path: edited(path, lambda tree: {"segGroups": [{"objectId": 0, "label": "chair"}]}),
        "detection3d",
        "object 0 has no whole 'objectId', text 'label' and list 'segments'",
    ),
    (
        ".aggregation.json",
        lambda path: path.write_text(
            path.read_text().replace("office chair", "stool of mine").replace('"chair', '"stool')
        ),
        "instances3d",
        "categories that scannetv2-labels.combined.tsv lacks: stool",
    ),
    (".txt", lambda path: path.write_text("colorHeight = 968\n"), "detection3d", "has no axisAlignment"),
    (".txt", lambda path: path.write_text("axisAlignment = 1 2 x\n"), "detection3d", "'1 2 x', expected 16 numbers"),
    (
        ".txt",
        lambda path: path.write_text(f"axisAlignment = {'1 ' * 16}\n"),
        "detection3d",
        "axisAlignment is not a rot",
    ),
    (".txt", lambda path: path.write_text(FAR), "detection3d", "axisAlignment is 1e+300 m from the origin"),
    (
        ".aggregation.json",
        lambda path: path.write_text(path.read_text().replace('"objectId": 0', '"objectId": 1000000000000')),
        "instances3d",
        "has no whole 'objectId'",
    ),
]


@pytest.mark.parametrize("end, change, task, reason", FAULTS)
def test_a_broken_scan_is_named_with_its_reason(copy, end, change, task, reason):
    root, folder = copy
    path = folder / f"{SCAN}{end}"
    change(path)
    with pytest.raises(BadFrame) as error:
        load(root, task)
    assert reason in error.value.reason
    assert error.value.path == str(path)
    assert len(opened(root, task=task).load("scene0000_00")) == 360


def test_objects_of_the_full_mesh_are_not_taken_for_those_of_the_decimated_one(copy):
    root, folder = copy
    (folder / f"{SCAN}.aggregation.json").rename(folder / f"{SCAN}_vh_clean.aggregation.json")
    with pytest.raises(BadFrame, match=r"scene0001_00.aggregation.json: objects cannot be read"):
        load(root, "instances3d")


def test_what_is_missing_is_told(copy, tmp_path):
    root, folder = copy
    with pytest.raises(UnknownName, match="Unknown split 'validation'"):
        opened(root, "validation")
    table = (root / "scannetv2-labels.combined.tsv").rename(tmp_path / "table.tsv")
    with pytest.raises(DataError, match=r"No table 'scannetv2-labels.combined.tsv' in .*label_file"):
        opened(root, task="detection3d")
    assert len(opened(root, task="detection3d", label_file=str(table)).load(SCAN).boxes) == 3
    table.write_text("a\tb\n1\t2\n")
    with pytest.raises(DataError, match="is no table with columns raw_category and nyu40id"):
        opened(root, task="detection3d", label_file=str(table))
    (root / "scannetv2_val.txt").unlink()
    with pytest.raises(DataError, match=r"No list of scenes 'scannetv2_val.txt' in .*Tasks/Benchmark"):
        opened(root, "val")
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"lacks 1 of the 3 scans of .*scannetv2_train.txt': scene0001_00. Expected "):
        opened(root)


def test_fingerprint_has_the_files_of_the_task_and_the_options(copy):
    root, folder = copy
    tasks = "segmentation3d", "instances3d", "detection3d"

    def prints():
        return [opened(root, task=task).fingerprint() for task in tasks]

    before = prints()
    assert before == prints()
    assert len({*before, opened(root, labels="objects").fingerprint(), opened(root, "val").fingerprint()}) == 5
    for end, changed in ((".txt", [2]), (".aggregation.json", [1, 2]), ("_vh_clean_2.labels.ply", [0])):
        path = folder / f"{SCAN}{end}"
        path.write_bytes(path.read_bytes() + b" ")
        after = prints()
        assert [k for k in range(3) if after[k] != before[k]] == changed, end
        before = after


def test_lists_of_the_data_efficient_benchmark_are_read_by_share_or_by_name(release, tmp_path):
    for share, names in ((1, ["scene0002_00"]), (20, ["scene0002_00", "scene0000_00"])):
        (tmp_path / f"{share}.txt").write_text("\n".join(names))
    assert read_scene_list(tmp_path, 0.01) == ["scene0002_00"]
    part = subset(opened(release[0]), 1.0, scenes=read_scene_list(tmp_path / "20.txt"))
    assert part.ids() == ["scene0000_00", "scene0002_00"]
    with pytest.raises(DataError, match=r"No list 'scannetv2_train_5.txt' in .*; there are: 1.txt, 20.txt"):
        read_scene_list(tmp_path, 0.05)
