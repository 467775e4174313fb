"""Fine-tuning: a downstream recipe and a backbone become a number, with everything that it depends on beside it.

A run lives in `<out>.run/` (state, log) and ends by writing the folder `<out>`: results.json, log.jsonl, recipe.yaml,
model.safetensors and predictions.png. What a step does is a function of the recipe, the data and the step number
alone, so a run that was killed continues as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from geo_pretrain.errors import CheckpointError, DataError, GeoPretrainError, RecipeError
from geo_pretrain.training.data.samples import Key, MicroBatches, sample_seed, total_steps
from geo_pretrain.training.distributed import join
from geo_pretrain.training.downstream.data.labelled import LabelledSource
from geo_pretrain.training.downstream.data.scannet import read_scene_list
from geo_pretrain.training.downstream.data.sources import open_labelled, subset
from geo_pretrain.training.downstream.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.downstream.finetune_task import (
    Evaluation,
    FinetuneTask,
    Start,
    build_finetune_task,
    weights_digest,
)
from geo_pretrain.training.engine import STATE, Interrupted, StepInfo, stop_requests
from geo_pretrain.training.export import LIBRARIES, code_version
from geo_pretrain.training.schedule import pri3d_bn_momentum, set_bn_momentum

RESULTS, LOG, MODEL, BEST, PICTURE = (
    "results.json",
    "log.jsonl",
    "model.safetensors",
    "best.safetensors",
    "predictions.png",
)
FORMAT = 1
DRAWN = 4  # validation images in the figure


@dataclass(frozen=True)
class FinetuneResult:
    """What a run measured; `score` is what its table shows."""

    recipe: str
    task: str
    metric: str
    backbone: str
    seed: int
    fraction: float  # of the training images, as it came out
    score: float  # a share of 1
    uses: Literal["last", "best"]  # which evaluation `score` is from
    last: float | None  # None: the end of the run was not measured, as in the released protocol
    best: float
    best_step: int
    steps: int
    folder: Path
    data: dict[str, Any]  # the whole of results.json

    def per_class(self, what: str = "iou") -> dict[str, float | None]:
        """Values by class of the evaluation that `score` is from; None for a class without pixels."""
        values: dict[str, float | None] = self.data[self.uses]["per_class"][what]
        return values


@dataclass
class _Run:
    """A run in progress."""

    recipe: FinetuneRecipe
    start: Start
    out: Path
    device: torch.device
    train: LabelledSource
    val: LabelledSource
    fraction: float
    task: FinetuneTask
    optimizer: torch.optim.SGD
    digest: str  # of the backbone's weights at the start
    steps: int
    train_ids: list[str]
    val_ids: list[str]
    due: list[int]  # steps after which is measured
    step: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def folder(self) -> Path:
        return _run_folder(self.out)

    def best(self) -> dict[str, Any]:
        """The first of the highest evaluations."""
        return max(self.evaluations, key=lambda found: found["scores"][self.task.metric])

    def identity(self) -> dict[str, str]:
        """What must not change between two sittings."""
        return {
            "recipe": self.recipe.to_yaml(),
            "backbone": self.digest,
            "data": f"{self.train.fingerprint()} {self.val.fingerprint()}",
        }


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
        CheckpointError: `out` already holds a result and `overwrite` is not set.
        DataError: a label or image cannot be used; file and value are named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("Fine-tuning runs in one process; start it without torchrun (WORLD_SIZE is above 1).")
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    out = Path(out)
    _check_out(out, overwrite)
    where = dict(init_kwargs or {})
    start = Start(os.fspath(backbone), recipe.network.depth, recipe.network.width, where)
    contract = start.contract()  # a wrong name is found before any data are read
    train, val, fraction = _open(recipe, sources, on_data)
    place = join(device).device
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        task = build_finetune_task(recipe, start, train.classes, contract)
        run = _prepare(recipe, start, task, (train, val), fraction, out, place)
        with stop_requests() as stop:
            finished = _loop(run, stop, on_step, on_evaluation)
        if not finished:
            raise Interrupted(
                f"Stopped after step {run.step} of {run.steps}; the state is in {run.folder}. "
                "Give the same command again to go on."
            )
        return _finish(run)


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


def read_result(folder: Path) -> FinetuneResult:
    """The result in a finished run's folder. Raises `CheckpointError` when there is none."""
    path = folder / RESULTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _result(folder, data)
    except FileNotFoundError:
        raise CheckpointError(f"No {RESULTS} in {str(folder)!r}: the run there has not ended.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a result of fine-tuning ({error!r}).") from None


