"""PPKT: points get the features that a frozen image network has for their pixels.

Liu et al., "Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D Pretraining", 2021, section 3
(PPNCE, equation 3 and algorithm 1; the upsampling feature projection layer). Nobody published its code; numbers that
the paper leaves open are those of its re-implementation in SLidR (Sautier et al., CVPR 2022) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.feature_pair import FeaturePair, pair_golden
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.augment import Rotation
from geo_pretrain.training.data.samples.clouds import Features
from geo_pretrain.training.data.samples.frame_clouds import FrameCloudConfig, FrameCloudSamples, collate_frame_clouds
from geo_pretrain.training.losses import info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export
from geo_pretrain.training.tasks.clouds import draw, encode, unet_args, voxel_contract
from geo_pretrain.training.tasks.teachers import Teacher, load_segmenter, load_teacher, sample_map

ADE20K = "ade20k"  # a segmentation network whose file the user has


@dataclass(frozen=True)
class FrameConfig:
    """Settings of every task that teaches a cloud by its own image; ranges of augmentation are not in PPKT's paper."""

    # imagenet | moco_v2 | scratch | stage1 | catalog name | checkpoint folder; a segmentation network with its logits:
    # folder of a fine-tuning run | ade20k
    teacher: str = "imagenet"
    teacher_file: str | None = None  # the weights of "ade20k", see teachers.load_segmenter
    teacher_depth: Literal[18, 50] = 50  # of the first three
    dense: bool = False  # the teacher's dense features instead of its last map; needs a decoder
    features: Features = "rgb"  # of voxels, color / 255 - 0.5
    pixels: Literal["one", "all"] = "one"  # a voxel's own pixel, or (SLidR) every pixel that falls in it
    flip_prob: float = 0.5  # mirrored images
    resize: tuple[float, float] = (0.8, 1.25)  # of images, with their intrinsics; cut or padded to the size of all
    scale: tuple[float, float] = (0.9, 1.1)  # of clouds
    rotation: Rotation = "upright"  # of clouds: any turn about z, +-pi/64 about x and y
    elastic_prob: float = 0.95  # distortions of clouds, see data/elastic.py
    color_jitter: float = 0.0  # of the voxels' colors
    keep: tuple[float, float] = (1.0, 1.0)  # share of the points

    def require_positive(self, *keys: str) -> None:
        """Raise `RecipeError` for a setting that is not above 0."""
        for key in keys:
            if not getattr(self, key) > 0:
                raise RecipeError(f"'task.{key}' is {getattr(self, key)!r}, accepted is a number above 0.")

    def cloud_spec(self, voxel_size: float) -> FrameCloudConfig:
        """How frames become images and voxels. Raises `RecipeError` for impossible ranges."""
        return FrameCloudConfig(
            voxel_size=voxel_size,
            features=self.features,
            pixels=self.pixels,
            rotation=self.rotation,
            scale=self.scale,
            elastic_prob=self.elastic_prob,
            keep=self.keep,
            color_jitter=self.color_jitter,
            flip_prob=self.flip_prob,
            resize=self.resize,
        )


class TaughtByImages(nn.Module):
    """A sparse U-Net and the frozen image network that teaches it, on single frames; the loss is a subclass's.

    State: `backbone.*` is the student, `teacher.*` the frozen teacher, the rest a subclass's projections.
    """

    unit, views = "images", 1
    normalize: bool  # whether the student's rows have length 1

    def __init__(self, recipe: Recipe, config: FrameConfig, teacher: Teacher) -> None:
        super().__init__()
        self.recipe, self.frames, self.spec = recipe, config, recipe.network3d()
        self.cloud_spec = config.cloud_spec(self.spec.voxel_size)
        self.low_precision = recipe.precision == "bf16"
        self.contract = voxel_contract(self.spec, config.features)
        self.arch_args = unet_args(self.spec, normalize=self.normalize)
        self.backbone = SRUNet(**self.arch_args, bn_momentum=self.spec.bn_momentum)
        self.teacher = teacher

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Single frames: an image and the voxels of its points."""
        if self.recipe.data.units != "frames":
            raise RecipeError(
                f"recipe {self.recipe.name}: 'data.units' is {self.recipe.data.units!r}, accepted for task "
                f"{self.recipe.task['name']!r} is 'frames'."
            )
        return FrameCloudSamples(
            source, pairs, self.recipe.data, self.cloud_spec, self.teacher.contract, self.recipe.seed
        )

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate_frame_clouds(samples)

    def teach(self, batch: Mapping[str, Any]) -> Tensor:
        """The teacher's maps of a batch's images: float32 [B, C, h, w], without gradients."""
        with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=self.low_precision):
            maps: Tensor = self.teacher(batch["image"])
        return maps

    def student(self) -> SRUNet:
        """A copy of the student for export, in eval mode on the CPU."""
        network = SRUNet(**self.arch_args)
        network.load_state_dict(self.backbone.state_dict())
        return network.eval()

    def heads(self) -> dict[str, Tensor]:
        """The projections: what is trained beside the student, on the CPU. Queues, memories and classifiers are not."""
        trained = {key for key, parameter in self.named_parameters() if parameter.requires_grad}
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}
        return {key: value.cpu() for key, value in own.items() if key in trained}

    def shown(self) -> ImageContract:
        """The images that the teacher was shown: its contract, at the size of the recipe's data by nearest pixels."""
        return replace(self.teacher.contract, size=self.recipe.data.size, interpolation="nearest")

    def export(self) -> Export:
        """The student, and in a file of their own the projections."""
        network, heads = self.student(), self.heads()
        weights = {"model": network.state_dict()} | ({"heads": heads} if heads else {})
        golden = golden_values(network, ones=self.frames.features == "ones")
        return Export("sr_unet", dict(self.arch_args), self.contract, weights, golden)


