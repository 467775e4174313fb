"""Matching recall: networks whose right answer is known, and a loop over queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Pair, SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.evaluation.features import EncoderMaps, ImageExtractor
from geo_pretrain.training.evaluation.matching import evaluate_matching, match_pair
from geo_pretrain.training.recipe import DataSpec
from tests.training.conftest import write_recording

CONTRACT = ImageContract()
SIZE = (120, 160)


class ColorFeatures(nn.Module):
    """The colors themselves at half resolution, plus a bias so that black has a direction."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
        self.noise = noise

    def forward(self, x):
        features = torch.cat([x[:, :, ::2, ::2], self.bias.expand(len(x), 1, x.shape[2] // 2, x.shape[3] // 2)], 1)
        return features + self.noise * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))


class SharpColors(ColorFeatures):
    """The colors at the image's own resolution."""

    def forward(self, x):
        return torch.cat([x, self.bias.expand(len(x), 1, *x.shape[2:])], 1)


def extractor(network):
    return ImageExtractor(network, CONTRACT)


@pytest.fixture(scope="module")
def source(recording):
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def pairs(source):
    return find_pairs(source, DataSpec(source="seven_scenes", size=SIZE, overlap=(0.3, 1.0)), skips=SkippedFrames())


def test_frame_matched_with_itself_is_right_to_the_half_pixel(source, pairs):
    pair = Pair(pairs[0].scene, pairs[0].frame1, pairs[0].frame1, 1.0)
    matches = match_pair(extractor(ColorFeatures()), source, pair, size=SIZE, queries=200)
    assert np.median(matches.error) <= np.sqrt(0.5)
    np.testing.assert_allclose(matches.query, matches.truth, atol=1)


def test_features_at_the_image_s_resolution_are_matched_to_the_pixel(source, pairs):
    pair = Pair(pairs[0].scene, pairs[0].frame1, pairs[0].frame1, 1.0)
    matches = match_pair(extractor(SharpColors()), source, pair, size=SIZE, queries=200)
    colors = [
        frame.color[places[:, 1].astype(int), places[:, 0].astype(int)]
        for frame, places in ((matches.frames[0], matches.query), (matches.frames[1], matches.predicted))
    ]
    np.testing.assert_array_equal(*colors)  # another pixel may have the same color
    assert np.median(matches.error) <= 1
    assert (matches.predicted % 1 == 0).all()
    assert matches.predicted.max() > 100


def test_nearest_feature_and_its_error_equal_the_loop(source, pairs):
    network = ColorFeatures()
    matches = match_pair(extractor(network), source, pairs[0], size=SIZE, queries=60, seed=3)
    maps = []
    for frame in (matches.frames[0], matches.frames[1]):
        color = (frame.color / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        maps.append(np.concatenate([color[::2, ::2], np.ones((60, 80, 1))], -1))
        maps[-1] /= np.linalg.norm(maps[-1], axis=-1, keepdims=True)
    right = 0
    for (u, v), predicted in zip(matches.query, matches.predicted, strict=True):
        similarity = maps[1] @ maps[0][int(v) // 2, int(u) // 2]
        i, j = np.unravel_index(similarity.argmax(), similarity.shape)
        column, row = int(predicted[0]) // 2, int(predicted[1]) // 2
        right += bool((i, j) == (row, column) or similarity[i, j] - similarity[row, column] < 1e-6)
    assert right == 60
    truth_depth = matches.frames[1].depth[matches.truth[:, 1].astype(int), matches.truth[:, 0].astype(int)]
    assert (truth_depth > 0).all()


def test_recall_is_the_mean_over_pairs_and_falls_with_noise(source, pairs):
    clean = evaluate_matching(extractor(ColorFeatures()), source, pairs, size=SIZE, queries=100)
    noisy = evaluate_matching(extractor(ColorFeatures(noise=5.0)), source, pairs, size=SIZE, queries=100)
    strict = evaluate_matching(extractor(ColorFeatures()), source, pairs, size=SIZE, queries=100, threshold=1.0)
    assert clean.recall == pytest.approx(np.mean(clean.per_pair))
    assert len(clean.per_pair) == len(pairs)
    assert clean.queries == 100 * len(pairs)
    assert clean.recall > strict.recall > noisy.recall
    assert noisy.recall < 0.05
    assert clean.chance == pytest.approx(np.pi * 16 / (120 * 160))


def test_every_pair_draws_its_own_queries(source, pairs):
    result = evaluate_matching(extractor(ColorFeatures()), source, [pairs[0]] * 2, size=SIZE, queries=30, seed=4)
    alone = [match_pair(extractor(ColorFeatures()), source, pairs[0], size=SIZE, queries=30, seed=s) for s in (4, 5)]
    assert not np.array_equal(alone[0].query, alone[1].query)
    assert result.per_pair == tuple(float((matches.error <= 4).mean()) for matches in alone)


def test_pairs_that_cannot_be_read_are_counted(source, pairs):
    skips = SkippedFrames()
    broken = Pair(pairs[0].scene, "999999", pairs[0].frame1, 1.0)
    result = evaluate_matching(extractor(ColorFeatures()), source, [broken, *pairs], size=SIZE, skips=skips)
    assert len(result.per_pair) == len(pairs)
    assert "missing" in skips.summary()
    with pytest.raises(DataError, match="could be evaluated"):
        evaluate_matching(extractor(ColorFeatures()), source, [broken], size=SIZE)


def test_pair_without_common_surface_is_a_bad_pair(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    pose = np.loadtxt(folder / "frame-000010.pose.txt")
    pose[:3, 3] += 100
    np.savetxt(folder / "frame-000010.pose.txt", pose)
    with pytest.raises(BadFrame, match="no match"):
        match_pair(extractor(ColorFeatures()), SevenScenes(folder), Pair("kitchen", "000000", "000010", 0), size=SIZE)


def test_maps_of_an_encoder_are_matched_side_by_side():
    encoder = ResNetEncoder(18, width=8, out_indices=(1, 2, 3, 4)).eval()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, maps = EncoderMaps(encoder)(image), encoder(image)
    assert features.shape == (1, 8 + 16 + 32 + 64, 32, 48)
    shares = [bilinear_shares(size, m.shape[2:]) for m in maps for size in [(32, 48)]]
    for row, column in ((0, 0), (31, 47), (7, 20), (16, 1), (30, 46)):
        expected = []
        for m, (down, along) in zip(maps, shares, strict=True):
            unit = m[0] / m[0].norm(dim=0)
            expected.append(torch.einsum("chw,h,w->c", unit, down[row], along[column]))
        assert torch.allclose(features[0, :, row, column], torch.cat(expected), atol=1e-5)


def bilinear_shares(large, small):
    """[large, small] for each axis: how much of each small cell is in each large one; a cell is at its center."""
    shares = []
    for many, few in zip(large, small, strict=True):
        table = torch.zeros(many, few)
        for k in range(many):
            place = min(max((k + 0.5) * few / many - 0.5, 0), few - 1)
            for cell in range(few):
                table[k, cell] = max(0, 1 - abs(place - cell))
        shares.append(table)
    return shares
