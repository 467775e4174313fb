"""The papers' tables as work: the command of each row, and, when its runs are there, our numbers beside the paper's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.tables import Column, PaperTable, TableRow, paper_tables
from geo_pretrain.errors import DataError, RecipeError, unknown
from geo_pretrain.training.data.labelled.registry import DATA_SETS
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.finetune.folder import RESULTS, read_result
from geo_pretrain.training.finetune.published import POINTS, Place, network_title, place_of
from geo_pretrain.training.finetune.sweep import SWEEP, read_plan
from geo_pretrain.training.finetune_recipe import (
    POINT_KINDS,
    FinetuneRecipe,
    list_finetune_recipes,
    load_finetune_recipe,
)

POINTS_KEY = "data.cloud.labelled_points"
# (paper, data set) -> recipes that follow this paper's protocol, where others fit as well
PREFERRED = {("SLidR", "SemanticKITTI"): "semantickitti_slidr_srunet34"}
# (recipe, what is limited) -> changes that its paper makes for limited labels
LIMITED = {
    ("scannet3d_instances", "scenes"): ("optim.steps=5000",),
    ("scannet3d_instances", "points"): ("optim.steps=10000",),
}
# (paper, recipe) -> changes for a paper that measures otherwise
OF_PAPER = {("PPKT", "scannet3d_srunet34"): ("evaluate.level=points",)}  # the mesh's vertices
STEPS = re.compile(r", ([\d,]+) steps$")
SRUNET = "SR-UNet"
POINT_TASKS = ("segmentation3d", "instances3d", "parts3d")  # labelled by points
WEIGHTS = "weights"  # folder for checkpoints that have to be made first
NO_RECIPE = "no recipe here measures it"


@dataclass(frozen=True)
class Protocol:
    """The runs that fill some columns of a table for one network: a recipe with its changes, and shares of the data."""

    recipe: str
    changes: tuple[str, ...]  # KEY=VALUE
    places: Mapping[Column, Place]

    @property
    def folder(self) -> str:
        """The name of the sweep's folder."""
        return "-".join([self.recipe, *(change.rpartition(".")[2].replace("=", "_") for change in self.changes)])

    @property
    def fractions(self) -> list[float]:
        return sorted({place.fraction for place in self.places.values()})


@dataclass(frozen=True)
class RowPlan:
    """A row of a table: what to run for it, and what the runs said."""

    row: TableRow
    commands: tuple[str, ...]  # in order; none where the row cannot be run
    ours: Mapping[Column, Spread]  # over seeds; columns that are not measured are missing


@dataclass(frozen=True)
class TablePlan:
    """A table with its commands and our numbers."""

    table: PaperTable
    rows: tuple[RowPlan, ...]
    without: Mapping[Column, str]  # columns that no recipe fills, and why
    toy: bool

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        rows = [
            {
                "row": plan.row.label,
                "start": plan.row.start,
                "network": plan.row.network,
                "note": plan.row.note,
                "commands": list(plan.commands),
                "numbers": [
                    {"task": task, "data": data, "metric": metric, "paper": plan.row.values.get((task, data, metric))}
                    | _ours(plan.ours.get((task, data, metric)))
                    for task, data, metric in self.table.columns
                ],
            }
            for plan in self.rows
        ]
        without = [{"task": t, "data": d, "metric": m, "why": why} for (t, d, m), why in self.without.items()]
        return {"table": self.table.name, "toy": self.toy, "rows": rows, "not measured here": without}


def list_tables() -> dict[str, PaperTable]:
    """Every table of the papers, by its name."""
    return paper_tables(CATALOG)


