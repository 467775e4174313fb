"""Two views of an image: crops are torchvision's, index maps Pillow's nearest resizing, matches a slow twin's."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples import two_views
from geo_pretrain.training.data.samples.augment import Crop, crop_resize
from geo_pretrain.training.data.samples.two_views import (
    TwoViewSamples,
    ViewConfig,
    common_pixels,
    index_map,
    random_crop,
)
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.recipe import AugmentSpec, DataSpec

PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)
CROPS = (Crop(0, 0, 30, 40), Crop(3, 5, 11, 17), Crop(20, 1, 10, 39, flip=True), Crop(7, 30, 1, 2, flip=True))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def numbered(size):
    """An image in which every pixel holds its flat index."""
    return np.arange(size[0] * size[1], dtype=np.int32).reshape(size)


def source_of(crop, size):
    """The flat pixel of the image that each pixel of a view shows, as Pillow resizes: int [H, W]."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    view = Image.fromarray(numbered(size), mode="I").crop(box).resize(size[::-1], Image.Resampling.NEAREST)
    return np.array(view)[:, ::-1] if crop.flip else np.array(view)


@pytest.mark.parametrize("crop", CROPS)
def test_index_map_is_pillows_nearest_resizing_of_the_crop(crop):
    rows, columns = index_map(crop, (30, 40))
    np.testing.assert_array_equal((rows[:, None] * 40 + columns).numpy(), source_of(crop, (30, 40)))


@pytest.mark.parametrize("crop", CROPS[:3])
def test_view_is_torchvisions_resized_crop(crop):
    color = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    want = tvf.resized_crop(
        Image.fromarray(color), crop.top, crop.left, crop.height, crop.width, [30, 40], InterpolationMode.BILINEAR
    )
    want = tvf.horizontal_flip(want) if crop.flip else want
    np.testing.assert_array_equal(crop_resize(color, crop, (30, 40)), np.array(want))


def slow_common(source1, source2):
    """Every (pixel of view 1, pixel of view 2) that show one pixel of the image, by that pixel."""
    found = {}
    for i, first in enumerate(source1.ravel().tolist()):
        for j, second in enumerate(source2.ravel().tolist()):
            if first == second:
                found.setdefault(first, []).append((i, j))
    return found


SMALL = (
    (Crop(0, 0, 6, 8), Crop(2, 1, 3, 5)),
    (Crop(1, 2, 5, 4, True), Crop(3, 0, 3, 5)),
    (Crop(1, 2, 3, 5, True),) * 2,
)


@pytest.mark.parametrize("crops", SMALL)
def test_matches_are_pixels_of_one_pixel_drawn_uniformly(crops):
    size = (6, 8)
    sources = [source_of(crop, size) for crop in crops]
    common = slow_common(*sources)
    allowed = {match: origin for origin, matches in common.items() for match in matches}
    maps = [index_map(crop, size) for crop in crops]
    every, some, runs = Counter(), Counter(), 400
    for seed in range(runs):
        matches = [tuple(match) for match in common_pixels(*maps, 1000, seeded(seed)).tolist()]
        assert sorted(allowed[match] for match in matches) == sorted(common)  # each common pixel once
        every.update(matches)
        few = [allowed[tuple(match)] for match in common_pixels(*maps, 3, seeded(seed)).tolist()]
        assert len(set(few)) == 3
        some.update(few)
    for match, origin in allowed.items():
        share = runs / len(common[origin])
        assert abs(every[match] - share) < 6 * share**0.5
    for origin in common:
        share = 3 * runs / len(common)
        assert abs(some[origin] - share) < 6 * share**0.5


def test_views_that_share_nothing_have_no_match():
    apart = [index_map(Crop(0, left, 6, 3), (6, 8)) for left in (0, 3)]
    assert common_pixels(*apart, 10, seeded(0)).shape == (0, 2)
    corner = [index_map(Crop(0, 0, 3, 8), (6, 8)), index_map(Crop(3, 0, 3, 8), (6, 8))]
    assert common_pixels(*corner, 10, seeded(0)).shape == (0, 2)


def test_views_of_other_sizes_are_numbered_by_their_own_width():
    map1, map2 = index_map(Crop(0, 0, 6, 8), (6, 8)), index_map(Crop(0, 0, 6, 8), (12, 16))
    for first, second in common_pixels(map1, map2, 100, seeded(0)).tolist():
        assert (first // 8, first % 8) == (second // 16 // 2, second % 16 // 2)


def test_crops_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.zeros(3, 60, 80)
    want = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in _params(theirs, image, 4000)])
    crops = [random_crop((60, 80), ViewConfig(), seeded(seed)) for seed in range(4000)]
    got = np.array([[c.top, c.left, c.height, c.width] for c in crops])
    for moment in (np.mean, np.std):
        np.testing.assert_allclose(moment(got, axis=0), moment(want, axis=0), rtol=0.06)
    np.testing.assert_allclose(np.corrcoef(got.T), np.corrcoef(want.T), atol=0.06)
    assert (got[:, 0] + got[:, 2] <= 60).all()
    assert (got[:, 1] + got[:, 3] <= 80).all()
    assert abs(np.mean([crop.flip for crop in crops]) - 0.5) < 0.03


def _params(transform, image, count):
    return [transform.make_params([image]) for _ in range(count)]


