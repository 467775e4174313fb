"""PointContrast: points of two scans at the same position in the scene get the same feature.

Xie et al., "PointContrast: Unsupervised Pre-training for 3D Point Cloud Understanding", ECCV 2020; defaults are those
of the released code and launch scripts (MIT), from which the published weights came. The paper's formula for the
hardest-contrastive loss, and negatives from the anchor's pair only, are options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geo_pretrain.training.checks import Count, Positive
from geo_pretrain.training.losses.contrastive import hardest_contrastive, info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.clouds import CloudConfig, CloudPairs
from geo_pretrain.training.tasks.matching import draw, one_match_each


@dataclass(frozen=True)
class Config(CloudConfig):
    """Settings of the task; each default is the released code's. Numbers of samples hold for each process."""

    loss: Literal["nce", "hardest"] = "nce"  # set by the task's name
    negatives: Literal["batch", "pair"] = "batch"  # nce: anchors of all pairs of the batch, or of the same pair only
    positives: Count = 1024  # hardest: matches for each pair, drawn from the whole batch
    candidates: Count = 256  # hardest: points of each side for each pair, drawn from the whole batch
    positive_margin: Positive = 0.1
    negative_margin: Positive = 1.4
    squared: bool = True  # hardest: relu(d^2 - margin) for positives; False: the paper's relu(d - margin)^2

    def unused(self) -> dict[str, str]:
        if self.loss == "nce":
            names = ("positives", "candidates", "positive_margin", "negative_margin", "squared")
            return dict.fromkeys(names, "the hardest-contrastive loss")
        return dict.fromkeys(("temperature", "matches", "negatives"), "PointInfoNCE")


class PointContrast(CloudPairs):
    """PointInfoNCE or the hardest-contrastive loss."""

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        alone = config.loss == "nce" and config.negatives == "pair"
        self.negatives = "sample" if alone else "micro-batch"
        self.terms = ("nce",) if config.loss == "nce" else ("positive", "negative")

    def losses(
        self, batch: Batch, features1: Tensor, features2: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """PointInfoNCE, or the two terms of the hardest-contrastive loss."""
        config, matches = self.config, batch["matches"]
        if config.loss == "nce":
            groups = [matches] if config.negatives == "batch" else matches.split(batch["matches_per_pair"])
            chosen = [one_match_each(group, config.matches, generator) for group in groups if len(group)]
            return (torch.stack([self._nce(features1[m[:, 0]], features2[m[:, 1]]) for m in chosen]).mean(),)
        pairs = len(batch["seed"])
        positives = draw(len(matches), config.positives * pairs, generator, matches.device)
        candidates = [
            draw(len(features), config.candidates * pairs, generator, matches.device)
            for features in (features1, features2)
        ]
        return hardest_contrastive(
            features1,
            features2,
            matches,
            positives,
            *candidates,
            positive_margin=config.positive_margin,
            negative_margin=config.negative_margin,
            squared=config.squared,
        )

    def _nce(self, anchors: Tensor, others: Tensor) -> Tensor:
        return info_nce(anchors, others, temperature=self.config.temperature, symmetric=False, normalize=False)
