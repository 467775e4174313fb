"""MoCo v2: an image is told from all others, whatever crop and colors of it are seen; Pri3D's baseline in 2D alone.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2020, on the frames of Pri3D's pairs and on
ImageNet (Hou et al., ICCV 2021, section 4.1). Defaults are those of the released trainers. MoCo's is CC-BY-NC-4.0; this
one is written from the paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import collate
from geo_pretrain.training.data.samples.single_images import CropSamples, Mix, list_images
from geo_pretrain.training.initialize import initialize
from geo_pretrain.training.losses import queue_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export

GROUPS = 8  # processes of the released trainers


@dataclass(frozen=True)
class Config:
    """Settings of the task; each default is the released code's. Crops are as large as `data.size`."""

    dim: int = 128  # of what is compared
    queue: int = 65536  # older keys, the negatives
    momentum: float = 0.999  # of the key encoder
    temperature: float = 0.2
    # BatchNorm must not tell which key belongs to a query: keys go through it in other groups than queries. Groups are
    # the processes; here each process's share can be cut into more, so that one does what several would. None: 1 where
    # several train, else as `groups_of` says. 1 in one process: one group, so nothing is shuffled and BatchNorm tells.
    bn_groups: int | None = None
    resize: tuple[int, int] | None = (240, 320)  # of frames before the crop, to the nearest pixel; null: as they are
    scale: tuple[float, float] = (0.2, 1.0)  # share of the image that a crop covers
    flip_prob: float = 0.5
    # combine: frames and `images` in one list; batch: a frame and an image in each sample, so optim.batch counts both
    mix: Mix = "none"
    images: str | None = None  # folder of class folders, such as ImageNet's train

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("dim", "queue", "temperature", "bn_groups"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RecipeError(f"'task.{key}' is {value!r}, accepted is a number above 0.")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"'task.momentum' is {self.momentum!r}, accepted is a number from 0 up, under 1.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise RecipeError(f"'task.scale' is {list(self.scale)}, accepted is [low, high] with 0 < low <= high <= 1.")
        if self.resize is not None and min(self.resize) < 1:
            raise RecipeError(f"'task.resize' is {list(self.resize)}, accepted is [height, width], each from 1 up.")


class Projector(nn.Module):
    """A ResNet, the mean over the image, and two layers: an image becomes one vector of length 1."""

    def __init__(self, depth: int, width: int, dim: int) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(depth, width=width, out_indices=(4,))
        channels = self.encoder.feature_info[-1]["num_chs"]
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W], normalized -> [N, dim]."""
        return F.normalize(self.head(self.encoder(images)[0].mean((2, 3))).float(), dim=-1)


class MoCo(nn.Module):
    """Query and key network, and the queue; all of it is in the state, so that a resumed run goes on exactly."""

    unit = "images"
    queue: Tensor  # [K, dim]
    queue_end: Tensor  # where the next key goes

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        model = recipe.network2d()
        self.recipe, self.config = recipe, config
        self.views = 2 if config.mix == "batch" else 1  # images a sample
        self.contract = ImageContract(size=recipe.data.size, interpolation="bilinear")
        self.arch_args: dict[str, Any] = {"depth": model.depth, "width": model.width}
        self.query, self.key = (Projector(model.depth, model.width, config.dim) for _ in range(2))
        self.key.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.dim), dim=-1))
        self.register_buffer("queue_end", torch.zeros((), dtype=torch.long))
        self.pending: list[Tensor] = []  # keys of the micro-batches of this step; empty between steps

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Two crops of each image; see `CropSamples`. Raises `RecipeError` or `DataError` without `task.images`."""
        config = self.config
        return CropSamples(
            source,
            pairs,
            self.recipe.data,
            self.contract,
            self.recipe.seed,
            scale=config.scale,
            flip_prob=config.flip_prob,
            resize=config.resize,
            images=() if config.mix == "none" else list_images(config.images),
            mix=config.mix,
        )

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate(samples)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch as `dataset` yields it, a scalar "moco"; the keys enter the queue.

        With several micro-batches a step, they see the same queue and the same key network.
        """
        images1, images2 = batch["image1"], batch["image2"]
        if not self.pending:
            self._follow()
        low = self.recipe.precision == "bf16"
        with torch.autocast(images1.device.type, torch.bfloat16, enabled=low):
            query = in_groups(self.query, images1, self._groups(len(images1)))
            key, everyones = self._keys(images2, batch["seed"][0])
        loss = queue_nce(
            query.flatten(0, 1), key.flatten(0, 1), self.queue.clone(), temperature=self.config.temperature
        )
        self.pending.append(everyones.flatten(0, 1))
        if len(self.pending) == self.recipe.optim.accumulate:
            self._enqueue(torch.cat(self.pending))
            self.pending = []
        return {"moco": loss}

    def export(self) -> Export:
        """The query encoder alone; its projection beside it."""
        encoder = ResNetEncoder(**self.arch_args)
        encoder.load_state_dict(self.query.encoder.state_dict())
        encoder.eval()
        heads = {f"head.{key}": value.cpu() for key, value in self.query.head.state_dict().items()}
        weights = {"encoder": encoder.state_dict(), "heads": heads}
        return Export("resnet", dict(self.arch_args), self.contract, weights, golden_values(encoder))

    def _groups(self, samples: int) -> int:
        """Groups for BatchNorm of the `samples` that this process takes at once."""
        if self.config.bn_groups is not None:
            return self.config.bn_groups
        return 1 if place()[1] > 1 else groups_of(samples)

    @torch.no_grad()
    def _follow(self) -> None:
        """The key network's parameters move a little towards the query network's."""
        for own, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
            own.lerp_(other, 1 - self.config.momentum)

    @torch.no_grad()
    def _keys(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Keys of this process's images [B, P, 3, H, W], and of all processes': [B, P, dim], [B', P, dim].

        All images are permuted, dealt to processes and groups anew, and their keys put back in order.
        """
        rank, world = place()
        groups = self._groups(len(images))
        together = gather(images)
        batch, per = together.shape[:2]
        generator = torch.Generator().manual_seed(shared(seed, images.device))
        order = torch.randperm(batch * per, generator=generator).to(images.device)
        shuffled = together.flatten(0, 1)[order][:, None]
        keys = gather(in_groups(self.key, shuffled[rank::world], groups))[:, 0]
        everyones = keys[order.argsort()].unflatten(0, (batch, per))
        return everyones[rank::world], everyones

    def _enqueue(self, keys: Tensor) -> None:
        """Put keys [n, dim] in place of the oldest."""
        size = len(self.queue)
        keys = keys[-size:]  # a queue shorter than a batch keeps the last ones
        rows = (self.queue_end + torch.arange(len(keys), device=keys.device)) % size
        self.queue[rows] = keys
        self.queue_end.copy_((self.queue_end + len(keys)) % size)


