"""Fine-tune a backbone by a downstream recipe; the result records the score and everything it depends on.

A run lives in `<out>.run/` (state, log) and ends by writing the folder `<out>` (folder.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from geo_pretrain.errors import DataError, some
from geo_pretrain.files import expanded
from geo_pretrain.training.announcement import announce
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.own_boxes import shared_images
from geo_pretrain.training.data.labelled.registry import DATA_SETS, data_terms, open_labelled, subset
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from geo_pretrain.training.data.labelled.shares import LabelTable, label_table
from geo_pretrain.training.distributed import World, join
from geo_pretrain.training.finetune.folder import FinetuneResult, check_result_out, finish
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task, check_start, resolved
from geo_pretrain.training.finetune.training import Finetuning, LabelledSplits, OnEvaluation
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.licenses import finetuned_license
from geo_pretrain.training.loop import StepInfo, fit
from geo_pretrain.training.precision import choices, settle_precision
from geo_pretrain.training.runs import RunFolder, explained, run_lock


def finetune(
    recipe: FinetuneRecipe,
    backbone: str | os.PathLike[str],
    out: Path,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    world: World | None = None,
    overwrite: bool = False,
    sources: tuple[LabelledData, LabelledData] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_data: Callable[[int, int], None] | None = None,
    on_labels: Callable[[LabelTable], None] | None = None,
) -> FinetuneResult:
    """Fine-tune `backbone` by a recipe, or resume the run in `<out>.run`, and write the folder `out`.

    `backbone`: a name of the catalog, a checkpoint folder, "imagenet" (torchvision's IMAGENET1K_V1), "scratch",
    or the weights of an encoder alone, "file:PATH" or "package:MODULE".
    `init_kwargs`: where to look for it (`hub`, `revision`, `cache_dir`, `local_files_only`).
    `device` None: CUDA when there is one; `world`: the processes of torchrun, if they were joined already; all of them
    return the result. `sources`: training and validation images in place of the recipe's. `on_data(done, total)` is
    called while rooms are rendered; `on_labels(table)` before training, with what labels of a user's own files are.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the state is saved.
        RecipeError: the recipe does not fit backbone or data, or is not that of the run to be continued.
        CheckpointError: `out` already holds a result and `overwrite` is not set, or another process works there.
        MissingDependency: the task needs a library that is not installed.
        DataError: a label or image cannot be used; file and value are named.
    """
    out, where = Path(out), dict(init_kwargs or {})
    check_result_out(out, overwrite=overwrite)
    check_start(recipe, os.fspath(backbone))
    data = None if _is_rendered(recipe, sources) else open_splits(recipe, sources, on_data)  # before a fetch
    recipe = resolved(recipe, os.fspath(backbone), where)
    start = backbone_init(recipe, os.fspath(backbone), where)
    contract = start.contract()
    start.fetch()  # weights that cannot be had are told before rooms are rendered, or labels read
    data = open_splits(recipe, sources, on_data) if data is None else data
    _check_labels(recipe, data, on_labels)
    terms = data_terms(data.train.name, recipe.data.license)[0]  # now: the start may have moved when the run ends
    license = finetuned_license(data.train.name, terms, start.backbone, recipe.network.encoder, where)
    world = world or join(device)
    generators = torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else [])
    with run_lock(out, "fine-tuning run") if world.is_main else nullcontext(), generators:
        check_result_out(out, overwrite=overwrite)  # again: another process may have finished a run there meanwhile
        world.barrier()
        run = RunFolder(out, writes=world.is_main)
        wanted, recipe = recipe, settle_precision(recipe, world, run.saved_recipe())
        network = build_finetune_task(recipe, start, data.train.classes, contract)
        task = Finetuning(recipe, start.backbone, network, data, world, run, on_evaluation)
        task.choices = choices(wanted, recipe)
        run.create()
        progress = fit(task, world, run, on_start=lambda begun: announce(task, begun, on_step), on_step=on_step)
        if not progress.finished:
            raise progress.interrupted(run)
        with explained(run):
            result = finish(task, progress, license) if world.is_main else None
        return cast(FinetuneResult, world.all_gather_object(result)[0])


def _check_labels(recipe: FinetuneRecipe, data: LabelledSplits, on_labels: Callable[[LabelTable], None] | None) -> None:
    """Show what labels are. Raises `DataError` for those that are no class, in each process and before any work."""
    table = label_table(data.train)
    if table is None:
        return
    if on_labels is not None:
        on_labels(table)
    fault = table.fault(recipe.data.options.get("ignore", ()))
    if fault is None:
        return
    source, path = recipe.data.source, recipe.data.path
    line = "" if path is None or table.looked == table.total else f" All: geo-pretrain data check {source}:{path}"
    raise DataError(" ".join(text for text in (table.note, fault) if text is not None) + line)


def is_on_disk(recipe: FinetuneRecipe) -> bool:
    """Whether the recipe's data are files, which are opened at once; others are rendered."""
    return DATA_SETS[recipe.data.source].embedded is None


def _is_rendered(recipe: FinetuneRecipe, sources: tuple[LabelledData, LabelledData] | None) -> bool:
    return sources is None and not is_on_disk(recipe)


def open_splits(
    recipe: FinetuneRecipe,
    sources: tuple[LabelledData, LabelledData] | None,
    on_data: Callable[[int, int], None] | None,
) -> LabelledSplits:
    """Open the recipe's share of the training images, and all validation images."""
    spec = recipe.data
    if sources is None:
        path = None if spec.path is None else Path(spec.path)
        train, val = (
            open_labelled(spec.source, path, split, task=recipe.labels(), options=spec.options, progress=on_data)
            for split in ("train", "val")
        )
    else:
        train, val = sources
    if train.classes != val.classes:
        raise DataError(f"Classes of the training images {train.classes} are not those to measure on {val.classes}.")
    if shared := shared_images([train, val]):
        names = some((path.name for path in shared), 5)
        raise DataError(f"{len(shared)} images are in train and in val: {names}. Train on none that is measured.")
    total = len(train.ids())
    if not total or not val.ids():
        raise DataError(f"Source {spec.source!r}: {total} training and {len(val.ids())} validation images.")
    listed = expanded(spec.scenes) if spec.scenes is not None else None
    if listed is not None and not (listed.is_dir() and spec.fraction == 1):  # all scenes need no list
        train = subset(train, 1.0, scenes=read_scene_list(listed, spec.fraction))
    elif spec.fraction < 1:
        train = subset(train, spec.fraction, spec.fraction_seed)
    return LabelledSplits(train, val, len(train.ids()) / total)
