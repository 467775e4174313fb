"""Sweeps: one fine-tuning recipe from several starts, on several shares of the data, with several seeds.

A sweep is a folder: sweep.json says which recipe and starts it holds, runs/START/SHARE/seedN is one fine-tuning run
each. The same command again goes on; further starts, shares and seeds may be added, the recipe may not change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from geo_pretrain import hub
from geo_pretrain.errors import CheckpointError, DataError, RecipeError
from geo_pretrain.files import expanded, read_sealed, write_sealed
from geo_pretrain.training.config import changes, parse
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import data_terms
from geo_pretrain.training.data.labelled.shares import LabelTable
from geo_pretrain.training.distributed import World, join
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.finetune.folder import RESULTS, FinetuneResult, read_result
from geo_pretrain.training.finetune.published import PaperRow, paper_rows
from geo_pretrain.training.finetune.registry import backbone_init, check_start
from geo_pretrain.training.finetune.run import finetune, is_on_disk, open_splits
from geo_pretrain.training.finetune_recipe import (
    FinetuneRecipe,
    list_finetune_recipes,
    load_finetune_recipe,
    with_encoder,
)
from geo_pretrain.training.loop import StepInfo
from geo_pretrain.training.precision import settle_precision
from geo_pretrain.training.recipe import without_auto
from geo_pretrain.training.runs import run_folder, run_lock
from geo_pretrain.yaml_text import parse_yaml

SWEEP, RUNS, FORMAT = "sweep.json", "runs", 1
# Keys that a sweep sets for each run, and those without effect on the result (data have their own fingerprint).
FREE = ("seed", "data.fraction", "data.path", "workers", "save_every")


@dataclass(frozen=True)
class Run:
    """One run of a sweep: backbone, share of the data, seed, and its folder."""

    backbone: str  # "scratch", "imagenet", a name of the catalog or a folder
    label: str  # name in tables; for a folder the name of its checkpoint
    fraction: float
    seed: int
    sweep: Path

    @property
    def folder(self) -> Path:
        return self.sweep / RUNS / _slug(self.label) / f"{100 * self.fraction:.10g}" / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.label}, {100 * self.fraction:g} % of the data, seed {self.seed}"


@dataclass(frozen=True)
class Point:
    """The scores of one start on one share of the data, one per seed, each from 0 to 1."""

    backbone: str  # label
    fraction: float
    values: Mapping[int, float]

    @property
    def spread(self) -> Spread:
        """Mean and standard deviation over seeds."""
        return Spread(tuple(self.values.values()))


@dataclass(frozen=True)
class SweepResult:
    """The scores of a sweep's finished runs, beside the papers' scores for the same protocol."""

    recipe: FinetuneRecipe
    metric: str  # of all numbers: "miou", "box_ap50"
    which: str  # evaluation of each run that counts: "last" or "best"
    points: tuple[Point, ...]
    paper: tuple[PaperRow, ...]  # of this metric
    images: Mapping[float, int]  # training images of each share
    protocol_deviations: Mapping[str, str]  # what the released protocol does by accident -> what these runs do
    changed: tuple[str, ...] = ()  # how the recipe differs from the one shipped under its name
    missing: tuple[str, ...] = ()  # runs of the sweep that are not finished
    left_out: tuple[str, ...] = ()  # clouds that runs could not use, and why

    def by_start(self) -> tuple[dict[str, dict[float, Spread]], dict[str, list[PaperRow]]]:
        """Measured scores by start and share, and what papers report by start, shares rising."""
        measured: dict[str, dict[float, Spread]] = {}
        for point in self.points:
            measured.setdefault(point.backbone, {})[point.fraction] = point.spread
        reported: dict[str, list[PaperRow]] = {}
        for row in sorted(self.paper, key=lambda row: row.fraction):
            reported.setdefault(row.backbone, []).append(row)
        return measured, {name: reported[name] for name in dict.fromkeys(row.backbone for row in self.paper)}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types; measured and reported scores are separate."""
        license, terms = data_terms(self.recipe.data.source, self.recipe.data.license)
        return {
            "recipe": yaml.safe_load(self.recipe.to_yaml()),
            "data": {"source": self.recipe.data.source, "licence": license, "terms": terms},
            "metric": self.metric,
            "state": self.which,
            "measured": [
                {
                    "backbone": p.backbone,
                    "fraction": p.fraction,
                    "images": self.images.get(p.fraction),
                    "mean": p.spread.mean,
                    "std": p.spread.std if len(p.values) > 1 else None,
                    "seeds": {str(seed): value for seed, value in p.values.items()},
                }
                for p in self.points
            ],
            "reported_by_papers": [dataclasses.asdict(row) for row in self.paper],
            "quirks": dict(self.protocol_deviations),
            "changed": list(self.changed),
            "missing": list(self.missing),
        }