def groups_of(samples: int) -> int:
    """The groups that one process cuts its `samples` into: their largest divisor up to `GROUPS`."""
    groups = max(count for count in range(1, GROUPS + 1) if samples % count == 0)
    if groups == 1 < samples:
        warnings.warn(
            f"{samples} samples cannot be cut into 2 to {GROUPS} equal groups, so one process cannot shuffle keys "
            "between groups of BatchNorm, which then tells which key belongs to a query. Take an optim.batch (/ "
            "optim.accumulate) that such a number divides.",
            stacklevel=2,
        )
    return groups


def in_groups(network: Callable[[Tensor], Tensor], samples: Tensor, groups: int) -> Tensor:
    """Send every `groups`-th sample of [B, P, 3, H, W] through the network together: [B, P, dim], in order.

    BatchNorm sees one group at a time and keeps the statistics of the first, as those of the main process are kept
    where groups are processes. Raises `RecipeError` when the groups would differ in size.
    """
    if len(samples) % groups:
        raise RecipeError(
            f"'task.bn_groups' is {groups}, accepted here is a number that divides the {len(samples)} samples that a "
            "process takes at once (optim.batch / processes / optim.accumulate)."
        )
    per = samples.shape[1]
    outputs = []
    for group in range(groups):
        with unrecorded(network) if group else nullcontext():
            outputs.append(network(samples[group::groups].flatten(0, 1)).unflatten(0, (-1, per)))
    return torch.stack(outputs, dim=1).flatten(0, 1)


@contextmanager
def unrecorded(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """BatchNorm normalizes by the batch and leaves its running statistics alone."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    layers = [layer for layer in modules if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def place() -> tuple[int, int]:
    """(rank, number) of processes that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(own: Tensor) -> Tensor:
    """The rows [B, ...] of all processes [world * B, ...], dealt as the loader deals samples: row i is of i % world."""
    _, world = place()
    if world == 1:
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def shared(seed: int, device: torch.device) -> int:
    """The main process's seed, in all of them."""
    if place()[1] == 1:
        return seed
    value = torch.tensor(seed, device=device)
    dist.broadcast(value, src=0)
    return int(value)


def build(recipe: Recipe, config: Config) -> MoCo:
    """The task, its weights drawn from the recipe's seed, its encoders started as the recipe says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = MoCo(recipe, config)
    initialize(task.query.encoder, recipe)
    task.key.load_state_dict(task.query.state_dict())
    return task
