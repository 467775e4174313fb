"""Short fine-tuning of semantic segmentation on samples held in memory, for the demo and the benchmark; 2D and 3D.

The same loop as everywhere, without a folder. Order and augmentation are drawn batch after batch from one generator,
so nothing can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import DataError
from geo_pretrain.training import precision
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.voxels import voxels_of
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.distributed import World
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix, mean_iou
from geo_pretrain.training.finetune.segmentation import segmentation_loss, upsample
from geo_pretrain.training.finetune.segmentation3d import cloud_confusion, cloud_loss
from geo_pretrain.training.loop import Budget, TrainingTask, fit, make_optimizer
from geo_pretrain.training.recipe import AUTO, OptimSpec, Precision
from geo_pretrain.training.schedule import learning_rate, set_bn_momentum

OnStep = Callable[[int, float], None]  # step (1, 2, ...), loss


@dataclass(frozen=True)
class FinetuneSpec:
    """The budget of a run on images, the same for every start; SGD as in Pri3D's table 1."""

    steps: int = 100
    batch: int = 4
    lr: float = 0.05
    momentum: float = 0.9
    dampening: float = 0.1
    weight_decay: float = 0.0
    bn_momentum: float = 0.1  # Pri3D's falls to 0.001 within 180 steps, whose averages lag behind hundreds
    precision: Precision = "auto"


@dataclass(frozen=True)
class PointsSpec(FinetuneSpec):
    """The budget of a run on clouds, the same for every start; SGD as in PointContrast's segmentation."""

    lr: float = 0.1
    weight_decay: float = 1e-4
    precision: Precision = "fp32"


@dataclass(frozen=True)
class SegmentationResult:
    """mIoU over the classes present in the ground truth, and the confusion matrix behind it."""

    miou: float
    confusion: np.ndarray  # int64 [classes, classes], rows = truth; class 0 (unlabeled) is left out of mIoU
    losses: tuple[float, ...]


