"""The training loop, of pre-training and of fine-tuning: one process or many, CPU or CUDA, exact resume, a log.

`fit` takes steps, a `TrainingTask` says what a step does. A step is a function of the task's settings, the data and
the step number alone, so a run that was killed continues as if it had never stopped.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from geo_pretrain.errors import CheckpointError, GeoPretrainError, RecipeError, first_line
from geo_pretrain.heap import kept_heap
from geo_pretrain.threads import Pace, considerate_waiting, usable_cpus
from geo_pretrain.training.data.samples.sampler import MicroBatches, total_steps
from geo_pretrain.training.depthwise import quick_depthwise
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune_recipe import FinetuneOptim, FinetuneRecipe
from geo_pretrain.training.recipe import OptimSpec, Recipe, micro_batches
from geo_pretrain.training.runs import Interrupted, RunFolder, WriteLog, watched, write_nothing
from geo_pretrain.training.states import check_optimizer, not_finite
from geo_pretrain.training.stops import StopRequest
from geo_pretrain.yaml_text import parse_yaml

DEALING = ("optim.accumulate:", "optim.micro_batch:")  # changes of how a batch is dealt to processes
FUSED = ("cpu", "cuda")  # devices with torch's fused SGD
ONE_VALUE = "Expected more than 1 value per channel when training"  # torch's words, of BatchNorm


@dataclass(frozen=True)
class StepInfo:
    """The information about one step for progress displays."""

    step: int  # steps done
    steps: int
    losses: dict[str, float]
    rate: float  # units a second
    unit: str  # what is counted: "images" or "clouds"

    def __str__(self) -> str:
        if not self.losses:
            return "the first step"
        total, parts = f"loss {sum(self.losses.values()):.2f}", [f"{n} {value:.2f}" for n, value in self.losses.items()]
        return ", ".join([total, f"{self.rate:.3g} {self.unit}/s", *(parts if len(parts) > 1 else [])])  # by importance


@dataclass(frozen=True)
class Budget:
    """The number of steps of a run, and the samples and micro-batches of each."""

    steps: int
    batch: int  # samples a step, of all processes together
    accumulate: int = 1  # micro-batches that a process makes of its share
    save_every: int = 500  # steps between saved states
    clip_norm: float | None = None  # of all gradients together; None: not clipped


class TrainingTask(ABC):
    """The interface of a task for `fit`: networks, losses, batches, optimizer, schedule and saved state.

    Every loss of a batch must reach every parameter that is not frozen, with a gradient of 0 where there is nothing to
    learn from: processes that train together wait for each other's gradients.
    """

    module: nn.Module  # all that is trained and saved, on its device; the loop calls .train()
    optimizer: torch.optim.Optimizer
    budget: Budget
    unit: str = "images"  # what `rate` of the display counts
    views: int = 1  # units a sample
    choices: Mapping[str, Any] = MappingProxyType({})  # what was left to this machine, for the log's first line
    logs_rate = False  # whether a line of the log has units a second, which no repetition gives again

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """Micro-batches of this process, `budget.accumulate` a step, from step `start` on.

        Tensors in them, in lists and in dicts too, are moved to the device by the loop.
        """

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalar losses of a micro-batch by name; their sum is minimized."""

    @abstractmethod
    def schedule(self, step: int) -> float:
        """Set learning rates, BatchNorm momentum and the like for a step; return the learning rate for the log."""

    def seed(self, step: int, micro_batch: int) -> None:  # noqa: B027
        """Seed global generators before the losses of a micro-batch, numbered through all processes, if they are used.

        Called for every micro-batch.
        """

    def remarks(self) -> dict[str, Any]:
        """What else the log's line of the step just taken should hold, in plain JSON types."""
        return {}

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed: "recipe" (YAML), "data", ..., plain types."""
        return {}

    def changed_settings(self, recipe: str) -> list[str]:
        """How the recipe of a saved identity differs from this task's, as "optim.lr: 0.1 -> 0.2"."""
        return []

    def has_micro_batches_of(self, recipe: str, processes: int) -> bool:
        """Whether a run of a saved identity's recipe by so many processes took the micro-batches that this one takes.

        Then it may go on with another number of processes.
        """
        return False

    def extras(self) -> dict[str, Any]:
        """Additional entries of the saved state, in plain types; called in all processes, the main one's are saved."""
        return {}

    def restore(self, extras: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the task from a saved state, which has the entries of `extras`."""

    def evaluation_due(self, step: int) -> bool:
        """Whether `evaluate` is to be called after this step (1, 2, ...), in all processes."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure `module`, which may be left in evaluation mode; scores for the log."""
        raise NotImplementedError


class RecipeTask(TrainingTask):
    """A task of a recipe: its budget, and its micro-batches of a dataset indexed by (epoch, position) that collates."""

    def __init__(self, recipe: Recipe | FinetuneRecipe, module: nn.Module, dataset: Any, world: World) -> None:
        self.recipe, self.module, self.dataset, self.world = recipe, module, dataset, world
        optim, self.samples = recipe.optim, len(dataset)
        self.budget = Budget(
            steps=total_steps(self.samples, optim.batch, optim.epochs, optim.steps),
            batch=optim.batch,
            accumulate=micro_batches(optim, world.size),
            save_every=recipe.save_every,
            clip_norm=optim.clip_norm if isinstance(optim, FinetuneOptim) else None,
        )
        self.micro_batch = optim.batch // (world.size * self.budget.accumulate)  # samples
        # channels_last is about 10 % faster on CPU and more on CUDA, and the same on every resume.
        module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def has_micro_batches_of(self, recipe: str, processes: int) -> bool:
        """Only where `optim.micro_batch` says that they are to be kept, and statistics are those of one micro-batch."""
        optim = parse_yaml(recipe)["optim"]
        before = optim.get("micro_batch") or optim["batch"] // (processes * optim.get("accumulate", 1))
        return self.recipe.optim.micro_batch == before and not self.recipe.optim.sync_bn

    def batches(self, start: int) -> Iterator[Any]:
        recipe, budget, world = self.recipe, self.budget, self.world
        keys = MicroBatches(
            self.samples,
            batch=budget.batch,
            accumulate=budget.accumulate,
            rank=world.rank,
            world=world.size,
            start=start,
            steps=budget.steps,
            seed=recipe.seed,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=min(recipe.workers, usable_cpus()),  # more would only be in each other's way
            collate_fn=self.dataset.collate,
            generator=torch.Generator().manual_seed(recipe.seed),  # keeps the loader off the global generator
            pin_memory=world.device.type == "cuda",
        )
        return iter(loader)


@dataclass
class Progress:
    """How far a run is."""

    steps: int
    step: int = 0
    seconds: float = 0.0  # training time of all sittings
    terminated: bool = False  # whether SIGTERM stopped it, in any process

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.step == self.steps

    def interrupted(self, run: RunFolder) -> Interrupted:
        """Build the error that tells how to resume."""
        usable = f" {run.out} has the weights so far, for load_backbone and every command." if run.out.exists() else ""
        stopped = f"Stopped after step {self.step} of {self.steps}; the state is in {run.path}."
        return Interrupted(
            f"{stopped} Give the same command again to go on.{usable}",
            terminated=self.terminated,
        )


def fit(
    task: TrainingTask,
    world: World,
    run: RunFolder | None = None,
    *,
    on_start: Callable[[Progress], None] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Progress:
    """Take the steps of `task` that are left; an unfinished `Progress` when SIGINT, SIGTERM or SIGHUP arrived.

    `on_start` is called once it is known where the run goes on.

    With `run`, steps go on from its saved state, states and log are written there, and a stop is saved; without, all
    stays in memory and signals act as ever.

    Raises:
        RecipeError: the saved state is that of other settings, other data, or another number of processes.
        CheckpointError: no saved state can be used; of two, the older one is used, see `RunFolder.load`.
        GeoPretrainError: a loss is not finite, or a weight where a state would be saved or the run would end; a loader
            worker or another process died; there is no room for what the run writes.
    """
    progress = Progress(task.budget.steps)
    if run is not None:
        _restore(run, task, world, progress)
    with ExitStack() as stack:
        stop = stack.enter_context(watched(run))
        (on_start or (lambda _: None))(progress)
        log = stack.enter_context(run.log(progress.step)) if run is not None else write_nothing
        if world.device.type == "cpu":
            stack.enter_context(considerate_waiting())
            stack.enter_context(kept_heap())
        _Loop(task, world, run, progress, log, on_step).take_steps(stop)
    return progress


@dataclass
class _Loop:
    """The part of a run that one process takes: from the start or a saved state to the end or a request to stop."""

    task: TrainingTask
    world: World
    run: RunFolder | None
    progress: Progress
    log: WriteLog
    on_step: Callable[[StepInfo], None] | None

    def __post_init__(self) -> None:
        self.model, self.gradients = self.world.wrap(_Losses(self.task)), quick_depthwise(self.task.module)
        self.first, self.sitting, self.pace = self.progress.step, 0.0, Pace()

    def take_steps(self, stop: StopRequest) -> None:
        """Steps, evaluations and saved states until the end or a request to stop."""
        task, progress = self.task, self.progress
        micro_batches = iter(task.batches(progress.step))
        task.module.train()
        while not progress.finished:
            begin = time.perf_counter()  # Windows' monotonic clock has ticks of 16 ms
            lr = task.schedule(progress.step)
            losses = self.take_step(micro_batches)
            progress.step += 1
            seconds = time.perf_counter() - begin
            self.sitting += seconds
            progress.seconds += seconds
            if slow := self.pace.step(seconds):
                warnings.warn(slow, stacklevel=2)
            self.report(losses, lr)
            measured = task.evaluation_due(progress.step)
            saving = progress.step % task.budget.save_every == 0 and not progress.finished
            if measured or saving or progress.finished:
                self.check_values()
            if measured:
                self.log({"step": progress.step, "evaluation": task.evaluate(progress.step)}, {})
                task.module.train()
            stopped = self.world.any(stop.is_set())
            if stopped:
                progress.terminated = self.world.any(stop.terminated)
                self.check_values()
            if self.run is not None and (stopped or measured or saving):
                _save(self.run, task, self.world, progress)
            if stopped:
                return

    def take_step(self, micro_batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over `accumulate` micro-batches; the mean losses over all processes."""
        task, world, budget = self.task, self.world, self.task.budget
        task.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part in range(budget.accumulate):
            batch = to_device(next(micro_batches), world.device)
            task.seed(self.progress.step, world.rank + world.size * part)
            last = part == budget.accumulate - 1
            with nullcontext() if last or world.size == 1 else self.model.no_sync():  # type: ignore[operator]
                losses = self.losses(batch)
                total = torch.stack(list(losses.values())).sum() / budget.accumulate
                total.backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / budget.accumulate
        means = world.mean(torch.stack(list(sums.values())))
        means_by_name = dict(zip(sums, means.tolist(), strict=True))
        if not torch.isfinite(means.sum()):
            shown = ", ".join(f"{name} {value:g}" for name, value in means_by_name.items())
            raise self.diverged(f"The loss is not finite at step {self.progress.step + 1} ({shown})")
        if self.progress.step == self.first:
            check_layouts(task.optimizer)
        if budget.clip_norm is not None:
            nn.utils.clip_grad_norm_(task.module.parameters(), budget.clip_norm)
        task.optimizer.step()
        return means_by_name

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch. Raises `RecipeError` where a BatchNorm would get one value of each channel."""
        try:
            with self.gradients:
                losses: dict[str, Tensor] = self.model(batch)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            budget = self.task.budget
            share = budget.batch // (self.world.size * budget.accumulate)
            raise RecipeError(
                f"At step {self.progress.step + 1} a BatchNorm layer gets one value of each channel, whose variance is "
                f"undefined: a map of one pixel, or one voxel, and 'optim.batch' {budget.batch} leaves {share} "
                f"{'sample' if share == 1 else 'samples'} a process and micro-batch. Take at least "
                f"{2 * budget.batch // share}, or larger images or crops, or smaller voxels."
            ) from error
        return losses

    def check_values(self) -> None:
        """Raise the error of a diverged run if a weight is not finite, which only the next step's loss would show."""
        trained = {"module": self.task.module.state_dict(), "optimizer": self.task.optimizer.state_dict()["state"]}
        if (name := not_finite(trained)) is not None:
            raise self.diverged(f"{name} is not finite after step {self.progress.step}")

    def diverged(self, what: str) -> GeoPretrainError:
        """Build the error of a diverged run. The last state is finite, but may be diverging already."""
        kept = self.run is not None and self.run.has_state()
        state = f" The last saved state is in {self.run.path};" if kept and self.run is not None else ";"
        return GeoPretrainError(f"{what}{'.' if kept else ''}{state} try a lower optim.lr.")

    def report(self, losses: dict[str, float], lr: float) -> None:
        """Log a step and pass it to the progress display."""
        task, progress = self.task, self.progress
        rate = task.views * task.budget.batch * (progress.step - self.first) / self.sitting
        record = {"step": progress.step, "lr": lr, **losses, **task.remarks()}
        record |= task.choices if progress.step == 1 else {}
        self.log(record | ({f"{task.unit}_per_second": round(rate, 2)} if task.logs_rate else {}), losses)
        if self.on_step is not None:
            self.on_step(StepInfo(progress.step, progress.steps, losses, rate, task.unit))


class _Losses(nn.Module):
    """The losses of a task as the forward pass of a module, which data-parallel training needs."""

    def __init__(self, task: TrainingTask) -> None:
        super().__init__()
        self.trained, self._losses = task.module, task.losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._losses(batch)


def check_batch(batch: int, accumulate: int, world: World) -> None:
    """Raise `RecipeError` unless a batch can be dealt evenly to all micro-batches of all processes."""
    parts = world.size * accumulate
    if batch % parts:
        raise RecipeError(f"'optim.batch' is {batch}, accepted is a multiple of processes x accumulate = {parts}.")


def make_finetune_optimizer(spec: FinetuneOptim, groups: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer of a fine-tuning recipe over groups of parameters; Adam with torch's betas, as VoteNet's."""
    if spec.optimizer == "adam":
        return torch.optim.Adam(groups, lr=spec.lr, weight_decay=spec.weight_decay)
    return make_sgd(spec, groups)


def make_optimizer(spec: OptimSpec, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters that are trained; a frozen teacher has none."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if spec.kind == "adam":
        return torch.optim.Adam(trained, lr=spec.lr, weight_decay=spec.weight_decay)
    return make_sgd(spec, trained)


def make_sgd(spec: OptimSpec | FinetuneOptim, parameters: Iterable[Any]) -> torch.optim.SGD:
    """SGD with the settings of a recipe over parameters or groups of them."""
    groups = list(parameters)
    given = [one for group in groups for one in (group["params"] if isinstance(group, dict) else [group])]
    return torch.optim.SGD(
        groups,
        lr=spec.lr,
        momentum=spec.momentum,
        dampening=spec.dampening,
        weight_decay=spec.weight_decay,
        # One pass over a weight, its gradient and its momentum. A run that goes on keeps what its state says.
        fused=bool(given) and all(one.device.type in FUSED and one.is_floating_point() for one in given),
    )


def check_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Switch the fused SGD off where a gradient's memory is laid out unlike its weight's: torch would mix them up."""
    for group in optimizer.param_groups:
        if group.get("fused") and not all(_same_layout(one, one.grad) for one in group["params"]):
            group["fused"] = False


def _same_layout(weight: Tensor, grad: Tensor | None) -> bool:
    if grad is None:
        return True
    strides = zip(weight.shape, weight.stride(), grad.stride(), strict=True)
    return all(one == other for size, one, other in strides if size > 1)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list | tuple) else value


def _save(run: RunFolder, task: TrainingTask, world: World, progress: Progress) -> None:
    facts = {"step": progress.step, "seconds": progress.seconds, **task.extras()}
    if world.is_main:
        run.save(
            {
                "identity": task.identity() | {"world": world.size},
                "module": task.module.state_dict(),
                "optimizer": task.optimizer.state_dict(),
                **facts,
            }
        )
    world.barrier()


def _restore(run: RunFolder, task: TrainingTask, world: World, progress: Progress) -> None:
    """Load the saved state into task and progress, if there is one."""
    run.refuse_length(task.changed_settings)
    state = run.load(task.budget.steps)
    if state is not None:
        try:
            _check_identity(run, state.get("identity", state), task, world)  # once these keys lay in the state itself
            task.module.load_state_dict(state["module"])
            task.optimizer.load_state_dict(state["optimizer"])
            check_optimizer(task.optimizer)
            task.restore(state)
            progress.step, progress.seconds = state["step"], float(state["seconds"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if isinstance(error, GeoPretrainError):
                raise
            raise CheckpointError(
                f"The state in {run.path} does not fit this run ({type(error).__name__}: {first_line(error)}). Resume "
                "it with the version that wrote it, or remove that folder to start from the beginning."
            ) from error
    elif world.is_main and (lost := run.logged_steps()) > task.budget.save_every:
        warnings.warn(
            f"{run.path} has no saved state, though its log reaches step {lost}: the run starts from the beginning.",
            stacklevel=3,
        )
    world.barrier()


def _check_identity(run: RunFolder, given: Mapping[str, Any], task: TrainingTask, world: World) -> None:
    wanted, changed, processes = task.identity(), task.changed_settings(given["recipe"]), given.get("world", 1)
    moved = processes != world.size and task.has_micro_batches_of(given["recipe"], processes)
    if moved:
        changed = [change for change in changed if not change.startswith(DEALING)]
    run.refuse(given.get("recipe", ""), changed)
    if given.get("backbone") != wanted.get("backbone"):
        raise RecipeError(
            f"The run in {run.path} was started from another backbone. Choose another --out, or remove that folder."
        )
    content = given.get("content", wanted.get("content"))  # older states have none
    theirs = given["data"], given.get("own_data", {}), content
    if theirs != (wanted["data"], wanted.get("own_data", {}), wanted.get("content")):
        raise RecipeError(
            f"The run in {run.path} was started on other data, or the data have changed since. Choose another --out, "
            "or remove that folder."
        )
    if moved and world.is_main:
        warnings.warn(
            f"The run in {run.path} used {processes} processes and goes on with {world.size}: the same batches and "
            "micro-batches, but sums are rounded in another order and running statistics of BatchNorm are those of "
            "other micro-batches, so it is no longer the same run to the last bit.",
            stacklevel=4,
        )
    elif processes != world.size:
        raise RecipeError(
            f"The run in {run.path} used {processes} processes, not {world.size}. A recipe with optim.micro_batch goes "
            "on with another number of them."
        )