def plan_table(
    name: str, out: Path, data: Iterable[str] = (), *, seeds: Sequence[int] = (0,), toy: bool = False
) -> TablePlan:
    """Plan a paper's table: what to run into `out` for each row, with the numbers of the runs that are there.

    Args:
        name: such as "PPKT T1"; any case.
        data: SOURCE:PATH of data sets; a source that is not given stands as SOURCE:PATH in the commands.
        toy: the commands are on small rooms, whose numbers are not to be compared with the paper's.

    Raises:
        UnknownName: no such table.
        RecipeError: `data` names a set that no column of the table is measured on.
        DataError: a folder in `out` holds something that is no sweep.
    """
    tables = list_tables()
    table = next((t for key, t in tables.items() if key.lower() == name.strip().lower()), None)
    if table is None:
        raise unknown("table", name, tables, "All: `geo-pretrain bench table`.")
    folders = _folders(data)
    by_network = {n: list(protocols(table, n)) for n in {row.network for row in table.rows if row.start}}
    used = {_recipes()[p.recipe].data.source for found in by_network.values() for p in found}
    for source in folders:
        if source not in used:
            raise RecipeError(
                f"--data {source}: {table.name} is not measured on it; accepted: {', '.join(sorted(used)) or 'none'}."
            )
    plans = []
    for row in table.rows:
        found = [p for p in by_network.get(row.network, []) if row.start] if row.start else []
        needed = [kept for p in found if (kept := _of_row(p, row))]
        commands = tuple(_commands(row, needed, out, folders, seeds, toy))
        ours = {column: spread for p in needed for column, spread in _measured(p, row, out).items()}
        plans.append(RowPlan(row, commands, ours))
    filled = {column for found in by_network.values() for p in found for column in p.places}
    without = {column: NO_RECIPE for column in table.columns if column not in filled}
    return TablePlan(table, tuple(plans), without, toy)


def protocols(table: PaperTable, network: str) -> Iterator[Protocol]:
    """The recipes, with their changes, that fill columns of a table for a network; each column by one of them."""
    chosen: dict[tuple[str, tuple[str, ...]], dict[Column, Place]] = {}
    for column in table.columns:
        fitting = {n: found for n, r in _recipes().items() if (found := _fit(column, r, table.paper, network))}
        if fitting:
            name = min(fitting, key=lambda n: _preference(n, table, column, fitting[n][1]))
            changes, place = fitting[name]
            chosen.setdefault((name, changes), {})[column] = place
    for (name, changes), places in chosen.items():
        yield Protocol(name, changes, places)


@cache
def _recipes() -> dict[str, FinetuneRecipe]:
    """The recipes of the package by name."""
    return {name: load_finetune_recipe(name) for name in list_finetune_recipes()}


def _fit(column: Column, recipe: FinetuneRecipe, paper: str, network: str) -> tuple[tuple[str, ...], Place] | None:
    """The changes to a recipe, and where its runs then give a column's score; None: they do not."""
    task, dataset, metric = column
    changes, title = [], network_title(recipe)
    if title != network:
        if recipe.network.kind not in POINT_KINDS or not network.startswith(SRUNET):
            return None
        changes.append(f"network.unet3d.variant={network.removeprefix(SRUNET)}")
    steps, points, cloud = STEPS.search(task), POINTS.search(task), recipe.data.cloud
    if points:
        if cloud is None or recipe.task not in POINT_TASKS or recipe.on_frames():
            return None
        recipe = replace(recipe, data=replace(recipe.data, cloud=replace(cloud, labelled_points=int(points[1]))))
        changes.append(f"{POINTS_KEY}={points[1]}")
    if steps:
        changes.append(f"optim.steps={steps[1].replace(',', '')}")
    place = place_of((STEPS.sub("", task), dataset, metric), recipe)
    if place is None:
        return None
    kind = "points" if points else "scenes" if place.fraction < 1 else ""
    changes += [*LIMITED.get((recipe.name, kind), ()), *OF_PAPER.get((paper, recipe.name), ())]
    return tuple(changes), place


def _preference(name: str, table: PaperTable, column: Column, place: Place) -> tuple[bool, bool, int, str]:
    """Sort key of recipes for a column: the paper's own, then the one for parts of the data, then the shortest name."""
    wanted = PREFERRED.get((table.paper, column[1]))
    kind = "points" if POINTS.search(column[0]) else "scenes" if place.fraction < 1 else ""
    own = next((part for part in ("points", "scenes") if f"_{part}_" in name), "")
    return name != wanted, own != kind, len(name), name


