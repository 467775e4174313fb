"""PPKD, a baseline of PPKT: points learn a frozen segmentation network's class predictions at their pixels.

Liu et al., "Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D Pretraining", 2021, table 5: KL
divergence per point, from the 150 classes of a network trained on ADE20K.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.checks import Count, Positive
from geo_pretrain.training.losses.distillation import kl_distillation
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.matching import sample_map
from geo_pretrain.training.tasks.taught import TaughtByImages, TaughtConfig, draw_points


@dataclass(frozen=True)
class Config(TaughtConfig):
    """Settings of the task; numbers of samples hold for each process.

    The teacher's map is taken as logits: those of a segmentation network, or the channels of any other network's map
    (not in any paper: for teachers without classes).
    """

    temperature: Positive = 1.0  # of both distributions; the paper names none
    matches: Count = 4096  # points of the batch
    align_corners: bool = False  # of the upsampling of the teacher's map


class PPKD(TaughtByImages):
    """The student's last layer gives the teacher's classes; nothing else is trained."""

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        if self.spec.out_chans != self.teacher.out_chans:
            raise RecipeError(
                f"'unet3d.out_chans' is {self.spec.out_chans}, accepted is {self.teacher.out_chans}: the classes of "
                f"teacher {config.teacher!r}."
            )

    def normalizes(self) -> bool:
        """Logits are not normalized."""
        return False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `FrameCloudSamples`: {"ppkd": a scalar}, the mean over the drawn points."""
        rows = draw_points(batch, self.config.matches)
        student = self.student_rows(batch)[batch["voxel"][rows]]
        element, pixel, align = batch["element"][rows], batch["pixel"][rows], self.config.align_corners
        logits = sample_map(self.teacher_maps(batch), element, pixel, batch["image"].shape[-2:], align_corners=align)
        return {"ppkd": kl_distillation(student, logits, temperature=self.config.temperature)}
