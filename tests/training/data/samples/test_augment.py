"""Augmentations: how often they come, and what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from geo_pretrain.training.data.samples.augment import augment_colors
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.recipe import AugmentSpec

NO_AUGMENT = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)

PICTURE = (np.random.default_rng(0).random((24, 32, 3)) * 255).astype(np.uint8)


def rates(spec, test, count=400):
    hits = 0
    for k in range(count):
        hits += bool(test(augment_colors(PICTURE, spec, torch.Generator().manual_seed(sample_seed(0, 0, k)))))
    return hits / count


def is_gray(image):
    return torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])


def is_changed(image):
    return not torch.equal((image * 255).round().byte(), torch.from_numpy(PICTURE).permute(2, 0, 1))


def test_augmentations_come_as_often_as_they_should():
    only = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
    assert rates(AugmentSpec(**only), is_changed, 20) == 0
    assert rates(AugmentSpec(**only | {"grayscale_prob": 0.2}), is_gray) == pytest.approx(0.2, abs=0.07)
    assert rates(AugmentSpec(**only | {"jitter_prob": 0.8}), is_changed) == pytest.approx(0.8, abs=0.07)
    assert rates(AugmentSpec(**only | {"blur_prob": 0.5}), is_changed) == pytest.approx(0.5, abs=0.08)
    assert AugmentSpec() == AugmentSpec((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, (0.1, 2.0))


def test_blur_is_pillows_gaussian():
    spec = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=1, blur_radius=(1.5, 1.5))
    want = np.array(Image.fromarray(PICTURE).filter(ImageFilter.GaussianBlur(1.5)))
    got = augment_colors(PICTURE, spec, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal((got * 255).round().byte().permute(1, 2, 0).numpy(), want)


def test_images_stay_in_range():
    for k in range(30):
        image = augment_colors(PICTURE, AugmentSpec(), torch.Generator().manual_seed(k))
        assert image.shape == (3, 24, 32)
        assert 0 <= image.min() <= image.max() <= 1