def run_sweep(
    recipe: FinetuneRecipe,
    backbones: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    world: World | None = None,
    sources: tuple[LabelledSource, LabelledSource] | None = None,
    on_run: Callable[[int, int, Run], None] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    on_data: Callable[[int, int], None] | None = None,
    on_labels: Callable[[LabelTable], None] | None = None,
) -> SweepResult:
    """Fine-tune every start on every share with every seed, skipping finished runs, and summarize all.

    All starts see the same images of a share; seeds draw the order, augmentation and new weights. Every seed goes
    through all starts before the next one begins, so a sweep that is stopped has whole curves.

    Args:
        backbones: "scratch", "imagenet", names of the catalog, checkpoint folders.
        fractions: shares of the training images, above 0 and up to 1.
        init_kwargs: where `load_backbone` looks for named backbones (hub, cache_dir, ...).
        on_run: called with the number of the run, the number of runs and the run before each one, finished or not.
        device, world, sources, on_step, on_data, on_labels: of `finetune`; the last is called in the first run alone.

    Raises:
        RecipeError: the sweep in `out` has another recipe or another checkpoint under the same name.
        MissingDependency: the task needs a library that is not installed.
        CheckpointError: another process is at work on the sweep in `out`.
        GeoPretrainError: a start that cannot be had, before anything is trained.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the same command goes on.
    """
    where = dict(init_kwargs or {})
    _check_axes(recipe, fractions, seeds)
    held = _check_starts(recipe, backbones, where, opened=sources is not None)
    order = product(seeds, fractions, held.items())
    runs = [Run(backbone, label, float(share), seed, out) for seed, share, (label, (backbone, _)) in order]
    world = world or join(device)
    same: dict[str, Any] = {"init_kwargs": where, "world": world, "sources": sources, "on_step": on_step}
    same["on_data"] = on_data
    with run_lock(out, "sweep") if world.is_main else nullcontext():
        recorded = read_plan(out)[0].to_yaml() if (out / SWEEP).exists() else None
        recipe = settle_precision(recipe, world, recorded)  # once, so that all runs compute alike
        if world.is_main:
            _keep_plan(recipe, held, runs, out)
        world.barrier()
        for number, run in enumerate(runs):
            if on_run is not None:
                on_run(number, len(runs), run)
            if not (run.folder / RESULTS).exists() or run_folder(run.folder).exists():
                own = run_recipe(recipe, run.fraction, run.seed)
                finetune(own, run.backbone, run.folder, on_labels=on_labels, **same)
                on_labels = None
    return read_sweep(out)


def run_recipe(recipe: FinetuneRecipe, fraction: float, seed: int) -> FinetuneRecipe:
    """Build the recipe of one run."""
    return replace(recipe, data=replace(recipe.data, fraction=fraction), seed=seed)


def differences(old: FinetuneRecipe, new: FinetuneRecipe) -> list[str]:
    """List the keys outside `FREE` whose values differ, such as "optim.lr: 0.01 -> 0.02"."""
    return without_auto(changes(old.to_yaml(), new.to_yaml(), FinetuneRecipe, ignore=FREE))


def read_sweep(out: Path) -> SweepResult:
    """Read the finished runs of a sweep's folder, without training anything.

    Raises `DataError` when it is no such folder or has no finished run, `RecipeError` when its runs do not belong
    together.
    """
    recipe, held, runs = read_plan(out)
    finished = {run: read_result(run.folder) for run in runs if (run.folder / RESULTS).exists()}
    if not finished:
        raise DataError(f"{out}: none of the {len(runs)} runs of this sweep is finished.")
    images = _check_runs(recipe, finished)
    first = next(iter(finished.values()))
    values: dict[tuple[float, str], dict[int, float]] = {}
    for run, result in finished.items():
        values.setdefault((run.fraction, run.label), {})[run.seed] = result.score
    return SweepResult(
        recipe=recipe,
        metric=first.metric,
        which=first.uses,
        points=tuple(
            Point(label, fraction, dict(sorted(values[fraction, label].items())))
            for label in held
            for fraction in sorted({share for share, name in values if name == label})
        ),
        paper=tuple(row for row in paper_rows(recipe) if row.metric == first.metric),
        images=images,
        protocol_deviations=first.data["quirks"],
        changed=_changed(recipe),
        missing=tuple(str(run) for run in runs if run not in finished),
        left_out=tuple(f"{run}: {line}" for run, result in finished.items() for line in result.left_out()),
    )


def read_plan(out: Path) -> tuple[FinetuneRecipe, dict[str, tuple[str, str | None]], list[Run]]:
    """Read a sweep's recipe, starts (label -> backbone and digest) and runs. Raises `DataError`."""
    path = out / SWEEP
    try:
        kept = read_sealed(path)
        if kept["format"] != FORMAT:
            raise DataError(f"{path}: format {kept['format']!r}; this version reads {FORMAT}.")
        recipe = parse(FinetuneRecipe, parse_yaml(kept["recipe"]), where=str(path))
        held = {label: (backbone, digest) for label, (backbone, digest) in kept["starts"].items()}
        return recipe, held, [Run(held[label][0], label, share, seed, out) for label, share, seed in kept["runs"]]
    except FileNotFoundError:
        raise DataError(f"{out} holds no sweep: {SWEEP} is missing.") from None
    except CheckpointError as error:
        raise DataError(f"{error} It is not the plan of a sweep.") from None
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, RecipeError):
            raise
        raise DataError(f"{path}: not the plan of a sweep ({error!r}).") from None