def _of_row(protocol: Protocol, row: TableRow) -> Protocol | None:
    """The part of a protocol that a row has numbers for; None: it has none."""
    places = {column: place for column, place in protocol.places.items() if column in row.values}
    return replace(protocol, places=places) if places else None


def _commands(
    row: TableRow, needed: Sequence[Protocol], out: Path, folders: Mapping[str, str], seeds: Sequence[int], toy: bool
) -> Iterator[str]:
    """The commands of a row: its weights where they have to be made, then a sweep for each protocol."""
    start, entry = _start(row, out), CATALOG.get(row.start)
    if needed and entry is not None and start != row.start:
        folder = shlex.quote(start)
        yield f"geo-pretrain train {entry.recipe} --toy --out {folder}" if toy else entry.train_command(folder)
    for protocol in needed:
        source = _recipes()[protocol.recipe].data.source
        data = [] if toy else ["--data", f"{source}:{folders.get(source, 'PATH')}"]
        shares = [part for share in protocol.fractions for part in ("--fraction", f"{share:g}")]
        options = [part for change in protocol.changes for part in ("--set", change)]
        words = ["geo-pretrain", "finetune", protocol.recipe, "--sweep", "-b", start, *data, *shares]
        words += [part for seed in seeds for part in ("--seed", str(seed))] + options + (["--toy"] if toy else [])
        yield shlex.join([*words, "-o", (out / protocol.folder).as_posix()])


def _start(row: TableRow, out: Path) -> str:
    """What fine-tuning is given as a row's start: a folder for weights that nobody offers and a recipe makes."""
    entry = CATALOG.get(row.start)
    made = entry is not None and entry.status == "regenerable"
    return (out / WEIGHTS / row.start).as_posix() if made else row.start


def _measured(protocol: Protocol, row: TableRow, out: Path) -> dict[Column, Spread]:
    """Our scores of a row from the sweep of a protocol; columns without a finished run are left out."""
    folder = out / protocol.folder
    if not (folder / SWEEP).exists():
        if folder.exists():
            raise DataError(f"{folder} holds no sweep: {SWEEP} is missing; choose another --out.")
        return {}
    values: dict[tuple[float, str], list[float]] = {}
    _, _, runs = read_plan(folder)
    for run in runs:
        is_rows = row.start in (run.label, run.backbone) or run.backbone == _start(row, out)
        if is_rows and (run.folder / RESULTS).exists():
            result = read_result(run.folder)
            for metric, value in result.data[result.uses]["scores"].items():
                values.setdefault((run.fraction, metric), []).append(value)
    return {
        column: Spread(tuple(values[place.fraction, place.metric]))
        for column, place in protocol.places.items()
        if (place.fraction, place.metric) in values
    }


def _folders(data: Iterable[str]) -> dict[str, str]:
    folders = {}
    for text in data:
        source, _, path = text.partition(":")
        if source not in DATA_SETS:
            raise unknown("labelled data set", source, DATA_SETS, "Write SOURCE:PATH.")
        folders[source] = path or "PATH"
    return folders


def _ours(spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {"ours": None}
    several = len(spread.values) > 1
    return {
        "ours": 100 * spread.mean,
        "std": 100 * spread.std if several else None,
        "seeds": len(spread.values),
    }


def heading(column: Column) -> str:
    """A column in words: data set, metric, task, and what the task adds."""
    task, dataset, metric = column
    kind, _, detail = task.partition(",")
    return ", ".join(filter(None, (f"{dataset} {metric}", kind.removeprefix("3D "), detail.strip())))


HEAD = ("benchmark", "start", "paper", "ours")


def cells(plan: TablePlan) -> list[tuple[str, ...]]:
    """The table for people, a line for each number: the paper's, and where it was run ours; see `HEAD`."""
    lines: list[tuple[str, ...]] = []
    for column in plan.table.columns:
        for one in plan.rows:
            paper, ours = one.row.values.get(column), one.ours.get(column)
            if paper is not None:
                name = f"{one.row.label} ({one.row.network})" if one.row.network else one.row.label
                lines.append((heading(column), name, f"{paper:g}", "-" if ours is None else str(ours)))
    return lines
