"""The training loop: one process or many, CPU or CUDA, exact resume, a log that always exists.

A run lives in `<out>.run/` (state, log) and ends by writing the checkpoint folder `<out>`. What a step does is a
function of the recipe, the data and the step number alone, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from geo_pretrain.catalog.license import License
from geo_pretrain.checkpoint import Checkpoint, check_target
from geo_pretrain.errors import CheckpointError, GeoPretrainError, RecipeError
from geo_pretrain.training.data.frame import Skips, Source
from geo_pretrain.training.data.mining import Pair
from geo_pretrain.training.data.samples.sampler import MicroBatches, total_steps
from geo_pretrain.training.distributed import World
from geo_pretrain.training.export import run_license, write_run
from geo_pretrain.training.recipe import OptimSpec, Recipe, changes
from geo_pretrain.training.schedule import BN_FLOOR, learning_rate, pri3d_bn_momentum, set_bn_momentum
from geo_pretrain.training.tasks import Task, build_task

STATE, BOARD = "state.pt", "tensorboard"


class Interrupted(GeoPretrainError):
    """The run was asked to stop and has saved its state."""


@dataclass(frozen=True)
class StepInfo:
    """What a progress display may want to know."""

    step: int  # steps done
    steps: int
    losses: dict[str, float]
    rate: float  # units a second
    unit: str  # what is counted: "images" or "clouds"

    def __str__(self) -> str:
        losses = " ".join(f"{name} {value:.2f}" for name, value in self.losses.items())
        return f"{losses}, {self.rate:.3g} {self.unit}/s"


@dataclass
class Run:
    """A run in progress: what is saved and restored, and what is needed to take steps."""

    recipe: Recipe
    out: Path
    source: Source
    pairs: list[Pair]
    dataset: Dataset[dict[str, Any]]
    world: World
    skips: Skips
    steps: int
    task: Task
    module: nn.Module
    optimizer: torch.optim.Optimizer
    license: License  # of the checkpoint
    step: int = 0
    seconds: float = 0.0  # training time of earlier sittings

    @property
    def folder(self) -> Path:
        """Where state and log live until the checkpoint folder is written."""
        return _run_folder(self.out)


def train(
    recipe: Recipe,
    out: Path,
    source: Source,
    pairs: list[Pair],
    world: World,
    *,
    skips: Skips | None = None,
    overwrite: bool = False,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Checkpoint | None:
    """Train a recipe, or go on with the run that `<out>.run` holds, and write the checkpoint folder `out`.

    Returns the checkpoint in the main process, None in the others.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the state is saved and an unfinished checkpoint folder written.
        RecipeError: the recipe does not fit the world, or differs from the one of the run to be continued.
        CheckpointError: `out` already holds a checkpoint and `overwrite` is not set.
    """
    run = _prepare(recipe, out, source, pairs, world, skips or Skips(), overwrite)
    with stop_requests() as stop:
        finished = _loop(run, stop, on_step)
    checkpoint = _finish(run, finished)
    if not finished:
        raise Interrupted(
            f"Stopped after step {run.step} of {run.steps}; the state is in {run.folder}. "
            "Give the same command again to go on."
        )
    return checkpoint


def check_out(out: Path, name: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` when the run could not end in `out`, or would replace a finished checkpoint there."""
    check_target(out, name)
    if (out / "config.json").exists() and not _run_folder(out).exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} already holds a checkpoint. Choose another --out, or pass --overwrite.")


