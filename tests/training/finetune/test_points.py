"""3D probes and fine-tuning: features whose right answer is known, labels by a loop over points, one step by hand."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import CheckpointError, DataError, RecipeError, UnknownName
from geo_pretrain.loading import load_backbone
from geo_pretrain.rooms import CLASSES
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.evaluation.probes import RANDOM, ProbeSpec, fit_head
from geo_pretrain.training.finetune import points
from geo_pretrain.training.finetune.points import (
    LabelledCloud,
    PointsSpec,
    commonest,
    compare_point_probes,
    evaluate_points,
    finetune_points,
    labelled_clouds,
    linear_probe_points,
    segmentation_srunet,
    voxel_features,
    voxels_of,
)
from tests.training.finetune.sweeps import Squares
from tests.zoo import write_tiny, write_tiny_3d

ROOMS = {"scenes": 2, "val_scenes": 1, "frames": 3, "labelled": 2, "width": 64, "height": 64}
COLORS = VoxelContract(0.1, ("R", "G", "B"), offset=-0.5)
ONES = VoxelContract(0.1, ("one",) * 3)
METRE = VoxelContract(1.0, ("R", "G", "B"), offset=-0.5)
PAINT = np.array([[0, 0, 0], [250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)
SPEC = ProbeSpec(pixels=200)


def tiny_unet(**options):
    torch.manual_seed(5)
    return SRUNet("18A", width=8, **options)


def painted(number, *, classes=(1, 2, 3), count=400):
    """A box of points whose color tells their class; a part has no label."""
    generator = np.random.default_rng(number)
    points = generator.uniform(-1, 1, (count, 3)).astype(np.float32)
    labels = np.array(classes)[(np.floor((points[:, 0] + 1) * 5).astype(int)) % len(classes)]
    colors = PAINT[labels]
    return LabelledCloud(f"cloud/{number}", points, colors, np.where(points[:, 2] > 0.8, 0, labels).astype(np.int64))


class Given(nn.Module):
    """A network that gives its input features, or with `constant` nothing but ones."""

    def __init__(self, constant=False):
        super().__init__()
        self.unused, self.constant = nn.Parameter(torch.zeros(1)), constant

    def forward(self, x):
        return x.with_feats(torch.ones_like(x.feats) if self.constant else x.feats)


@pytest.fixture(scope="module")
def rooms():
    return tuple(open_labelled("rooms", None, split, task="segmentation", options=ROOMS) for split in ("train", "val"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_3d(tmp_path_factory.mktemp("tiny") / "tiny_net_srunet34").folder


def test_commonest_label_is_that_of_a_loop_over_voxels():
    generator = torch.Generator().manual_seed(0)
    labels, inverse = (torch.randint(high, (300,), generator=generator) for high in (5, 40))
    labels[inverse == 7] = 0
    expected = []
    for voxel in range(41):  # the last one has no point at all
        votes = Counter(int(label) for label, of in zip(labels, inverse, strict=True) if of == voxel and label > 0)
        expected.append(min(votes, key=lambda label: (-votes[label], label)) if votes else 0)
    assert commonest(labels, inverse, 41).tolist() == expected
    assert expected[7] == expected[40] == 0
    assert len(set(expected)) == 5


def test_voxels_carry_the_labels_of_their_points():
    cloud = painted(0)
    coords, feats, labels = voxels_of(cloud, COLORS)
    inside: dict[tuple[int, ...], list[int]] = {}
    for point, label in zip(cloud.points, cloud.labels, strict=True):
        inside.setdefault(tuple(math.floor(np.float32(x) / np.float32(0.1)) for x in point), []).append(int(label))
    assert {tuple(row) for row in coords[:, 1:].tolist()} == set(inside)
    for row, label in zip(coords[:, 1:].tolist(), labels.tolist(), strict=True):
        known = [found for found in inside[tuple(row)] if found]
        assert (label in known) if known else label == 0
    assert feats.min() >= -0.5
    assert feats.max() <= 0.5


def test_turns_of_training_keep_labels_and_heights():
    """Turned upright, a point keeps its distance to the centroid, and nearly its height above it."""
    cloud = painted(1)
    fine = VoxelContract(0.001, ("R", "G", "B"), offset=-0.5)  # every point has a voxel of its own
    generator = torch.Generator().manual_seed(1)
    coords, feats, labels = voxels_of(cloud, fine, generator)
    assert len(coords) == len(cloud.points)
    points, center = torch.from_numpy(cloud.points), torch.from_numpy(cloud.points).mean(0)
    turned = coords[:, 1:] * 0.001
    assert torch.allclose((points - center).norm(dim=1), turned.norm(dim=1), atol=5e-3)
    assert (turned[:, 2] - (points - center)[:, 2]).abs().max() < 0.15
    assert not torch.allclose(turned, points - center, atol=0.1)
    assert torch.equal(labels, torch.from_numpy(cloud.labels))
    again = voxels_of(cloud, fine, torch.Generator().manual_seed(1))
    assert torch.equal(coords, again[0])
    assert torch.equal(feats, again[1])


def test_clouds_of_rooms_are_the_pixels_of_labelled_frames(rooms):
    train, _ = rooms
    clouds = labelled_clouds(train)
    assert [cloud.id for cloud in clouds] == train.ids()
    assert len(clouds) == 4
    scene, _, frame_id = clouds[1].id.partition("/")
    frame = train.rooms.load(scene, frame_id)
    k, row = frame.intrinsics, 0
    for v in range(frame.depth.shape[0]):
        for u in range(frame.depth.shape[1]):
            z = float(frame.depth[v, u])
            if z == 0:
                continue
            if (u + v) % 13 == 0:
                local = np.array([(u - k[0, 2]) / k[0, 0] * z, (v - k[1, 2]) / k[1, 1] * z, z, 1])
                assert np.allclose(clouds[1].points[row], (frame.cam_to_world @ local)[:3], atol=1e-4)
                assert clouds[1].colors[row].tolist() == frame.color[v, u].tolist()
                assert train.classes[clouds[1].labels[row] - 1] == CLASSES[frame.semantic[v, u]]
            row += 1
    assert row == len(clouds[1].points)
    assert max(len(cloud.points) for cloud in labelled_clouds(train, (32, 32))) <= 32 * 32
    part = subset(train, 0.5, 0)
    assert [cloud.id for cloud in labelled_clouds(part)] == part.ids() != train.ids()


def test_source_without_depth_is_refused():
    with pytest.raises(RecipeError, match=r"'squares' has no depth.*rooms"):
        labelled_clouds(Squares("train"))


def test_linear_probe_reads_classes_from_features_that_tell_them():
    train, val = [painted(k) for k in range(3)], [painted(k) for k in range(3, 5)]
    found = linear_probe_points(Given(), COLORS, train, val, 3, SPEC)
    assert found.miou == found.accuracy == 1
    assert found.fitted == 3 * math.ceil(200 / 3)
    assert found.measured == sum(int((voxels_of(cloud, COLORS)[2] > 0).sum()) for cloud in val)
    assert found.confusion.shape == (4, 4)
    assert found.confusion[0].sum() == 0
    blind = linear_probe_points(Given(constant=True), COLORS, train, val, 3, SPEC)
    assert 0.05 < blind.miou < 0.2  # one class for all: a third of the voxels, over three classes
    steps = []
    linear_probe_points(Given(), COLORS, train, val, 3, SPEC, progress=lambda d, t: steps.append((d, t)))
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

    monkeypatch.setattr(points, "fit_head", fit)
    monkeypatch.setattr(points, "vote", judge)

    def cloud(name):
        colors = np.stack([np.arange(200), np.full(200, 7), np.full(200, 9)], 1).astype(np.uint8)
        places = np.stack([np.arange(200), np.zeros(200), np.zeros(200)], 1).astype(np.float32) + 0.5
        return LabelledCloud(name, places, colors, np.arange(200, dtype=np.int64) % 3)

    def drawn(*names, pixels=30, seed=0, probe="linear"):
        spec, clouds = ProbeSpec(pixels=pixels, iterations=1, seed=seed), [cloud(name) for name in names]
        read.clear()
        samples = points._read(Given(), METRE, clouds, spec, "train", count())
        points._probe(probe, Given(), METRE, samples, clouds, 2, spec, count())
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
    found = linear_probe_points(Given(), COLORS, train, val, 3, SPEC)
    assert found.confusion[:, 3].sum() == 0
    ious = [found.confusion[c, c] / (found.confusion[c].sum() + found.confusion[:, c].sum() - found.confusion[c, c])
            for c in (1, 3)]  # fmt: skip
    assert found.miou == pytest.approx(np.mean(ious))


def test_probe_needs_labels():
    blank = LabelledCloud("blank", painted(0).points, painted(0).colors, np.zeros(400, np.int64))
    with pytest.raises(DataError, match="No labelled voxel in 1 clouds"):
        linear_probe_points(Given(), COLORS, [blank], [painted(0)], 3, SPEC)
    with pytest.raises(DataError, match="judge"):
        linear_probe_points(Given(), COLORS, [painted(0)], [blank], 3, SPEC)


def test_features_of_a_unet_are_those_before_its_last_layer():
    network = tiny_unet(normalize=False).eval()
    coords, feats, _ = voxels_of(painted(0), COLORS)
    x = SparseTensor(coords, feats)
    features = voxel_features(network, x)
    with torch.no_grad():
        assert torch.allclose(features @ network.final.kernel + network.final.bias, network(x).feats, atol=1e-5)
    assert features.shape == (len(coords), network.planes[-1])


def test_backbone_is_probed_beside_its_random_twin(folder, rooms):
    spec, done = ProbeSpec(size=(32, 32), pixels=300, iterations=30, seed=3), []
    found = compare_point_probes(folder, *rooms, spec, progress=lambda *at: done.append(at))
    assert list(found) == [RANDOM, str(folder)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        twin = load_backbone(folder, pretrained=False)
    network = load_backbone(folder)
    clouds = [labelled_clouds(source, (32, 32)) for source in rooms]
    assert done == [(k, 2 * (len(clouds[0]) + 2 * len(clouds[1]))) for k in range(1, len(done) + 1)]
    assert len(done) == done[0][1]
    results = [linear_probe_points(n, n.contract, *clouds, len(rooms[0].classes), spec) for n in (twin, network)]
    for name, alone in zip(found, results, strict=True):
        assert np.array_equal(found[name]["linear"].confusion, alone.confusion)
    assert not np.array_equal(*(alone.confusion for alone in results))
    assert found[RANDOM]["knn"].measured <= 300
    assert set(found[RANDOM]) == {"linear", "knn"}
    with pytest.raises(UnknownName, match="linear"):
        compare_point_probes(folder, *rooms, spec, probes=["liner"])


def test_a_probe_has_the_settings_of_its_spec_and_a_network_that_is_not_trained(monkeypatch):
    given = {}
    monkeypatch.setattr(
        points, "fit_head", lambda samples, **options: given.update(options) or fit_head(samples, **options)
    )
    monkeypatch.setattr(points, "vote", lambda bank, queries, **options: given.update(options) or queries.labels)
    spec, clouds = ProbeSpec(pixels=50, penalty=0.3, iterations=7, k=5, temperature=0.4), [painted(0)]
    network = Given().train()
    linear_probe_points(network, COLORS, clouds, clouds, 3, spec)
    assert not network.training
    samples = points._read(network, COLORS, clouds, spec, "train", count())
    assert points._probe("knn", network, COLORS, samples, clouds, 3, spec, count()).accuracy == 1
    assert given == {"penalty": 0.3, "iterations": 7, "k": 5, "temperature": 0.4}


def test_image_backbone_is_refused(tmp_path, rooms):
    folder = write_tiny(tmp_path / "tiny_net_r18").folder
    with pytest.raises(CheckpointError, match="2D backbone"):
        compare_point_probes(folder, *rooms)


def test_segmentation_network_takes_all_but_the_last_layer():
    start = tiny_unet(in_chans=4, out_chans=16, normalize=True, stem_kernel=5)
    hosts = {transfer: segmentation_srunet(start, 4, seed=2, transfer=transfer) for transfer in (True, False)}
    kept, own = (hosts[transfer].state_dict() for transfer in (True, False))
    for key, value in start.state_dict().items():
        if key.startswith("final."):
            assert torch.equal(kept[key], own[key])
            assert kept[key].shape[-1] == 4
        else:
            assert torch.equal(kept[key], value)
    assert not torch.equal(own["conv0p1s1.kernel"], kept["conv0p1s1.kernel"])
    assert not hosts[True].normalize
    other = segmentation_srunet(start, 4, seed=3)
    assert not torch.equal(other.final.kernel, hosts[True].final.kernel)


def test_fine_tuning_learns_and_repeats():
    clouds = [painted(k) for k in range(4)]
    start = segmentation_srunet(tiny_unet(), 4, seed=0)
    spec = PointsSpec(steps=16, batch=2, lr=0.1)
    shown = []
    runs = [
        finetune_points(copy.deepcopy(start), COLORS, clouds[:3], clouds[3:], spec, seed=seed,
                        on_step=lambda step, loss: shown.append(step))
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].miou == runs[1].miou > 0.9
    assert runs[0].losses[-1] < 0.3 * runs[0].losses[0]
    assert shown[:16] == list(range(1, 17))


def test_first_step_is_the_one_computed_by_hand():
    """SGD's first step, with dampening, is that of the plain gradient of the mean over labelled voxels."""
    cloud = painted(0)
    network = segmentation_srunet(tiny_unet(), 4, seed=0)
    twin = copy.deepcopy(network).train()
    spec = PointsSpec(steps=1, batch=1, lr=0.2, weight_decay=0.01)
    result = finetune_points(network, COLORS, [cloud], [cloud], spec, seed=4)
    generator = torch.Generator().manual_seed(sample_seed(4, 0, 0))
    torch.randperm(1, generator=generator)  # the order is drawn first
    coords, feats, labels = voxels_of(cloud, COLORS, generator)
    logits = twin(SparseTensor(coords, feats)).feats
    rows = [F.log_softmax(row, 0)[label] for row, label in zip(logits, labels.tolist(), strict=True) if label]
    loss = -torch.stack(rows).mean()
    loss.backward()
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-4)
    for after, before in zip(network.parameters(), twin.parameters(), strict=True):
        expected = before - 0.2 * (before.grad + 0.01 * before)
        assert torch.allclose(after, expected, atol=1e-5)
    blank = LabelledCloud("blank", cloud.points, cloud.colors, np.zeros(400, np.int64))
    assert finetune_points(network, COLORS, [blank], [cloud], spec).losses == (0.0,)


