"""A fine-tuning run as a task of the training loop: samples, schedule, evaluations, saved state."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import Dataset

from geo_pretrain.checkpoint import sha256
from geo_pretrain.errors import CheckpointError, DataError
from geo_pretrain.files import atomic_write
from geo_pretrain.training.batchnorm import synchronize_batchnorm
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.sampler import Key, Skipped, read_or_replace, sample_seed
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.task import Evaluation, FinetuneTask, weights_digest
from geo_pretrain.training.finetune_recipe import FinetuneRecipe, changes
from geo_pretrain.training.loop import RecipeTask, check_batch, make_finetune_optimizer
from geo_pretrain.training.recipe import micro_batches
from geo_pretrain.training.runs import RunFolder
from geo_pretrain.training.schedule import pri3d_bn_momentum, set_bn_momentum, votenet_bn_momentum

BEST = "best.safetensors"  # weights of the best evaluation, in the run's folder

T = TypeVar("T")
OnEvaluation = Callable[[int, Evaluation], None]


@dataclass(frozen=True)
class LabelledSplits:
    """The labelled data of a run."""

    train: LabelledData
    val: LabelledData
    fraction: float  # actual share of the source's training images in `train`


class Finetuning(RecipeTask):
    """A downstream task with the labelled data, optimizer and schedule of its recipe."""

    recipe: FinetuneRecipe

    def __init__(
        self,
        recipe: FinetuneRecipe,
        backbone: str,
        task: FinetuneTask,
        data: LabelledSplits,
        world: World,
        run: RunFolder,
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        optim = recipe.optim
        check_batch(optim.batch, micro_batches(optim, world.size), world)
        self.backbone, self.task, self.data, self.run, self.on_evaluation = backbone, task, data, run, on_evaluation
        self.train_ids, self.val_ids = data.train.ids(), spread_ids(data.val.ids(), recipe.evaluate.images)
        task.prepare(data.train)
        with warnings.catch_warnings():
            if not world.is_main:  # what is refused is refused in all processes, what is told in one
                warnings.simplefilter("ignore", UserWarning)
            task.look_at(data.train, data.val)
        self.digest = weights_digest(task.backbone().state_dict())
        samples = _Samples(data.train, self.train_ids, task, recipe.seed)
        super().__init__(recipe, task.module, samples, world)
        self.unit = task.unit
        if optim.backbone_bn_momentum is not None:
            set_bn_momentum(task.backbone(), optim.backbone_bn_momentum)
        if optim.sync_bn:
            synchronize_batchnorm(self.module, world)
        self.optimizer = make_finetune_optimizer(optim, task.parameter_groups())
        self.due = frozenset(evaluation_steps(recipe, len(self.train_ids), self.budget.steps))
        self.evaluations: list[dict[str, Any]] = []
        self.best_sha256: str | None = None  # of the file `BEST`; None: not written yet, or by an older version
        self.skipped: dict[str, str] = {}  # path -> reason, of training samples that were left out
        self._remarks: dict[str, Any] = {}

    def batches(self, start: int) -> Iterator[Any]:
        """Yield the micro-batches of each step. Raises `DataError` with the name of an unusable image or cloud.

        Broken clouds, which another one replaced, and clouds beyond the limit of a batch are noted for the log.
        """
        for batch in super().batches(start):
            if isinstance(batch, DataError):
                thing = "cloud" if self.task.skips_broken else "image"
                source, path = self.recipe.data.source, self.recipe.data.path
                line = "" if path is None else f" All at once: geo-pretrain data check {source}:{path}"
                raise DataError(f"A training {thing} cannot be used: {str(batch).rstrip('.')}.{line}")
            for name in ("skipped", "dropped") if isinstance(batch, dict) else ():
                if found := batch.pop(name, None):
                    self._remarks[name] = self._remarks[name] + found if name in self._remarks else found
            self.skipped |= dict(self._remarks.get("skipped", ()))
            yield batch

    def remarks(self) -> dict[str, Any]:
        """Broken clouds that were replaced, and the number of clouds dropped from the batch, of the last step."""
        remarks, self._remarks = self._remarks, {}
        return remarks

    def losses(self, batch: Any) -> dict[str, Tensor]:
        with self.precision():
            return self.task.losses(batch)

    def schedule(self, step: int) -> float:
        """Set the learning rate of each group, and BatchNorm momentum."""
        spec = self.recipe.optim
        epoch = step * spec.batch // len(self.train_ids)
        rate = spec.rate(step, self.budget.steps, epoch=epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate * group["factor"], spec.floor)
        if spec.bn_momentum == "pri3d":
            set_bn_momentum(self.module, pri3d_bn_momentum(max(step - 1, 0)))
        elif spec.bn_momentum == "votenet":
            set_bn_momentum(self.module, votenet_bn_momentum(epoch, spec.bn_epochs))
        return rate

    def seed(self, step: int, micro_batch: int) -> None:
        """Seed the global random generators (dropout, torchvision's samplers) from the step."""
        torch.manual_seed(sample_seed(self.recipe.seed, step, -2 - micro_batch))

    def identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_yaml(),
            "backbone": self.digest,
            "data": f"{self.data.train.fingerprint()} {self.data.val.fingerprint()}",
        }

    def changed_settings(self, recipe: str) -> list[str]:
        return changes(recipe, self.recipe.to_yaml())

    def extras(self) -> dict[str, Any]:
        self._gather_skipped()
        return {"evaluations": self.evaluations, "skipped": self.skipped, "best_sha256": self.best_sha256}

    def restore(self, extras: Mapping[str, Any]) -> None:
        self.evaluations, self.skipped = extras["evaluations"], extras.get("skipped", {})
        self.best_sha256 = extras.get("best_sha256")

    def evaluation_due(self, step: int) -> bool:
        return step in self.due

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate on the validation images; save the weights of the best evaluation if the recipe reports it."""
        with self.precision():
            evaluation = self.task.evaluate(self.data.val, self.val_ids, self.world)
        self._gather_skipped()
        self.evaluations.append({"step": step, **evaluation.to_dict()})
        if self.recipe.match_released_code and self.best()["step"] == step and self.world.is_main:
            write_weights(self.task, self.run.path / BEST)
            self.best_sha256 = sha256(self.run.path / BEST)
        if self.on_evaluation is not None:
            self.on_evaluation(step, evaluation)
        return evaluation.scores

    def _gather_skipped(self) -> None:
        for skipped in self.world.all_gather_object(self.skipped) if self.task.skips_broken else ():
            self.skipped |= cast(dict[str, str], skipped)

    def best(self) -> dict[str, Any]:
        """The evaluation with the highest score; the first one on ties."""
        return max(self.evaluations, key=lambda evaluation: evaluation["scores"][self.task.metric])

    def load_best(self) -> None:
        """Load the weights of the best evaluation. Raises `CheckpointError` if the run's folder holds others."""
        path = self.run.path / BEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if not data or self.best_sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise CheckpointError(
                f"{path}, the weights of the best evaluation, {'was altered' if data else 'is missing or empty'}. Put "
                "it back as it was, or remove that folder to start from the beginning."
            )
        self.module.load_state_dict(load(data))

    def precision(self) -> torch.autocast:
        """The autocast context of forward passes in the recipe's precision."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")


class _Samples(Dataset[Any]):
    """Training samples by (epoch, position), independent of worker count and resuming.

    What cannot be used is handed on as a `DataError`: raised in the training process, its message survives. A task that
    skips broken clouds gets another one in its place, and the batch has the list "skipped" of (path, reason).
    """

    def __init__(self, source: LabelledData, ids: Sequence[str], task: FinetuneTask, seed: int) -> None:
        self.source, self.ids, self.task, self.seed = source, list(ids), task, seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Key) -> Any:
        epoch, position = key
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, position))

        def draw(row: int) -> Any:
            return self.task.sample(self.task.load(self.source, self.ids[row]), generator)

        try:
            if not self.task.skips_broken:
                return draw(position)
            skipped: Skipped = []
            _, sample = read_or_replace(draw, len(self.ids), position, generator, skipped, what="clouds")
            return sample, skipped
        except DataError as error:
            return error

    def collate(self, samples: list[Any]) -> Any:
        """Collate with the task, or hand on the first sample that cannot be used."""
        try:
            unusable = next((s for s in samples if isinstance(s, DataError)), None)
            if unusable is not None or not self.task.skips_broken:
                return unusable or self.task.collate(samples)
            skipped = [one for _, skipped in samples for one in skipped]
            return self.task.collate([sample for sample, _ in samples]) | {"skipped": skipped}
        except DataError as error:
            return error


def evaluation_steps(recipe: FinetuneRecipe, images: int, steps: int) -> list[int]:
    """List the steps after which a run with this many training images is evaluated.

    The released loops measure after epochs 0, n, 2n, ... or every n steps, and so often never at the end; here the end
    is measured, too, unless the recipe is `match_released_code` (and measures at all before).
    """
    due = []
    if recipe.evaluate.every_epochs is not None:
        epoch = 0
        while (step := math.ceil((epoch + 1) * images / recipe.optim.batch)) <= steps:
            due.append(step)
            epoch += recipe.evaluate.every_epochs
    elif recipe.evaluate.every_steps is not None:
        due = list(range(recipe.evaluate.every_steps, steps + 1, recipe.evaluate.every_steps))
    if not due or (due[-1] != steps and not recipe.match_released_code):
        due.append(steps)
    return due


def spread_ids(ids: list[T], count: int | None) -> list[T]:
    """Choose at most `count` evenly spaced ids, or other items."""
    if count is None or count >= len(ids):
        return ids
    return [ids[k * len(ids) // count] for k in range(count)]


def write_weights(task: FinetuneTask, path: Path) -> None:
    """Write the network's weights as safetensors, whatever device they are on."""
    weights = {key: value.detach().cpu().contiguous() for key, value in task.module.state_dict().items()}
    with atomic_write(path) as part:
        part.write_bytes(save(weights))  # save_file's errors do not say what is wrong with the disk
