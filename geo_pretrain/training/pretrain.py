"""From a recipe to its checkpoint: data opened, pairs found, stages trained one after another.

A run lives in `<out>.run/` (state, log) and ends by writing the checkpoint folder `<out>`.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.cards import render_card
from geo_pretrain.catalog.license import License
from geo_pretrain.checkpoint import CONFIG, Checkpoint, check_target, read_checkpoint, write_checkpoint
from geo_pretrain.errors import DataError, HubError, RecipeError, UnknownName
from geo_pretrain.hub import without_network
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.progress import Report, stage_of
from geo_pretrain.training.announcement import announce
from geo_pretrain.training.batchnorm import synchronize_batchnorm
from geo_pretrain.training.data.check.source import quick_check, stop_if_wrong
from geo_pretrain.training.data.frame import Pair, SampledContent, SkippedFrames, Source, capability
from geo_pretrain.training.data.mining import find_pairs, refuse_changed
from geo_pretrain.training.data.pair_files import read_pairs
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.data.sources.registry import open_source, source_note, source_options
from geo_pretrain.training.distributed import World
from geo_pretrain.training.initialize import check_size, check_start
from geo_pretrain.training.licenses import run_license
from geo_pretrain.training.loop import Progress, RecipeTask, StepInfo, check_batch, fit, make_optimizer
from geo_pretrain.training.precision import choices, settle_precision
from geo_pretrain.training.recipe import STAGE1, Recipe, changes, list_recipes, load_recipe, micro_batches
from geo_pretrain.training.runs import RunFolder, check_out, code_version, explained, library_versions, run_lock
from geo_pretrain.training.schedule import BN_FLOOR, learning_rate, pri3d_bn_momentum, set_bn_momentum
from geo_pretrain.training.tasks import build_task, task_config, task_settings


@dataclass
class Outcome:
    """The result of a run of one recipe, or of two stages."""

    checkpoint: Checkpoint | None  # None but in the main process
    pairs: int  # or frames, of the last stage
    skips: SkippedFrames = field(default_factory=SkippedFrames)


def run_recipe(
    recipe: Recipe,
    out: Path,
    world: World,
    *,
    stage1: Recipe | None = None,
    starts: Mapping[str, Path] = {},
    pairs: Path | None = None,
    overwrite: bool = False,
    check: bool = False,
    report: Report = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train `recipe` into the checkpoint folder `out`, after `stage1` into `<out>.stage1` if the recipe starts from it.

    A first stage that is finished is used as it is; `starts` maps "stage1" to the folder of one trained elsewhere.
    `pairs` is a folder of mined pairs (`geo-pretrain data mine`); without one pairs are mined here and cached.
    Interrupted runs go on, in the stage where they were. `note` is told what the data source says about itself. With
    `check` some frames of data on disk are checked first: `DataError` when they are surely read wrongly, and `note` is
    told what is likely wrong. Raises as `train`, `find_pairs` and `open_source`, `CheckpointError` when another process
    works on `out`, and `RecipeError` when `<out>.stage1` was made by another recipe.
    """
    check_checkpoint_out(out, recipe.name, overwrite=overwrite)
    with run_lock(out, "training run") if world.is_main else nullcontext():
        if check and recipe.data.path is not None:  # rooms are as they should be
            _check_data(recipe, world, report, note)
        if stage1 is not None and needs_stage1(recipe):
            folder = out.with_name(out.name + ".stage1")
            with run_lock(folder, "first stage") if world.is_main else nullcontext():
                if not _is_done(stage1, folder, world, report, overwrite=overwrite):
                    _run(stage1, folder, {}, pairs, world, overwrite, report, note)
            starts = {STAGE1: folder}
        return _run(recipe, out, starts, pairs, world, overwrite, report, note)


def load_checked_recipe(name: str, overrides: Iterable[str] = (), *, toy: bool = False, small: bool = False) -> Recipe:
    """`load_recipe`, and check the task's settings, the data source's options and the start weights with the rest.

    Warns of task settings that change nothing as the others are.
    """
    recipe = load_recipe(name, overrides, toy=toy, small=small, also=CHECKS)
    for text in task_config(recipe).idle():
        warnings.warn(f"recipe {recipe.name}: {text}", stacklevel=2)
    return recipe


