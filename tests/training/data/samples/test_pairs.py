"""Samples of pairs: functions of their key alone, with the set of every pixel on demand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.pairs import PairSamples, SetPairSamples
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.data.surfaces.sets import Sets, pixel_sets
from geo_pretrain.training.recipe import AugmentSpec, DataSpec
from tests.training.conftest import write_recording

NO_AUGMENT = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)


@pytest.fixture
def samples(recording):
    spec = DataSpec(source="seven_scenes", size=(60, 80), overlap=(0.2, 1.0))
    source = SevenScenes(recording)
    return PairSamples(source, find_pairs(source, spec, skips=SkippedFrames()), spec, 0, ImageContract())


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
    batch = samples.collate([samples[(0, k)] for k in range(3)])
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
        samples.source, samples.pairs, DataSpec(size=(120, 160), augment=NO_AUGMENT), 0, ImageContract()
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
    samples = PairSamples(source, find_pairs(source, spec, skips=SkippedFrames()), spec, 0, ImageContract())
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
    sample = PairSamples(SevenScenes(folder), pairs, spec, 0, ImageContract())[(0, 0)]
    assert sample["skipped"][0] == (f"kitchen/{pairs[0].frame1}", "no pixel has a valid depth at 60x80")
    assert sample["depth1"].any()


@pytest.fixture(scope="module")
def rooms():
    return Rooms(RoomsConfig(scenes=1, frames=5, width=96, height=64))


@pytest.fixture(scope="module")
def spec():
    return DataSpec(source="rooms", size=(48, 64), overlap=(0.2, 1.0))


def test_samples_are_those_of_pairs_with_the_sets_of_every_pixel(rooms, spec, tmp_path):
    pairs = find_pairs(rooms, spec, skips=SkippedFrames())
    samples = SetPairSamples(rooms, pairs, spec, 3, ImageContract(), Sets(rooms, cache_dir=tmp_path))
    plain = PairSamples(rooms, pairs, spec, 3, ImageContract())
    got, want = samples[(1, 0)], plain[(1, 0)]
    assert set(got) == {*want, "sets1", "sets2"}
    for name, value in want.items():
        assert torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
    scene = Sets(rooms, cache_dir=tmp_path).scene(pairs[0].scene)
    for number, frame_id in ((1, pairs[0].frame1), (2, pairs[0].frame2)):
        frame = resize_frame(rooms.load(pairs[0].scene, frame_id), spec.size)
        np.testing.assert_array_equal(got[f"sets{number}"], pixel_sets(frame, scene, stride=2))
    assert len(set(got["sets1"].unique().tolist()) & set(got["sets2"].unique().tolist()) - {-1}) > 3
    batch = samples.collate([pickle.loads(pickle.dumps(samples))[(0, k)] for k in range(2)])
    assert batch["sets2"].shape == (2, 48, 64)
    assert batch["sets1"].dtype == torch.int64


def test_samples_take_the_options_of_sets(rooms, spec, tmp_path):
    pairs = find_pairs(rooms, spec, skips=SkippedFrames())[:1]
    semantic = SetPairSamples(rooms, pairs, spec, 0, ImageContract(), Sets(rooms, kind="semantic"))[(0, 0)]
    frame = resize_frame(rooms.load(pairs[0].scene, pairs[0].frame2), spec.size)
    np.testing.assert_array_equal(semantic["sets2"], frame.semantic)
    options = {"k_thresh": 0.03, "min_vertices": 7, "cache_dir": tmp_path}
    got = SetPairSamples(rooms, pairs, spec, 0, ImageContract(), Sets(rooms, **options))[(0, 0)]["sets2"]
    np.testing.assert_array_equal(got, pixel_sets(frame, Sets(rooms, **options).scene(pairs[0].scene), stride=2))
