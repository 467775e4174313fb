"""3D fine-tuning: which weights are kept, steps by hand, evaluation as a sum over clouds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geo_pretrain.errors import DataError
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.voxels import voxels_of
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.finetune.in_memory import PointsSpec, evaluate_clouds, finetune_clouds
from geo_pretrain.training.networks3d import segmentation_srunet
from tests.training.painted_clouds import COLORS, ONES, painted, tiny_unet


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
        finetune_clouds(copy.deepcopy(start), COLORS, clouds[:3], clouds[3:], spec, seed=seed,
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
    result = finetune_clouds(network, COLORS, [cloud], [cloud], spec, seed=4)
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
    assert finetune_clouds(network, COLORS, [blank], [cloud], spec).losses == (0.0,)


def test_later_steps_are_those_computed_by_hand():
    """The order goes through several permutations, rates fall, momentum is dampened; BatchNorm counts as told."""
    clouds = [painted(k, count=150) for k in range(3)]
    network = segmentation_srunet(tiny_unet(), 4, seed=0)
    twin = copy.deepcopy(network).train()
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 0.3
    spec = PointsSpec(steps=3, batch=2, lr=0.05, momentum=0.8, dampening=0.4, weight_decay=0.01, bn_momentum=0.3)
    result = finetune_clouds(network, COLORS, clouds, clouds, spec, seed=4)
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
    total = evaluate_clouds(network, ONES, clouds)
    assert np.array_equal(total, sum(evaluate_clouds(network, ONES, [cloud]) for cloud in clouds))
    assert total[:, 0].sum() == total[0].sum() == 0
    assert total.sum() == sum(int((voxels_of(cloud, ONES)[2] > 0).sum()) for cloud in clouds)
    assert not network.training
    with pytest.raises(DataError, match="evaluate on"):
        evaluate_clouds(network, ONES, [])
    with pytest.raises(DataError, match="train on"):
        finetune_clouds(network, ONES, [], clouds)
