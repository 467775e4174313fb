"""Samples depend on (seed, epoch, index) alone; the augmentation is Pri3D's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.augment import augment_colors
from geo_pretrain.training.data.samples.pairs import PairSamples
from geo_pretrain.training.data.samples.sampler import collate, sample_seed, total_steps
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.recipe import AugmentSpec, DataSpec
from tests.training.conftest import write_recording

NO_AUGMENT = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)


@pytest.fixture
def samples(recording):
    spec = DataSpec(source="seven_scenes", size=(60, 80), overlap=(0.2, 1.0))
    source = SevenScenes(recording)
    return PairSamples(source, find_pairs(source, spec, skips=SkippedFrames()), spec, ImageContract(), seed=0)


def equal(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_sample_is_a_function_of_its_key(samples):
    torch.manual_seed(1)
    first = samples[(0, 2)]
    torch.manual_seed(2)
    assert equal(first, samples[(0, 2)])
    assert not torch.equal(first["image1"], samples[(1, 2)]["image1"])
    assert torch.equal(first["depth1"], samples[(1, 2)]["depth1"])
    assert first["seed"] != samples[(1, 2)]["seed"]


def test_drawing_a_sample_leaves_the_global_generators_alone(samples):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    samples[(0, 0)]
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_batch_has_the_shapes_that_tasks_expect(samples):
    batch = collate([samples[(0, k)] for k in range(3)])
    assert {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)} == {
        f"{name}{k}": (3, *shape)
        for k in (1, 2)
        for name, shape in {
            "image": (3, 60, 80), "depth": (60, 80), "intrinsics": (3, 3), "cam_to_world": (4, 4),
        }.items()
    }  # fmt: skip
    assert len(batch["seed"]) == 3
    assert batch["skipped"] == []


def test_without_augmentation_the_image_is_the_normalized_frame(samples, recording):
    plain = PairSamples(
        samples.source, samples.pairs, DataSpec(size=(120, 160), augment=NO_AUGMENT), ImageContract(), 0
    )
    pair = samples.pairs[0]
    image = plain[(0, 0)]["image1"]
    color = np.array(Image.open(recording / f"frame-{pair.frame1}.color.png")) / 255
    want = (color - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), want, atol=1e-5)


def test_all_data_gone_is_an_error(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    spec = DataSpec(source="seven_scenes", size=(60, 80), overlap=(0.2, 1.0))
    source = SevenScenes(folder)
    samples = PairSamples(source, find_pairs(source, spec, skips=SkippedFrames()), spec, ImageContract(), seed=0)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="16 pairs in a row"):
        samples[(0, 0)]


def test_frame_that_loses_its_last_depth_at_the_working_size_is_replaced(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    spec = DataSpec(source="seven_scenes", size=(60, 80), overlap=(0.2, 1.0))
    pairs = find_pairs(SevenScenes(folder), spec, skips=SkippedFrames())
    path = folder / f"frame-{pairs[0].frame1}.depth.png"
    depth = np.zeros((120, 160), np.uint16)
    depth[0, 0] = 1000  # the working size keeps odd rows and columns
    Image.fromarray(depth).save(path)
    sample = PairSamples(SevenScenes(folder), pairs, spec, ImageContract(), seed=0)[(0, 0)]
    assert sample["skipped"][0] == (f"kitchen/{pairs[0].frame1}", "no pixel has a valid depth at 60x80")
    assert sample["depth1"].any()


PICTURE = (np.random.default_rng(0).random((24, 32, 3)) * 255).astype(np.uint8)


def rates(spec, test, count=400):
    hits = 0
    for k in range(count):
        hits += bool(test(augment_colors(PICTURE, spec, torch.Generator().manual_seed(sample_seed(0, 0, k)))))
    return hits / count


def is_grey(image):
    return torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])


def is_changed(image):
    return not torch.equal((image * 255).round().byte(), torch.from_numpy(PICTURE).permute(2, 0, 1))


def test_augmentations_come_as_often_as_they_should():
    only = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
    assert rates(AugmentSpec(**only), is_changed, 20) == 0
    assert rates(AugmentSpec(**only | {"grayscale_prob": 0.2}), is_grey) == pytest.approx(0.2, abs=0.07)
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


def test_seeds_of_neighbors_differ():
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(20) for i in range(-1, 50)}
    assert len(seeds) == 4 * 20 * 51
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_length_of_a_run():
    assert total_steps(840_000, 64, 5, None) == 65625  # methods.md 5.1: about 65.6k
    assert total_steps(10, 64, 1, None) == 1
    assert total_steps(10, 64, None, 7) == 7
