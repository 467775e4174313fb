"""Voxel matching: descriptors whose right answer is known, and a loop over voxels."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.training.data.frame import Pair, SkippedFrames
from geo_pretrain.training.data.mining import find_pairs, spread_evenly
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.evaluation import matching
from geo_pretrain.training.evaluation.features import CloudExtractor
from geo_pretrain.training.evaluation.matching import (
    chance_within,
    evaluate_matching,
    match_pair,
)
from geo_pretrain.training.recipe import DataSpec
from tests.training.conftest import write_recording

SIZE = (60, 80)  # half of the recording, so that its intrinsics stay exact
VOXEL = 0.1
COLORS, ONES = VoxelContract(VOXEL, ("R", "G", "B"), offset=-0.5), VoxelContract(VOXEL)
TURNS = ("camera", "full", "upright")


class Described(nn.Module):
    """A network whose descriptors are a function of its input features [N, C]."""

    def __init__(self, describe):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.describe = describe

    def forward(self, x):
        return x.with_feats(self.describe(x.feats) + self.bias)


class PaintedWithPosition:
    """Frames of a source whose colors are their points' places in the world: 1 / 255 is 4 cm."""

    name = "painted"

    def __init__(self, source):
        self.source = source
        self.scenes, self.frame_ids = source.scenes, source.frame_ids

    def load(self, scene, frame_id):
        return self.paint(self.source.load(scene, frame_id))

    def paint(self, frame):
        v, u = np.mgrid[: frame.depth.shape[0], : frame.depth.shape[1]]
        pixels = np.stack([u, v, np.ones_like(u)], -1) * frame.depth[..., None]
        world = pixels @ np.linalg.inv(frame.intrinsics).T @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
        return dataclasses.replace(frame, color=np.clip(np.rint(world / 0.04 + 128), 0, 255).astype(np.uint8))


def on_a_torus(colors):
    """Unit rows whose cosine falls with the distance of the colors."""
    angles = math.pi * colors
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(scope="module")
def source(recording):
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def pairs(source):
    return find_pairs(source, DataSpec(source="seven_scenes", size=SIZE, overlap=(0.3, 1.0)), skips=SkippedFrames())


@pytest.mark.parametrize("turn", TURNS)
def test_descriptor_that_knows_its_place_is_always_right(source, pairs, turn):
    network = Described(on_a_torus)
    result = evaluate_matching(
        CloudExtractor(network, COLORS), PaintedWithPosition(source), pairs, size=SIZE, turn=turn, queries=100
    )
    assert result.recall == 1.0
    assert result.spread == 0.0
    assert result.chance < 0.1
    assert len(result.per_pair) == len(pairs)
    assert result.queries == 100 * len(pairs)
    assert result.measure == "recall within 2 voxels"


def test_descriptor_that_knows_nothing_is_right_by_chance(source, pairs):
    def noise(feats):
        return torch.randn(len(feats), 16, generator=generator)

    generator = torch.Generator().manual_seed(0)
    many = [pair for pair in pairs for _ in range(3)]
    noisy = evaluate_matching(CloudExtractor(Described(noise), ONES), source, many, size=SIZE, queries=400)
    assert noisy.chance / 2 < noisy.recall < 2 * noisy.chance
    constant = evaluate_matching(CloudExtractor(Described(torch.ones_like), ONES), source, many, size=SIZE, queries=400)
    assert constant.recall < 5 * constant.chance


def test_matches_equal_the_loop_over_voxels(source, pairs):
    matches = match_pair(CloudExtractor(Described(torch.tanh), COLORS), source, pairs[0], size=SIZE, queries=40, seed=3)
    clouds = [slow_voxels(source.load(pairs[0].scene, f), SIZE) for f in (pairs[0].frame1, pairs[0].frame2)]
    features2 = [np.tanh(color) / np.linalg.norm(np.tanh(color)) for _, color in clouds[1]]
    places2 = np.array([place for place, _ in clouds[1]])
    near = 0
    for query, predicted in zip(matches.query, matches.predicted, strict=True):
        row = min(range(len(clouds[0])), key=lambda k: np.linalg.norm(clouds[0][k][0] - query))
        assert np.linalg.norm(clouds[0][row][0] - query) < 1e-5
        assert min(np.linalg.norm(places2 - query, axis=1)) < 1.5 * VOXEL
        similarity = np.array(features2) @ np.tanh(clouds[0][row][1])
        chosen = np.linalg.norm(places2 - predicted, axis=1).argmin()
        assert similarity.max() - similarity[chosen] < 1e-6
        near += int((np.linalg.norm(places2 - query, axis=1) <= 2 * VOXEL).sum())
    assert matches.chance == pytest.approx(near / 40 / len(places2))
    np.testing.assert_allclose(matches.error, np.linalg.norm(matches.query - matches.predicted, axis=1) / VOXEL)
    assert len(np.unique(matches.query, axis=0)) == 40


