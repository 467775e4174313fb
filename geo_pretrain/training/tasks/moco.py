"""MoCo v2: two crops of an image get the same feature, different from all other images'; Pri3D's 2D-only baseline.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2020, on the frames of Pri3D's pairs and on
ImageNet (Hou et al., ICCV 2021, section 4.1). Defaults are those of the released trainers. MoCo's is CC-BY-NC-4.0; this
one is written from the paper.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import encoder_arch
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.checks import Accepts, Count, Momentum, Positive, Probability, Shares
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.data.samples.single_images import CropSamples, Mix, list_images
from geo_pretrain.training.distributed import World, forward_in_groups
from geo_pretrain.training.losses.contrastive import queue_nce
from geo_pretrain.training.recipe import Recipe, micro_batches
from geo_pretrain.training.tasks.base import Batch, TaskConfig, same_settings
from geo_pretrain.training.tasks.images import ImageTask

FrameSize = Annotated[tuple[int, int], Accepts(lambda size: min(size) >= 1, "[height, width], each from 1 up")]
GROUPS = 8  # as many as the released trainers have processes


@dataclass(frozen=True)
class Config(TaskConfig):
    """Settings of the task; each default is the released code's. Crops are as large as `data.size`."""

    dim: Count = 128  # of what is compared
    queue: Count = 65536  # older keys, the negatives
    momentum: Momentum = 0.999  # of the key encoder
    temperature: Positive = 0.2
    # Shuffle-BN: number of BatchNorm groups per process. Keys are normalized in other groups than queries, so that
    # batch statistics do not tell which key belongs to a query. None: 1 when distributed, else as `groups_of` says.
    # 1 in a single process disables shuffling.
    bn_groups: Count | None = None
    resize: FrameSize | None = (240, 320)  # of frames before the crop, to the nearest pixel; null: as they are
    scale: Shares = (0.2, 1.0)  # share of the image that a crop covers
    flip_prob: Probability = 0.5
    # combine: frames and `images` in one list; batch: a frame and an image in each sample, so optim.batch counts both
    mix: Mix = "none"
    images: str | None = None  # folder of class folders, such as ImageNet's train

    def unused(self) -> dict[str, str]:
        return {"images": "mix 'combine' or 'batch'"} if self.mix == "none" else {}


class Projector(nn.Module):
    """An encoder, the mean over the image, and two linear layers: an image becomes one vector of length 1."""

    def __init__(self, encoder: str, width: int, dim: int) -> None:
        super().__init__()
        last = len(encoder_arch(encoder, width=width).maps) - 1
        self.encoder = build_encoder(encoder, width=width, out_indices=(last,))
        channels = self.encoder.feature_info[-1]["num_chs"]
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W], normalized -> [N, dim]."""
        return F.normalize(self.head(self.encoder(images)[0].mean((2, 3))).float(), dim=-1)


class MoCo(ImageTask):
    """Query network, key network and queue; all of them are in the state, so that a run resumes exactly."""

    config_type = Config
    config: Config
    negatives = "queue"
    parts_batchnorm = True
    same_in_any_world = False  # processes are groups of BatchNorm
    queue: Tensor  # [K, dim]
    queue_end: Tensor  # where the next key goes

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        model = recipe.network2d()
        self.views = 2 if config.mix == "batch" else 1  # images a sample
        self.contract = replace(self.contract, interpolation="bilinear")
        self.query, self.key = (Projector(model.encoder, model.width, config.dim) for _ in range(2))
        self.key.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.dim), dim=-1))
        self.register_buffer("queue_end", torch.zeros((), dtype=torch.long))
        self.pending: list[Tensor] = []  # keys of the micro-batches of this step; empty between steps

    @property
    def backbone(self) -> nn.Module:
        return self.query.encoder

    def heads(self) -> dict[str, Tensor]:
        return {f"head.{key}": value.cpu() for key, value in self.query.head.state_dict().items()}

    def load_start_weights(self) -> None:
        """The encoder's start weights; the key network starts as the query network."""
        super().load_start_weights()
        self.key.load_state_dict(self.query.state_dict())

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Two crops of each image; see `CropSamples`. Raises `RecipeError` or `DataError` without `task.images`."""
        images = () if self.config.mix == "none" else list_images(self.config.images)
        return same_settings(CropSamples, self.config, *self.arguments(source, pairs), images=images)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `CropSamples`: {"moco": a scalar}; the keys enter the queue.

        With several micro-batches a step, they see the same queue and the same key network.
        """
        images1, images2 = batch["image1"], batch["image2"]
        if not self.pending:
            self.update_key_network()
        world = World.current(images1.device)
        groups = self.bn_groups(len(images1), world)
        with self.autocast(images1.device):
            query = forward_in_groups(self.query, images1, groups)
            with torch.no_grad():
                all_keys = world.forward_shuffled(self.key, images2, groups, seed=batch["seed"][0])
        key = world.own_rows(all_keys)
        loss = queue_nce(
            query.flatten(0, 1), key.flatten(0, 1), self.queue.clone(), temperature=self.config.temperature
        )
        self.pending.append(all_keys.flatten(0, 1))
        if len(self.pending) == micro_batches(self.recipe.optim, world.size):
            self.enqueue(torch.cat(self.pending))
            self.pending = []
        return {"moco": loss}

    def bn_groups(self, samples: int, world: World) -> int:
        """BatchNorm groups for the `samples` that this process takes at once. Raises `RecipeError` for unequal ones."""
        if self.config.bn_groups is None:
            return 1 if world.size > 1 else groups_of(samples)
        if samples % self.config.bn_groups:
            raise RecipeError(
                f"'task.bn_groups' is {self.config.bn_groups}, accepted here is a number that divides the {samples} "
                "samples that a process takes at once (optim.batch / processes / optim.accumulate)."
            )
        return self.config.bn_groups

    @torch.no_grad()
    def update_key_network(self) -> None:
        """Move the key network's parameters a little towards the query network's: an exponential moving average."""
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.lerp_(query, 1 - self.config.momentum)

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys of the queue by keys [n, dim]."""
        size = len(self.queue)
        keys = keys[-size:]  # a queue shorter than a batch keeps the last ones
        rows = (self.queue_end + torch.arange(len(keys), device=keys.device)) % size
        self.queue[rows] = keys
        self.queue_end.copy_((self.queue_end + len(keys)) % size)


def groups_of(samples: int) -> int:
    """The number of BatchNorm groups for `samples` in one process: their largest divisor up to `GROUPS`.

    Each has at least two samples, or BatchNorm would take its statistics from single images; but of 2 or 3 all are cut.
    """
    least = 2 if samples > 3 else 1
    groups = max(count for count in range(1, GROUPS + 1) if samples % count == 0 and samples >= least * count)
    if groups == 1 < samples:
        warnings.warn(
            f"{samples} samples cannot be cut into 2 to {GROUPS} equal groups of two or more, so one process cannot "
            "shuffle keys between groups of BatchNorm, whose statistics then tell which key belongs to a query. Choose "
            "an optim.batch (/ optim.accumulate) that such a number divides.",
            stacklevel=2,
        )
    return groups
