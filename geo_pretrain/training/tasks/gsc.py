"""Geometric Set Consistency: pixels of two frames that lie in one segment of the surface get one feature, on average.

Chen et al., "Self-Supervised Image Representation Learning with Geometric Set Consistency", CVPR 2022, section 3. It
continues from a network that Pri3D trained (view and geo). The authors released no code: each default says where it
comes from, and what the paper leaves open is an option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.pairs import SetPairSamples, check_labels
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.data.surfaces.oversegmentation import K_THRESH, MIN_VERTICES
from geo_pretrain.training.data.surfaces.sets import Kind
from geo_pretrain.training.initialize import initialize, initialize_heads
from geo_pretrain.training.losses import depth_loss, set_info_nce
from geo_pretrain.training.losses.sets import Denominator
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import pri3d


@dataclass(frozen=True)
class Config:
    """Settings of the task. The paper gives the kind of sets, k_thresh as 0.01 to 0.05, and one pixel as an option."""

    sets: Kind = "segments"  # semantic, instance: from the ground truth, the paper's upper bound
    k_thresh: float = K_THRESH  # of the graph cut: larger, larger segments; the paper's ablation: 0.01 to 0.05
    min_vertices: int = MIN_VERTICES  # of a segment
    temperature: float = 0.4  # Pri3D's
    denominator: Denominator = "other"  # see losses.sets
    symmetric: bool = True  # as Pri3D's code
    renormalize: bool = True  # make the mean feature of a set unit again
    min_size: int = 5  # cells of the feature map that a set must have in each view
    max_sets: int | None = None  # of a pair, drawn from those in both views; None: all
    unmatched: bool = False  # sets seen in one view alone are negatives
    asymmetric: bool = False  # one random pixel of a set against the mean of its pixels in the other view
    projection: int | None = None  # channels of a linear layer before the loss; None: the network's own output
    depth_proxy: bool = False  # Pri3D's depth loss beside; the paper's second stage has the set loss alone

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("k_thresh", "min_vertices", "temperature", "min_size", "max_sets", "projection"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RecipeError(f"'task.{key}' is {value!r}, accepted is a number above 0.")


class GSC(pri3d.Pri3D):
    """Pri3D's 2D U-Net with another loss; state keys are `backbone.*` and, where asked for, `w2d.*` and `headnet.*`."""

    def __init__(self, recipe: Recipe, settings: Config) -> None:
        # The networks of Pri3D's view loss, which has no layers of its own.
        super().__init__(recipe, pri3d.Config(view=True, geo=False, depth_proxy=settings.depth_proxy))
        self.settings = settings
        if settings.projection is not None:
            self.w2d = nn.Linear(self.backbone.out_chans, settings.projection)

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Pairs of images with the set of every pixel. Raises `DataError` when the labels asked for are not there."""
        if self.settings.sets != "segments":
            check_labels(source, pairs, self.settings.sets)
        return SetPairSamples(
            source,
            pairs,
            self.recipe.data,
            self.contract,
            self.recipe.seed,
            k_thresh=self.settings.k_thresh,
            min_vertices=self.settings.min_vertices,
            kind=self.settings.sets,
        )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs as `dataset` yields them, scalars: "set", and "depth" with the depth proxy.

        A pair without a common set costs nothing but counts in the batch, as a pair without a match does in Pri3D.
        """
        settings = self.settings
        features = [self._features(batch[f"image{k}"]) for k in (1, 2)]
        ids1, ids2 = (half_resolution_sets(batch[f"sets{k}"], f.shape) for k, f in enumerate(features, 1))
        if settings.max_sets is not None:
            ids1, ids2 = limit_sets(ids1, ids2, batch["seed"], settings.max_sets, min_size=settings.min_size)
        cells1, cells2 = (self._cells(f) for f in features)
        loss = set_info_nce(
            cells1,
            cells2,
            ids1,
            ids2,
            temperature=settings.temperature,
            denominator=settings.denominator,
            symmetric=settings.symmetric,
            renormalize=settings.renormalize,
            min_size=settings.min_size,
            unmatched=settings.unmatched,
            draws=draws_of_cells(batch["seed"], ids1, ids2) if settings.asymmetric else None,
        )
        losses = {"set": loss.mean()}
        if settings.depth_proxy:
            terms = [
                depth_loss(self._depth(f, batch[f"depth{k}"]), batch[f"depth{k}"]) for k, f in enumerate(features, 1)
            ]
            losses["depth"] = (terms[0] + terms[1]) / 2
        return losses

    def _cells(self, features: Tensor) -> Tensor:
        """[B, C, h, w] -> what is contrasted: [B, h * w, C], or the projection's channels."""
        rows = features.flatten(2).transpose(1, 2)
        return rows if self.settings.projection is None else self.w2d(rows)


def half_resolution_sets(ids: Tensor, features: torch.Size) -> Tensor:
    """Set of every cell of a feature map [B, C, h, w]: that of pixel (2 row, 2 column); [B, H, W] -> [B, h * w].

    Of a size that 32 does not divide the map may reach past the image. Cells there are those of no pixel, on which no
    match of Pri3D falls (`pri3d.half_resolution_cell`): they are in no set, -1.
    """
    inside = ids[:, ::2, ::2][:, : features[-2], : features[-1]]
    cells = ids.new_full((len(ids), features[-2], features[-1]), -1)
    cells[:, : inside.shape[1], : inside.shape[2]] = inside
    return cells.flatten(1)


def limit_sets(
    ids1: Tensor, ids2: Tensor, seeds: Sequence[int], limit: int, *, min_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep at most `limit` of the sets that have `min_size` cells in both views of a pair, drawn by the pair's seed.

    ids1, ids2: int64 [B, N1], [B, N2], -1 for none; returned alike, the cells of sets left out become -1. Sets in one
    view alone stay.
    """
    out1, out2 = ids1.clone(), ids2.clone()
    for one, two, seed in zip(out1, out2, seeds, strict=True):
        found = []
        for view in (one, two):
            numbers, counts = view[view >= 0].unique(return_counts=True)
            found.append(numbers[counts >= min_size])
        common = found[0][torch.isin(found[0], found[1])]
        order = torch.randperm(len(common), generator=torch.Generator().manual_seed(sample_seed(seed, 0, 0)))
        dropped = common[order[limit:].to(common.device)]
        for view in (one, two):
            view[torch.isin(view, dropped)] = -1
    return out1, out2


def draws_of_cells(seeds: Sequence[int], ids1: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor]:
    """Random numbers shaped like ids1, ids2 [B, N]: those of a pair depend on its seed alone."""
    draws = [torch.rand(2, ids1.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    first, second = torch.stack(draws).to(ids1.device).unbind(1)
    return first, second[:, : ids2.shape[1]]


def build(recipe: Recipe, config: Config) -> GSC:
    """The task, its weights drawn from the recipe's seed, its networks started as the recipe says.

    A depth head starts from the one of the first stage, where that has one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = GSC(recipe, config)
    initialize(task.backbone, recipe)
    if config.depth_proxy:
        initialize_heads(task, recipe.network2d().init, prefix="headnet.", required=False)
    return task
