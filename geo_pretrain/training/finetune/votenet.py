"""VoteNet on a sparse U-Net: seeds, votes, proposals. Names of weights are those of PointContrast's and CSC's code.

Qi et al., "Deep Hough Voting for 3D Object Detection in Point Clouds", ICCV 2019, with the SR-UNet of Xie et al.,
"PointContrast", ECCV 2020, in the place of PointNet++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.geometry3d.points import ball_query, farthest_points, gather_rows
from geo_pretrain.training.losses.voting import Proposals

FEATURES, HIDDEN = 256, 128  # channels of seeds and votes, of proposals
Sampling = Literal["vote_fps", "seed_fps", "random"]


@dataclass(frozen=True)
class VoteNetShape:
    """The numbers that VoteNet is built from; defaults are the released ones."""

    classes: int  # C, also the number of size templates
    heading_bins: int = 1  # 1: boxes are aligned with the axes
    seeds: int = 1024
    proposals: int = 256
    vote_factor: int = 1  # votes of a seed
    radius: float = 0.3  # m, of the ball whose votes make a proposal
    group: int = 16  # votes in it
    sampling: Sampling = "vote_fps"  # how proposals are chosen
    skip_near_origin: bool = False  # see `farthest_points`


class Output(NamedTuple):
    """What VoteNet finds in B clouds."""

    seeds: Tensor  # [B, S, 3] m
    seed_voxels: Tensor  # int64 [B, S]: the voxel of each seed, counted within its cloud
    votes: Tensor  # [B, S, V, 3] m
    proposals: Proposals


class VoteNet(nn.Module):
    """The network. `mean_sizes` [C, 3] (m) are the size templates, kept with the weights."""

    mean_sizes: Tensor

    def __init__(self, unet: SRUNet, shape: VoteNetShape) -> None:
        super().__init__()
        if unet.out_chans != FEATURES:
            raise ValueError(f"The U-Net gives {unet.out_chans} channels; accepted: {FEATURES}.")
        self.shape = shape
        self.backbone_net = _Wrapped(unet)
        self.vgen = Voting(shape.vote_factor)
        self.pnet = Proposing(shape)
        self.register_buffer("mean_sizes", torch.ones(shape.classes, 3))

    @property
    def unet(self) -> SRUNet:
        """The backbone."""
        return self.backbone_net.net

    def forward(self, x: SparseTensor, positions: Tensor, counts: list[int]) -> Output:
        """Find objects in the voxels of B clouds.

        Args:
            x: the voxels, cloud after cloud.
            positions: [N, 3] m, of each voxel's first point.
            counts: voxels of each cloud, N together.
        """
        padded = [
            nn.utils.rnn.pad_sequence(list(values.split(counts)), batch_first=True)
            for values in (positions, self.unet(x).feats.float())
        ]
        lengths = torch.tensor(counts, device=positions.device)
        origin = self.shape.skip_near_origin
        chosen = farthest_points(padded[0], self.shape.seeds, lengths=lengths, skip_near_origin=origin)
        seeds, features = (gather_rows(values, chosen) for values in padded)
        votes, vote_features = self.vgen(seeds, features)
        proposals = self.pnet(seeds, votes.flatten(1, 2), vote_features)
        return Output(seeds, chosen, votes, proposals)


class Voting(nn.Module):
    """Each seed's votes for an object's center, with features: 199,171 parameters at one vote."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv1, self.conv2 = nn.Conv1d(FEATURES, FEATURES, 1), nn.Conv1d(FEATURES, FEATURES, 1)
        self.conv3 = nn.Conv1d(FEATURES, (3 + FEATURES) * factor, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(FEATURES), nn.BatchNorm1d(FEATURES)

    def forward(self, seeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds [B, S, 3] with features [B, S, 256] -> votes [B, S, V, 3] (m), unit features [B, S * V, 256]."""
        hidden = features.transpose(1, 2)
        hidden = F.relu(self.bn1(self.conv1(hidden)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        moves = self.conv3(hidden).float().transpose(1, 2).unflatten(2, (self.factor, 3 + FEATURES))
        votes = seeds[:, :, None] + moves[..., :3]
        moved = features[:, :, None] + moves[..., 3:]
        return votes, F.normalize(moved.flatten(1, 2), dim=2)


class Proposing(nn.Module):
    """Proposals from the votes in balls: 112,737 parameters for ScanNet's classes, 110,415 for SUN RGB-D's."""

    def __init__(self, shape: VoteNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.vote_aggregation = _Aggregation(shape.radius, shape.group)
        outputs = 2 + 3 + 2 * shape.heading_bins + 4 * shape.classes + shape.classes
        self.conv1, self.conv2 = nn.Conv1d(HIDDEN, HIDDEN, 1), nn.Conv1d(HIDDEN, HIDDEN, 1)
        self.conv3 = nn.Conv1d(HIDDEN, outputs, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN)

    def forward(self, seeds: Tensor, votes: Tensor, features: Tensor) -> Proposals:
        """Seeds [B, S, 3], votes [B, S * V, 3] (m) with features [B, S * V, 256] -> B x K proposals."""
        bases = gather_rows(votes, self.choose(seeds, votes))
        hidden = self.vote_aggregation(votes, features, bases)
        hidden = F.relu(self.bn1(self.conv1(hidden)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        bins, templates = self.shape.heading_bins, self.shape.classes
        parts = (
            self.conv3(hidden)
            .float()
            .transpose(1, 2)
            .split([2, 3, bins, bins, templates, 3 * templates, templates], dim=2)
        )
        objectness, moves, headings, turns, sizes, growths, classes = parts
        growths = growths.unflatten(2, (templates, 3))
        return Proposals(bases, objectness, bases + moves, headings, turns, sizes, growths, classes)

    def choose(self, seeds: Tensor, votes: Tensor) -> Tensor:
        """The votes that proposals are centered on: int64 [B, K]. Random ones come from the global generator."""
        shape = self.shape
        if shape.sampling == "random":
            return torch.randint(votes.shape[1], (len(votes), shape.proposals)).to(votes.device)
        source = votes if shape.sampling == "vote_fps" else seeds
        chosen = farthest_points(source, shape.proposals, skip_near_origin=shape.skip_near_origin)
        return chosen if shape.sampling == "vote_fps" else chosen * shape.vote_factor  # the first vote of each seed


@torch.no_grad()
def quiet_start(network: VoteNet) -> None:
    """Let votes begin at their seeds and proposals without offsets: the last layers' weights for them become 0.

    Random ones, which the released code starts from, move votes about a meter; a few hundred steps are spent on that.
    """
    for parameter in network.vgen.conv3.parameters():
        parameter.unflatten(0, (network.vgen.factor, 3 + FEATURES))[:, :3] = 0
    for parameter in network.pnet.conv3.parameters():
        parameter.zero_()


class _Aggregation(nn.Module):
    """The features of the votes in a ball around each proposal: a shared perceptron, then the maximum."""

    def __init__(self, radius: float, group: int) -> None:
        super().__init__()
        self.radius, self.group = radius, group
        widths = (3 + FEATURES, HIDDEN, HIDDEN, HIDDEN)
        self.mlp_module = nn.Sequential()
        for k in range(3):
            self.mlp_module.add_module(f"layer{k}", _Layer(widths[k], widths[k + 1]))

    def forward(self, votes: Tensor, features: Tensor, bases: Tensor) -> Tensor:
        """Votes [B, N, 3] with features [B, N, 256] -> [B, 128, K] for centers [B, K, 3]."""
        index = ball_query(votes, bases, self.radius, self.group)
        near = (gather_rows(votes, index) - bases[:, :, None]) / self.radius
        grouped = torch.cat([near, gather_rows(features, index)], dim=3)  # [B, K, S, 259]
        hidden: Tensor = self.mlp_module(grouped.permute(0, 3, 1, 2))
        return hidden.amax(3)


class _Layer(nn.Module):
    """A 1x1 convolution without bias, norm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 1, bias=False)
        self.bn = nn.ModuleDict({"bn": nn.BatchNorm2d(out_chans)})  # the released code wraps it twice

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn["bn"](self.conv(x)))


class _Wrapped(nn.Module):
    """The U-Net under the name `net`, as in the released code."""

    def __init__(self, net: SRUNet) -> None:
        super().__init__()
        self.net = net
