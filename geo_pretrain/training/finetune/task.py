"""The interface of a downstream task in a fine-tuning run: labels, losses, metrics.

Adding a task means writing one class with the methods of `FinetuneTask`, in one file, and one row in registry.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.backbones.encoder import HOST_WIDTH
from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.metrics import class_iou, mean_iou, pixel_accuracy
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one evaluation over the validation images."""

    scores: dict[str, float]  # shares of 1, such as {"miou": 0.61}; the loop's best is by the task's `metric`
    per_class: dict[str, dict[str, float | None]] = field(default_factory=dict)  # {"iou": {"wall": 0.7}}; None: absent
    details: dict[str, Any] = field(default_factory=dict)  # JSON: whatever else results.json should keep

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        return {"scores": self.scores, "per_class": self.per_class, "details": self.details}


class FinetuneTask(ABC):
    """A task of one run. `load` and `sample` run in loader processes, everything else in the training process."""

    module: nn.Module  # all that is trained and saved; the loop moves it and calls .train() before a step
    recipe: FinetuneRecipe
    classes: tuple[str, ...]  # names of the labels 1..C
    metric: str  # the score that picks the best evaluation and goes into tables: "miou", "box_ap50"
    contract: ImageContract | VoxelContract  # what images or points are turned into
    unit = "images"  # what is counted in displays: "images" or "clouds"
    needs: tuple[tuple[str, str], ...] = ()  # libraries that training or scoring needs, each with our extra
    skips_broken = False  # whether a `BadFrame` is skipped and counted in training, instead of ending the run

    @classmethod  # noqa: B027 (many tasks take all settings)
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Raise `RecipeError` for settings of a recipe that the task cannot use, before anything is loaded."""

    def prepare(self, train: LabelledData) -> None:  # noqa: B027 (most tasks learn nothing before training)
        """Take from the training data what the network is built from, such as typical sizes; called before training.

        It must come out the same in each process and each time, and be kept with the weights (buffers).
        """

    def look_at(self, source: LabelledData, measured: LabelledData) -> None:  # noqa: B027 (images one by one)
        """Warn before training on a source, measured on another, of data that cannot be meant, as clouds in feet."""

    def load(self, source: LabelledData, id: str) -> Any:
        """Load the labelled image of a sample. Raises `BadFrame` if it is unusable."""
        return source.load(id)

    @abstractmethod
    def sample(self, item: Any, generator: torch.Generator) -> Any:
        """Make a training sample from `load`'s result; augmentation uses `generator` only. Raises `BadFrame`."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Collate a batch; the loop moves its tensors, also those in lists and dicts, to the device."""

    @abstractmethod
    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalar losses by name; the loop minimizes their sum."""

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that are trained at `backbone_factor`; all others have `head_factor`."""
        return encoder_of(self.module).parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """[{"params": [...], "factor": 10.0}, ...] without frozen ones: factor on the schedule's learning rate.

        Without `optim.decay_norms`, biases and weights of norms (one number a channel) are in groups of their own.
        """
        optim, inside = self.recipe.optim, {id(parameter) for parameter in self.encoder_parameters()}
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in inside], "factor": optim.backbone_factor},
            {"params": [p for p in trained if id(p) not in inside], "factor": optim.head_factor},
        ]
        if not optim.decay_norms:
            groups = [half for group in groups for half in _by_decay(group)]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def backbone(self) -> nn.Module:
        """The transferred part of `module`; BatchNorm momentum and digests apply to it."""

    @abstractmethod
    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Measure `module` on these images, each process of `world` on its share; leaves it in evaluation mode.

        Every process gets the same result, which does not depend on their number.
        """

    @abstractmethod
    def predict(self, items: Sequence[Any]) -> list[Any]:
        """Predict in evaluation mode, in the order of `items`: images uint8 [H, W, 3], RGB, or `LabelledCloud`s.

        Labels of clouds are not looked at and may be None. Results are in the size, frame and order of points of the
        input; their types are in evaluation/predictions.py, that of boxes in images is `evaluation.coco.Detections`.
        """

    @abstractmethod
    def draw(self, source: LabelledData, ids: Sequence[str], path: Path) -> None:
        """Write a PNG with image, ground truth and prediction of these images."""

    @abstractmethod
    def protocol_deviations(self) -> dict[str, str]:
        """Map each accident of the released protocol to what this run does about it, in words."""

    def start_shape(self) -> dict[str, Any]:
        """What, beside the recipe, the shape of the network depends on: the start weights' own, in plain JSON types."""
        if is_timm(self.recipe.network.encoder):
            return {"width": HOST_WIDTH}  # the encoder's name says it all
        return {"width": int(cast(Any, encoder_of(self.backbone())).conv1.weight.shape[0])}

    def facts(self) -> dict[str, Any]:
        """Further entries of results.json, in plain JSON types."""
        return {}


class SegmentationTask(FinetuneTask):
    """A task measured by mIoU, accuracy and per-class IoU from one confusion matrix over all images."""

    metric = "miou"
    classes: tuple[str, ...]
    counted = "pixel", "images"
    exact = False  # whether IoU counts as the released code does

    @abstractmethod
    def confusion(self, source: LabelledData, ids: Sequence[str]) -> np.ndarray:
        """The confusion matrix over these images, rows = truth: int64 [1 + C, 1 + C]."""

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Add the confusion matrices of all processes; the details hold the sum."""
        own = np.zeros((1 + len(self.classes),) * 2, np.int64)
        for batch in share_of(ids, self.recipe.evaluate.batch, world):
            own += self.confusion(source, batch)
        total = np.sum(cast(list[np.ndarray], world.all_gather_object(own)), axis=0)
        if not total.sum():
            thing, places = self.counted
            raise DataError(f"No labelled {thing} in {len(ids)} {places} of {source.name!r}, split {source.split!r}.")
        values = class_iou(total, match_released_code=self.exact)
        iou = {name: None if np.isnan(v) else float(v) for name, v in zip(self.classes, values, strict=True)}
        miou = mean_iou(total, match_released_code=self.exact)
        scores = {"miou": miou, "accuracy": pixel_accuracy(total)}
        return Evaluation(scores, {"iou": iou}, {"confusion": total.tolist(), "images": len(ids)})


def _by_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a parameter group into the parameters that decay, and those with one number a channel, which do not."""
    parameters = group["params"]
    decay = group | {"params": [parameter for parameter in parameters if parameter.ndim > 1]}
    rest = group | {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0}
    return [decay, rest]


def share_of(items: Sequence[T], batch: int, world: World) -> list[list[T]]:
    """Yield this process's batches, every `world.size`-th one; the batches do not depend on the number of processes."""
    batches = [list(items[start : start + batch]) for start in range(0, len(items), batch)]
    return batches[world.rank :: world.size]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Compute a sha256 over names, types, shapes and values of weights; it identifies a run's initial weights."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