def _check_task(recipe: Recipe) -> None:
    if "name" in recipe.task:
        task_settings(recipe)


def _check_source(recipe: Recipe) -> None:
    source_options(recipe.data)


def _check_start(recipe: Recipe) -> None:
    if recipe.model is not None:
        check_start(recipe.model.init, recipe.model.encoder)


def _check_size(recipe: Recipe) -> None:
    if recipe.model is not None:
        with suppress(UnknownName):  # which is told of the start
            check_size(recipe.model.encoder, recipe.data.size)


CHECKS = (_check_task, _check_source, _check_start, _check_size)  # of a recipe, before any work


def needs_stage1(recipe: Recipe) -> bool:
    """Whether a start or a teacher is set to "stage1", so that the first stage has to be trained."""
    settings = [*task_settings(recipe).values(), None if recipe.model is None else recipe.model.init]
    return STAGE1 in [value for value in settings if isinstance(value, str)]


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a finished checkpoint."""
    return (folder / CONFIG).is_file() and read_checkpoint(folder).finished


def _is_done(stage1: Recipe, folder: Path, world: World, report: Report, *, overwrite: bool) -> bool:
    """Whether the folder holds this recipe's result. Raises if it holds the result of another recipe."""
    if not is_trained(folder):
        return False
    found = read_checkpoint(folder)
    theirs = (folder / found.file_of("recipe")).read_text(encoding="utf-8") if "recipe" in found.roles else "{}"
    changed = changes(theirs, stage1.to_yaml())
    fingerprint = _open(stage1, world, report).fingerprint()
    if found.provenance.get("data", {}).get("fingerprint", fingerprint) != fingerprint:
        changed.append("the files of the data")
    if not changed:
        return True
    if overwrite:
        return False
    raise RecipeError(
        f"{folder} holds a first stage of another recipe; it differs in: {'; '.join(changed[:5])}. "
        "Choose another --out, remove that folder, or pass --overwrite."
    )


def _fetch_start(recipe: Recipe, starts: Mapping[str, Path]) -> None:
    """Build the task once: start weights that cannot be had are told before rooms are rendered and pairs are mined."""
    if "teacher" in recipe.task or (recipe.model is not None and recipe.model.init != "scratch"):
        try:
            build_task(recipe, starts)
        except HubError as error:
            if recipe.model is None or f"{recipe.model.init!r} could not" not in str(error):
                raise  # a teacher, whose weights are what is learned from
            raise without_network(error, "--set model.init=scratch begins with random weights.") from error


def _open(recipe: Recipe, world: World, report: Report) -> Source:
    return open_source(recipe.data, device=str(world.device), progress=stage_of(report, "rendering rooms"))


def _check_data(recipe: Recipe, world: World, report: Report, note: Callable[[str], None]) -> None:
    """Look at some frames in the main process; in all processes, raise `DataError` when they are read wrongly."""
    fault = None
    if world.is_main:
        try:
            for warning in stop_if_wrong(quick_check(_open(recipe, world, report), recipe.data)):
                note(warning)
        except DataError as error:
            fault = str(error)
    told = [each for each in world.all_gather_object(fault) if each is not None]
    if told:
        raise DataError(str(told[0]))


