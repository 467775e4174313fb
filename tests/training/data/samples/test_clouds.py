"""Pairs of turned clouds and of chunks: matches by brute force, draws as the released loaders make them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Surface, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.augment import random_rotation
from geo_pretrain.training.data.samples.clouds import (
    ChunkPairSamples,
    CloudPairSamples,
    PairCloudConfig,
    rotated_voxels,
)
from geo_pretrain.training.data.samples.pairs import PairSamples
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces, frame_cloud
from geo_pretrain.training.recipe import DataSpec
from tests.training.conftest import write_recording
from tests.work import LargestTensor, python_lines

SPEC = DataSpec(source="seven_scenes", size=(60, 80), overlap=(0.2, 1.0))
COARSE = PairCloudConfig(voxel_size=0.06)


@pytest.fixture
def source(recording):
    return SevenScenes(recording)


@pytest.fixture
def pairs(source):
    return find_pairs(source, SPEC, skips=SkippedFrames())


@pytest.fixture
def samples(source, pairs):
    return CloudPairSamples(source, pairs, SPEC, 0, COARSE)


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def moved(points, matrix):
    return points.double() @ matrix[:3, :3].T + matrix[:3, 3]


def test_sample_is_a_function_of_its_key(samples):
    torch.manual_seed(1)
    first = samples[(0, 2)]
    torch.manual_seed(2)
    assert equal(first, samples[(0, 2)])
    other = samples[(1, 2)]
    assert not torch.equal(first["to_world1"], other["to_world1"])
    assert first["seed"] != other["seed"]
    assert not torch.equal(first["to_world1"][:3, :3], first["to_world2"][:3, :3])  # each view is turned on its own


def test_voxels_hold_their_points_and_the_points_lie_on_the_frames(samples, source, pairs):
    sample = samples[(0, 1)]
    for k, name in ((1, pairs[1].frame1), (2, pairs[1].frame2)):
        coords, points = sample[f"coords{k}"], sample[f"points{k}"]
        assert coords.dtype == torch.int32
        assert len(coords.unique(dim=0)) == len(coords) == len(points) == len(sample[f"feats{k}"])
        assert torch.equal(torch.floor(points / 0.06).int(), coords)
        cloud = frame_cloud(resize_frame(source.load(pairs[1].scene, name), SPEC.size)).points
        world = moved(points, sample[f"to_world{k}"]).numpy()
        gap = np.linalg.norm(world[::9, None] - cloud[None], axis=-1).min(axis=1)
        assert gap.max() < 1e-5
        # The centroid of the whole cloud, not of the voxels, is the origin.
        origin = moved(torch.zeros(1, 3), sample[f"to_world{k}"])[0].numpy()
        np.testing.assert_allclose(origin, cloud.mean(0, dtype=np.float64), atol=1e-5)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.8, 0.8)])
def test_matches_are_all_points_near_the_moved_point(source, pairs, scale):
    """methods.md 4.4, by brute force in the frame of view 2: the radius is scaled with the clouds."""
    spec = dataclasses.replace(COARSE, scale=scale)
    sample = CloudPairSamples(source, pairs, SPEC, 0, spec)[(0, 0)]
    one_to_two = torch.linalg.inv(sample["to_world2"]) @ sample["to_world1"]
    there = moved(sample["points1"], one_to_two)
    distance = (there[:, None] - sample["points2"].double()[None]).norm(dim=-1)
    radius = 1.5 * 0.06 * scale[0]
    want = (distance < radius).nonzero()
    assert len(want) > 500
    assert torch.equal(sample["matches"], want)
    assert sample["matches"][:, 0].bincount().max() > 1  # one to many
    assert torch.linalg.det(sample["to_world1"][:3, :3]).item() == pytest.approx(scale[0] ** -3)


def test_turns_about_any_axis_are_pointcontrasts():
    """Axis rand(3) - 0.5, angle uniform in +-180 degrees: moments over many draws."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.stack([random_rotation(generator, "full")[:3, :3] for _ in range(3000)])
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3, dtype=torch.float64).expand_as(turns))
    assert torch.linalg.det(turns).min() > 0.999
    angle = torch.arccos(((turns.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))
    share = torch.histc(angle, 6, 0, math.pi) / len(angle)
    assert (share - 1 / 6).abs().max() < 0.03
    skew = turns - turns.mT
    axis = torch.nn.functional.normalize(torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1), dim=1)
    assert axis.mean(dim=0).abs().max() < 0.04  # both senses alike
    assert (axis[:, 0] * axis[:, 1] > 0).double().mean().item() == pytest.approx(0.5, abs=0.06)
    cube = torch.nn.functional.normalize(torch.rand(100_000, 3, generator=generator) - 0.5, dim=1)
    assert axis.abs().amax(1).mean().item() == pytest.approx(cube.abs().amax(1).mean().item(), abs=0.006)


