"""Single frames with their clouds: every voxel keeps its pixel whatever is done to the image and to the cloud."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import convolve

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Frame, Pair
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.augment import elastic_distortion, elastic_grid
from geo_pretrain.training.data.samples.frame_clouds import (
    FrameCloudConfig,
    FrameCloudSamples,
    fit_frame,
    flip_frame,
    frame_voxels,
)
from geo_pretrain.training.data.samples.pairs import read_pair
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import AugmentSpec, DataSpec
from tests.training.conftest import write_recording

PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)


@pytest.fixture(scope="module")
def samples(recording):
    spec = DataSpec(source="seven_scenes", path=str(recording), size=(48, 64), units="frames", augment=PLAIN)
    source = open_source(spec)
    frames = find_pairs(source, spec, skips=None)

    def make(seed=0, contract=ImageContract(), **cloud):
        return FrameCloudSamples(source, frames, spec, seed, contract, FrameCloudConfig(**{"voxel_size": 0.1, **cloud}))

    return make


def test_elastic_distortion_is_that_of_the_reference_loaders():
    """Written from the numpy code that SparseConvNet's and MinkowskiEngine's examples share."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-2, 1.5, size=(500, 3)) * [1, 0.7, 0.1]
    for granularity, magnitude in ((0.2, 0.4), (0.8, 1.6)):
        size = tuple(int(extent // granularity) + 3 for extent in points.max(0) - points.min(0))
        assert elastic_grid(torch.from_numpy(points), granularity) == size
        noise = rng.normal(size=(*size, 3))
        smooth = noise
        for _ in range(2):
            for shape in ((3, 1, 1, 1), (1, 3, 1, 1), (1, 1, 3, 1)):
                smooth = convolve(smooth, np.full(shape, 1 / 3), mode="constant", cval=0)
        low = points.min(0)
        axes = [
            np.linspace(start, stop, count)
            for start, stop, count in zip(
                low - granularity, low + granularity * (np.array(size) - 2), size, strict=True
            )
        ]
        want = points + RegularGridInterpolator(axes, smooth)(points) * magnitude
        got = elastic_distortion(torch.from_numpy(points), torch.from_numpy(noise), granularity, magnitude)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-9)


def test_elastic_distortion_of_one_point_and_of_a_plane_stays_in_the_grid():
    for points in (torch.zeros(1, 3), torch.tensor([[0.0, 0, 0], [0.8, 0, 0], [0.6, 0.2, 0]])):
        noise = torch.randn(*elastic_grid(points, 0.2), 3)
        assert elastic_distortion(points, noise, 0.2, 0.4).isfinite().all()


def test_a_pixel_far_away_does_not_make_the_grid_larger_which_is_repeated():
    near = torch.tensor([[0.0, 0, 0], [1.03, 0.41, 0.77]], dtype=torch.float64)
    points = torch.cat([near, near + torch.tensor([128 * 0.2, 0, 0]), torch.tensor([[900.0, 0.1, 900]])])
    size = elastic_grid(points, 0.2)
    assert size == (128, 5, 128)
    noise = torch.randn(*size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = elastic_distortion(points, noise, 0.2, 0.4) - points
    assert moved.isfinite().all()
    torch.testing.assert_close(moved[2:4], moved[:2])
    assert (moved[0] != moved[1]).all()


def slow_points(sample):
    """The world point behind each of a sample's pixels, one by one; intrinsics as they are after augmentation."""
    depth, matrix = sample["depth"].double().numpy(), sample["intrinsics"].numpy()
    width = depth.shape[1]
    points = []
    for pixel in sample["pixel"].tolist():
        z = depth[pixel // width, pixel % width]
        assert z > 0
        points.append(
            [(pixel % width - matrix[0, 2]) * z / matrix[0, 0], (pixel // width - matrix[1, 2]) * z / matrix[1, 1], z]
        )
    return np.array(points)


SETTINGS = [
    {},
    {"flip_prob": 1.0},
    {"resize": (0.7, 0.8)},
    {"resize": (1.2, 1.4), "flip_prob": 1.0},
    {"pixels": "all", "scale": (0.9, 1.1), "keep": (0.5, 0.6)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("number", [0, 4])
def test_every_voxel_is_that_of_its_pixel(samples, settings, number):
    dataset = samples(**settings)
    sample = dataset[(3, number)]
    _, (frame, _) = read_pair(dataset, (3, number), torch.Generator(), [])
    world = slow_points(sample) @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
    to_turned = np.linalg.inv(sample["to_world"].numpy())
    turned = world @ to_turned[:3, :3].T + to_turned[:3, 3]
    cells = np.floor(turned.astype(np.float32) / np.float32(0.1))
    own = sample["coords"][sample["voxel"]].numpy()
    near_border = np.abs(turned / 0.1 - np.round(turned / 0.1)) < 1e-3
    assert ((cells == own) | near_border).all()
    if settings.get("pixels") != "all":
        assert len(sample["pixel"]) == len(sample["coords"]) == len(set(sample["pixel"].tolist()))
        np.testing.assert_allclose(sample["points"].numpy(), turned, atol=1e-4)
    else:
        share = len(sample["pixel"]) / int((sample["depth"] > 0).sum())
        assert 0.49 < share < 0.61
        assert len(set(sample["voxel"].tolist())) == len(sample["coords"]) < len(sample["voxel"])


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_the_color_of_a_voxel_is_that_of_its_pixel_in_the_image(samples, settings):
    contract = ImageContract(mean=(0.45, 0.5, 0.55), std=(0.2, 0.25, 0.5))
    sample = samples(contract=contract, **settings)[(0, 1)]
    mean, std = (torch.tensor(values)[:, None] for values in (contract.mean, contract.std))
    shown = sample["image"].flatten(1)[:, sample["pixel"]] * std + mean
    torch.testing.assert_close(sample["feats"], shown.T - 0.5, atol=1e-5, rtol=0)
    filling = sample["image"][:, sample["depth"] == 0]
    if settings.get("resize") == (0.7, 0.8):
        assert (filling.abs() < 0.02).all(dim=0).float().mean() > 0.5  # padded with what is 0 when normalized


def frame_of(height, width):
    rng = np.random.default_rng(0)
    intrinsics = np.array([[50.0, 0, 30.2], [0, 51.0, 22.9], [0, 0, 1]])
    color = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame("s", "f", color, rng.uniform(1, 2, (height, width)).astype(np.float32), intrinsics, np.eye(4))


def point_at(frame, row, column):
    """Where a pixel's surface is, camera frame."""
    z, matrix = float(frame.depth[row, column]), frame.intrinsics
    return [(column - matrix[0, 2]) * z / matrix[0, 0], (row - matrix[1, 2]) * z / matrix[1, 1], z]


def test_surfaces_stay_where_they_are_when_an_image_is_moved():
    frame, fill = frame_of(20, 40), np.zeros(3, dtype=np.uint8)
    mirrored = flip_frame(frame)
    small = fit_frame(frame, 0.5, (0.999, 0.5), fill)  # placed 10 rows down and 10 columns right
    for row, column in ((0, 0), (3, 7), (19, 39)):
        np.testing.assert_allclose(point_at(mirrored, row, 39 - column), point_at(frame, row, column))
    for row, column in ((1, 1), (3, 7), (19, 39)):
        np.testing.assert_allclose(point_at(small, row // 2 + 10, column // 2 + 10), point_at(frame, row, column))
    big = fit_frame(frame, 3.0, (0.5, 0.999), fill)  # 20 of 40 rows and all 80 columns cut off in front
    np.testing.assert_allclose(point_at(big, 2, 2), point_at(frame, 7, 27))


def test_mirroring_twice_gives_the_frame_back():
    frame = frame_of(6, 8)
    twice = flip_frame(flip_frame(frame))
    assert np.array_equal(twice.color, frame.color)
    assert np.array_equal(twice.depth, frame.depth)
    np.testing.assert_allclose(twice.intrinsics, frame.intrinsics)
    assert np.array_equal(flip_frame(frame).color[2, 1], frame.color[2, 6])


def test_a_resized_frame_is_placed_anywhere_it_fits():
    frame, fill = frame_of(20, 40), np.array([1, 2, 3], dtype=np.uint8)
    for offset, rows in ((0.0, (0, 10)), (0.999, (10, 20))):
        small = fit_frame(frame, 0.5, (offset, 0.0), fill)
        covered = np.zeros((20, 40), dtype=bool)
        covered[slice(*rows), :20] = True
        assert np.array_equal(small.depth > 0, covered)
        assert (small.color[~covered] == fill).all()
        assert np.array_equal(small.depth[slice(*rows), :20], frame.depth[1::2, 1::2])
    for offset, start in ((0.0, 0), (0.999, 20)):
        large = fit_frame(frame, 2.0, (offset, 0.0), fill)
        assert np.array_equal(large.depth, np.repeat(np.repeat(frame.depth, 2, 0), 2, 1)[start : start + 20, :40])


def test_samples_are_functions_of_their_key_and_seed(samples):
    full = {"flip_prob": 0.5, "resize": (0.8, 1.25), "elastic_prob": 0.95, "scale": (0.9, 1.1), "color_jitter": 0.05}
    first, again, other = samples(**full)[(1, 2)], samples(**full)[(1, 2)], samples(**full)[(2, 2)]
    for key in ("image", "coords", "feats", "pixel", "seed"):
        assert np.array_equal(first[key], again[key]), key
    assert first["seed"] != other["seed"]
    assert first["coords"].shape != other["coords"].shape or not torch.equal(first["coords"], other["coords"])
    assert not torch.equal(samples(seed=1, **full)[(1, 2)]["image"], first["image"])


def test_distortion_and_jitter_are_drawn_as_often_as_asked(samples):
    plain, moved = samples()[(0, 0)], samples(elastic_prob=1.0)[(0, 0)]
    assert not torch.allclose(moved["points"][:50], plain["points"][:50], atol=0.01)
    assert moved["pixel"][0] == plain["pixel"][0]  # of the cloud's first point: the image is as it was
    assert torch.equal(moved["image"], plain["image"])
    noisy = samples(color_jitter=0.05, color_jitter_prob=1.0)[(0, 0)]
    inside = (plain["feats"].abs() < 0.3).all(dim=1)
    assert 0.04 < float((noisy["feats"] - plain["feats"])[inside].std()) < 0.06
    assert noisy["feats"].abs().max() <= 0.5
    assert torch.equal(samples(color_jitter=0.05, color_jitter_prob=0.0)[(0, 0)]["feats"], plain["feats"])
    ones = samples(features="ones")[(0, 0)]
    assert (ones["feats"] == 1).all()


def test_flips_and_factors_have_the_asked_frequency_and_range(samples):
    dataset = samples(flip_prob=0.3, resize=(0.8, 1.25))
    negative = [float(dataset[(epoch, 0)]["intrinsics"][0, 0]) for epoch in range(60)]
    assert 8 <= sum(f < 0 for f in negative) <= 29
    plain = float(samples()[(0, 0)]["intrinsics"][0, 0])
    factors = [abs(f) / plain for f in negative]
    assert 0.78 < min(factors) < 0.9
    assert 1.15 < max(factors) < 1.27


def test_a_batch_joins_clouds_and_counts_their_rows(samples):
    parts = [samples(pixels="all")[(0, k)] for k in (0, 3, 5)]
    batch = FrameCloudSamples.collate(parts)
    for number, part in enumerate(parts):
        mine = batch["element"] == number
        assert torch.equal(batch["pixel"][mine], part["pixel"])
        rows = batch["coords"][batch["voxel"][mine]]
        assert (rows[:, 0] == number).all()
        assert torch.equal(rows[:, 1:], part["coords"][part["voxel"]])
    assert batch["index"].tolist() == [0, 3, 5]
    assert batch["image"].shape == (3, 3, 48, 64)


def test_the_number_of_a_sample_is_that_of_the_frame_in_it(tmp_path):
    folder = write_recording(tmp_path / "recording")
    spec = DataSpec(source="seven_scenes", path=str(folder), size=(48, 64), units="frames", augment=PLAIN)
    source = open_source(spec)
    frames = find_pairs(source, spec, skips=None)
    (folder / "frame-000010.depth.png").write_bytes(b"broken")
    dataset = FrameCloudSamples(source, frames, spec, 0, ImageContract(), FrameCloudConfig(voxel_size=0.1))
    replaced = set()
    for epoch in range(6):
        sample = dataset[(epoch, 1)]
        assert len(sample["skipped"]) >= 1
        number = int(sample["index"])
        assert number != 1
        assert torch.equal(sample["depth"], dataset[(epoch, number)]["depth"])
        replaced.add(number)
    assert len(replaced) > 1
    assert int(dataset[(0, 2)]["index"]) == 2


def test_a_frame_that_would_lose_all_its_depth_stays_as_it_is(samples):
    dataset = samples(resize=(3.0, 3.0), flip_prob=1.0)
    frame = frame_of(20, 40)
    depth = np.zeros_like(frame.depth)
    depth[6, 14] = 1.5
    frame = Frame("s", "f", frame.color, depth, frame.intrinsics, frame.cam_to_world)
    moved = [dataset._flip_resize(frame, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert all(found.depth.any() for found in moved)
    kept = [found for found in moved if found is frame]
    assert 0 < len(kept) < 40
    assert all(found.intrinsics[0, 0] < 0 for found in moved if found is not frame)  # mirrored, where that is possible


def test_of_a_pair_the_first_frame_is_taken(samples):
    dataset = samples()
    pair = Pair(dataset.pairs[0].scene, dataset.pairs[2].frame1, dataset.pairs[0].frame1, 0.5)
    mixed = FrameCloudSamples(dataset.source, [pair], dataset.spec, 0, ImageContract(), dataset.cloud)
    assert [p.frame2 for p in mixed.pairs] == [dataset.pairs[2].frame1]
    assert len(mixed) == 1


def fine_cloud(**settings):
    """The cloud of a small frame whose points all have voxels of their own, by pixel; and the points as they were."""
    frame = frame_of(6, 8)
    spec = FrameCloudConfig(pixels="all", voxel_size=0.001, **settings)
    found = frame_voxels(frame, spec, torch.Generator().manual_seed(3))
    assert len(found["coords"]) == len(found["pixel"])
    return found["points"][found["voxel"]], np.array([point_at(frame, p // 8, p % 8) for p in found["pixel"].tolist()])


def test_a_turned_cloud_is_scaled_about_its_centroid_in_the_origin():
    got, world = fine_cloud(scale=(1.5, 1.5))
    np.testing.assert_allclose(got.mean(0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(got.norm(dim=1), 1.5 * np.linalg.norm(world - world.mean(0), axis=1), rtol=1e-5)


def test_a_cloud_is_distorted_finely_and_then_coarsely():
    """PPKT's (granularity, magnitude) in meters: 0.2, 0.4 and 0.8, 1.6."""
    got, points = fine_cloud(rotation="none", elastic_prob=1.0)
    want, generator = torch.from_numpy(points), torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)  # what to keep, whether to distort
    for granularity, magnitude in ((0.2, 0.4), (0.8, 1.6)):
        noise = torch.randn(*elastic_grid(want, granularity), 3, generator=generator)
        want = elastic_distortion(want, noise, granularity, magnitude)
    torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-5)


def test_one_point_is_left_however_few_are_kept():
    frame = frame_of(6, 8)
    depth = np.zeros_like(frame.depth)
    depth[2, 3] = 1.5
    frame = Frame("s", "f", frame.color, depth, frame.intrinsics, frame.cam_to_world)
    found = frame_voxels(frame, FrameCloudConfig(keep=(0.1, 0.1)), torch.Generator().manual_seed(0))
    assert found["pixel"].tolist() == [2 * 8 + 3]


def test_a_cloud_without_a_turn_stays_in_the_world():
    frame = frame_of(6, 8)
    found = frame_voxels(frame, FrameCloudConfig(rotation="none"), torch.Generator().manual_seed(0))
    assert torch.equal(found["to_world"], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"keep": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ({"scale": (0.0, 1.0)}, r"'scale' is \[0.0, 1.0\]"),
        ({"color_jitter": -1.0}, "'color_jitter' is -1.0"),
        ({"voxel_size": 0.0}, "meters above 0"),
        ({"elastic_prob": 2.0}, "a probability"),
    ],
)
def test_impossible_settings_are_told(settings, part):
    with pytest.raises(RecipeError, match=part):
        FrameCloudConfig(**settings)