def with_teacher(export: Export, student: SRUNet, teacher: Teacher, pairing: Pairing) -> Export:
    """The export with the teacher's weights and golden values of both networks' common features.

    A teacher of no architecture of the zoo is left out.
    """
    if teacher.arch is None:
        return export
    state = {key: value.cpu() for key, value in teacher.network.state_dict().items()}
    student.contract = export.contract  # type: ignore[assignment]
    pair = FeaturePair.from_states(student, pairing, state, export.weights.get("heads", {}))
    weights = export.weights | {"teacher": state}
    return Export(
        export.arch, export.arch_args, export.contract, weights, export.golden | pair_golden(pair), pairing=pairing
    )


@dataclass(frozen=True)
class Config(FrameConfig):
    """Settings of the task; numbers of samples hold for each process."""

    temperature: float = 0.04  # SLidR: 0.07
    matches: int = 4096  # anchors of the batch or of each image:
    matches_of: Literal["batch", "image"] = "batch"
    # algorithm 1 flattens the points of all images; "image": the own image's alone, with `matches` of each
    negatives: Literal["batch", "image"] = "batch"
    align_corners: bool = True  # of the upsampling, as SLidR has it

    def __post_init__(self) -> None:
        """Ranges."""
        self.require_positive("temperature", "matches")


class PPKT(TaughtByImages):
    """PPNCE between voxels and the upsampled, projected features of their pixels."""

    normalize = True

    def __init__(self, recipe: Recipe, config: Config, teacher: Teacher) -> None:
        super().__init__(recipe, config, teacher)
        self.config = config
        self.projection = nn.Conv2d(teacher.out_chans, self.spec.out_chans, kernel_size=1)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch as `FrameCloudSamples` yields it: {"ppnce": a scalar}."""
        rows = self._chosen(batch)
        voxels = encode(self.backbone, batch["coords"], batch["feats"], low_precision=self.low_precision)
        pixels = self.pixel_features(batch, torch.cat(rows))
        own = voxels[batch["voxel"][torch.cat(rows)]]
        sizes = [len(part) for part in rows]
        losses = [
            info_nce(point, pixel, temperature=self.config.temperature, symmetric=False)
            for point, pixel in zip(own.split(sizes), pixels.split(sizes), strict=True)
        ]
        return {"ppnce": torch.stack(losses).mean()}

    def pixel_features(self, batch: Mapping[str, Any], rows: Tensor) -> Tensor:
        """Features of the pixels of correspondences `rows`, int64 [n]: float32 [n, out_chans], not normalized.

        The projection is linear and so is the upsampling: they are exchanged, and done for these pixels alone.
        """
        maps = self.projection(self.teach(batch))
        size = batch["image"].shape[-2], batch["image"].shape[-1]
        element, pixel = batch["element"][rows], batch["pixel"][rows]
        return sample_map(maps, element, pixel, size, align_corners=self.config.align_corners)

    def _chosen(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The drawn correspondences of every problem: one for the batch, or one for each image."""
        element, together = batch["element"], self.config.negatives == "batch"
        if together and self.config.matches_of == "batch":
            generator = torch.Generator().manual_seed(batch["seed"][0])  # one stream of draws for the whole batch
            return [draw(len(element), self.config.matches, generator, element.device)]
        groups = [(element == number).nonzero()[:, 0] for number in range(len(batch["seed"]))]
        drawn = [
            group[draw(len(group), self.config.matches, torch.Generator().manual_seed(seed), element.device)]
            for group, seed in zip(groups, batch["seed"], strict=True)
        ]
        return [torch.cat(drawn)] if together else drawn

    def export(self) -> Export:
        """Student, projection and teacher: `load_pair` puts them together."""
        export = super().export()
        if self.teacher.arch is None:
            return export
        interpolation: Literal["corners", "bilinear"] = "corners" if self.config.align_corners else "bilinear"
        pairing = Pairing(
            self.teacher.arch,
            self.shown(),
            role="teacher",
            image_projection="projection",
            interpolation=interpolation,
        )
        return with_teacher(export, self.student(), self.teacher, pairing)


def build(recipe: Recipe, config: Config) -> PPKT:
    """The task, its weights drawn from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return PPKT(recipe, config, teacher_of(recipe, config))


def teacher_of(recipe: Recipe, config: FrameConfig) -> Teacher:
    """The teacher that a recipe names."""
    if config.teacher == ADE20K:
        if config.teacher_file is None:
            raise RecipeError(
                f"recipe {recipe.name}: teacher 'ade20k' has no file that could be fetched. Accepted: --set "
                "task.teacher_file=FILE, a state dict of torchvision's FCN or DeepLabV3 trained on ADE20K's 150 "
                "classes; or --set task.teacher=FOLDER, a finished segmentation run of `geo-pretrain finetune`."
            )
        return load_segmenter(config.teacher, config.teacher_file)
    if config.teacher_file is not None:
        raise RecipeError(
            f"'task.teacher_file' is given, and 'task.teacher' is {config.teacher!r}: accepted is ade20k."
        )
    weights = config.teacher
    if (Path(weights) / "results.json").is_file():
        return load_segmenter(weights)
    return load_teacher(weights, config.teacher_depth, dense=config.dense)