def _check_axes(recipe: FinetuneRecipe, fractions: Sequence[float], seeds: Sequence[int]) -> None:
    for what, given in (("fractions", fractions), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise RecipeError(f"{what} are {list(given)}, accepted is one or more, each once.")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise RecipeError(f"fraction={fraction!r}; accepted: above 0 and up to 1.")
    scenes = recipe.data.scenes
    if scenes is not None and len(fractions) > 1 and expanded(scenes).is_file():
        raise RecipeError(
            f"'data.scenes' is {scenes!r}, one list for every share; accepted for {len(fractions)} fractions is the "
            "folder that holds a list for each."
        )


def _check_starts(
    recipe: FinetuneRecipe, backbones: Sequence[str], where: Mapping[str, Any], *, opened: bool
) -> dict[str, tuple[str, str | None]]:
    """Load each start once; map its label to backbone and digest of the weights (None: not a checkpoint)."""
    if not backbones or len(set(backbones)) != len(backbones):
        raise RecipeError(f"backbones are {list(backbones)}, accepted is one or more, each once.")
    for backbone in backbones:
        check_start(recipe, backbone)
    if not opened and is_on_disk(recipe):
        open_splits(recipe, None, None)  # a wrong path is told before starts are fetched
    checkpoints = {}
    for backbone in backbones:
        start = backbone_init(recipe, backbone, where)
        start.unet(recipe.seed)
        if start.named:
            checkpoints[backbone] = hub.open(backbone, **where).fetch()
    names = Counter(found.name for found in checkpoints.values())
    held: dict[str, tuple[str, str | None]] = {}
    for backbone in backbones:
        found = checkpoints.get(backbone)
        if found is None:
            held[backbone] = (backbone, None)
            continue
        files = sorted((name, file.sha256) for name, file in found.files.items() if file.role in found.network_roles())
        label = found.name if names[found.name] == 1 else backbone
        held[label] = (backbone, hashlib.sha256(json.dumps(files).encode()).hexdigest())
    return held


def _keep_plan(recipe: FinetuneRecipe, held: dict[str, tuple[str, str | None]], runs: list[Run], out: Path) -> None:
    """Add runs to the sweep in `out`, or create it."""
    if (out / SWEEP).exists():
        old_recipe, old_held, old_runs = read_plan(out)
        changed = differences(old_recipe, recipe)
        if changed:
            raise RecipeError(
                f"The sweep in {out} has another recipe: {'; '.join(changed[:5])}. Give the first settings again, or "
                "choose another --out."
            )
        for label, (backbone, digest) in held.items():
            if label in old_held and old_held[label][1] != digest:
                raise RecipeError(
                    f"{label!r} ({backbone}) has other weights than in the sweep in {out}; choose another --out."
                )
        held = old_held | held
        runs = list(dict.fromkeys([*old_runs, *runs]))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{str(out)!r} exists and holds no sweep; choose another --out.")
    tree = {
        "format": FORMAT,
        "recipe": recipe.to_yaml(),
        "starts": {label: list(start) for label, start in held.items()},
        "runs": list(dict.fromkeys((run.label, run.fraction, run.seed) for run in runs)),
    }
    write_sealed(out / SWEEP, tree, indent=2)


def _check_runs(recipe: FinetuneRecipe, finished: Mapping[Run, FinetuneResult]) -> dict[float, int]:
    """Check that all runs share recipe and data; return the number of training images of each share."""
    same: dict[tuple[str, Any], tuple[Run, Any]] = {}
    images: dict[float, int] = {}
    for run, result in finished.items():
        own = load_finetune_recipe(str(run.folder / "recipe.yaml"))
        expected = with_encoder(run_recipe(recipe, run.fraction, run.seed), own.network.encoder)
        wrong = differences(expected, own)
        if (own.data.fraction, own.seed) != (run.fraction, run.seed):
            wrong.append(f"share {run.fraction} -> {own.data.fraction}, seed {run.seed} -> {own.seed}")
        if wrong:
            raise RecipeError(f"{run.folder}: this run has another recipe: {'; '.join(wrong[:5])}.")
        data = result.data["data"]
        for what, value in {
            ("validation images", None): data["val_fingerprint"],
            ("training images", run.fraction): data["train_fingerprint"],
            ("metric", None): (result.metric, result.uses),
        }.items():
            other, known = same.setdefault(what, (run, value))
            if known != value:
                raise RecipeError(f"{run.folder} has other {what[0]} than {other.folder}; remove one of the two.")
        images[run.fraction] = data["train_images"]
    return dict(sorted(images.items()))


def _changed(recipe: FinetuneRecipe) -> tuple[str, ...]:
    """List the differences between a recipe and the shipped recipe of its name."""
    if recipe.name not in list_finetune_recipes():
        return ()
    return tuple(differences(load_finetune_recipe(recipe.name), recipe))


def _slug(label: str) -> str:
    """Convert a label to a folder name; a digest is appended if characters had to be replaced."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("._")
    return plain if plain == label else f"{plain[-40:]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