def test_later_steps_are_those_computed_by_hand():
    """The order goes through several permutations, rates fall, momentum is dampened; BatchNorm counts as told."""
    clouds = [painted(k, count=150) for k in range(3)]
    network = segmentation_srunet(tiny_unet(), 4, seed=0)
    twin = copy.deepcopy(network).train()
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 0.3
    spec = PointsSpec(steps=3, batch=2, lr=0.05, momentum=0.8, dampening=0.4, weight_decay=0.01, bn_momentum=0.3)
    result = finetune_points(network, COLORS, clouds, clouds, spec, seed=4)
    generator = torch.Generator().manual_seed(sample_seed(4, 0, 0))
    order, moved, losses = [], {}, []
    for step in range(3):
        while len(order) < 2:
            order += torch.randperm(3, generator=generator).tolist()
        chosen, order = order[:2], order[2:]
        parts = [voxels_of(clouds[number], COLORS, generator) for number in chosen]
        coords, feats, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        coords[len(parts[0][0]) :, 0] = 1
        loss = F.cross_entropy(twin(SparseTensor(coords, feats)).feats, labels, ignore_index=0)
        twin.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for key, weight in twin.named_parameters():
                gradient = weight.grad + 0.01 * weight
                moved[key] = gradient if step == 0 else 0.8 * moved[key] + 0.6 * gradient
                weight -= 0.05 * (1 - step / 4) ** 0.9 * moved[key]
    assert result.losses == pytest.approx(losses, rel=1e-3)
    for (key, after), expected in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-3, msg=key)


def test_evaluation_is_a_sum_over_clouds_and_never_names_class_0():
    network = segmentation_srunet(tiny_unet(), 4, seed=0)
    with torch.no_grad():
        network.final.bias[0, 0] = 100.0
    clouds = [painted(0), painted(1)]
    total = evaluate_points(network, ONES, clouds)
    assert np.array_equal(total, sum(evaluate_points(network, ONES, [cloud]) for cloud in clouds))
    assert total[:, 0].sum() == total[0].sum() == 0
    assert total.sum() == sum(int((voxels_of(cloud, ONES)[2] > 0).sum()) for cloud in clouds)
    assert not network.training
    with pytest.raises(DataError, match="evaluate on"):
        evaluate_points(network, ONES, [])
    with pytest.raises(DataError, match="train on"):
        finetune_points(network, ONES, [], clouds)