def slow_voxels(frame, size):
    """(place in the world, color - 0.5) of the first pixel in every voxel of the camera's frame, in order."""
    found = {}
    step = frame.depth.shape[0] / size[0]
    for row in range(size[0]):
        for column in range(size[1]):
            i, j = int((row + 0.5) * step), int((column + 0.5) * step)
            z = frame.depth[i, j]
            if z > 0:
                own = np.linalg.inv(frame.intrinsics) @ np.array([j, i, 1.0]) * z
                voxel = tuple(np.floor(own.astype(np.float32) / np.float32(VOXEL)).astype(int))
                world = frame.cam_to_world[:3, :3] @ own + frame.cam_to_world[:3, 3]
                found.setdefault(voxel, (world, frame.color[i, j] / 255 - 0.5))
    return list(found.values())


def test_a_turn_moves_the_voxels_but_not_their_places(source, pairs):
    seen = {}

    def remember(feats):
        seen[len(seen)] = len(feats)
        return feats

    results = {
        turn: match_pair(
            CloudExtractor(Described(remember), COLORS), source, pairs[0], size=SIZE, turn=turn, queries=2000
        )
        for turn in TURNS
    }
    assert len({seen[0], seen[2], seen[4]}) > 1  # other voxels
    boxes = [(r.query.min(axis=0), r.query.max(axis=0)) for r in results.values()]
    for low, high in boxes[1:]:
        np.testing.assert_allclose(low, boxes[0][0], atol=2 * VOXEL)
        np.testing.assert_allclose(high, boxes[0][1], atol=2 * VOXEL)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.coords[:, 1:].double() * VOXEL)
        return x


@pytest.mark.parametrize("turn", TURNS)
def test_both_clouds_are_turned_each_on_its_own_and_rigidly(source, pairs, turn):
    network = Remembering()
    itself = Pair(pairs[0].scene, pairs[0].frame1, pairs[0].frame1, 1.0)
    match_pair(CloudExtractor(network, ONES), source, itself, size=SIZE, turn=turn, seed=3)
    first, second = network.seen
    if turn == "camera":
        assert torch.equal(first, second)
        assert first[:, 2].min() > 0  # in front of the camera
        return
    one, two = (torch.cov(cloud.T) for cloud in (first, second))
    torch.testing.assert_close(torch.linalg.eigvalsh(one), torch.linalg.eigvalsh(two), rtol=0.1, atol=0.03)
    assert (one - two).abs().max() > 0.1  # m^2
    assert (abs(one[2, 2] - two[2, 2]) < 0.05) == (turn == "upright")


def test_every_pair_draws_its_own_queries(source, pairs):
    network = Described(lambda feats: torch.tanh(3 * feats))
    twice = [pairs[0], pairs[0]]
    result = evaluate_matching(CloudExtractor(network, COLORS), source, twice, size=SIZE, queries=150)
    assert result.per_pair[0] != result.per_pair[1]


def test_evaluation_passes_its_options_on_and_holds_clouds_as_cameras_see_them(source, pairs):
    network = Described(on_a_torus)
    options = {"size": SIZE, "queries": 30, "turn": "upright", "threshold": 1.0}
    result = evaluate_matching(CloudExtractor(network, COLORS), source, pairs[:2], seed=4, **options)
    alone = [match_pair(CloudExtractor(network, COLORS), source, pairs[k], seed=4 + k, **options) for k in (0, 1)]
    assert result.per_pair == tuple(float((matches.error <= 1).mean()) for matches in alone)
    assert result.chance == pytest.approx((alone[0].chance + alone[1].chance) / 2)
    del options["turn"]
    plain, held = (
        match_pair(CloudExtractor(network, COLORS), source, pairs[0], **options, **turn)
        for turn in ({}, {"turn": "camera"})
    )
    assert np.array_equal(plain.query, held.query)
    result = evaluate_matching(CloudExtractor(network, COLORS), source, pairs[:1], **options)
    assert result.per_pair == (float((held.error <= 1).mean()),)


