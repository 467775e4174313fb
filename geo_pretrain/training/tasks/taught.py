"""Shared parts of tasks that distill a frozen image network into a sparse 3D network, on single frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.errors import RecipeError
from geo_pretrain.files import expanded
from geo_pretrain.training.checks import PositiveRange, Probability
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.frame_clouds import FrameCloudConfig, FrameCloudSamples, FrameCloudSettings
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.networks3d import encode, unet_args, voxel_contract
from geo_pretrain.training.recipe import EncoderName, Recipe
from geo_pretrain.training.tasks.base import Batch, PretextTask, TaskConfig, same_settings
from geo_pretrain.training.tasks.matching import draw
from geo_pretrain.training.tasks.teachers import (
    OF_ANY_ENCODER,
    Layer,
    Teacher,
    csail_segmenter,
    finetuned_segmenter,
    load_teacher,
    torchvision_segmenter,
)

RESULTS = "results.json"  # in the folder of a fine-tuning run
ADE20K = "ade20k"  # a segmentation network whose file the user has
ADE20K_RECIPE = "ade20k_fcn_r50"  # the fine-tuning recipe that trains one


@dataclass(frozen=True)
class TaughtConfig(FrameCloudSettings, TaskConfig):
    """Settings of tasks that distill an image into its cloud; PPKT's paper gives no ranges of augmentation."""

    # imagenet | moco_v2 | scratch | stage1 | catalog name | checkpoint folder; a segmentation network with its logits:
    # folder of a fine-tuning run | ade20k
    teacher: str = "imagenet"
    # weights of "ade20k": a state dict of torchvision, a fine-tuning run's folder, or that of ADE20K's authors' files
    teacher_file: str | None = None
    teacher_layer: Layer = "logits"  # of a segmentation network; features: the map that its last layer takes
    teacher_encoder: EncoderName = "resnet50"  # of the first three
    dense: bool = False  # the teacher's dense features instead of its last map; needs a decoder
    flip_prob: Probability = 0.5
    resize: PositiveRange = (0.8, 1.25)
    scale: PositiveRange = (0.9, 1.1)
    elastic_prob: Probability = 0.95

    def unused(self) -> dict[str, str]:
        if self.teacher in OF_ANY_ENCODER:
            return {}
        return {"teacher_encoder": f"teachers {', '.join(OF_ANY_ENCODER)}"}


class TaughtByImages(PretextTask):
    """A sparse U-Net, the student, and the frozen image network that teaches it; the loss is a subclass's.

    State: `backbone.*` is the student, `teacher.*` the frozen teacher, the rest a subclass's projections.
    """

    config: TaughtConfig
    arch = "sr_unet"
    views = 1

    def __init__(self, recipe: Recipe, config: TaughtConfig) -> None:
        super().__init__(recipe, config)
        self.teacher = self.find_teacher()  # first: a random one is drawn before the student
        self.spec = recipe.network3d()
        self.cloud_spec = same_settings(FrameCloudConfig, config, voxel_size=self.spec.voxel_size)
        self.contract = voxel_contract(self.spec, config.features)
        self.arch_args = unet_args(self.spec, normalize=self.normalizes())
        self.backbone = SRUNet(**self.arch_args, bn_momentum=self.spec.bn_momentum)

    def normalizes(self) -> bool:
        """Whether the student's rows have length 1."""
        return True

    def find_teacher(self) -> Teacher:
        """Load the teacher that the recipe names."""
        config = self.config
        if config.teacher == ADE20K:
            if config.teacher_file is None:
                raise RecipeError(
                    f"recipe {self.recipe.name}: teacher 'ade20k' has no file that could be fetched. Accepted: --set "
                    f"task.teacher_file=FOLDER, a finished run of `geo-pretrain finetune {ADE20K_RECIPE} -b imagenet "
                    "--data ade20k:PATH --out FOLDER`, or the folder of encoder_epoch_20.pth and decoder_epoch_20.pth "
                    "of ADE20K's authors; or FILE, a state dict of torchvision's FCN or DeepLabV3 with 150 classes."
                )
            return self._segmenter(expanded(config.teacher_file))
        if config.teacher_file is not None:
            raise RecipeError(
                f"'task.teacher_file' is given, and 'task.teacher' is {config.teacher!r}: accepted is ade20k."
            )
        if (Path(config.teacher) / RESULTS).is_file():
            return finetuned_segmenter(Path(config.teacher), config.teacher_layer)
        return load_teacher(config.teacher, config.teacher_encoder, dense=config.dense)

    def _segmenter(self, path: Path) -> Teacher:
        """The segmentation network in a file or folder."""
        if (path / RESULTS).is_file():
            return finetuned_segmenter(path, self.config.teacher_layer)
        read = csail_segmenter if path.is_dir() else torchvision_segmenter
        return read(path, self.config.teacher_layer)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Single frames: an image and the voxels of its points."""
        if self.recipe.data.units != "frames":
            raise RecipeError(
                f"recipe {self.recipe.name}: 'data.units' is {self.recipe.data.units!r}, accepted for task "
                f"{self.recipe.task['name']!r} is 'frames'."
            )
        data, seed, images = self.recipe.data, self.recipe.seed, self.teacher.contract
        return FrameCloudSamples(source, pairs, data, seed, images, self.cloud_spec)

    def teacher_maps(self, batch: Batch) -> Tensor:
        """The teacher's maps of a batch's images: float32 [B, C, h, w], without gradients."""
        with self.autocast(batch["image"].device):
            maps: Tensor = self.teacher(batch["image"])
        return maps

    def student_rows(self, batch: Batch) -> Tensor:
        """The student's outputs for a batch's voxels: float32 [N, out_chans]."""
        return encode(self.backbone, batch["coords"], batch["feats"], low_precision=self.low_precision)

    def heads(self) -> dict[str, Tensor]:
        """The trained projections besides the student, on the CPU; no queues, memories or classifiers."""
        trained = {key for key, parameter in self.named_parameters() if parameter.requires_grad}
        return {key: value for key, value in super().heads().items() if key in trained}

    def other_weights(self) -> dict[str, dict[str, Tensor]]:
        """The trained projections, and the teacher if `pairing` pairs it with the student."""
        weights = super().other_weights()
        if self.pairing() is not None:
            weights["teacher"] = {key: value.cpu() for key, value in self.teacher.network.state_dict().items()}
        return weights

    def pair_with_teacher(self, **projected: Any) -> Pairing | None:
        """The pairing with a teacher whose features the student shares; None if the zoo has no such network.

        Its images are those it was shown: its contract's, at the size of the recipe's data by nearest pixels.
        """
        if self.teacher.arch is None:
            return None
        images = replace(self.teacher.contract, size=self.recipe.data.size, interpolation="nearest")
        return Pairing(self.teacher.arch, images, role="teacher", **projected)


def draw_points(batch: Batch, count: int) -> Tensor:
    """Draw at most `count` points of a batch, each with its pixel: int64 [n]; one stream of draws for all images."""
    generator = torch.Generator().manual_seed(batch["seed"][0])
    return draw(len(batch["pixel"]), count, generator, batch["pixel"].device)