@pytest.mark.parametrize(
    "size, ratio, want",
    [((20, 200), (3 / 4, 4 / 3), (0, 86, 20, 27)), ((200, 20), (3 / 4, 4 / 3), (86, 0, 27, 20))],
)
def test_box_that_never_fits_becomes_the_largest_in_the_middle(size, ratio, want):
    crop = random_crop(size, ViewConfig(scale=(1.0, 1.0), ratio=ratio), seeded(0))
    assert (crop.top, crop.left, crop.height, crop.width) == want


@pytest.fixture
def make(recording):
    def make(augment=PLAIN, matches=200, **views):
        spec = DataSpec(source="seven_scenes", size=(60, 80), units="frames", augment=augment)
        source = SevenScenes(recording)
        pairs = find_pairs(source, spec, skips=SkippedFrames())
        return TwoViewSamples(source, pairs, spec, 0, ImageContract(), views=ViewConfig(**views), matches=matches)

    return make


def test_matched_pixels_have_the_color_of_the_pixel_they_show(make):
    samples = make(scale=(0.4, 1.0))
    contract = ImageContract()
    errors = []
    for number in range(len(samples)):
        sample = samples[(0, number)]
        frame = resize_frame(samples.source.load(samples.pairs[number].scene, samples.pairs[number].frame1), (60, 80))
        original = contract.transforms(resize=False)(frame.color).flatten(1)
        for view in (1, 2):
            pixel = sample["matches"][:, view - 1]
            origin = sample[f"rows{view}"][pixel // 80] * 80 + sample[f"columns{view}"][pixel % 80]
            shown = sample[f"image{view}"].flatten(1)[:, pixel]
            errors.append((shown - original[:, origin]).abs().mean().item())
            elsewhere = (shown - original[:, origin.flip(0)]).abs().mean().item()
            assert errors[-1] < 0.5 * elsewhere
    assert np.mean(errors) < 0.15


def test_matches_of_a_sample_show_one_pixel_and_none_twice(make):
    samples = make(matches=5000)
    for number in range(len(samples)):
        sample = samples[(3, number)]
        origins = [
            sample[f"rows{view}"][pixel // 80] * 80 + sample[f"columns{view}"][pixel % 80]
            for view, pixel in ((1, sample["matches"][:, 0]), (2, sample["matches"][:, 1]))
        ]
        assert torch.equal(*origins)
        assert len(origins[0].unique()) == len(origins[0])
        assert 0 < len(origins[0]) < 4800


def test_sample_is_a_function_of_its_key(make):
    samples = make(augment=AugmentSpec())

    def equal(a, b):
        return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = samples[(0, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert equal(first, samples[(0, 2)])
    other = samples[(1, 2)]
    assert not torch.equal(first["image1"], other["image1"])
    assert not torch.equal(first["image1"], first["image2"])
    assert first["seed"] != other["seed"]
    reseeded = TwoViewSamples(
        samples.source, samples.pairs, samples.spec, 1, ImageContract(), views=ViewConfig(), matches=200
    )
    assert not torch.equal(first["image1"], reseeded[(0, 2)]["image1"])


def test_both_views_get_colors_of_their_own(make):
    samples = make(augment=AugmentSpec(jitter_prob=1), scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip_prob=0.0)
    sample = samples[(0, 0)]
    assert sample["rows1"].tolist() == sample["rows2"].tolist() == list(range(60))
    assert not torch.equal(sample["image1"], sample["image2"])
    plain = make(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip_prob=0.0)[(0, 0)]
    assert torch.equal(plain["image1"], plain["image2"])
    mirrored = make(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip_prob=1.0)[(0, 0)]
    assert torch.equal(plain["image1"], mirrored["image1"].flip(2))
    assert plain["columns1"].tolist() == list(range(80))


def test_views_without_a_common_pixel_are_drawn_again(make, monkeypatch):
    samples = make(scale=(0.05, 0.05))
    assert all(len(samples[(0, k)]["matches"]) for k in range(len(samples)))
    monkeypatch.setattr(two_views, "VIEW_ATTEMPTS", 1)
    assert 0 in [len(samples[(epoch, k)]["matches"]) for epoch in range(5) for k in range(len(samples))]


def test_batch_numbers_its_matches_through(make):
    samples = make(matches=7)
    parts = [samples[(0, k)] for k in range(3)]
    parts[1]["matches"] = parts[1]["matches"][:0]
    batch = TwoViewSamples.collate(parts)
    assert batch["matches_per_image"] == [7, 0, 7]
    assert batch["image1"].shape == (3, 3, 60, 80)
    assert batch["rows1"].shape == (3, 60)
    assert torch.equal(batch["matches"], torch.cat([parts[0]["matches"], parts[2]["matches"] + 2 * 4800]))
    assert len(batch["seed"]) == 3
    assert batch["skipped"] == []


@pytest.mark.parametrize(
    "wrong", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 1.1)}, {"scale": (0.6, 0.5)}, {"ratio": (2, 1)}]
)
def test_impossible_ranges_are_named(wrong):
    with pytest.raises(RecipeError, match=f"'{next(iter(wrong))}' is"):
        ViewConfig(**wrong)


def test_area_and_aspect_stay_in_their_ranges():
    for seed in range(300):
        crop = random_crop((240, 320), ViewConfig(), seeded(seed))
        assert 0.19 < crop.height * crop.width / (240 * 320) <= 1
        assert math.log(3 / 4) - 0.03 < math.log(crop.width / crop.height) < math.log(4 / 3) + 0.03


def test_ratio_is_width_over_height():
    for seed in range(50):
        crop = random_crop((240, 320), ViewConfig(scale=(0.1, 0.2), ratio=(1.8, 2.2)), seeded(seed))
        assert 1.75 < crop.width / crop.height < 2.25