def test_upright_turns_are_cscs():
    generator = torch.Generator().manual_seed(0)
    turns = torch.stack([random_rotation(generator, "upright")[:3, :3] for _ in range(3000)])
    tilt = torch.arccos(turns[:, 2, 2])
    assert 0.85 * math.pi / 32 < tilt.max() <= math.pi / 32  # with the turn about z between them, the two add up
    heading = torch.atan2(turns[:, 1, 0], turns[:, 0, 0])
    share = torch.histc(heading, 6, -math.pi, math.pi) / len(heading)
    assert (share - 1 / 6).abs().max() < 0.03
    assert torch.equal(random_rotation(generator, "none"), torch.eye(4).double())


def test_upright_turns_come_in_all_orders():
    """With the same angles the six products differ; more than one of them occurs."""
    from scipy.spatial.transform import Rotation

    orders = set()
    for seed in range(60):
        draw = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
        angles = (2 * draw[:3] - 1) * [math.pi / 64, math.pi / 64, math.pi]
        turn = random_rotation(torch.Generator().manual_seed(seed), "upright")[:3, :3].numpy()
        for order in ("XYZ", "XZY", "YXZ", "YZX", "ZXY", "ZYX"):
            want = Rotation.from_euler(order, [angles["XYZ".index(axis)] for axis in order]).as_matrix()
            if np.abs(turn - want).max() < 1e-9:
                orders.add(order)
    assert orders == {"XYZ", "XZY", "YXZ", "YZX", "ZXY", "ZYX"}


def test_ones_are_jittered_as_often_and_as_much_as_they_should():
    cloud = Surface(np.random.default_rng(0).random((500, 3), np.float32), np.full((500, 3), 51, np.uint8))
    generator = torch.Generator().manual_seed(0)
    drawn = [rotated_voxels(cloud, PairCloudConfig(), 1.0, generator)["feats"] for _ in range(400)]
    noisy = torch.cat([feats for feats in drawn if not (feats == 1).all()])
    assert sum((feats == 1).all() for feats in drawn) / 400 == pytest.approx(0.05, abs=0.03)
    assert noisy.mean().item() == pytest.approx(1, abs=1e-3)
    assert noisy.std().item() == pytest.approx(0.01, rel=0.02)
    rgb = PairCloudConfig(features="rgb", rotation="upright", jitter_prob=1.0)
    feats = rotated_voxels(cloud, rgb, 1.0, generator)["feats"]
    assert feats.mean().item() == pytest.approx(51 / 255 - 0.5, abs=1e-4)
    assert feats.std().item() == pytest.approx(0.01 / 255, rel=0.1)
    plain = rotated_voxels(cloud, dataclasses.replace(rgb, jitter_prob=0.0, rotation="none"), 1.0, generator)
    assert (plain["feats"] == 51 / 255 - 0.5).all()
    assert torch.equal(plain["to_world"], torch.eye(4).double())


def test_color_of_a_voxel_is_that_of_its_point():
    points = np.array([[0.01, 0, 0], [0.012, 0, 0], [0.5, 0.5, 0.5]], np.float32)
    cloud = Surface(points, np.array([[0, 255, 51], [9, 9, 9], [102, 0, 255]], np.uint8))
    spec = PairCloudConfig(features="rgb", rotation="none", jitter_prob=0)
    voxels = rotated_voxels(cloud, spec, 1.0, torch.Generator())
    torch.testing.assert_close(voxels["feats"] + 0.5, torch.tensor([[0, 1, 0.2], [0.4, 0, 1]]))
    assert torch.equal(voxels["points"], torch.from_numpy(points[[0, 2]]))
    assert voxels["coords"].tolist() == [[0, 0, 0], [20, 20, 20]]


