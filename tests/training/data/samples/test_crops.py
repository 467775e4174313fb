"""Crops about a point that two frames see, and pairs that are drawn from scenes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, RecipeError
from geo_pretrain.training.data.frame import Pair
from geo_pretrain.training.data.samples.crops import crop_centers, crop_frame, crop_pair
from geo_pretrain.training.data.samples.pairs import PairSamples, SetPairSamples
from geo_pretrain.training.data.samples.single_images import CropSamples, TwoColorViews
from geo_pretrain.training.recipe import AugmentSpec, DataSpec
from tests.recording_layouts import golden_frames

PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)


@pytest.fixture(scope="module")
def frames():
    return golden_frames(3, (48, 64))


class Given:
    """A source of given frames, which may state where pairs see the same points."""

    name = "given"

    def __init__(self, frames):
        self.frames = frames

    def load(self, scene, frame_id):
        return self.frames[int(frame_id)]


class Stated(Given):
    def common_points(self, scene, frame1, frame2):
        return np.array([[0.4, 63.0, 47.0, 1.0]])


def seed(value):
    return torch.Generator().manual_seed(value)


def points(frame):
    """The world's points of a frame's pixels, [H, W, 3]."""
    rows, columns = np.indices(frame.depth.shape)
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(frame.intrinsics).T
    return (rays * frame.depth[..., None]) @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]


def test_a_crop_shows_the_same_points(frames):
    crop = crop_frame(frames[0], 7, 21, (20, 30))
    assert crop.color.shape == (20, 30, 3)
    np.testing.assert_array_equal(crop.color, frames[0].color[7:27, 21:51])
    np.testing.assert_allclose(points(crop), points(frames[0])[7:27, 21:51], atol=1e-9)


def test_crops_are_cut_about_a_point_that_both_frames_see(frames):
    size, pair = (20, 30), Pair("", "0", "2", 1.0)
    centers = crop_centers(Given(frames), pair, frames[0], frames[2], size)
    for number in (0, 2):  # whole crops fit
        rows, columns = centers[:, number].astype(int), centers[:, number + 1].astype(int)
        assert rows.min() >= 10
        assert rows.max() <= 48 - 10
        assert columns.min() >= 15
        assert columns.max() <= 64 - 15
    first, second = centers[:, :2].astype(int), centers[:, 2:].astype(int)
    gaps = points(frames[0])[tuple(first.T)] - points(frames[2])[tuple(second.T)]
    assert np.median(np.linalg.norm(gaps, axis=1)) < 0.1
    one, two = crop_pair(frames[0], frames[2], size, centers, seed(1))
    other, _ = crop_pair(frames[0], frames[2], size, centers, seed(2))
    assert np.linalg.norm(points(one)[10, 15] - points(two)[10, 15]) < 0.5  # the point is in the middle of both
    assert (other.color != one.color).any()
    apart = frames[1].cam_to_world.copy()
    apart[:3, 3] += 100
    away = SimpleNamespace(**{**vars(frames[1]), "cam_to_world": apart})
    with pytest.raises(BadFrame, match="/0 and 1: no point is seen by both"):
        crop_centers(Given(frames), Pair("", "0", "1", 1.0), frames[0], away, size)


def test_points_that_a_source_states_are_used_and_crops_moved_inside(frames):
    centers = crop_centers(Stated(frames), Pair("", "0", "1", 1.0), frames[0], frames[1], (20, 30))
    one, two = crop_pair(frames[0], frames[1], (20, 30), centers, seed(0))
    np.testing.assert_array_equal(one.color, frames[0].color[:20, -30:])
    np.testing.assert_array_equal(two.color, frames[1].color[-20:, :30])
    with pytest.raises(BadFrame, match="is 64x48, smaller than crops of 30x60"):
        crop_pair(frames[0], frames[1], (60, 30), centers, seed(0))


def samples(frames, pairs, cls=PairSamples, source=Given, **options):
    spec = DataSpec(size=(20, 30), augment=PLAIN, **options)
    return cls(source(frames), pairs, spec, 0, ImageContract(size=(20, 30)))


def test_samples_are_cropped_where_the_recipe_says_so(frames):
    made = samples(frames, [Pair("", "0", "1", 1.0)], source=Stated, crop="match")
    sample = made[(0, 0)]
    np.testing.assert_array_equal(sample["depth1"], frames[0].depth[:20, -30:])
    assert sample["intrinsics2"][1, 2] == pytest.approx(frames[1].intrinsics[1, 2] - 28)
    whole = samples(frames, [Pair("", "0", "1", 1.0)], source=Stated)[(0, 0)]
    assert whole["depth1"].shape == sample["depth1"].shape
    assert (whole["depth1"] != sample["depth1"]).any()


def test_each_epoch_draws_as_many_pairs_of_each_scene(frames):
    pairs = [Pair("a", "0", str(k % 3), 1.0) for k in range(5)] + [Pair("b", "2", "2", 1.0)]
    made = samples(frames, pairs, draws_per_scene=40)
    assert len(made) == 80
    assert len(samples(frames, pairs)) == 6
    drawn = {}
    made.source.load = lambda scene, id: drawn.setdefault(key, []).append((scene, id)) or frames[0]
    for epoch in (0, 1):
        for index in range(80):
            key = (epoch, index)
            made[key]
    scenes = Counter(found[0][0] for found in drawn.values())
    assert scenes == {"a": 80, "b": 80}  # however many pairs they have
    assert {found[0] for (_, index), found in drawn.items() if index < 40} == {("a", "0")}
    second = [drawn[(epoch, index)][-1] for epoch in (0, 1) for index in range(40)]
    counts = Counter(second)  # two of a's five pairs each with frames 0 and 1, one with 2
    assert counts[("a", "2")] < counts[("a", "0")]
    assert counts[("a", "2")] < counts[("a", "1")]
    assert second[:40] != second[40:]
    before, key = drawn[(1, 3)].copy(), (1, 3)
    drawn.clear()
    made[key]
    assert drawn[key] == before  # a pure function of the key


def test_samples_that_do_not_follow_them_refuse_settings_of_pairs(frames):
    pairs = [Pair("", "0", "1", 1.0)]
    contract = ImageContract(size=(20, 30))
    for options, text in (
        ({"crop": "match"}, "'data.crop' is 'match'"),
        ({"draws_per_scene": 3}, "draws_per_scene' is 3"),
    ):
        spec = DataSpec(size=(20, 30), **options)
        with pytest.raises(RecipeError, match=text):
            CropSamples(Given(frames), pairs, spec, 0, contract, scale=(0.2, 1.0), flip_prob=0.5)
        with pytest.raises(RecipeError, match=text):
            TwoColorViews(Given(frames), pairs, spec, 0, contract, blur_taps=None)
    with pytest.raises(RecipeError, match=r"'data\.crop' is 'match', which geometric sets"):
        SetPairSamples(Given(frames), pairs, DataSpec(crop="match"), 0, contract, None)