def result_rows(results: Iterable[FinetuneResult]) -> list[dict[str, str]]:
    """A table for people, a row a result; its column "table" says whether last or best is the number to be compared."""
    rows = []
    for result in results:
        rows.append(
            {
                "recipe": result.recipe,
                "backbone": result.backbone,
                "data": f"{100 * result.fraction:.3g} %",
                "seed": str(result.seed),
                "metric": result.metric,
                "last": "-" if result.last is None else f"{100 * result.last:.1f}",
                "best": f"{100 * result.best:.1f} (step {result.best_step})",
                "table": result.uses,
            }
        )
    return rows


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


def _run_folder(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def _check_out(out: Path, overwrite: bool) -> None:
    if _run_folder(out).exists():
        return  # it is gone on with, even when it was killed while it wrote `out`
    if (out / RESULTS).exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} already holds a result. Choose another --out, or pass --overwrite.")
    if out.exists() and not (out / RESULTS).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{str(out)!r} exists and holds no result of fine-tuning; choose another --out.")


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
    start: Start,
    task: FinetuneTask,
    sources: tuple[LabelledSource, LabelledSource],
    fraction: float,
    out: Path,
    device: torch.device,
) -> _Run:
    """The run at its beginning, or where it was left."""
    train_ids, val_ids = sources[0].ids(), _spread(sources[1].ids(), recipe.evaluate.images)
    o = recipe.optim
    steps = total_steps(len(train_ids), o.batch, o.epochs, o.steps)
    digest = weights_digest(task.backbone().state_dict())
    task.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if o.backbone_bn_momentum is not None:
        set_bn_momentum(task.backbone(), o.backbone_bn_momentum)
    optimizer = torch.optim.SGD(
        task.parameter_groups(), lr=o.lr, momentum=o.momentum, dampening=o.dampening, weight_decay=o.weight_decay
    )
    run = _Run(
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
        _restore(run)
    return run


def _loop(
    run: _Run,
    stop: threading.Event,
    on_step: Callable[[StepInfo], None] | None,
    on_evaluation: Callable[[int, Evaluation], None] | None,
) -> bool:
    """Take the remaining steps; False when asked to stop before the end."""
    batches = iter(_loader(run))
    first, sitting = run.step, 0.0
    with _log(run) as log:
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
                _save(run)
            if stop.is_set():
                return run.step == run.steps
    return True


def _take_step(run: _Run, batch: dict[str, Any]) -> dict[str, float]:
    """One optimiser step; returns the losses."""
    spec = run.recipe.optim
    torch.manual_seed(sample_seed(run.recipe.seed, run.step, -2))  # dropout: a function of the step, as all else
    run.task.module.train()
    rate = spec.rate(run.step, run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = max(rate * group["factor"], spec.floor)
    if spec.bn_momentum == "pri3d":
        set_bn_momentum(run.task.module, pri3d_bn_momentum(max(run.step - 1, 0)))
    run.optimizer.zero_grad(set_to_none=True)
    with _precision(run):
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


def _evaluate(run: _Run) -> Evaluation:
    """Measure, remember, and keep the best weights where the table needs them."""
    with _precision(run):
        found = run.task.evaluate(run.val, run.val_ids)
    run.evaluations.append({"step": run.step, **found.to_dict()})
    if run.recipe.authors_exact and run.best()["step"] == run.step:
        _write_weights(run, run.folder / BEST)
    return found


def _loader(run: _Run) -> DataLoader[Any]:
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


@contextmanager
def _precision(run: _Run) -> Iterator[None]:
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.precision == "bf16"):
        yield


def _spread(ids: list[str], count: int | None) -> list[str]:
    """At most `count` of them, evenly spaced."""
    if count is None or count >= len(ids):
        return ids
    return [ids[k * len(ids) // count] for k in range(count)]


def _save(run: _Run) -> None:
    """Write the state so that a kill at any moment leaves the old or the new one."""
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "identity": run.identity(),
        "module": run.task.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    _replace(run.folder / STATE, lambda path: torch.save(state, path))


def _restore(run: _Run) -> None:
    state = torch.load(run.folder / STATE, map_location="cpu", weights_only=True)
    given, mine = state["identity"], run.identity()
    if given["recipe"] != mine["recipe"]:
        before = given["recipe"].splitlines()
        changed = [line.strip() for line in mine["recipe"].splitlines() if line not in before]
        raise RecipeError(
            f"The run in {run.folder} was started with another recipe; it differs in: {'; '.join(changed[:5])}. "
            "Give the first settings again, choose another --out, or remove that folder."
        )
    for key, what in (("backbone", "from another backbone"), ("data", "on other data")):
        if given[key] != mine[key]:
            raise RecipeError(
                f"The run in {run.folder} was started {what}. Choose another --out, or remove that folder."
            )
    run.task.module.load_state_dict(state["module"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.seconds, run.evaluations = state["step"], state["seconds"], state["evaluations"]


@contextmanager
def _log(run: _Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One JSON line a step and an evaluation; lines after the restored step are dropped first."""
    path = run.folder / LOG
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if not line.endswith("}") or json.loads(line)["step"] > run.step:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield write


def _finish(run: _Run) -> FinetuneResult:
    """Write the folder `out`; results.json comes last and says that the rest is there."""
    uses: Literal["last", "best"] = "best" if run.recipe.authors_exact else "last"
    if uses == "best":
        run.task.module.load_state_dict(load_file(run.folder / BEST))
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / RESULTS).unlink(missing_ok=True)
    _write_weights(run, run.out / MODEL)
    with _precision(run):
        run.task.draw(run.val, _spread(run.val_ids, DRAWN), run.out / PICTURE)
    (run.out / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    shutil.copyfile(run.folder / LOG, run.out / LOG)
    data = _summary(run, uses)
    _replace(run.out / RESULTS, lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))
    shutil.rmtree(run.folder)
    return _result(run.out, data)


def _summary(run: _Run, uses: str) -> dict[str, Any]:
    """The content of results.json."""
    recipe, metric = run.recipe, run.task.metric
    last = run.evaluations[-1] if run.evaluations[-1]["step"] == run.steps else None
    quirks = {
        "number reported": "the best on the validation images (as published)"
        if uses == "best"
        else "the last (mended)",
        "end of the run": "is not measured (as published)" if last is None else "is measured",
        **run.task.quirks(),
    }
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "task": recipe.task,
        "network": recipe.network.kind,
        "metric": metric,
        "uses": uses,
        "score": (run.best() if uses == "best" else run.evaluations[-1])["scores"][metric],
        "seed": recipe.seed,
        "authors_exact": recipe.authors_exact,
        "backbone": {"name": run.start.backbone, "digest": run.digest},
        "data": {
            "source": run.train.name,
            "fraction": run.fraction,
            "train_images": len(run.train_ids),
            "val_images": len(run.val_ids),
            "classes": list(run.train.classes),
            "train_fingerprint": run.train.fingerprint(),
            "val_fingerprint": run.val.fingerprint(),
        },
        "steps": run.steps,
        "evaluations": [{"step": found["step"], "scores": found["scores"]} for found in run.evaluations],
        "last": last,
        "best": run.best(),
        "quirks": quirks,
        "seconds": round(run.seconds, 1),
        "device": run.device.type,
        "code": code_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _result(folder: Path, data: dict[str, Any]) -> FinetuneResult:
    metric = data["metric"]
    return FinetuneResult(
        recipe=data["recipe"],
        task=data["task"],
        metric=metric,
        backbone=data["backbone"]["name"],
        seed=data["seed"],
        fraction=data["data"]["fraction"],
        score=data["score"],
        uses=data["uses"],
        last=None if data["last"] is None else data["last"]["scores"][metric],
        best=data["best"]["scores"][metric],
        best_step=data["best"]["step"],
        steps=data["steps"],
        folder=folder,
        data=data,
    )


def _write_weights(run: _Run, path: Path) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in run.task.module.state_dict().items()}
    _replace(path, lambda new: save_file(weights, new))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, bring it to disk, and move it there at once."""
    new = path.with_name(path.name + ".new")
    write(new)
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    new.replace(path)


__all__ = ["Evaluation", "FinetuneResult", "evaluation_steps", "finetune", "read_result", "result_rows"]
