"""Losses of offsets to instances' centers against slow loops over voxels."""

from __future__ import annotations

import math

import pytest
import torch

from geo_pretrain.training import losses

VOXEL = 0.05


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.randint(-50, 200, (80, 4), generator=generator, dtype=torch.int32)
    coords[:, 0] = torch.arange(80) % 3
    instances = torch.randint(0, 5, (80,), generator=generator) * 1000  # numbers have gaps
    instances[coords[:, 0] == 2] = 0  # a cloud without instances
    predicted = torch.randn(80, 3, generator=generator)
    predicted[:3] = 0
    return coords, instances, predicted


def slow_offsets(coords, instances):
    rows = []
    for (cloud, *cell), number in zip(coords.tolist(), instances.tolist(), strict=True):
        own = [c[1:] for c, n in zip(coords.tolist(), instances.tolist(), strict=True) if (c[0], n) == (cloud, number)]
        center = [sum(c[axis] for c in own) / len(own) for axis in range(3)]
        rows.append([(center[axis] - cell[axis]) * VOXEL if number else 0.0 for axis in range(3)])
    return rows


def slow_terms(predicted, offsets, instances):
    far, turned, count = 0.0, 0.0, 0
    for p, t, number in zip(predicted.tolist(), offsets, instances.tolist(), strict=True):
        if not number:
            continue
        count += 1
        far += sum(abs(a - b) for a, b in zip(p, t, strict=True))
        norms = [math.sqrt(sum(v * v for v in vector)) + 1e-8 for vector in (p, t)]
        turned -= sum(a / norms[0] * b / norms[1] for a, b in zip(p, t, strict=True))
    return far / (count + 1e-6), turned / (count + 1e-6)


def test_offsets_lead_to_the_mean_of_each_instance_of_each_cloud():
    coords, instances, _ = random_case()
    offsets = losses.center_offsets(coords, instances, VOXEL)
    torch.testing.assert_close(offsets, torch.tensor(slow_offsets(coords, instances)))
    assert offsets.dtype == torch.float32
    assert (offsets[instances == 0] == 0).all()


def test_losses_are_the_slow_ones():
    coords, instances, predicted = random_case()
    offsets, mask = losses.center_offsets(coords, instances, VOXEL), instances > 0
    far, turned = slow_terms(predicted, slow_offsets(coords, instances), instances)
    assert losses.offset_loss(predicted, offsets, mask).item() == pytest.approx(far, rel=1e-5)
    assert losses.direction_loss(predicted, offsets, mask).item() == pytest.approx(turned, rel=1e-4)


def test_perfect_offsets_have_the_lowest_losses():
    coords, instances, _ = random_case()
    offsets = losses.center_offsets(coords, instances, VOXEL)
    assert losses.offset_loss(offsets, offsets, instances > 0) == 0
    assert losses.direction_loss(offsets, offsets, instances > 0).item() == pytest.approx(-1, abs=1e-5)


def test_without_instances_losses_are_0_and_gradients_finite():
    coords, _, _ = random_case()
    nothing = torch.zeros(80, dtype=torch.int64)
    offsets = losses.center_offsets(coords, nothing, VOXEL)
    assert (offsets == 0).all()
    predicted = torch.zeros(80, 3, requires_grad=True)  # no direction
    total = losses.offset_loss(predicted, offsets, nothing > 0) + losses.direction_loss(predicted, offsets, nothing > 0)
    total.backward()
    assert total == 0
    assert torch.isfinite(predicted.grad).all()
    assert losses.center_offsets(coords[:0], nothing[:0], VOXEL).shape == (0, 3)


def test_a_voxel_in_its_center_has_no_direction_and_a_finite_gradient():
    predicted = torch.zeros(1, 3, requires_grad=True)
    loss = losses.direction_loss(predicted, torch.zeros(1, 3), torch.tensor([True]))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(predicted.grad).all()
