"""From a recipe to its checkpoint: data opened, pairs found, stages trained one after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from geo_pretrain.checkpoint import Checkpoint, read_checkpoint
from geo_pretrain.errors import RecipeError
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.training import loop as engine
from geo_pretrain.training.data.frame import Skips, Source
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source, source_note
from geo_pretrain.training.distributed import World
from geo_pretrain.training.recipe import Recipe, changes
from geo_pretrain.training.runs import only_process

Report = Callable[[str, int, int, str], None]  # stage, done, total, detail


@dataclass
class Outcome:
    """What a run of one recipe, or of two in a row, ended with."""

    checkpoint: Checkpoint | None  # None but in the main process
    pairs: int  # or frames, of the last stage
    skips: Skips = field(default_factory=Skips)


def run_recipe(
    recipe: Recipe,
    out: Path,
    world: World,
    *,
    stage1: Recipe | None = None,
    overwrite: bool = False,
    report: Report = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train `recipe` into the checkpoint folder `out`, after `stage1` into `<out>.stage1` if the recipe starts from it.

    A first stage that is finished is used as it is. Interrupted runs go on, in the stage where they were. `note` is
    told what the data source says about itself.

    Raises:
        CheckpointError: another process works on `out`.
        RecipeError: `<out>.stage1` was made by another recipe; and as `engine.train`, `find_pairs`, `open_source`.
    """
    engine.check_out(out, recipe.name, overwrite=overwrite)
    with only_process(out, "training run") if world.is_main else nullcontext():
        return _run_stages(recipe, out, world, stage1, overwrite, report, note)


def _run_stages(
    recipe: Recipe,
    out: Path,
    world: World,
    stage1: Recipe | None,
    overwrite: bool,
    report: Report,
    note: Callable[[str], None],
) -> Outcome:
    if recipe.needs_stage1 and stage1 is not None:
        folder = out.with_name(out.name + ".stage1")
        if not _is_done(stage1, folder, world, report, overwrite=overwrite):
            _run(stage1, folder, world, overwrite, report, note)
        recipe = replace(recipe, stage1={**(recipe.stage1 or {}), "folder": str(folder)})
    return _run(recipe, out, world, overwrite, report, note)


def _is_done(stage1: Recipe, folder: Path, world: World, report: Report, *, overwrite: bool) -> bool:
    """Whether the folder holds what this very recipe makes. Raises when it holds another's result."""
    if not (folder / "config.json").is_file():
        return False
    found = read_checkpoint(folder)
    if not found.finished:
        return False
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


def _open(recipe: Recipe, world: World, report: Report) -> Source:
    return open_source(recipe.data, device=str(world.device), progress=lambda d, t: report("rendering rooms", d, t, ""))


def _run(
    recipe: Recipe, out: Path, world: World, overwrite: bool, report: Report, note: Callable[[str], None]
) -> Outcome:
    skips = Skips()
    source = _open(recipe, world, report)
    if world.is_main and source_note(source):
        note(source_note(source))
    pairs = find_pairs(
        source,
        recipe.data,
        skips=skips,
        device=world.device,
        cache_dir=default_cache(),
        progress=lambda d, t: report("finding pairs", d, t, ""),
    )
    checkpoint = engine.train(
        recipe,
        out,
        source,
        pairs,
        world,
        skips=skips,
        overwrite=overwrite,
        on_step=lambda step: report(f"training {recipe.name}", step.step, step.steps, str(step)),
    )
    return Outcome(checkpoint, len(pairs), skips)