def test_an_error_equal_to_the_threshold_is_right(monkeypatch, source):
    errors = {"a": [1.9, 2.0], "b": [2.0, 2.1]}

    def match(extractor, source, pair, *, seed, **_):
        return SimpleNamespace(error=np.array(errors[pair.scene]), chance=0.25 * seed)

    monkeypatch.setattr(matching, "match_pair", match)
    extractor = CloudExtractor(Described(torch.tanh), COLORS)
    pairs = [Pair(scene, "0", "1", 0.5) for scene in errors]
    result = evaluate_matching(extractor, source, pairs, size=SIZE, threshold=2.0)
    assert result.scenes == ("a", "b")
    assert result.per_pair == (1.0, 0.5)
    assert (result.recall, result.spread, result.queries, result.chance) == (0.75, 0.25, 4, 0.125)


def test_same_seed_gives_the_same_result_and_another_one_does_not(source, pairs):
    def run(seed):
        network = Described(on_a_torus)
        return evaluate_matching(
            CloudExtractor(network, COLORS), source, pairs, size=SIZE, turn="full", queries=50, seed=seed
        )

    assert run(0) == run(0)
    assert run(0).per_pair != run(100).per_pair


def test_pairs_that_cannot_be_read_are_counted(source, pairs):
    skips = SkippedFrames()
    broken = Pair(pairs[0].scene, "999999", pairs[0].frame1, 1.0)
    network = Described(torch.tanh)
    result = evaluate_matching(CloudExtractor(network, ONES), source, [broken, pairs[0]], size=SIZE, skips=skips)
    assert len(result.per_pair) == 1
    assert "missing" in skips.summary()
    with pytest.raises(DataError, match="could be evaluated"):
        evaluate_matching(CloudExtractor(network, ONES), source, [broken], size=SIZE)


def test_clouds_without_common_surface_are_a_bad_pair(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    pose = np.loadtxt(folder / "frame-000010.pose.txt")
    pose[:3, 3] += 100
    np.savetxt(folder / "frame-000010.pose.txt", pose)
    pair = Pair("kitchen", "000000", "000010", 0)
    with pytest.raises(BadFrame, match="no match"):
        match_pair(CloudExtractor(Described(torch.tanh), ONES), SevenScenes(folder), pair, size=SIZE)


@pytest.mark.parametrize(
    "contract",
    [
        VoxelContract((0.1, 1.0, 0.1), ("intensity",), coordinates="cylindrical"),
        VoxelContract((0.1, 1.0, 0.1), ("R", "G", "B"), coordinates="cylindrical"),
        VoxelContract(0.1, ("intensity",)),
        VoxelContract(0.1, ("R", "G", "B", "extra0")),
    ],
    ids=str,
)
def test_what_rgbd_frames_cannot_give_is_refused_and_named(source, pairs, contract):
    with pytest.raises(CheckpointError, match="RGB-D frames give") as error:
        evaluate_matching(CloudExtractor(Described(torch.tanh), contract), source, pairs, size=SIZE)
    assert str(contract) in str(error.value)


def test_chance_equals_the_loop_over_candidates():
    generator = torch.Generator().manual_seed(0)
    truth, places = (torch.rand(n, 3, generator=generator, dtype=torch.float64) for n in (130, 57))
    slow = [[float((t - p).norm()) <= 0.3 for p in places] for t in truth]
    assert chance_within(truth, places, 0.3) == pytest.approx(np.mean(slow))


def test_spread_evenly_keeps_both_ends_and_repeats_nothing():
    assert spread_evenly(range(10), 4) == [0, 3, 6, 9]
    assert spread_evenly(range(3), 4) == [0, 1, 2]
