"""PPKD: points learn the classes that a frozen segmentation network gives to their pixels; a baseline of PPKT.

Liu et al., "Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D Pretraining", 2021, table 5: KL
divergence a point, from the 150 classes of a network trained on ADE20K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.losses import kl_distillation
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.clouds import draw, encode
from geo_pretrain.training.tasks.ppkt import FrameConfig, TaughtByImages, teacher_of
from geo_pretrain.training.tasks.teachers import Teacher, sample_map


@dataclass(frozen=True)
class Config(FrameConfig):
    """Settings of the task; numbers of samples hold for each process.

    The teacher's map is taken as logits: those of a segmentation network, or the channels of any other network's map
    (not in any paper: for teachers without classes).
    """

    temperature: float = 1.0  # of both distributions; the paper names none
    matches: int = 4096  # points of the batch
    align_corners: bool = False  # of the upsampling of the teacher's map

    def __post_init__(self) -> None:
        """Ranges."""
        self.require_positive("temperature", "matches")


class PPKD(TaughtByImages):
    """The student's last layer gives the teacher's classes; nothing else is trained."""

    normalize = False

    def __init__(self, recipe: Recipe, config: Config, teacher: Teacher) -> None:
        super().__init__(recipe, config, teacher)
        self.config = config
        if self.spec.out_chans != teacher.out_chans:
            raise RecipeError(
                f"'unet3d.out_chans' is {self.spec.out_chans}, accepted is {teacher.out_chans}: the classes of teacher "
                f"{config.teacher!r}."
            )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch as `FrameCloudSamples` yields it: {"ppkd": a scalar}, the mean over the drawn points."""
        element = batch["element"]
        generator = torch.Generator().manual_seed(batch["seed"][0])
        rows = draw(len(element), self.config.matches, generator, element.device)
        voxels = encode(self.backbone, batch["coords"], batch["feats"], low_precision=self.low_precision)
        size = batch["image"].shape[-2], batch["image"].shape[-1]
        align = self.config.align_corners
        logits = sample_map(self.teach(batch), element[rows], batch["pixel"][rows], size, align_corners=align)
        own = voxels[batch["voxel"][rows]]
        return {"ppkd": kl_distillation(own, logits, temperature=self.config.temperature)}


def build(recipe: Recipe, config: Config) -> PPKD:
    """The task, its weights drawn from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return PPKD(recipe, config, teacher_of(recipe, config))
