"""Samples of whole labelled clouds: each rule of labels and each step of augmentation against a slow or closed form."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.cloud_recipe import CloudAugment, CloudSpec, CropSpec
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.samples import cloud_augment as steps
from geo_pretrain.training.data.samples.whole_clouds import (
    collate_voxels,
    evaluation_sample,
    training_sample,
    voxel_of_points,
)

COLORS = VoxelContract(0.25, ("R", "G", "B"), offset=-0.5)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def cloud():
    generator = np.random.default_rng(3)
    points = generator.uniform(-2, 2, (900, 3)).astype(np.float32)
    labels = generator.choice(4, 900, p=(0.1, 0.6, 0.2, 0.1))
    return LabelledCloud(
        "room/1", points, generator.integers(0, 256, (900, 3), np.uint8), labels, generator.integers(0, 3, 900)
    )


def members(cloud, sample):
    """Points of each voxel, found one by one with floor division: {cell: [rows]}."""
    cells = np.floor(cloud.points[sample.chosen.numpy()] / np.float32(0.25)).astype(int)
    cells -= cells.min(0)
    groups: dict[tuple, list] = {}
    for row, cell in enumerate(map(tuple, cells)):
        groups.setdefault(cell, []).append(row)
    return groups


def slow_label(labels, rule):
    if rule == "first":
        return labels[0]
    if rule == "agree":
        return labels[0] if len(set(labels)) == 1 else 0
    known = [label for label in labels if label > 0]
    if rule == "agree_known":
        return known[0] if len(set(known)) == 1 else 0
    counts = Counter(known)
    return min(counts, key=lambda label: (-counts[label], label)) if known else 0


@pytest.mark.parametrize("rule", ["agree", "agree_known", "majority", "first"])
def test_a_voxels_label_instance_and_color_by_each_rule(cloud, rule):
    sample = evaluation_sample(cloud, CloudSpec(labels=rule), COLORS)
    groups = members(cloud, sample)
    assert len(sample) == len(groups)
    for row, cell in enumerate(map(tuple, sample.coords[:, 1:].tolist())):
        rows = groups[cell]
        label = slow_label(cloud.labels[rows].tolist(), rule)
        assert sample.labels[row] == label
        objects = {int(cloud.instances[r]) for r in rows if cloud.labels[r] == label and label > 0}
        assert sample.instances[row] == (objects.pop() if len(objects) == 1 else 0)
        assert sample.index[row] == rows[0]
        assert set(np.flatnonzero(sample.inverse.numpy() == row)) == set(rows)
        color = sample.feats[row].numpy()
        assert np.allclose(color, cloud.colors[rows[0]] / 255 - 0.5, atol=1e-6)


def test_every_point_gets_a_voxel_also_those_that_were_not_drawn_or_lie_outside(cloud):
    sample = evaluation_sample(cloud, CloudSpec(points=100, bounds=1.5), COLORS)
    assert 0 < len(sample.chosen) < 100
    voxel = voxel_of_points(sample, cloud).numpy()
    drawn = sample.chosen.numpy()
    for row in range(len(cloud)):
        nearest = ((cloud.points[drawn].astype(float) - cloud.points[row]) ** 2).sum(1).argmin()
        assert voxel[row] == sample.inverse[nearest]
    again = evaluation_sample(cloud, CloudSpec(points=100, bounds=1.5), COLORS)
    assert torch.equal(again.chosen, sample.chosen)
    other = evaluation_sample(replace(cloud, id="room/2"), CloudSpec(points=100, bounds=1.5), COLORS)
    assert not torch.equal(other.chosen, sample.chosen[: len(other.chosen)])


def test_the_motion_takes_the_clouds_points_to_the_samples(cloud):
    augment = CloudAugment(
        mirror=(0.5, 0.5, 0), rotate=(5, 5, 180), scale=(0.9, 1.1), translate=(0.2, 0.2, 0.2), center="centroid",
        crop=CropSpec(half=1.5),
    )  # fmt: skip
    spec = CloudSpec(normalize="unit_sphere", points=500, augment=replace(augment, crop=None))
    for chosen_spec in (spec, CloudSpec(augment=augment)):
        for number in range(3):
            sample = training_sample(cloud, chosen_spec, COLORS, seeded(number))
            points = torch.from_numpy(cloud.points[sample.chosen.numpy()]).double()
            homogeneous = torch.cat([points, torch.ones(len(points), 1)], dim=1)
            assert torch.allclose((homogeneous @ sample.motion.T)[:, :3].float(), sample.points, atol=1e-5)
    assert len(sample.points) < len(cloud)
    norms = evaluation_sample(cloud, spec, COLORS).points.norm(dim=1)
    assert 0.5 < float(norms.max()) <= 1.0 + 1e-6


def test_dropout_flips_and_shift_move_voxels_with_their_rows(cloud):
    augment = CloudAugment(dropout=0.3, dropout_prob=1.0, flip_axes="xy", flip_prob=1.0, shift=100, shift_axes="xy")
    spec = CloudSpec(augment=augment)
    whole = evaluation_sample(cloud, spec, COLORS)
    sample = training_sample(cloud, spec, COLORS, seeded(4))
    assert len(sample) == int(len(whole) * 0.7)
    assert sample.coords[:, 3].max() == whole.coords[:, 3].max()  # z neither flipped nor shifted
    assert sample.coords[:, 1:3].min() >= 0
    for row in range(len(sample)):
        inside = (sample.inverse == row).nonzero()[:, 0]
        first = int(sample.index[row])
        assert first == inside.min()
        assert sample.labels[row] == whole.labels[whole.inverse[first]]
        assert torch.equal(sample.feats[row], whole.feats[whole.inverse[first]])
    gone = sample.inverse == -1
    assert gone.any()


def test_steps_of_augmentation_in_closed_form():
    cells = torch.tensor([[0, 1, 2], [4, 3, 5]], dtype=torch.int32)
    flips = {tuple(steps.flipped(cells, CloudAugment(flip_axes="y", flip_prob=1.0), seeded(n))[:, 1].tolist())
             for n in range(20)}  # fmt: skip
    assert flips == {(1, 3), (2, 0)}
    moves = torch.stack([steps.shifted(cells, CloudAugment(shift=7), seeded(n)) - cells for n in range(200)])
    assert moves.min() == 0
    assert moves.max() == 6
    assert torch.equal(moves[:, 0], moves[:, 1])
    colors = torch.tensor([[50.0, 10, 7], [100, 30, 7]])
    assert torch.allclose(steps.stretched(colors, 1.0), torch.tensor([[0.0, 0, 7], [255, 255, 7]]))
    assert torch.allclose(steps.stretched(colors, 0.5), torch.tensor([[25.0, 5, 7], [177.5, 142.5, 7]]))
    moved = steps.augmented_colors(colors, CloudAugment(color_translation=0.1, color_translation_prob=1.0), seeded(1))
    shift = moved - colors
    assert torch.allclose(shift[0, :2], shift[1, :2], atol=1e-4)
    assert shift.abs().max() <= 25.5
    jitter = steps.jittered(torch.zeros(4000, 3), CloudAugment(jitter=0.02, jitter_clip=0.03), seeded()).abs()
    assert jitter.max() == pytest.approx(0.03)
    assert 0.010 < jitter.mean() < 0.02
    low = steps.draw_rows(5, 12, seeded())
    assert len(low) == 12
    assert len(set(steps.draw_rows(12, 5, seeded()).tolist())) == 5
    specs = [CloudAugment(scale=(0.5, 2.0), scale_axes=axes) for axes in (False, True)]
    factors = [steps.random_motion(torch.zeros(1, 3), spec, seeded(n)) for n in range(50) for spec in specs]
    factors = torch.stack([motion.diagonal()[:3] for motion in factors])
    assert factors.min() >= 0.5
    assert factors.max() <= 2.0
    assert torch.equal(factors[::2, 0], factors[::2, 2])
    assert not torch.equal(factors[1::2, 0], factors[1::2, 2])


def test_crops_are_cubes_about_a_moved_middle_and_small_clouds_are_kept_whole():
    points = torch.rand(5000, 3, generator=seeded()) * torch.tensor([20.0, 10, 3])
    spec = CropSpec(half=2.0, shift=(0.2, 0.2, 0.05))
    middles = []
    for number in range(30):
        inside = points[steps.crop_rows(points, spec, seeded(number))]
        assert (inside.amax(0) - inside.amin(0) <= 4.0).all()
        middles.append((inside.amax(0) + inside.amin(0)) / 2)
    spread = torch.stack(middles).amax(0) - torch.stack(middles).amin(0)
    assert 5 < spread[0] <= 8.2
    assert 2 < spread[1] <= 4.2
    assert len(steps.crop_rows(points, replace(spec, minimum=30.0), seeded())) == 5000


def test_a_batch_stops_at_the_limit_of_voxels(cloud):
    samples = [evaluation_sample(cloud, CloudSpec(), COLORS) for _ in range(3)]
    size = len(samples[0])
    batch = collate_voxels(samples, limit=2 * size + 1)
    assert batch["counts"] == [size, size]
    assert batch["dropped"] == 1
    assert batch["coords"][:, 0].unique().tolist() == [0, 1]
    assert collate_voxels(samples, limit=3)["counts"] == [size]  # one is always kept
    unlabelled = evaluation_sample(replace(cloud, labels=None, instances=None), CloudSpec(), COLORS)
    assert "labels" not in collate_voxels([samples[0], unlabelled])


def test_clouds_that_cannot_be_used_say_why(cloud):
    with pytest.raises(DataError, match=r"neither colors nor remission.*features=ones"):
        evaluation_sample(replace(cloud, colors=None), CloudSpec(), COLORS)
    gray = replace(cloud, colors=None, intensity=np.zeros(900, np.float32))
    with pytest.raises(DataError, match=r"has remission.*features=gray"):
        evaluation_sample(gray, CloudSpec(), COLORS)
    far = replace(cloud, points=np.full_like(cloud.points, np.nan))
    with pytest.raises(BadFrame, match="room/1"):
        evaluation_sample(far, CloudSpec(), COLORS)
    with pytest.raises(BadFrame, match="no point in a random cube"):
        training_sample(cloud, CloudSpec(augment=CloudAugment(crop=CropSpec(half=1e-3))), COLORS, seeded())
