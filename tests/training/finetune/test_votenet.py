"""VoteNet: the published numbers of parameters and names, its parts against slow twins, codes of boxes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.finetune.box_coding import (
    SIZES,
    decode_boxes,
    encode_boxes,
    heading_bins,
    typical_sizes,
)
from geo_pretrain.training.finetune.votenet import Proposing, VoteNet, VoteNetShape, Voting, quiet_start
from geo_pretrain.training.geometry3d.boxes import box_iou
from geo_pretrain.training.losses.voting import Proposals

TINY = VoteNetShape(classes=3, heading_bins=4, seeds=12, proposals=6, group=4, radius=0.5)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny_votenet(shape=TINY):
    torch.manual_seed(0)
    return VoteNet(SRUNet("18A", width=8, out_chans=256), shape)


def tiny_input():
    generator = torch.Generator().manual_seed(1)
    coords = torch.unique(torch.randint(0, 12, (90, 3), generator=generator), dim=0)
    counts = [len(coords) - 20, 20]
    numbers = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))[:, None]
    positions = coords * 0.1 + 0.03
    return SparseTensor(torch.cat([numbers, coords], 1).int(), torch.ones(len(coords), 3)), positions, counts


def test_the_published_numbers_of_parameters():
    with torch.device("meta"):
        unet = SRUNet("34C", in_chans=3, out_chans=256)
    assert parameters(unet) == 37_869_536
    assert parameters(Voting(1)) == 199_171
    scannet, sunrgbd = Proposing(VoteNetShape(18)), Proposing(VoteNetShape(10, 12))
    assert parameters(scannet.vote_aggregation) == 66_688
    assert (parameters(scannet), parameters(sunrgbd)) == (112_737, 110_415)
    assert (scannet.conv3.out_channels, sunrgbd.conv3.out_channels) == (97, 79)


def test_names_of_weights_are_those_of_the_released_files():
    names = set(tiny_votenet().state_dict())
    assert {"backbone_net.net.conv0p1s1.kernel", "vgen.conv3.weight", "vgen.bn2.running_mean", "pnet.conv3.bias",
            "pnet.vote_aggregation.mlp_module.layer0.conv.weight", "pnet.bn1.weight", "mean_sizes",
            "pnet.vote_aggregation.mlp_module.layer2.bn.bn.running_var"} <= names  # fmt: skip
    heads = {name for name in names if not name.startswith("backbone_net.net.")}
    assert {name.partition(".")[0] for name in heads} == {"vgen", "pnet", "mean_sizes"}


def slow_ball(points, center, radius, count):
    inside = [k for k, p in enumerate(points) if float(((p - center) ** 2).sum()) < radius**2][:count]
    return (inside + inside[:1] * count)[:count]


@torch.no_grad()
def test_the_heads_are_the_slow_ones():
    network = tiny_votenet().eval()
    for layer in network.modules():  # so that norms in evaluation mode do something
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 2)
    x, positions, counts = tiny_input()
    output = network(x, positions, counts)
    features = network.unet(x).feats
    assert output.seeds.shape == (2, 12, 3)

    def norm(bn, v):
        return bn.weight * (v - bn.running_mean) / (bn.running_var + bn.eps).sqrt() + bn.bias

    for b, start in enumerate((0, counts[0])):
        rows = output.seed_voxels[b]
        assert len(set(rows.tolist())) == 12
        assert int(rows.max()) < counts[b]
        assert torch.equal(output.seeds[b], positions[start + rows])
        vote_features = []
        for k, row in enumerate(rows.tolist()):
            h = f = features[start + row]
            for conv, bn in ((network.vgen.conv1, network.vgen.bn1), (network.vgen.conv2, network.vgen.bn2)):
                h = norm(bn, conv.weight[:, :, 0] @ h + conv.bias).clamp(min=0)
            h = network.vgen.conv3.weight[:, :, 0] @ h + network.vgen.conv3.bias
            torch.testing.assert_close(output.votes[b, k, 0], output.seeds[b, k] + h[:3], atol=1e-5, rtol=1e-4)
            vote_features.append((f + h[3:]) / (f + h[3:]).norm())
        votes, pnet = output.votes[b, :, 0], network.pnet
        for k, base in enumerate(output.proposals.bases[b]):
            assert any(torch.equal(base, vote) for vote in votes)
            pooled = []
            for n in slow_ball(votes, base, 0.5, 4):
                h = torch.cat([(votes[n] - base) / 0.5, vote_features[n]])
                for layer in pnet.vote_aggregation.mlp_module:
                    h = norm(layer.bn["bn"], layer.conv.weight[:, :, 0, 0] @ h).clamp(min=0)
                pooled.append(h)
            h = torch.stack(pooled).amax(0)
            for conv, bn in ((pnet.conv1, pnet.bn1), (pnet.conv2, pnet.bn2)):
                h = norm(bn, conv.weight[:, :, 0] @ h + conv.bias).clamp(min=0)
            h = pnet.conv3.weight[:, :, 0] @ h + pnet.conv3.bias
            found = [part[b, k].flatten() for part in output.proposals[1:]]
            found[1] = found[1] - base
            torch.testing.assert_close(torch.cat(found), h, atol=1e-4, rtol=1e-3)


def test_the_choices_of_proposals():
    seeds, votes = torch.rand(2, 12, 3), torch.rand(2, 24, 3)
    for sampling in ("vote_fps", "seed_fps", "random"):
        head = Proposing(VoteNetShape(3, proposals=6, vote_factor=2, sampling=sampling))
        chosen = head.choose(seeds, votes)
        assert chosen.shape == (2, 6)
        assert int(chosen.max()) < 24
        if sampling == "seed_fps":
            assert (chosen % 2 == 0).all()


def test_heading_bins_are_shifted_by_half_a_bin():
    """Bin 0 of 12 is the 30 degrees around 0, and residuals are shares of 15 degrees."""
    degrees = [0, 14.9, 15.1, 180, -14.9, -15.1, 359, 725]
    number, residual = heading_bins(torch.tensor([math.radians(d) for d in degrees]).double(), 12)
    assert number.tolist() == [0, 0, 1, 6, 0, 11, 0, 0]
    offsets = [0, 14.9, -14.9, 0, -14.9, 14.9, -1, 5]
    assert residual.tolist() == pytest.approx([offset / 15 for offset in offsets], abs=1e-6)


@pytest.mark.parametrize("bins", [1, 12])
def test_boxes_survive_their_code(bins: int):
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.normal(size=(2, 5, 3)), rng.uniform(0.3, 2, (2, 5, 3)), rng.uniform(-6, 6, (2, 5, 1))], 2
    )
    rows = torch.from_numpy(rows).float()
    if bins == 1:
        rows[..., 6] = 0
    classes = torch.from_numpy(rng.integers(1, 4, (2, 5)))
    present = torch.ones(2, 5, dtype=torch.bool)
    present[1, 3:] = False
    means = torch.tensor([[1.0, 2, 3], [0.5, 0.6, 0.7], [2, 2, 0.1]])
    targets = encode_boxes(rows, classes, present, means, bins)
    assert targets.centers[1, 3:].abs().max() == 0
    assert targets.classes[1, 3:].tolist() == [0, 0]
    one_hot = nn.functional.one_hot
    perfect = Proposals(
        rows[..., :3], torch.zeros(2, 5, 2), rows[..., :3],
        one_hot(targets.headings, bins).float(), targets.heading_residuals[..., None].expand(-1, -1, bins),
        one_hot(targets.sizes, 3).float(), targets.size_residuals[:, :, None].expand(-1, -1, 3, 3),
        torch.zeros(2, 5, 3),
    )  # fmt: skip
    found = decode_boxes(perfect, means)
    assert found[..., 6].abs().max() <= math.pi + 1e-6
    assert box_iou(found[0], rows[0]).diagonal().tolist() == pytest.approx([1] * 5, abs=1e-4)
    assert box_iou(found[1, :3], rows[1, :3]).diagonal().tolist() == pytest.approx([1] * 3, abs=1e-4)


def test_a_released_code_of_a_box():
    """A chair turned by 40 degrees to the left is turned by -40 clockwise: bin 11 at -30, residual -10 of 15."""
    means = torch.tensor(SIZES["sunrgbd"])
    box = torch.tensor([[[1.0, 2, 0.4, 0.6, 0.5, 0.9, math.radians(40)]]])
    targets = encode_boxes(box, torch.tensor([[4]]), torch.tensor([[True]]), means, 12)
    assert (targets.headings.item(), targets.sizes.item(), targets.classes.item()) == (11, 3, 3)
    assert targets.heading_residuals.item() == pytest.approx(-10 / 15, abs=1e-5)
    assert targets.size_residuals[0, 0].tolist() == pytest.approx(
        [0.6 / 0.591958 - 1, 0.5 / 0.552978 - 1, 0.9 / 0.827272 - 1], abs=1e-5
    )


def test_published_sizes_and_those_of_other_data():
    assert [len(SIZES[name]) for name in ("scannet", "sunrgbd")] == [18, 10]
    assert SIZES["scannet"][14] == (0.593596, 0.591249, 0.739190)  # toilet
    assert SIZES["sunrgbd"][0] == (2.114256, 1.620300, 0.927272)  # bed
    boxes = [(np.array([[1, 1, 1], [2, 2, 5], [3, 3, 3]], np.float32), np.array([1, 1, 1])),
             (np.array([[8, 8, 8]], np.float32), np.array([3]))]  # fmt: skip
    assert typical_sizes(boxes, ("a", "b", "c"), mean=False).tolist() == [[2, 2, 3], [2.5, 2.5, 4], [8, 8, 8]]
    assert typical_sizes(boxes, ("a", "b", "c"), mean=True)[0].tolist() == [2, 2, 3]
    assert typical_sizes([], ("a",), mean=True).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("factor", [1, 2])
def test_a_quiet_start_leaves_votes_at_their_seeds_and_proposals_at_their_votes(factor):
    network = tiny_votenet(replace(TINY, vote_factor=factor)).eval()
    loud = network(*tiny_input())
    assert (loud.votes - loud.seeds[:, :, None]).abs().max() > 0.01
    quiet_start(network)
    found = network(*tiny_input())
    assert torch.equal(found.votes, found.seeds[:, :, None].expand_as(found.votes))
    assert torch.equal(found.proposals.centers, found.proposals.bases)
    assert not any(part.any() for part in found.proposals if part.shape[-1] != 3 or part.ndim == 4)
    assert network.vgen.conv3.weight.unflatten(0, (factor, -1))[:, 3:].all()  # features of votes stay as they are
