"""Single objects of rooms: points lie on the part that they are labelled with; categories are known before."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.rooms.scene import CLASSES, QUADRIC
from geo_pretrain.rooms.single import PARTS, make_object, object_points
from geo_pretrain.training.data.labelled.registry import open_labelled

FEW = {"objects": 30, "val_objects": 3, "object_points": 64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path))


def objects(task, split="train", **options):
    return open_labelled("rooms3d", None, split, task=task, options=FEW | options)


def outside(part, points):
    """How far (m, about) points are outside of a solid; below 0 inside, 0 on its surface: from its definition."""
    unit = (points - part.center) @ part.rotation / part.half
    taper = [(1 + t) / 2 + unit[:, 2] * (t - 1) / 2 for t in part.taper]
    cap = (np.abs(unit[:, 2]) - 1) * part.half[2]
    if part.kind == QUADRIC and part.sphere:
        return (np.linalg.norm(unit, axis=1) - 1) * part.half.min()
    if part.kind == QUADRIC:
        return np.maximum((np.hypot(unit[:, 0], unit[:, 1]) - taper[0]) * part.half[:2].min(), cap)
    sides = [(np.abs(unit[:, k]) - taper[k]) * part.half[k] for k in (0, 1)]
    return np.maximum.reduce([*sides, cap])


@pytest.mark.parametrize("category", sorted(PARTS))
def test_points_lie_on_the_part_that_they_name_and_in_no_other(category):
    built = set()
    for seed in range(6):
        rng = np.random.default_rng([7, seed])
        thing = make_object(category, rng)
        assert thing.label == category
        found = object_points(thing, rng, 200)
        assert (found.points.shape, found.colors.shape, found.parts.shape) == ((200, 3), (200, 3), (200,))
        distance = np.stack([outside(part, found.points.astype(np.float64)) for part in thing.parts])
        assert distance.min(0) == pytest.approx(0, abs=3e-3)
        named = np.array([PARTS[category].index(part.name) for part in thing.parts])
        on = [np.abs(distance[named == k]).min(0) < 1e-4 for k in sorted(set(named))]
        assert np.stack(on)[np.searchsorted(sorted(set(named)), found.parts), np.arange(200)].all()
        built |= {part.name for part in thing.parts}
    assert built <= set(PARTS[category])
    assert category in CLASSES


def test_parts_of_all_categories_are_built():
    built = {c: set() for c in PARTS}
    for category, names in built.items():
        for seed in range(30):
            names |= {part.name for part in make_object(category, np.random.default_rng([3, seed])).parts}
    assert built == {category: set(names) for category, names in PARTS.items()}
    with pytest.raises(UnknownName, match=r"Unknown category 'chiar'. Closest: 'chair'"):
        make_object("chiar", np.random.default_rng(0))


def test_tasks_name_categories_and_parts():
    whole, parts = objects("classification3d"), objects("parts3d")
    assert whole.classes == tuple(sorted(PARTS))
    assert parts.classes == tuple(f"{c}/{part}" for c in sorted(PARTS) for part in PARTS[c])
    assert whole.ids() == parts.ids() == [f"rooms_train_object_{k:05d}" for k in range(30)]
    for id in whole.ids()[:6]:
        cloud, same = whole.load(id), parts.load(id)
        assert cloud.labels is None
        assert cloud.category == same.category == whole.category_of(id)
        names = {parts.classes[k - 1].split("/")[0] for k in same.labels}
        assert names == {whole.classes[cloud.category - 1]}
        np.testing.assert_array_equal(cloud.points, same.points)
        assert len(cloud) == 64
    assert whole.fingerprint() != parts.fingerprint()


def test_categories_are_unequally_frequent_but_all_there_and_do_not_depend_on_the_number():
    counts = np.zeros(11, int)
    source = objects("classification3d", objects=48, object_points=1)
    for id in source.ids():
        counts[source.category_of(id) - 1] += 1
    assert dict(zip(source.classes, counts.tolist(), strict=True)) == {
        "bed": 2, "cabinet": 6, "chair": 10, "desk": 2, "lamp": 4, "plant": 2, "shelf": 4, "sofa": 6, "stool": 2,
        "table": 8, "tv": 2,
    }  # fmt: skip
    few = objects("classification3d", objects=3, object_points=1)
    assert [few.category_of(id) for id in few.ids()] == [source.category_of(id) for id in few.ids()]
    val = objects("classification3d", "val")
    assert not set(val.ids()) & set(source.ids())
    with pytest.raises(UnknownName, match="Unknown object 'rooms_train_object_00003'"):
        few.load("rooms_train_object_00003")
    with pytest.raises(RecipeError, match=r"data.options.objects' is 0"):
        objects("parts3d", objects=0)