def apart(source):
    """A pair of frames that share nothing."""
    spec = dataclasses.replace(SPEC, overlap=(0.0, 1.0))
    return min(find_pairs(source, spec, skips=SkippedFrames()), key=lambda pair: pair.overlap)


def test_pair_without_a_match_contributes_none_or_the_authors_dummy(source):
    pair = [apart(source)]
    fine = dataclasses.replace(COARSE, radius=1e-5)
    sample = CloudPairSamples(source, pair, SPEC, 0, fine)[(0, 0)]
    assert sample["matches"].shape == (0, 2)
    exact = dataclasses.replace(fine, match_released_code=True)
    assert CloudPairSamples(source, pair, SPEC, 0, exact)[(0, 0)]["matches"].tolist() == [[0, 0]]
    batch = CloudPairSamples.collate([sample, sample])
    assert batch["matches_per_pair"] == [0, 0]
    assert batch["matches"].shape == (0, 2)


def test_batch_of_clouds_says_which_rows_belong_together(samples):
    parts = [samples[(0, k)] for k in (0, 3, 1)]
    batch = CloudPairSamples.collate(parts)
    assert batch["coords1"].dtype == torch.int32
    assert batch["to_world2"].shape == (3, 4, 4)
    assert batch["seed"] == [part["seed"] for part in parts]
    assert batch["skipped"] == []
    starts = {"1": 0, "2": 0}
    matches = batch["matches"].split(batch["matches_per_pair"])
    for number, part in enumerate(parts):
        for k in ("1", "2"):
            rows = slice(starts[k], starts[k] + len(part["coords" + k]))
            assert (batch["coords" + k][rows, 0] == number).all()
            assert torch.equal(batch["coords" + k][rows, 1:], part["coords" + k])
            for name in ("feats", "points"):
                assert torch.equal(batch[name + k][rows], part[name + k])
        assert torch.equal(matches[number] - torch.tensor(list(starts.values())), part["matches"])
        starts = {k: starts[k] + len(part["coords" + k]) for k in starts}
    assert starts == {k: len(batch["coords" + k]) for k in starts}


def test_broken_frame_is_replaced_and_reported(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    source = SevenScenes(folder)
    pairs = find_pairs(source, SPEC, skips=SkippedFrames())
    samples = CloudPairSamples(source, pairs, SPEC, 0, COARSE)
    untouched = samples[(0, 1)]
    path = folder / f"frame-{pairs[0].frame1}.depth.png"
    Image.fromarray(np.zeros((120, 160), np.uint16)).save(path)
    sample = samples[(0, 0)]
    assert sample["skipped"][0] == (str(path), "no pixel has a valid depth")
    assert len(sample["matches"]) > 0
    if pairs[0].frame1 not in (pairs[1].frame1, pairs[1].frame2):
        assert equal(untouched, samples[(0, 1)])
    for depth in folder.glob("*.depth.png"):
        depth.unlink()
    with pytest.raises(DataError, match="16 pairs in a row"):
        samples[(0, 0)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"voxel_size": 0.0}, "'voxel_size' is 0.0, accepted is meters above 0"),
        ({"radius": -1.0}, "'radius' is -1.0"),
        ({"scale": (1.2, 0.8)}, r"'scale' is \[1.2, 0.8\]"),
    ],
)
def test_settings_out_of_range_are_explained(options, message):
    with pytest.raises(RecipeError, match=message):
        PairCloudConfig(**options)
    assert PairCloudConfig().match_radius == pytest.approx(0.0375)


def chunk_samples(source, pairs, tmp_path, **options):
    return ChunkPairSamples(
        source, pairs, SPEC, 0, ImageContract(), cache_dir=tmp_path, **{"voxel_size": 0.05} | options
    )


