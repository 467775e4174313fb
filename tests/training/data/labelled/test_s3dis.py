"""S3DIS: text files with their published faults, rooms as clouds, and their conversion."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, CheckpointError, DataError, RecipeError, UnknownName
from geo_pretrain.files import locked
from geo_pretrain.training.data.labelled import convert
from geo_pretrain.training.data.labelled.clouds import s3dis_text
from geo_pretrain.training.data.labelled.clouds.s3dis import POINTNET_ORDER, read_prepared
from geo_pretrain.training.data.labelled.clouds.s3dis_text import (
    MIXED,
    RAW_CLASSES,
    Room,
    parse_lines,
    parse_slowly,
    read_room,
    thin_room,
)
from geo_pretrain.training.data.labelled.convert import INDEX, conversion_settings, convert_data
from geo_pretrain.training.data.labelled.registry import open_labelled
from tests.front_door import geo_pretrain
from tests.indoor_layouts import lines_of, made_objects, write_s3dis, write_s3dis_room

pytestmark = pytest.mark.filterwarnings("ignore:S3DIS is not complete")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "Stanford3dDataset_v1.2"
    write_s3dis(root)
    return root


@pytest.fixture(scope="module")
def converted(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    convert_data("s3dis", raw, out)
    return out


def opened(path, split="val", task="segmentation3d", **options):
    return open_labelled("s3dis", path, split, task=task, options=options)


@pytest.mark.parametrize("chunk", [40, 300, 1 << 18])
def test_text_is_parsed_at_once_as_line_by_line(chunk, monkeypatch):
    monkeypatch.setattr(s3dis_text, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    text = lines_of(rng.uniform(-40, 40, (30, 3)), rng.integers(0, 256, (30, 3)))
    text += "1.5 -2 3e-1 0 255 7\n\n0.1\t0.2  0.3 12.000000 13.000000 14.000000\r\n-0.001 .5 5. 1 2 3"  # no end of line
    found = parse_lines(text.encode())
    table = np.array([line.split() for line in text.splitlines() if line.strip()]).astype(np.float64)
    assert np.array_equal(found.points, table[:, :3].astype(np.float32))
    assert np.array_equal(found.colors, table[:, 3:].astype(np.uint8))
    assert found.faults == ()
    assert np.array_equal(parse_slowly(text.encode())[0], table)


def test_published_faults_lose_no_point_that_can_be_read():
    """The lines of Area_5/hallway_6, Area_1/WC_1 and Area_3/hallway_2, and some that nothing can be made of."""
    good = b"1.000 2.000 3.000 10 20 30\n"
    broken = [
        (b"20.316 7.354 3.111 185\x00187 182\n", [20.316, 7.354, 3.111, 185, 187, 182]),
        (b"-1.285 0.300 2.100 100 101 10\x102\n", None),  # one number too many: a point is lost
        (b"5.000 -9.1\xd50 1.000 1 2 3\n", None),
        (b"1 2 3 4 5\n", None),
        (b"1 2 3 4 5 256\n", None),
        (b"1 2 nan 4 5 6\n", None),
        (b"1 2 1e999 4 5 6\n", None),
        (b"1 2 1e300 4 5 6\n", None),
    ]
    found = parse_lines(good + b"".join(good + line for line, _ in broken) + good)
    rows = np.concatenate([found.points, found.colors], 1)
    assert len(rows) == 2 + len(broken) + 1
    assert np.allclose(rows[2], broken[0][1])
    assert [fault.partition(",")[0] for fault in found.faults] == ["line 3: repaired"] + [
        f"line {2 * k + 3}: dropped" for k in range(1, len(broken))
    ]
    assert "odd bytes in b'20.316 7.354 3.111 185\\x00187 182'" in found.faults[0]
    assert "5 words: b'1 2 3 4 5'" in found.faults[3]
    far = parse_lines(good + b"1 -123456789.5 3 4 5 6\n")  # plain decimals
    assert far.points.tolist() == [[1, 2, 3]]
    assert "line 2: dropped, not a place up to 1e+07 m" in far.faults[0]
    alone = parse_lines(good + broken[0][0] + good)
    assert [fault.partition(",")[0] for fault in alone.faults] == ["line 2: repaired"]
    assert np.array_equal(alone.points[1], rows[2, :3].astype(np.float32))


def test_a_room_has_its_objects_by_name_without_copies_and_strange_files(tmp_path):
    rng = np.random.default_rng(1)
    objects = made_objects(rng, 5)
    folder = write_s3dis_room(tmp_path, "Area_1/office_1", objects)
    notes = folder / "Annotations"
    shutil.copy(notes / "wall_1.txt", notes / "wall_1 (1).txt")
    shutil.copy(notes / "wall_1.txt", notes / "lamp_1.txt")
    (notes / "chair_1.txt").write_bytes((notes / "chair_1.txt").read_bytes() + b"1 2\n")
    room, remarks = read_room(folder, None)
    order = ["chair", "chair", "floor", "table", "wall"]
    assert [RAW_CLASSES[k] for k in room.labels[::5]] == order
    assert room.instances.tolist() == np.repeat([1, 2, 3, 4, 5], 5).tolist()
    by_name = {name: points for name, points, _ in objects}
    assert np.allclose(room.points[-5:], by_name["wall"], atol=6e-4)
    assert [remark.partition(",")[0] for remark in remarks] == [
        "Annotations/chair_1.txt: line 6: dropped", "Annotations/lamp_1.txt: left out",
        "Annotations/wall_1 (1).txt: left out",
    ]  # fmt: skip
    for path in notes.glob("*.txt"):
        path.write_text("\n")
    with pytest.raises(BadFrame, match="no object with a point"):
        read_room(folder)


def test_thinning_keeps_the_first_point_of_each_voxel_and_marks_mixed_ones():
    rng = np.random.default_rng(2)
    points = rng.uniform(-0.05, 0.05, (300, 3)).astype(np.float32)
    room = Room(points, rng.integers(0, 255, (300, 3)).astype(np.uint8), (points[:, 0] > 0.003).astype(np.uint8) * 7,
                rng.integers(1, 4, 300).astype(np.int32))  # fmt: skip
    voxels: dict[tuple, list[int]] = {}
    for row, cell in enumerate(np.floor(points / np.float32(0.02)).astype(int)):
        voxels.setdefault(tuple(cell), []).append(row)
    thin = thin_room(room, 0.02)
    rows = [group[0] for group in voxels.values()]
    mixed = [len(set(room.labels[group])) > 1 for group in voxels.values()]
    assert 0 < sum(mixed) < len(mixed) < 200
    assert np.array_equal(thin.points, points[rows])
    assert np.array_equal(thin.colors, room.colors[rows])
    assert np.array_equal(thin.labels, np.where(mixed, MIXED, room.labels[rows]))
    assert np.array_equal(thin.instances, np.where(mixed, 0, room.instances[rows]))


def test_area_5_validates_unless_another_is_asked_for(raw):
    assert opened(raw).ids() == ["Area_5/office_1"]
    assert opened(raw.parent, "train").ids() == [f"Area_{k}/office_1" for k in (1, 2, 3, 4, 6)]
    assert opened(raw, area=2).ids() == ["Area_2/office_1"]
    assert "Area_5/office_1" in opened(raw, "train", area=2).ids()
    with pytest.raises(RecipeError, match=r"'data.options.area' is 7, accepted is an area, 1 to 6"):
        opened(raw, area=7)
    with pytest.warns(UserWarning, match="S3DIS is not complete in .*; rooms there: 1 of 68 in Area_5"):
        opened(raw)


def test_classes_come_in_either_order_and_stairs_are_ignored_or_clutter(tmp_path):
    rng = np.random.default_rng(3)
    names = list(RAW_CLASSES)  # by name, but for clutter
    # a point each, far apart, in classes by name
    objects = [(name, np.full((1, 3), k, float), rng.integers(0, 255, (1, 3))) for k, name in enumerate(names)]
    write_s3dis_room(tmp_path, "Area_5/hall_1", objects)
    alphabetical = [name for name in names if name != "stairs"]
    for options, classes in (({}, alphabetical), ({"order": "pointnet"}, list(POINTNET_ORDER))):
        for stairs in ("ignore", "clutter"):
            source = opened(tmp_path, **options, stairs=stairs)
            assert list(source.classes) == classes
            cloud = source.load("Area_5/hall_1")
            named = [names[int(x)] for x in cloud.points[:, 0]]
            expected = {"stairs": classes.index("clutter") + 1 if stairs == "clutter" else 0}
            assert cloud.labels.tolist() == [
                expected.get(name, 1 + ([*classes, "stairs"].index(name))) for name in named
            ]
            objects = opened(tmp_path, "val", "instances3d", **options, stairs=stairs).load("Area_5/hall_1")
            assert np.array_equal(objects.instances > 0, cloud.labels > 0)
    assert POINTNET_ORDER[:4] == ("ceiling", "floor", "wall", "beam")


def test_objects_are_those_of_the_classes_that_count(raw, converted):
    everything = opened(raw, task="instances3d").load("Area_5/office_1")
    things = opened(converted, task="instances3d", train_stuff=False)
    assert things.stuff == ("ceiling", "floor", "wall")
    cloud = things.load("Area_5/office_1")
    stuff = np.isin(cloud.labels, [things.classes.index(name) + 1 for name in things.stuff])
    assert stuff.any()
    assert np.array_equal(cloud.instances == 0, stuff | (cloud.labels == 0))
    assert np.array_equal(everything.instances > 0, everything.labels > 0)
    assert len(np.unique(cloud.instances[cloud.instances > 0])) == 3
    assert opened(raw).load("Area_5/office_1").instances is None


def test_converted_rooms_are_those_of_the_text_files(raw, converted):
    assert sorted(path.name for path in (converted / "Area_1").iterdir()) == ["office_1.ply"]
    for split in ("train", "val"):
        text, files = (opened(path, split, "instances3d") for path in (raw, converted))
        assert text.ids() == files.ids()
        for id in text.ids():
            one, other = text.load(id), files.load(id)
            for name in ("points", "colors", "labels", "instances"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
                assert getattr(one, name).dtype == getattr(other, name).dtype
    assert files.load(id).labels.dtype == np.int64


@pytest.mark.parametrize("kind", ["raw", "converted"])
def test_fingerprint_changes_with_files_and_options(kind, raw, converted, tmp_path):
    root = shutil.copytree({"raw": raw, "converted": converted}[kind], tmp_path / "copy")
    before = opened(root).fingerprint()
    assert opened(root).fingerprint() == before
    assert len({before, opened(root, stairs="clutter").fingerprint(), opened(root, "train").fingerprint()}) == 3
    file = next((root / "Area_5").rglob("office_1.ply" if kind == "converted" else "chair_2.txt"))
    file.write_bytes(file.read_bytes() + b" ")
    assert opened(root).fingerprint() != before


def test_what_is_missing_is_told(tmp_path, raw):
    with pytest.raises(DataError, match=r"No folder .*Expected layout: Area_1 .*buildingparser.stanford.edu"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="No Area_1 to Area_6 in"):
        opened(tmp_path)
    root = shutil.copytree(raw, tmp_path / "copy")
    shutil.rmtree(root / "Area_5")
    assert opened(root, "val", area=1).ids() == ["Area_1/office_1"]
    with pytest.raises(DataError, match="has no room of Area_5 for split 'val'"):
        opened(root)
    shutil.copytree(root, tmp_path / "again")
    with pytest.raises(DataError, match="holds again, copy; name one of these folders"):
        opened(tmp_path)


def test_broken_converted_rooms_are_named(converted, tmp_path):
    path = shutil.copy(converted / "Area_5" / "office_1.ply", tmp_path)
    whole = (converted / "Area_5" / "office_1.ply").read_bytes()
    cut, other = tmp_path / "cut.ply", tmp_path / "other.ply"
    cut.write_bytes(whole[:-3])
    other.write_bytes(whole.replace(b"property uchar label", b"property uchar lapel"))
    with pytest.raises(BadFrame, match="the file is cut off"):
        read_prepared(cut)
    with pytest.raises(BadFrame, match=r"points have no label; is it made by `geo-pretrain data convert s3dis`\?"):
        read_prepared(other)
    assert len(read_prepared(tmp_path / "office_1.ply").points) > 100, path


def test_conversion_goes_on_where_it_stopped_and_counts_broken_rooms(raw, tmp_path):
    root, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    broken = root / "Area_3" / "office_1" / "Annotations"
    moved = broken.rename(tmp_path / "away")
    broken.mkdir()
    (root / "Area_1" / "office_1" / "Annotations" / "wall_1.txt").open("ab").write(b"1 2 3\n")
    calls = []
    first = convert_data("s3dis", root, out, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 6) for k in range(1, 7)]
    assert (len(first.made), first.skips.counts()) == (5, {
        "no object with a point; expected CLASS_n.txt with lines x y z r g b": 1
    })  # fmt: skip
    assert [*first.remarks] == ["Area_1/office_1"]
    assert not [path for path in out.rglob("*") if "part" in path.name]
    broken.rmdir()
    moved.rename(broken)
    (out / "Area_2" / "office_1.ply").unlink()  # lost, of another size, and a line that a kill cut off
    with (out / "Area_4" / "office_1.ply").open("ab") as file:
        file.write(b"x")
    lines = (out / INDEX).read_text().splitlines()
    lines[1] = json.dumps({"item": json.loads(lines[1])["item"]})  # changed by somebody
    (out / INDEX).write_text("\n".join([*lines, "[]"]) + "\n")
    altered = {json.loads(lines[1])["item"]}
    with (out / INDEX).open("a") as file:
        file.write('{"item": "Area_5/off')
    (out / "Area_2" / ".office_1.ply.1-ab.part").write_bytes(b"begun")
    again = convert_data("s3dis", root, out)
    assert not list(out.rglob(".*.part"))
    assert set(again.made) == {f"Area_{k}/office_1" for k in (2, 3, 4)} | altered
    assert [*again.remarks] == ["Area_1/office_1"]  # as it was made by the first call
    assert "remarks on raw files: 1" in again.summary()
    assert len(convert_data("s3dis", root, out).present) == 6
    lines = [json.loads(line) for line in (out / INDEX).read_text().splitlines()]
    assert lines[0] == {"converter": "s3dis", "version": 1, "settings": {"voxel_size": 0.01}}
    with pytest.raises(DataError, match=r"holds a conversion by .*Convert into another folder"):
        convert_data("s3dis", root, out, settings=conversion_settings("s3dis", ["voxel_size=0.02"]))
    with locked(out / INDEX), pytest.raises(CheckpointError, match="Another process converts into"):
        convert_data("s3dis", root, out)


def test_several_workers_make_the_same(raw, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    assert len(convert_data("s3dis", raw, tmp_path, workers=3).made) == 6
    for path in converted.rglob("*.ply"):
        assert (tmp_path / path.relative_to(converted)).read_bytes() == path.read_bytes()
    pickle.dumps((convert._convert_item, conversion_settings("s3dis"), BadFrame(tmp_path, "why")))  # sent to processes


def test_conversion_from_the_command_line(raw, tmp_path):
    with pytest.raises(UnknownName, match=r"Unknown converter 's3dsi'. Closest: 's3dis'"):
        conversion_settings("s3dsi")
    with pytest.raises(RecipeError, match=r"'voxel_size' is -1.0, accepted is meters, or 0 for all points"):
        conversion_settings("s3dis", ["voxel_size=-1"])
    ended = geo_pretrain("data", "convert", "s3dis", raw.parent, tmp_path, "--set", "voxel_size=0")
    assert "6 made, 0 there before" in ended.output
    room = read_prepared(tmp_path / "Area_2" / "office_1.ply")
    text, _ = read_room(raw / "Area_2" / "office_1", None)
    assert np.array_equal(room.points, text.points)
    assert np.array_equal(room.instances, text.instances)
