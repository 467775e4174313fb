"""Probes of 3D backbones: features whose right answer is known, draws by name, the random-init baseline beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError, UnknownName
from geo_pretrain.loading import load_backbone
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds
from geo_pretrain.training.data.labelled.clouds.voxels import voxels_of
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.evaluation import probes
from geo_pretrain.training.evaluation.probes import (
    INPUT,
    RANDOM,
    CloudData,
    ProbeSpec,
    compare_probes,
    fit_head,
    probe_backbone,
    probe_extractor,
    run_probes,
)
from tests.training.painted_clouds import COLORS, ROOMS, Given, painted, tiny_unet
from tests.zoo import write_tiny_3d

METER = VoxelContract(1.0, ("R", "G", "B"), offset=-0.5)
SPEC = ProbeSpec(pixels=200)


@pytest.fixture(scope="module")
def rooms():
    return tuple(open_labelled("rooms", None, split, task="segmentation", options=ROOMS) for split in ("train", "val"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_3d(tmp_path_factory.mktemp("tiny") / "tiny_net_srunet34").folder


def probe_clouds(probe, network, contract, train, val, classes, spec=SPEC, **options):
    """One probe of a network on clouds that are given."""
    network.contract = contract
    splits = [CloudData(probe_extractor(network), clouds, classes) for clouds in (train, val)]
    return run_probes([probe], *splits, spec, **options)[probe]


def test_linear_probe_reads_classes_from_features_that_tell_them():
    train, val = [painted(k) for k in range(3)], [painted(k) for k in range(3, 5)]
    found = probe_clouds("linear", Given(), COLORS, train, val, 3, SPEC)
    assert found.miou == found.accuracy == 1
    assert found.fitted == 3 * math.ceil(200 / 3)
    assert found.measured == sum(int((voxels_of(cloud, COLORS)[2] > 0).sum()) for cloud in val)
    assert found.confusion.shape == (4, 4)
    assert found.confusion[0].sum() == 0
    blind = probe_clouds("linear", Given(constant=True), COLORS, train, val, 3, SPEC)
    assert 0.05 < blind.miou < 0.2  # one class for all: a third of the voxels, over three classes
    steps = []
    probe_clouds("linear", Given(), COLORS, train, val, 3, SPEC, progress=lambda d, t: steps.append((d, t)))
    assert steps == [(k, 5) for k in range(1, 6)]


def test_voxels_of_a_probe_are_drawn_for_each_cloud_by_seed_name_and_part(monkeypatch):
    """Each labelled voxel has a color of its own, so what is drawn can be told."""
    read = []

    def fit(samples, **options):
        read.append(samples)
        return fit_head(samples, **options)

    def judge(bank, queries, **options):
        read.append(queries)
        return queries.labels

    monkeypatch.setattr(probes, "fit_head", fit)
    monkeypatch.setattr(probes, "knn_predict", judge)

    def cloud(name):
        colors = np.stack([np.arange(200), np.full(200, 7), np.full(200, 9)], 1).astype(np.uint8)
        places = np.stack([np.arange(200), np.zeros(200), np.zeros(200)], 1).astype(np.float32) + 0.5
        return LabelledCloud(name, places, colors, np.arange(200, dtype=np.int64) % 3)

    def drawn(*names, pixels=30, seed=0, probe="linear"):
        spec, clouds = ProbeSpec(pixels=pixels, iterations=1, seed=seed), [cloud(name) for name in names]
        read.clear()
        probe_clouds(probe, Given(), METER, clouds, clouds, 2, spec)
        (found,) = read
        rows = ((found.features[:, 0] + 0.5) * 255).round().long()
        assert torch.equal(rows % 3, found.labels)
        return [own.tolist() for own in rows.chunk(len(names))]

    (alone,) = drawn("a")
    assert len(set(alone)) == 30
    assert alone != sorted(alone)
    assert drawn("a") == [alone]
    first, second = drawn("a", "b", pixels=60)
    assert first == alone != second
    assert drawn("a", seed=1) != [alone]
    assert drawn("a", probe="knn") != [alone]  # those that are judged


def test_class_that_no_training_voxel_has_is_never_predicted_and_absent_ones_do_not_count():
    train, val = [painted(0, classes=(1, 2))], [painted(1, classes=(1, 3))]
    found = probe_clouds("linear", Given(), COLORS, train, val, 3, SPEC)
    assert found.confusion[:, 3].sum() == 0
    ious = [found.confusion[c, c] / (found.confusion[c].sum() + found.confusion[:, c].sum() - found.confusion[c, c])
            for c in (1, 3)]  # fmt: skip
    assert found.miou == pytest.approx(np.mean(ious))


def test_probe_needs_labels():
    blank = LabelledCloud("blank", painted(0).points, painted(0).colors, np.zeros(400, np.int64))
    with pytest.raises(DataError, match="No labelled voxel in 1 clouds"):
        probe_clouds("linear", Given(), COLORS, [blank], [painted(0)], 3, SPEC)
    with pytest.raises(DataError, match="judge"):
        probe_clouds("linear", Given(), COLORS, [painted(0)], [blank], 3, SPEC)


def test_features_of_a_unet_are_those_before_its_last_layer():
    network = tiny_unet(normalize=False).eval()
    network.contract = COLORS
    coords, feats, _ = voxels_of(painted(0), COLORS)
    x = SparseTensor(coords, feats)
    (features,), _ = CloudData(probe_extractor(network), [painted(0)], 3).load(painted(0).id)
    with torch.no_grad():
        assert torch.allclose(features @ network.final.kernel + network.final.bias, network(x).feats, atol=1e-5)
    assert features.shape == (len(coords), network.planes[-1])


def test_backbone_is_probed_beside_its_random_init_baseline(folder, rooms):
    spec, done = ProbeSpec(size=(32, 32), pixels=300, iterations=30, seed=3), []
    found = compare_probes(folder, *rooms, spec, progress=lambda *at: done.append(at))
    assert list(found) == [INPUT, RANDOM, str(folder)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        twin = load_backbone(folder, pretrained=False)
    network = load_backbone(folder)
    clouds = [labelled_clouds(source, (32, 32)) for source in rooms]
    assert done == [(k, 3 * (len(clouds[0]) + 2 * len(clouds[1]))) for k in range(1, len(done) + 1)]
    assert len(done) == done[0][1]
    results = [probe_clouds("linear", n, n.contract, *clouds, len(rooms[0].classes), spec) for n in (twin, network)]
    for name, alone in zip((RANDOM, str(folder)), results, strict=True):
        assert np.array_equal(found[name]["linear"].confusion, alone.confusion)
    assert not np.array_equal(*(alone.confusion for alone in results))
    assert found[RANDOM]["knn"].measured <= 300
    assert set(found[RANDOM]) == {"linear", "knn"}
    by_name = probe_backbone(folder, *rooms, spec)
    assert np.array_equal(by_name.confusion, found[str(folder)]["linear"].confusion)
    with pytest.raises(UnknownName, match="linear"):
        compare_probes(folder, *rooms, spec, probes=["liner"])


def test_a_probe_has_the_settings_of_its_spec_and_a_network_that_is_not_trained(monkeypatch):
    given = {}
    monkeypatch.setattr(
        probes, "fit_head", lambda samples, **options: given.update(options) or fit_head(samples, **options)
    )
    monkeypatch.setattr(probes, "knn_predict", lambda bank, queries, **options: given.update(options) or queries.labels)
    spec, clouds = ProbeSpec(pixels=50, penalty=0.3, iterations=7, k=5, temperature=0.4), [painted(0)]
    network = Given().train()
    probe_clouds("linear", network, COLORS, clouds, clouds, 3, spec)
    assert not network.training
    assert probe_clouds("knn", network, COLORS, clouds, clouds, 3, spec).accuracy == 1
    assert given == {"penalty": 0.3, "iterations": 7, "k": 5, "temperature": 0.4}