def _run(
    recipe: Recipe,
    out: Path,
    starts: Mapping[str, Path],
    mined: Path | None,
    world: World,
    overwrite: bool,
    report: Report,
    note: Callable[[str], None],
) -> Outcome:
    skips = SkippedFrames()
    rendered = recipe.data.path is None
    if rendered:
        _fetch_start(recipe, starts)
    source = _open(recipe, world, report)
    if not rendered:  # a wrong path is told before anything is fetched
        _fetch_start(recipe, starts)
    if world.is_main and source_note(source):
        note(source_note(source))
    if mined is not None and recipe.data.units == "pairs":
        pairs = read_pairs(mined, source, recipe.data, skips)
        refuse_changed(source, pairs, recipe.data, mined)
    else:
        pairs = find_pairs(
            source,
            recipe.data,
            skips=skips,
            device=world.device,
            cache_dir=default_cache(),
            progress=stage_of(report, "finding pairs"),
            world=world,
        )
    checkpoint = train(
        recipe,
        out,
        source,
        pairs,
        world,
        starts=starts,
        skips=skips,
        overwrite=overwrite,
        on_step=lambda step: report(f"training {recipe.name}", step.step, step.steps, str(step)),
    )
    return Outcome(checkpoint, len(pairs), skips)


def train(
    recipe: Recipe,
    out: Path,
    source: Source,
    pairs: list[Pair],
    world: World,
    *,
    starts: Mapping[str, Path] = {},
    skips: SkippedFrames | None = None,
    overwrite: bool = False,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Checkpoint | None:
    """Train a recipe, or resume the run in `<out>.run`, and write the checkpoint folder `out`.

    Returns the checkpoint in the main process, None in the others.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the state is saved and an unfinished checkpoint folder written.
        RecipeError: the recipe does not fit the world, or differs from the one of the run to be continued.
        CheckpointError: `out` already holds a checkpoint and `overwrite` is not set.
    """
    check_batch(recipe.optim.batch, micro_batches(recipe.optim, world.size), world)
    run = RunFolder(out, writes=world.is_main, board=True)
    wanted, recipe = recipe, settle_precision(recipe, world, run.saved_recipe())
    task = Pretraining(recipe, source, pairs, world, skips or SkippedFrames(), starts)
    license = run_license(recipe, task_settings(recipe), starts)  # now, when a failure costs nothing
    check_checkpoint_out(out, recipe.name, overwrite=overwrite)
    run.create()
    task.choices = choices(wanted, recipe)
    progress = fit(task, world, run, on_start=lambda begun: announce(task, begun, on_step), on_step=on_step)
    task.gather_skips()
    checkpoint = None
    if world.is_main:
        with explained(run):
            checkpoint = task.write(run, progress, license)
        if progress.finished:
            run.keep_board()
            run.remove()
    world.barrier()
    if not progress.finished:
        raise progress.interrupted(run)
    return checkpoint


def check_checkpoint_out(out: Path, name: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` when the run could not end in `out`, or would replace a finished checkpoint there."""
    check_target(out, name)
    check_out(out, CONFIG, "a checkpoint", overwrite=overwrite)


class Pretraining(RecipeTask):
    """A pretext task with the data, optimizer and schedule of its recipe."""

    recipe: Recipe
    dataset: Samples
    logs_rate = True

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        pairs: list[Pair],
        world: World,
        skips: SkippedFrames,
        starts: Mapping[str, Path] = {},
    ) -> None:
        self.source, self.pairs, self.skips, self.starts = source, pairs, skips, starts
        self.task = build_task(recipe, starts)
        self.unit, self.views = self.task.unit, self.task.views
        super().__init__(recipe, self.task, self.task.dataset(source, pairs), world)
        if recipe.optim.sync_bn:
            self._synchronize()
        self.optimizer = make_optimizer(recipe.optim, self.task)

    def _synchronize(self) -> None:
        """Exchange the BatchNorm of trained networks of images; sparse ones keep statistics of their process.

        A process whose clouds do not match leaves its sparse network out, and others would wait for its statistics.
        Raises `RecipeError` where there is nothing to synchronize, or the task needs statistics of parts of a batch.
        """
        images = [layer for layer in self.task.modules() if isinstance(layer, nn.BatchNorm2d)]
        trained = {id(layer): type(layer) for layer in images if layer.weight is None or layer.weight.requires_grad}
        others = sorted({kind.__name__ for kind in trained.values()} - {"BatchNorm2d"})
        why = "it trains no BatchNorm of images" if not trained else ""
        why = "it needs statistics of parts of a batch" if self.task.parts_batchnorm else why
        if why or others:
            why = why or f"its encoder has layers {', '.join(others)}, which stay per process"
            task = self.recipe.task["name"]
            raise RecipeError(f"'optim.sync_bn' is True, accepted for task {task!r} is False: {why}.")
        synchronize_batchnorm(self.task, self.world, which=lambda layer: id(layer) in trained)

    def has_micro_batches_of(self, recipe: str, processes: int) -> bool:
        return self.task.same_in_any_world and super().has_micro_batches_of(recipe, processes)

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Micro-batches; files that failed on the way are noted in `skips`."""
        for batch in super().batches(start):
            for path, reason in batch.pop("skipped"):
                self.skips.reasons.setdefault(path, reason)
            yield batch

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.task(batch)
        return losses

    def schedule(self, step: int) -> float:
        spec = self.recipe.optim
        rate = learning_rate(spec, step, self.budget.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if spec.bn_momentum == "pri3d":
            set_bn_momentum(self.module, pri3d_bn_momentum(max(step - 1, 0)))
        elif spec.bn_momentum == "floor":
            set_bn_momentum(self.module, BN_FLOOR)
        return rate

    def identity(self) -> dict[str, Any]:
        """Recipe and data, also data that samples take from elsewhere than the source."""
        return {
            "recipe": self.recipe.to_yaml(),
            "data": self.source.fingerprint(),
            "content": self._content,
            "own_data": self.dataset.own_data(),
        }

    @cached_property
    def _content(self) -> str:
        """A digest of some bytes of the source's files as they are at the start; "" for sources that make their own."""
        sampled = capability(self.source, SampledContent)
        return "" if sampled is None else sampled.content()

    def changed_settings(self, recipe: str) -> list[str]:
        return changes(recipe, self.recipe.to_yaml())

    def extras(self) -> dict[str, Any]:
        self.gather_skips()
        return {"skipped": self.skips.reasons}

    def restore(self, extras: Mapping[str, Any]) -> None:
        self.skips.reasons |= extras.get("skipped", {})

    def gather_skips(self) -> None:
        """Share what each process has skipped."""
        for skipped in self.world.all_gather_object(self.skips.reasons):
            self.skips.reasons |= cast(dict[str, str], skipped)

    def write(self, run: RunFolder, progress: Progress, license: License) -> Checkpoint:
        """Write the checkpoint folder atomically: weights, golden values, recipe, log, license, provenance and card.

        `license` is the result of `run_license`, called before the run, since start weights may move meanwhile.
        """
        recipe, export = self.recipe, self.task.export()
        provenance = self.provenance(progress)
        made_by = recipe.name if recipe.name in list_recipes() else "recipe.yaml"  # a changed recipe is in the folder
        finished = progress.finished
        card = render_card(
            recipe.name, export.arch, export.contract, license, provenance, recipe=made_by, finished=finished
        )
        return write_checkpoint(
            run.out,
            name=recipe.name,
            license=license,
            provenance=provenance,
            recipe_yaml=recipe.to_yaml(),
            log=run.log_file,
            card=card,
            finished=finished,
            **vars(export),
        )

    def provenance(self, progress: Progress) -> dict[str, Any]:
        """Facts about the training run."""
        recipe = self.recipe
        return {
            "data": {
                "source": self.source.name,
                "fingerprint": self.source.fingerprint(),
                "pairs": len(self.pairs),
                **self.dataset.own_data(),
            },
            "steps": progress.step,
            "seconds": round(progress.seconds, 1),
            "processes": self.world.size,
            "micro_batch": self.micro_batch,
            "negatives": self.task.negatives,
            "device": self.world.device.type,
            "skipped": self.skips.counts(),
            "seed": recipe.seed,
            "init": "scratch" if recipe.model is None else recipe.start_of(recipe.model.init, self.starts),
            "notes": source_note(self.source),
            "code": code_version(),
            "python": platform.python_version(),
            "libraries": library_versions(*(["timm"] if recipe.model and is_timm(recipe.model.encoder) else [])),
        }