def _run_folder(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def _prepare(
    recipe: Recipe, out: Path, source: Source, pairs: list[Pair], world: World, skips: Skips, overwrite: bool
) -> Run:
    parts = world.size * recipe.optim.accumulate
    if recipe.optim.batch % parts:
        raise RecipeError(
            f"'optim.batch' is {recipe.optim.batch}, accepted is a multiple of processes x accumulate = {parts}."
        )
    task, module = build_task(recipe)
    license = run_license(recipe)  # now, when a failure costs nothing
    dataset = task.dataset(source, pairs)
    steps = total_steps(_length(dataset), recipe.optim.batch, recipe.optim.epochs, recipe.optim.steps)
    # channels_last is about 10 % faster on CPU and more on CUDA; results are those of the same layout on every resume.
    module.to(world.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = _optimizer(recipe.optim, module)
    run = Run(recipe, out, source, pairs, dataset, world, skips, steps, task, module, optimizer, license)
    state_file = run.folder / STATE
    check_out(out, recipe.name, overwrite=overwrite)
    if world.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        _restore(run, state_file)
    world.barrier()
    return run


def _optimizer(spec: OptimSpec, module: nn.Module) -> torch.optim.Optimizer:
    """Over what is trained: a frozen teacher takes no part."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if spec.kind == "adam":
        return torch.optim.Adam(trained, lr=spec.lr, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        trained, lr=spec.lr, momentum=spec.momentum, dampening=spec.dampening, weight_decay=spec.weight_decay
    )


def _loop(run: Run, stop: threading.Event, on_step: Callable[[StepInfo], None] | None) -> bool:
    """Take the remaining steps; False when asked to stop before the end."""
    micro_batches = iter(_loader(run))
    model = run.world.wrap(run.module)
    begin, first = time.monotonic(), run.step
    before = run.seconds
    with _log(run) as log:
        while run.step < run.steps:
            losses = _take_step(run, model, micro_batches)
            run.step += 1
            elapsed = time.monotonic() - begin
            run.seconds = before + elapsed
            rate = (run.step - first) / elapsed
            info = StepInfo(run.step, run.steps, losses, run.task.views * run.recipe.optim.batch * rate, run.task.unit)
            log(info)
            if on_step is not None:
                on_step(info)
            if run.world.any(stop.is_set()):
                _save(run)
                return run.step == run.steps
            if run.step % run.recipe.save_every == 0 and run.step < run.steps:
                _save(run)
    return True


def _take_step(run: Run, model: nn.Module, micro_batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """One optimizer step over `accumulate` micro-batches; returns the mean losses over all processes."""
    spec = run.recipe.optim
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(spec, run.step, run.steps)
    if spec.bn_momentum == "pri3d":
        set_bn_momentum(run.module, pri3d_bn_momentum(max(run.step - 1, 0)))
    elif spec.bn_momentum == "floor":
        set_bn_momentum(run.module, BN_FLOOR)
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    for part in range(spec.accumulate):
        batch = _to_device(next(micro_batches), run)
        last = part == spec.accumulate - 1
        with nullcontext() if last or run.world.size == 1 else model.no_sync():  # type: ignore[operator]
            losses: dict[str, torch.Tensor] = model(batch)
            total = torch.stack(list(losses.values())).sum() / spec.accumulate
            total.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / spec.accumulate
    means = run.world.mean(torch.stack(list(sums.values())))
    if not torch.isfinite(means).all():
        shown = ", ".join(f"{name} {value:g}" for name, value in zip(sums, means.tolist(), strict=True))
        raise GeoPretrainError(
            f"The loss is not finite at step {run.step + 1} ({shown}). The last good state is in {run.folder}; "
            "try a lower optim.lr."
        )
    run.optimizer.step()
    return dict(zip(sums, means.tolist(), strict=True))


def _loader(run: Run) -> DataLoader[dict[str, Any]]:
    recipe = run.recipe
    batches = MicroBatches(
        _length(run.dataset),
        batch=recipe.optim.batch,
        accumulate=recipe.optim.accumulate,
        rank=run.world.rank,
        world=run.world.size,
        start=run.step,
        steps=run.steps,
        seed=recipe.seed,
    )
    return DataLoader(
        run.dataset,
        batch_sampler=batches,
        num_workers=min(recipe.workers, os.cpu_count() or 1),  # more would only be in each other's way
        collate_fn=run.task.collate,
        generator=torch.Generator().manual_seed(recipe.seed),  # keeps the loader off the global generator
        pin_memory=run.world.device.type == "cuda",
    )


def _length(dataset: Dataset[dict[str, Any]]) -> int:
    """Samples of an epoch: pairs, unless the task brings data of its own."""
    return len(dataset)  # type: ignore[arg-type]


def _own_data(run: Run) -> dict[str, Any]:
    """Facts, a fingerprint among them, of data that samples take from elsewhere than the source; {} for most tasks."""
    own: Callable[[], dict[str, Any]] = getattr(run.dataset, "own_data", dict)
    return own()


def _to_device(batch: dict[str, Any], run: Run) -> dict[str, Any]:
    for path, reason in batch.pop("skipped"):
        run.skips.reasons.setdefault(path, reason)
    return {
        name: value.to(run.world.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _save(run: Run) -> None:
    """Write the state of the run so that a kill at any moment leaves the old or the new one."""
    if run.world.is_main:
        state = {
            "step": run.step,
            "seconds": run.seconds,
            "recipe": run.recipe.to_yaml(),
            "data": run.source.fingerprint(),
            "own_data": _own_data(run),
            "world": run.world.size,
            "module": run.module.state_dict(),
            "optimizer": run.optimizer.state_dict(),
        }
        temporary = run.folder / (STATE + ".new")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run.folder / STATE)
    run.world.barrier()


def _restore(run: Run, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = changes(state["recipe"], run.recipe.to_yaml())
    if changed:
        raise RecipeError(
            f"The run in {run.folder} was started with another recipe; it differs in: {'; '.join(changed[:5])}. "
            "Give the first settings again, choose another --out, or remove that folder."
        )
    if state["data"] != run.source.fingerprint() or state.get("own_data", {}) != _own_data(run):
        raise RecipeError(f"The data have changed since the run in {run.folder} was started; remove it to start anew.")
    if state["world"] != run.world.size:
        raise RecipeError(f"The run in {run.folder} used {state['world']} processes, not {run.world.size}.")
    run.module.load_state_dict(state["module"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.seconds = state["step"], state["seconds"]


def _finish(run: Run, finished: bool) -> Checkpoint | None:
    """Write the checkpoint folder in the main process; after a finished run the working folder goes."""
    for skipped in run.world.gather(run.skips.reasons):
        run.skips.reasons.update(skipped)  # type: ignore[call-overload]
    checkpoint = None
    if run.world.is_main:
        provenance = {
            "data": {
                "source": run.source.name,
                "fingerprint": run.source.fingerprint(),
                "pairs": len(run.pairs),
                **_own_data(run),
            },
            "steps": run.step,
            "seconds": round(run.seconds, 1),
            "processes": run.world.size,
            "device": run.world.device.type,
            "skipped": run.skips.counts(),
        }
        log = run.folder / "log.jsonl"
        checkpoint = write_run(
            run.recipe, run.out, run.task, run.source, log, provenance, run.license, finished=finished
        )
        if finished:
            _keep_board(run)
            shutil.rmtree(run.folder)
    run.world.barrier()
    return checkpoint


@contextmanager
def _log(run: Run) -> Iterator[Callable[[StepInfo], None]]:
    """One JSON line a step (and TensorBoard where installed); lines after the restored step are dropped first."""
    if not run.world.is_main:
        yield lambda info: None
        return
    path = run.folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines[: run.step] if line.endswith("}")]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    board = _tensorboard(run)
    with path.open("a", encoding="utf-8") as file:

        def write(info: StepInfo) -> None:
            record = {"step": info.step, "lr": learning_rate(run.recipe.optim, info.step - 1, run.steps), **info.losses}
            file.write(json.dumps(record | {f"{info.unit}_per_second": round(info.rate, 2)}) + "\n")
            file.flush()
            if board is not None:
                for name, value in info.losses.items():
                    board.add_scalar(f"loss/{name}", value, info.step)

        try:
            yield write
        finally:
            if board is not None:
                board.close()


def _tensorboard(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.folder / BOARD), purge_step=run.step + 1)


def _keep_board(run: Run) -> None:
    """Move the event files beside the finished weights; an older run's give way."""
    if (run.folder / BOARD).exists():
        shutil.rmtree(run.out / BOARD, ignore_errors=True)
        shutil.move(run.folder / BOARD, run.out / BOARD)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; a second one acts at once, as without us."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
