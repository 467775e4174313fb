"""Fine-tuning: a downstream recipe and a backbone become a number, with everything that it depends on beside it.

A run lives in `<out>.run/` (state, log) and ends by writing the folder `<out>` (finetune_folder.py). What a step does
is a function of the recipe, the data and the step number alone, so a run that was killed continues as if it had never
stopped.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from geo_pretrain.errors import DataError, GeoPretrainError, RecipeError
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from geo_pretrain.training.data.samples.sampler import Key, MicroBatches, sample_seed, total_steps
from geo_pretrain.training.distributed import join
from geo_pretrain.training.finetune.folder import (
    BEST,
    FinetuneResult,
    Run,
    check_out,
    finish,
    open_log,
    read_result,
    restore,
    result_rows,
    save,
    spread_ids,
    write_weights,
)
from geo_pretrain.training.finetune.task import (
    Evaluation,
    FinetuneTask,
    build_finetune_task,
    weights_digest,
)
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.loop import STATE, Interrupted, StepInfo, stop_requests
from geo_pretrain.training.networks import PretrainedInit
from geo_pretrain.training.runs import only_process
from geo_pretrain.training.schedule import pri3d_bn_momentum, set_bn_momentum


def finetune(
    recipe: FinetuneRecipe,
    backbone: str | os.PathLike[str],
    out: Path,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    sources: tuple[LabelledSource, LabelledSource] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
    on_data: Callable[[int, int], None] | None = None,
) -> FinetuneResult:
    """Fine-tune `backbone` by a recipe, or go on with the run that `<out>.run` holds, and write the folder `out`.

    `backbone`: a name of the catalog, a checkpoint folder, "imagenet" (torchvision's IMAGENET1K_V1) or "scratch".
    `init_kwargs`: where to look for it (`hub`, `revision`, `cache_dir`, `local_files_only`). `seed` None: the recipe's.
    `device` None: CUDA when there is one. `sources`: training and validation images in place of the recipe's.
    `on_data(done, total)` is called while rooms are rendered.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the state is saved.
        RecipeError: the recipe does not fit backbone or data, or is not that of the run to be continued.
        CheckpointError: `out` already holds a result and `overwrite` is not set, or another process works there.
        DataError: a label or image cannot be used; file and value are named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("Fine-tuning runs in one process; start it without torchrun (WORLD_SIZE is above 1).")
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    out = Path(out)
    check_out(out, overwrite)
    where = dict(init_kwargs or {})
    start = PretrainedInit(os.fspath(backbone), recipe.network.depth, recipe.network.width, where)
    contract = start.contract()  # a wrong name is found before any data are read
    train, val, fraction = _open(recipe, sources, on_data)
    place = join(device).device
    generators = torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
    with only_process(out, "fine-tuning run"), generators:
        check_out(out, overwrite)  # again: another process may have ended there in between
        task = build_finetune_task(recipe, start, train.classes, contract)
        run = _prepare(recipe, start, task, (train, val), fraction, out, place)
        with stop_requests() as stop:
            finished = _loop(run, stop, on_step, on_evaluation)
        if not finished:
            raise Interrupted(
                f"Stopped after step {run.step} of {run.steps}; the state is in {run.folder}. "
                "Give the same command again to go on."
            )
        return finish(run)


def evaluation_steps(recipe: FinetuneRecipe, images: int, steps: int) -> list[int]:
    """Steps after which a run over this many training images is measured.

    The released loops measure after epochs 0, n, 2n, ... or every n steps, and so often never at the end; here the end
    is measured, too, unless the recipe is `authors_exact` (and measures at all before).
    """
    due = []
    if recipe.evaluate.every_epochs is not None:
        epoch = 0
        while (step := math.ceil((epoch + 1) * images / recipe.optim.batch)) <= steps:
            due.append(step)
            epoch += recipe.evaluate.every_epochs
    elif recipe.evaluate.every_steps is not None:
        due = list(range(recipe.evaluate.every_steps, steps + 1, recipe.evaluate.every_steps))
    if not due or (due[-1] != steps and not recipe.authors_exact):
        due.append(steps)
    return due


class _Samples(Dataset[Any]):
    """Training samples by (epoch, position): workers and resuming change nothing."""

    def __init__(self, source: LabelledSource, ids: Sequence[str], task: FinetuneTask, seed: int) -> None:
        self.source, self.ids, self.task, self.seed = source, list(ids), task, seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Key) -> Any:
        epoch, position = key
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, position))
        try:
            return self.task.sample(self.source.load(self.ids[position]), generator)
        except DataError as error:
            return _Unusable(str(error))  # raised in the training process, where the message survives


@dataclass(frozen=True)
class _Unusable:
    """Why a sample could not be made."""

    reason: str


@dataclass(frozen=True)
class _Collate:
    """The task's batches, or what is wrong with one of the samples."""

    task: FinetuneTask

    def __call__(self, samples: list[Any]) -> dict[str, Any] | _Unusable:
        try:
            return next((s for s in samples if isinstance(s, _Unusable)), None) or self.task.collate(samples)
        except DataError as error:
            return _Unusable(str(error))


