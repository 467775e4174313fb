"""Geometric Set Consistency: pixels of two frames in the same surface segment get the same feature on average.

Chen et al., "Self-Supervised Image Representation Learning with Geometric Set Consistency", CVPR 2022, section 3. It
continues from a network that Pri3D trained (view and geo). The authors released no code: each default says where it
comes from, and what the paper leaves open is an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geo_pretrain.training.checks import Count, Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.pairs import SetPairSamples, check_labels
from geo_pretrain.training.data.samples.sampler import Samples, sample_seed
from geo_pretrain.training.data.surfaces.oversegmentation import K_THRESH, MIN_VERTICES
from geo_pretrain.training.data.surfaces.sets import Kind, Sets
from geo_pretrain.training.initialize import initialize_heads
from geo_pretrain.training.losses.sets import Denominator, set_info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.images import ImageUNetConfig, ImageUNetTask


@dataclass(frozen=True)
class Config(ImageUNetConfig):
    """Settings of the task. The paper gives the kind of sets, k_thresh as 0.01 to 0.05, and one pixel as an option."""

    sets: Kind = "segments"  # semantic, instance: from the ground truth, the paper's upper bound
    k_thresh: Positive = K_THRESH  # of the graph cut: larger, larger segments; the paper's ablation: 0.01 to 0.05
    min_vertices: Count = MIN_VERTICES  # of a segment
    temperature: Positive = 0.4  # Pri3D's
    denominator: Denominator = "other"  # see losses.sets
    symmetric: bool = True  # as Pri3D's code
    renormalize: bool = True  # make the mean feature of a set unit again
    min_size: Count = 5  # cells of the feature map that a set must have in each view
    max_sets: Count | None = None  # of a pair, drawn from those in both views; None: all
    unmatched: bool = False  # sets seen in one view alone are negatives
    asymmetric: bool = False  # one random pixel of a set against the mean of its pixels in the other view
    projection: Count | None = None  # channels of a linear layer before the loss; None: the network's own output
    depth_proxy: bool = False  # Pri3D's depth loss beside; the paper's second stage has the set loss alone

    def unused(self) -> dict[str, str]:
        return {} if self.sets == "segments" else dict.fromkeys(("k_thresh", "min_vertices"), "sets 'segments'")


class GSC(ImageUNetTask):
    """Pri3D's 2D U-Net with another loss; state keys are `backbone.*` and, where asked for, `headnet.*` and `w2d.*`."""

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config, depth_proxy=config.depth_proxy)
        self.negatives = "micro-batch" if config.denominator == "batch" else "sample"
        if config.projection is not None:
            self.w2d = nn.Linear(self.backbone.out_chans, config.projection)

    def load_start_weights(self) -> None:
        """The U-Net's start weights, and the depth head's where the first stage has one."""
        super().load_start_weights()
        if self.config.depth_proxy:
            initialize_heads(self, self.recipe.network2d().init, prefix="headnet.", required=False)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Pairs of images with the set of every pixel. Raises `DataError` when the labels asked for are not there."""
        if self.config.sets != "segments":
            check_labels(source, pairs, self.config.sets)
        config = self.config
        sets = Sets(source, k_thresh=config.k_thresh, min_vertices=config.min_vertices, kind=config.sets)
        return SetPairSamples(*self.arguments(source, pairs), sets)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch of `SetPairSamples`, scalars: "set", and "depth" with the depth proxy.

        A pair without a common set costs nothing but counts in the batch, as a pair without a match does in Pri3D.
        """
        config = self.config
        features1, features2 = self.features_of(batch["image1"], batch["image2"])
        ids1, ids2 = (half_resolution_sets(batch[f"sets{k}"], f.shape) for k, f in ((1, features1), (2, features2)))
        if config.max_sets is not None:
            ids1, ids2 = limit_sets(ids1, ids2, batch["seed"], config.max_sets, min_size=config.min_size)
        loss = set_info_nce(
            self.cells(features1),
            self.cells(features2),
            ids1,
            ids2,
            temperature=config.temperature,
            denominator=config.denominator,
            symmetric=config.symmetric,
            renormalize=config.renormalize,
            min_size=config.min_size,
            unmatched=config.unmatched,
            draws=draws_of_cells(batch["seed"], ids1, ids2) if config.asymmetric else None,
        )
        losses = {"set": loss.mean()}
        if config.depth_proxy:
            losses["depth"] = self.depth_proxy_loss((features1, features2), (batch["depth1"], batch["depth2"]))
        return losses

    def cells(self, features: Tensor) -> Tensor:
        """The features of all cells of a map [B, C, h, w] as they are contrasted: [B, h * w, C], or projected."""
        rows = features.flatten(2).transpose(1, 2)
        return rows if self.config.projection is None else self.w2d(rows)


def half_resolution_sets(ids: Tensor, features: torch.Size) -> Tensor:
    """Give every cell of a feature map [B, C, h, w] the set of pixel (2 row, 2 column); [B, H, W] -> [B, h * w].

    If H or W is not a multiple of 32, the map is larger than the image: cells outside it are in no set, -1. No match of
    Pri3D falls on them either (`matching.half_resolution_cell`).
    """
    inside = ids[:, ::2, ::2][:, : features[-2], : features[-1]]
    cells = ids.new_full((len(ids), features[-2], features[-1]), -1)
    cells[:, : inside.shape[1], : inside.shape[2]] = inside
    return cells.flatten(1)


def limit_sets(
    ids1: Tensor, ids2: Tensor, seeds: Sequence[int], limit: int, *, min_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep at most `limit` of the sets that have `min_size` cells in both views of a pair, drawn by the pair's seed.

    ids1, ids2: int64 [B, N1], [B, N2], -1 for none. Returned in the same form, with -1 for the cells of dropped sets.
    Sets that only one view sees stay.
    """
    out1, out2 = ids1.clone(), ids2.clone()
    for view1, view2, seed in zip(out1, out2, seeds, strict=True):
        large = []
        for view in (view1, view2):
            numbers, counts = view[view >= 0].unique(return_counts=True)
            large.append(numbers[counts >= min_size])
        common = large[0][torch.isin(large[0], large[1])]
        order = torch.randperm(len(common), generator=torch.Generator().manual_seed(sample_seed(seed, 0, 0)))
        dropped = common[order[limit:].to(common.device)]
        for view in (view1, view2):
            view[torch.isin(view, dropped)] = -1
    return out1, out2


def draws_of_cells(seeds: Sequence[int], ids1: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor]:
    """Draw random numbers shaped like ids1, ids2 [B, N]; the numbers of a pair depend on its seed alone."""
    draws = [torch.rand(2, ids1.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    first, second = torch.stack(draws).to(ids1.device).unbind(1)
    return first, second[:, : ids2.shape[1]]