def test_chunk_is_the_surface_in_the_box_of_the_frame(source, pairs, tmp_path):
    samples = chunk_samples(source, pairs, tmp_path)
    sample = samples[(0, 0)]
    pair = pairs[0]
    surface = Surfaces(source, cache_dir=tmp_path).load(pair.scene)
    for k, name in ((1, pair.frame1), (2, pair.frame2)):
        low, high = chunk_box(resize_frame(source.load(pair.scene, name), SPEC.size))
        chunk = crop_surface(surface, low, high)
        cells = {}
        for point, color in zip(chunk.points, chunk.colors, strict=True):
            cells.setdefault(tuple(np.floor(point / np.float32(0.05)).astype(int)), color)
        assert 1000 < len(cells) < len(surface)
        assert [tuple(row) for row in sample[f"coords{k}"].tolist()] == list(cells)
        np.testing.assert_allclose(sample[f"feats{k}"].numpy(), np.array(list(cells.values())) / 255, atol=1e-6)
    images = PairSamples(source, pairs, SPEC, 0, ImageContract())[(0, 0)]
    assert all(torch.equal(sample[name], images[name]) for name in images if name != "skipped" and name != "seed")
    assert sample["seed"] == images["seed"]  # chunks draw nothing


def test_chunks_of_a_batch_carry_their_number(source, pairs, tmp_path):
    samples = chunk_samples(source, pairs, tmp_path, features="ones")
    parts = [samples[(0, k)] for k in (0, 2)]
    batch = ChunkPairSamples.collate(parts)
    assert batch["image1"].shape == (2, 3, 60, 80)
    assert (batch["feats2"] == 1).all()
    for number, part in enumerate(parts):
        rows = batch["coords2"][:, 0] == number
        assert torch.equal(batch["coords2"][rows, 1:], part["coords2"])


def test_exact_voxels_of_a_chunk_are_truncated_towards_zero(source, pairs, tmp_path):
    """methods.md 1.4: voxels at a zero plane are twice as wide."""
    floor = chunk_samples(source, pairs, tmp_path)[(0, 0)]["coords1"]
    exact = chunk_samples(source, pairs, tmp_path, match_released_code=True)[(0, 0)]["coords1"]
    pair = pairs[0]
    box = chunk_box(resize_frame(source.load(pair.scene, pair.frame1), SPEC.size))
    points = crop_surface(Surfaces(source, cache_dir=tmp_path).load(pair.scene), *box).points
    assert (points < 0).any()
    want = {tuple(row) for row in np.trunc(points / np.float32(0.05)).astype(int)}
    assert {tuple(row) for row in exact.tolist()} == want
    assert {tuple(row) for row in floor.tolist()} != want


def test_tight_box_holds_fewer_voxels(source, pairs, tmp_path):
    whole = chunk_samples(source, pairs, tmp_path)[(0, 0)]
    tight = chunk_samples(source, pairs, tmp_path, frustum=True)[(0, 0)]
    assert 0 < len(tight["coords1"]) < len(whole["coords1"])


def test_work_for_a_pair_of_working_size_is_vectorized():
    """Two 320x240 frames at 2.5 cm; about 50 ms on one core, so no loop over points and no table of all distances."""

    class Wall:
        name = "wall"

        def load(self, scene, frame_id):
            rng = np.random.default_rng(int(frame_id))
            from geo_pretrain.training.data.frame import Frame

            depth = rng.uniform(1.9, 1.95, (240, 320)).astype(np.float32)
            intrinsics = np.array([[290.0, 0, 159.5], [0, 290, 119.5], [0, 0, 1]])
            return Frame(scene, frame_id, np.zeros((240, 320, 3), np.uint8), depth, intrinsics, np.eye(4))

    samples = CloudPairSamples(Wall(), [Pair("s", "0", "1", 1.0)], DataSpec(), 0, PairCloudConfig())
    samples[(0, 0)]
    with LargestTensor() as largest:
        found, lines = python_lines(lambda: samples[(1, 0)])
    assert lines < 50_000  # a frame has 76,800 points
    assert largest.elements < 5_000_000
    assert len(found["matches"]) > 10_000