def _open(
    recipe: FinetuneRecipe,
    sources: tuple[LabelledSource, LabelledSource] | None,
    on_data: Callable[[int, int], None] | None,
) -> tuple[LabelledSource, LabelledSource, float]:
    """Training images (their part), validation images, and the share of the training images that it came to."""
    spec = recipe.data
    if sources is None:
        labels: Literal["segmentation", "detection"] = "segmentation" if recipe.task == "segmentation" else "detection"
        path = None if spec.path is None else Path(spec.path)
        train, val = (
            open_labelled(spec.source, path, split, task=labels, options=spec.options, progress=on_data)
            for split in ("train", "val")
        )
    else:
        train, val = sources
    if train.classes != val.classes:
        raise DataError(f"Classes of the training images {train.classes} are not those to measure on {val.classes}.")
    total = len(train.ids())
    if not total or not val.ids():
        raise DataError(f"Source {spec.source!r}: {total} training and {len(val.ids())} validation images.")
    listed = Path(spec.scenes).expanduser() if spec.scenes is not None else None
    if listed is not None and not (listed.is_dir() and spec.fraction == 1):  # all scenes need no list
        train = subset(train, 1.0, scenes=read_scene_list(listed, spec.fraction))
    elif spec.fraction < 1:
        train = subset(train, spec.fraction, spec.fraction_seed)
    return train, val, len(train.ids()) / total


def _prepare(
    recipe: FinetuneRecipe,
    start: PretrainedInit,
    task: FinetuneTask,
    sources: tuple[LabelledSource, LabelledSource],
    fraction: float,
    out: Path,
    device: torch.device,
) -> Run:
    """The run at its beginning, or where it was left."""
    train_ids, val_ids = sources[0].ids(), spread_ids(sources[1].ids(), recipe.evaluate.images)
    o = recipe.optim
    steps = total_steps(len(train_ids), o.batch, o.epochs, o.steps)
    digest = weights_digest(task.backbone().state_dict())
    task.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if o.backbone_bn_momentum is not None:
        set_bn_momentum(task.backbone(), o.backbone_bn_momentum)
    optimizer = torch.optim.SGD(
        task.parameter_groups(), lr=o.lr, momentum=o.momentum, dampening=o.dampening, weight_decay=o.weight_decay
    )
    run = Run(
        recipe=recipe,
        start=start,
        out=out,
        device=device,
        train=sources[0],
        val=sources[1],
        fraction=fraction,
        task=task,
        optimizer=optimizer,
        digest=digest,
        steps=steps,
        train_ids=train_ids,
        val_ids=val_ids,
        due=evaluation_steps(recipe, len(train_ids), steps),
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    if (run.folder / STATE).exists():
        restore(run)
    return run


def _loop(
    run: Run,
    stop: threading.Event,
    on_step: Callable[[StepInfo], None] | None,
    on_evaluation: Callable[[int, Evaluation], None] | None,
) -> bool:
    """Take the remaining steps; False when asked to stop before the end."""
    batches = iter(_loader(run))
    first, sitting = run.step, 0.0
    with open_log(run) as log:
        while run.step < run.steps:
            begin = time.monotonic()
            batch = next(batches)
            if isinstance(batch, _Unusable):
                raise DataError(f"A training image cannot be used: {batch.reason}")
            losses = _take_step(run, batch)
            run.step += 1
            sitting += time.monotonic() - begin
            run.seconds += time.monotonic() - begin
            rate = run.recipe.optim.batch * (run.step - first) / sitting
            log({"step": run.step, "lr": run.recipe.optim.rate(run.step - 1, run.steps), **losses})
            if on_step is not None:
                on_step(StepInfo(run.step, run.steps, losses, rate, "images"))
            measured = run.step in run.due
            if measured:
                found = _evaluate(run)
                log({"step": run.step, "evaluation": found.scores})
                if on_evaluation is not None:
                    on_evaluation(run.step, found)
            if stop.is_set() or measured or run.step % run.recipe.save_every == 0:
                save(run)
            if stop.is_set():
                return run.step == run.steps
    return True


def _take_step(run: Run, batch: dict[str, Any]) -> dict[str, float]:
    """One optimizer step; returns the losses."""
    spec = run.recipe.optim
    torch.manual_seed(sample_seed(run.recipe.seed, run.step, -2))  # dropout: a function of the step, as all else
    run.task.module.train()
    rate = spec.rate(run.step, run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = max(rate * group["factor"], spec.floor)
    if spec.bn_momentum == "pri3d":
        set_bn_momentum(run.task.module, pri3d_bn_momentum(max(run.step - 1, 0)))
    run.optimizer.zero_grad(set_to_none=True)
    with run.precision():
        losses = run.task.losses(_moved(batch, run.device))
    total = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(total):
        shown = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
        raise GeoPretrainError(
            f"The loss is not finite at step {run.step + 1} ({shown}). The last good state is in {run.folder}; "
            "try a lower optim.lr."
        )
    total.backward()
    if spec.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.task.module.parameters(), spec.clip_norm)
    run.optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def _evaluate(run: Run) -> Evaluation:
    """Measure, remember, and keep the best weights where the table needs them."""
    with run.precision():
        found = run.task.evaluate(run.val, run.val_ids)
    run.evaluations.append({"step": run.step, **found.to_dict()})
    if run.recipe.authors_exact and run.best()["step"] == run.step:
        write_weights(run, run.folder / BEST)
    return found


def _loader(run: Run) -> DataLoader[Any]:
    recipe = run.recipe
    batches = MicroBatches(
        len(run.train_ids),
        batch=recipe.optim.batch,
        accumulate=1,
        rank=0,
        world=1,
        start=run.step,
        steps=run.steps,
        seed=recipe.seed,
    )
    return DataLoader(
        _Samples(run.train, run.train_ids, run.task, recipe.seed),
        batch_sampler=batches,
        num_workers=min(recipe.workers, os.cpu_count() or 1),
        collate_fn=_Collate(run.task),
        generator=torch.Generator().manual_seed(recipe.seed),  # keeps the loader off the global generator
        pin_memory=run.device.type == "cuda",
    )


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list | tuple) else value


__all__ = ["Evaluation", "FinetuneResult", "evaluation_steps", "finetune", "read_result", "result_rows"]
