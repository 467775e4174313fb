"""Opening by name, and subsets: whole scenes, nested, as near to the share as can be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.catalog.license import check_license
from geo_pretrain.errors import DataError, RecipeError, UnknownName
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.data.labelled.registry import (
    DATA_SETS,
    data_terms,
    list_labelled,
    open_labelled,
    subset,
)


class Fake:
    """Images of scenes of given sizes."""

    name, split, classes = "fake", "train", ("wall",)

    def __init__(self, sizes):
        self.sizes = sizes

    def ids(self):
        return [
            f"{scene}/{k}"
            for k in range(max(self.sizes.values(), default=0))
            for scene in self.sizes
            if k < self.sizes[scene]
        ]

    def scene_of(self, id):
        return id.split("/")[0]

    def load(self, id):
        return LabelledImage(id, np.zeros((1, 1, 3), np.uint8), None, None)

    def fingerprint(self):
        return "f"


def fake(seed=0, scenes=40):
    rng = np.random.default_rng(seed)
    return Fake({f"s{k}": int(n) for k, n in enumerate(rng.integers(1, 30, scenes))})


def scenes_of(source):
    return {source.scene_of(id) for id in source.ids()}


def test_every_source_is_listed_with_its_tasks():
    assert list_labelled() == sorted(DATA_SETS)
    assert {"ade20k", "cityscapes", "coco", "kitti", "nyuv2", "rooms", "rooms3d", "scannet", "sunrgbd"} <= set(
        DATA_SETS
    )
    assert list_labelled("detection") == ["coco", "folder", "nyuv2", "rooms", "scannet"]
    assert list_labelled("segmentation") == [
        "ade20k",
        "cityscapes",
        "folder",
        "kitti",
        "nyuv2",
        "rooms",
        "scannet",
        "sunrgbd",
    ]


def test_every_source_has_terms_and_the_docs_say_the_same():
    table = (Path(__file__).parents[4] / "docs" / "labelled_data.md").read_text()
    for source in list_labelled():
        license, terms = data_terms(source)
        check_license(license)
        assert f"| `{source}` | {license} | {terms} |" in table
    assert data_terms("kitti")[0] == "CC-BY-NC-SA-3.0"
    assert data_terms("coco")[0] == "CC-BY-4.0"
    assert data_terms("rooms")[0] == "MIT"
    assert data_terms("scannet")[0] == "LicenseRef-ScanNet-ToU"
    assert data_terms("my images")[0] == "LicenseRef-data-owner"


@pytest.mark.parametrize("source", list_labelled())
def test_every_source_opens_only_with_what_it_needs(source, tmp_path):
    task = DATA_SETS[source].tasks[0]
    if DATA_SETS[source].embedded is not None:
        with pytest.raises(RecipeError, match="takes no path"):
            open_labelled(source, tmp_path, "train", task=task)
        return
    with pytest.raises(RecipeError, match=f"Source '{source}' needs a folder: {source}:PATH"):
        open_labelled(source, None, "train", task=task)
    with pytest.raises(DataError, match=f"No folder '{tmp_path}/none.*Expected layout: "):
        open_labelled(source, tmp_path / "none", "train", task=task)
    with pytest.raises(DataError):
        open_labelled(source, tmp_path, "train", task=task)
    with pytest.raises(RecipeError, match=r"data.options"):
        open_labelled(source, tmp_path, "train", task=task, options={"nonsense": 1})


def test_unknown_names_and_tasks_are_named(tmp_path):
    with pytest.raises(UnknownName, match=r"Unknown labelled data set 'nyu2'. Closest: 'nyuv2'"):
        open_labelled("nyu2", tmp_path, "train", task="segmentation")
    with pytest.raises(
        RecipeError, match=r"'kitti' has no labels for task 'detection', only for segmentation. .*: coco, "
    ):
        open_labelled("kitti", tmp_path, "train", task="detection")
    with pytest.raises(
        RecipeError, match="'rooms' has no labels for task 'depth', only for segmentation and detection"
    ):
        open_labelled("rooms", None, "train", task="depth")


@pytest.mark.parametrize("seed", range(3))
def test_a_subset_has_whole_scenes_and_the_nearest_share_of_its_order(seed):
    source = fake(seed, 12)
    total = len(source.ids())
    # The order of scenes, from subsets alone: they grow one scene at a time as the fraction does.
    order, grown = [], set()
    for step in range(1, 401):
        now = scenes_of(subset(source, step / 400, seed))
        assert grown <= now
        assert len(now) <= len(grown) + 1
        order += now - grown
        grown = now
    assert grown == set(source.sizes)
    counts = [sum(source.sizes[scene] for scene in order[: k + 1]) for k in range(len(order))]
    for fraction in (0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.97):
        part = subset(source, fraction, seed)
        kept = scenes_of(part)
        assert part.ids() == [id for id in source.ids() if source.scene_of(id) in kept]
        assert part.share == len(part.ids()) / total
        assert abs(len(part.ids()) - fraction * total) == min(abs(count - fraction * total) for count in counts)


def test_seeds_choose_other_scenes_and_the_same_seed_the_same():
    source = fake()
    chosen = [frozenset(scenes_of(subset(source, 0.3, seed))) for seed in range(8)]
    assert len(set(chosen)) == 8
    assert chosen[3] == scenes_of(subset(fake(), 0.3, 3))
    assert chosen[0] == scenes_of(subset(source, 0.3))
    often = [sum(scene in part for part in chosen) for scene in source.sizes]
    assert max(often) < 8


def test_scenes_that_are_not_there_do_not_change_the_order_of_others():
    source = fake()
    few = Fake({scene: source.sizes[scene] for scene in list(source.sizes)[::2]})
    order = [scenes_of(subset(s, f, 1)) for s, f in ((source, 0.5), (few, 0.2))]
    first = scenes_of(subset(few, 0.001, 1))
    assert len(first) == 1
    assert first <= order[1]
    assert order[1] <= order[0]


def test_all_and_at_least_one():
    source = fake()
    assert subset(source, 1).ids() == source.ids()
    assert subset(source, 1.0).share == 1
    assert len(scenes_of(subset(source, 1e-9))) == 1


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(RecipeError, match="accepted: above 0 and up to 1"):
        subset(fake(), fraction)


def test_ties_take_fewer_images():
    source = Fake({"a": 2, "b": 2, "c": 2})
    assert len(subset(source, 0.5).ids()) == 2


def test_official_scenes_are_taken_as_they_are():
    source = fake()
    part = subset(source, 0.2, scenes=["s5", "s1"])
    assert scenes_of(part) == {"s1", "s5"}
    assert part.share == (source.sizes["s1"] + source.sizes["s5"]) / sum(source.sizes.values())
    with pytest.raises(DataError, match="lacks: s77, s78; it has 40"):
        subset(source, 0.2, scenes=["s5", "s78", "s77"])
    with pytest.raises(DataError, match="lacks: an empty list"):
        subset(source, 0.2, scenes=[])
    with pytest.raises(DataError, match=r"lacks: t0, t1, t2, t3, t4 and 4 more"):
        subset(source, 0.2, scenes=[f"t{k}" for k in range(9)])


def test_official_scenes_may_be_empty_when_the_source_knows_them():
    source = fake()
    source.scenes = lambda: [*source.sizes, "bare"]
    assert scenes_of(subset(source, 0.2, scenes=["s5", "bare"])) == {"s5"}


def test_a_subset_is_a_source():
    source = fake()
    part, other = subset(source, 0.2, 1), subset(source, 0.2, 2)
    assert (part.name, part.split, part.classes) == ("fake", "train", ("wall",))
    id = part.ids()[0]
    assert part.load(id).id == id
    assert part.scene_of(id) == source.scene_of(id)
    assert part.file_name(id) == f"{id}.png"
    assert len({source.fingerprint(), part.fingerprint(), other.fingerprint()}) == 3
    in_order = "\n".join(["f", *sorted(scenes_of(part))])  # sets have another order in every process
    assert part.fingerprint() == hashlib.sha256(in_order.encode()).hexdigest()
    assert scenes_of(subset(part, 0.5)) < scenes_of(part)


def test_a_share_of_objects_is_taken_in_each_category():
    """Loops over the categories; one of them has a single object, which every share holds."""
    sizes = {1: 40, 2: 10, 3: 1}
    source = Fake({f"{category}-{k}": 1 for category, count in sizes.items() for k in range(count)})
    plain = {fraction: subset(source, fraction) for fraction in (0.05, 0.2, 1.0)}
    source.category_of = lambda id: int(id.split("-")[0])
    for fraction in plain:
        part = subset(source, fraction)
        for category, count in sizes.items():
            taken = [id for id in part.ids() if source.category_of(id) == category]
            order = sorted(
                (f"{category}-{k}" for k in range(count)),
                key=lambda scene: hashlib.sha256(f"0\n{scene}".encode()).digest(),
            )
            assert {source.scene_of(id) for id in taken} == set(order[: max(1, round(fraction * count))])
            assert all(part.category_of(id) == category for id in taken)
    assert not hasattr(plain[0.2], "category_of")


def test_nothing_to_choose_from_is_an_error():
    with pytest.raises(DataError, match="Source 'fake' has no image in split 'train'"):
        subset(Fake({}), 0.5)