class InMemoryFinetuning(TrainingTask):
    """Segmentation on `count` samples: `draw` makes a batch, `loss` computes the network's loss on it."""

    def __init__(
        self,
        network: nn.Module,
        spec: FinetuneSpec,
        count: int,
        draw: Callable[[Tensor, torch.Generator], Any],
        loss: Callable[[Any], Tensor],
        seed: int,
    ) -> None:
        self.module, self.spec, self.count, self.draw, self.loss = network, spec, count, draw, loss
        settings = {key: value for key, value in vars(spec).items() if key not in ("bn_momentum", "precision")}
        self.optim = OptimSpec(**settings)
        self.generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0))
        self.optimizer = make_optimizer(self.optim, network)
        self.budget = Budget(steps=spec.steps, batch=spec.batch)
        device = next(network.parameters()).device
        low = precision.bf16_is_faster(device) if spec.precision == AUTO else spec.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=low)

    def batches(self, start: int) -> Iterator[Any]:
        """Yield batches, from a new permutation of the samples in each epoch."""
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < self.spec.batch:
                order = torch.cat([order, torch.randperm(self.count, generator=self.generator)])
            chosen, order = order[: self.spec.batch], order[self.spec.batch :]
            yield self.draw(chosen, self.generator)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        with self.autocast:
            return {"segmentation": self.loss(batch)}

    def schedule(self, step: int) -> float:
        rate = learning_rate(self.optim, step, self.budget.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        set_bn_momentum(self.module, self.spec.bn_momentum)
        return rate

    def train(self, on_step: OnStep | None, measure: Callable[[], np.ndarray]) -> SegmentationResult:
        """Take all steps, then `measure` the confusion matrix."""
        losses: list[float] = []

        def note(loss: float) -> None:
            losses.append(loss)
            if on_step is not None:
                on_step(len(losses), loss)

        world = World(0, 1, next(self.module.parameters()).device)
        fit(self, world, on_step=lambda info: note(info.losses["segmentation"]))
        confusion = measure()
        return SegmentationResult(mean_iou(confusion), confusion, tuple(losses))


def finetune_frames(
    network: nn.Module,
    contract: ImageContract,
    train: Sequence[Frame],
    val: Sequence[Frame],
    spec: FinetuneSpec,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> SegmentationResult:
    """Train `network` (logits [B, classes, H/2, W/2]) on labelled frames and measure it on others.

    Pri3D's protocol, table 1: SGD, poly schedule, cross-entropy on logits brought to label size (bilinear,
    align_corners), class 0 ignored; images are flipped with probability 0.5. The seed draws batches and flips. The last
    state is measured (the released protocol reports the best epoch on the validation set, which flatters).
    """
    images, labels = _stack(train, contract)

    def draw(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = images[chosen], labels[chosen]
        flips = torch.rand(spec.batch, generator=generator) < 0.5
        x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        return x, torch.where(flips[:, None, None], y.flip(-1), y)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return segmentation_loss(network(x).float(), y, first=0)

    task = InMemoryFinetuning(network, spec, len(images), draw, loss, seed)
    return task.train(on_step, lambda: evaluate_frames(network, contract, val))


def finetune_clouds(
    network: nn.Module,
    contract: VoxelContract,
    train: Sequence[LabelledCloud],
    val: Sequence[LabelledCloud],
    spec: PointsSpec = PointsSpec(),
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> SegmentationResult:
    """Train `network` (logits [N, 1 + C] of voxels) on labelled clouds and measure it on other, unaugmented clouds.

    SGD, poly schedule, cross-entropy over the labelled voxels of a batch, the last state measured. In training every
    cloud is rotated upright about its centroid (any angle about z, +-pi/64 about x and y). The seed draws order and
    rotations.
    """
    if not train:
        raise DataError("No labelled cloud to train on.")

    def draw(chosen: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [voxels_of(train[k], contract, generator) for k in chosen.tolist()]

    task = InMemoryFinetuning(network, spec, len(train), draw, lambda batch: cloud_loss(network, batch), seed)
    return task.train(on_step, lambda: evaluate_clouds(network, contract, val))


def evaluate_frames(
    network: nn.Module, contract: ImageContract, frames: Sequence[Frame], batch: int = 16
) -> np.ndarray:
    """The confusion matrix of a network over labelled frames, rows = truth: int64 [classes, classes]."""
    if not frames:
        raise DataError("No labelled frame to evaluate on.")
    network.eval()
    images, labels = _stack(frames, contract)
    device = next(network.parameters()).device
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            truth = labels[start : start + batch]
            logits = upsample(network(images[start : start + batch].to(device)), truth.shape[-2:]).cpu()
            parts.append(confusion_matrix(truth, best_class(logits), logits.shape[1]))
    return np.sum(parts, axis=0)


def evaluate_clouds(network: nn.Module, contract: VoxelContract, clouds: Sequence[LabelledCloud]) -> np.ndarray:
    """The confusion matrix of a network over the labelled voxels of unaugmented clouds: int64 [1 + C, 1 + C]."""
    parts = [cloud_confusion(network, contract, cloud) for cloud in clouds]
    total = np.sum(parts, axis=0)
    if not parts or not total.sum():
        raise DataError("No labelled cloud to evaluate on.")
    return np.asarray(total)


@torch.no_grad()
def predict(network: nn.Module, contract: ImageContract, frame: Frame) -> np.ndarray:
    """Class ids of one frame at its own size: int64 [H, W]; class 0 (unlabeled) is never predicted."""
    network.eval()
    image = contract.transforms(resize=False)(frame.color)[None].to(next(network.parameters()).device)
    return best_class(upsample(network(image), frame.depth.shape))[0].cpu().numpy()


def _stack(frames: Sequence[Frame], contract: ImageContract) -> tuple[Tensor, Tensor]:
    """Normalized images [N, 3, H, W] and labels [N, H, W] of frames of one size."""
    transform = contract.transforms(resize=False)
    labels = []
    for frame in frames:
        if frame.semantic is None:
            raise DataError(f"Frame {frame.scene}/{frame.id} has no labels; segmentation needs a labelled source.")
        labels.append(torch.from_numpy(frame.semantic.astype(np.int64)))
    return torch.stack([transform(f.color) for f in frames]), torch.stack(labels)
