"""Rooms as a labelled source: labels are the rooms' own, splits share no scene, images do not depend on options."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.rooms import CLASSES, RoomsConfig
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.labelled.rooms import LabelledRooms
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.demo.pretraining import labelled_frames
from tests.training.data.labelled.twins import assert_objects, objects

SMALL = {"scenes": 2, "val_scenes": 2, "frames": 4, "width": 64, "height": 64}
THINGS = [name for name in CLASSES if name not in ("unlabeled", "wall", "floor", "ceiling")]


def rooms(split, task, **options):
    return open_labelled("rooms", None, split, task=task, options=SMALL | options)


def config(split):
    return RoomsConfig(scenes=2, frames=4, width=64, height=64, split=split)


def test_segmentation_is_the_rooms_own():
    for split, count in (("train", 4), ("val", 8)):
        source, truth = rooms(split, "segmentation"), Rooms(config(split))
        assert source.classes == CLASSES[1:]
        assert (source.name, source.split, len(source.ids())) == ("rooms", split, count)
        for id in source.ids():
            scene, frame = id.split("/")
            assert source.scene_of(id) == scene
            read, want = source.load(id), truth.load(scene, frame)
            np.testing.assert_array_equal(read.image, want.color)
            np.testing.assert_array_equal(read.semantic, want.semantic)
            assert read.semantic.dtype == np.uint8
            assert read.instances is None


def test_objects_are_the_things_of_the_rooms():
    source, truth = rooms("val", "detection", min_pixels=20), Rooms(config("val"))
    assert list(source.classes) == THINGS
    order = [CLASSES.index(name) for name in THINGS]
    seen = 0
    for id in source.ids()[::3]:
        frame = truth.load(*id.split("/"))
        expected = objects(frame.semantic, frame.instance, order, min_pixels=20)
        assert_objects(source.load(id).instances, expected, (64, 64))
        assert source.load(id).semantic is None
        seen += len(expected)
    assert seen > 5


def test_the_smallest_object_is_as_large_a_part_as_1000_pixels_of_vga():
    assert rooms("train", "detection").min_pixels == 13  # 64 * 64 * 1000 / (640 * 480) = 13.3
    wide = Rooms(RoomsConfig(width=320, height=64))
    assert LabelledRooms(wide, "train", "detection", labelled=1).min_pixels == 67
    assert rooms("train", "detection", min_pixels=1).min_pixels == 1


def test_splits_share_no_scene_and_all_held_out_frames_have_labels():
    train, val = (rooms(split, "detection") for split in ("train", "val"))
    assert not {train.scene_of(id) for id in train.ids()} & {val.scene_of(id) for id in val.ids()}
    assert {id.split("/")[1] for id in val.ids()} == {f"{k:04d}" for k in range(4)}


def test_labelled_frames_are_those_of_the_demo():
    frames, _ = labelled_frames(Rooms(config("train")), Rooms(config("val")), (64, 64))
    assert rooms("train", "segmentation").ids() == [f"{frame.scene}/{frame.id}" for frame in frames]
    later = [f"rooms_val_{scene:04d}/{(scene + k) % 4:04d}" for scene in range(2) for k in range(4)]
    assert rooms("val", "segmentation").ids() == later


def test_fingerprints_tell_task_and_labels_apart():
    sources = [rooms("train", "detection"), rooms("train", "segmentation"), rooms("val", "detection")]
    sources += [rooms("train", "detection", labelled=3), rooms("train", "detection", min_pixels=5)]
    assert len({source.fingerprint() for source in sources}) == 5
    assert rooms("train", "detection").fingerprint() == sources[0].fingerprint()


def test_options_reach_the_rooms():
    given = {"val_scenes": 1, "frames": 1, "seed": 3, "difficulty": "easy", "width": 72}
    wanted = RoomsConfig(seed=3, scenes=1, frames=1, width=72, height=64, split="val", difficulty="easy")
    assert rooms("val", "detection", **given).rooms.config == wanted


def test_rendering_is_reported():
    calls = []
    open_labelled("rooms", None, "val", task="detection", options=SMALL, progress=lambda *a: calls.append(a))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"labelled": 0}, "'data.options.labelled' is 0, accepted is a whole number from 1 up"),
        ({"min_pixels": 0}, "'data.options.min_pixels' is 0, accepted is a whole number"),
        ({"width": 65}, "width=65"),
        ({"scene": 3}, "unknown key 'data.options.scene'. Closest: 'data.options.scenes'"),
    ],
)
def test_wrong_options_are_named(options, reason):
    with pytest.raises(RecipeError, match=reason):
        rooms("train", "detection", **options)


def test_unknown_splits_and_images_are_named():
    with pytest.raises(UnknownName, match="Unknown split 'test'"):
        rooms("test", "detection")
    with pytest.raises(UnknownName, match="Unknown image 'rooms_val_0000'"):
        rooms("val", "detection").load("rooms_val_0000")
    with pytest.raises(UnknownName, match="Unknown scene 'rooms_val_0009'"):
        rooms("val", "detection").load("rooms_val_0009/0000")


def test_coarse_classes_join_what_is_alike_and_lose_no_pixel():
    fine, coarse = rooms("val", "segmentation"), rooms("val", "segmentation", classes="coarse")
    assert coarse.classes == (
        "wall", "floor", "window", "door", "curtain", "bed", "sofa", "chair", "table", "cabinet", "lamp", "object"
    )  # fmt: skip
    joined = {"ceiling": "wall", "rug": "floor", "stool": "chair", "desk": "table", "shelf": "cabinet"}
    met = set()
    for id in fine.ids():
        labels, groups = fine.load(id).semantic, coarse.load(id).semantic
        assert np.array_equal(labels == 0, groups == 0)
        for label in np.unique(labels[labels > 0]):
            name = CLASSES[label]
            name = joined.get(name, name)
            expected = name if name in coarse.classes else "object"
            assert [coarse.classes[group - 1] for group in np.unique(groups[labels == label])] == [expected]
            met.add(expected)
    assert len(met) > 5
    assert coarse.fingerprint() != fine.fingerprint()
    with pytest.raises(RecipeError, match="'coarse', accepted for labels of detection is 'all'"):
        rooms("val", "detection", classes="coarse")
    with pytest.raises(RecipeError, match="classes"):
        rooms("val", "segmentation", classes="few")
