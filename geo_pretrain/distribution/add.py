"""Put a finished training run into a wheel project: float16, golden outputs, card, loss curve, catalog line."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geo_pretrain.cards import render_card
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import OUR_PACKAGES, Entry, Result, Shipped
from geo_pretrain.checkpoint import CONFIG, Checkpoint, read_checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.digests import inventory_line
from geo_pretrain.distribution import project as wheel
from geo_pretrain.distribution.shipped_file import catalog_file, read_shipped, write_shipped
from geo_pretrain.errors import CheckpointError, unknown
from geo_pretrain.files import SEAL, parse_json, tree_digest, write_text
from geo_pretrain.halving import write_halved
from geo_pretrain.hub.names import check_is_entry, check_pins
from geo_pretrain.hub.outgoing import outgoing
from geo_pretrain.publish import check_publishable, copy_to
from geo_pretrain.training.recipe import changes, list_recipes, load_recipe
from geo_pretrain.training.runs import run_folder
from geo_pretrain.training.visualize.loss_curve import draw_loss_curve

LEAST_STEPS = {"2d": 20_000, "3d": 10_000}  # of training, below which weights are a trial
LOG_LINES = 2000  # of the log that travels, at most


@dataclass(frozen=True)
class Added:
    """What `add_run` did."""

    checkpoint: Checkpoint  # in its place
    project: Path
    catalog: Path | None  # the file that lists it; None: this package runs from no clone
    size: int  # bytes of the checkpoint
    differences: tuple[str, ...]  # of its recipe from the one of its name


def add_run(
    run: Path | str,
    weights: Path | str = "weights",
    *,
    package: str | None = None,
    without: Collection[str] = (),
    short: bool = False,
) -> Added:
    """Put the checkpoint folder of a finished run into the project `weights`/`package`, and list it in the catalog.

    Matrices become float16, the log at most `LOG_LINES` lines; recipe, provenance and new golden outputs travel along,
    and a loss curve beside them. `without`: roles that only pairs of networks need, "heads" and "teacher". `short`:
    also a run of fewer than `LEAST_STEPS`. The same run again changes nothing.

    Raises `CheckpointError` for a run that did not finish or is too short, a name, network, input or license that is
    not the catalog's, a license other than MIT, a file, wheel or folder that would be too big, and what
    `publish.check_publishable` refuses; `DigestMismatch` for other weights under a name that was given away.
    """
    weights = Path(weights)
    checkpoint = _finished(Path(run))
    entry = CATALOG.get(checkpoint.name)
    if entry is None:
        hint = "Weights are given away under names of the catalog: add an entry first, see CONTRIBUTING.md."
        raise unknown("backbone", checkpoint.name, CATALOG, hint)
    _check_length(checkpoint, short)
    entry = _checked(checkpoint, entry)
    catalog = catalog_file(weights)
    target = weights / (package or wheel.planned_package(entry.name))
    _check_package(target.name)
    before = read_shipped(catalog).get(checkpoint.name) if catalog is not None else None
    with tempfile.TemporaryDirectory() as temporary:
        made = _light(checkpoint, Path(temporary), without)
        made = write_own_card(made, before.measured if before is not None else ())
        check_publishable(made, named=False)
        check_pins(entry, made.files, str(made.folder), all_files=True)
        (curve := made.folder / wheel.CURVE).unlink(missing_ok=True)
        draw_loss_curve(checkpoint.folder / checkpoint.file_of("log"), curve, title=checkpoint.name)
        place = target / target.name / checkpoint.name
        if not place.is_dir():
            wheel.check_sizes(target, [made.folder])
        config = (made.folder / CONFIG).read_bytes()
        copy_to(place, made, {CONFIG: config})
        shutil.copyfile(curve, place / wheel.CURVE)
    added = read_checkpoint(place)
    wheel.write_project(target)
    wheel.write_overview(weights)
    if catalog is not None:
        _list(catalog, added, target.name)
    return Added(added, target, catalog, wheel.size_of(place), tuple(_differences(added)))


def _finished(run: Path) -> Checkpoint:
    under_way = not (run / CONFIG).is_file() and run_folder(run).is_dir()
    if under_way or not (checkpoint := read_checkpoint(run)).finished:
        raise CheckpointError(f"{run}: its training did not finish; finished runs are accepted. Resume the run.")
    for role in ("recipe", "log"):
        checkpoint.file_of(role)
    return checkpoint


def _check_length(checkpoint: Checkpoint, short: bool) -> None:
    steps, least = checkpoint.provenance.get("steps", 0), LEAST_STEPS[CATALOG[checkpoint.name].modality]
    if steps < least and not short:
        raise CheckpointError(
            f"{checkpoint.folder}: was trained for {steps} steps; weights that are given away have {least} or more "
            "(--short takes them all the same, to try things out)."
        )


def _checked(checkpoint: Checkpoint, entry: Entry) -> Entry:
    """The entry with the run's own size of images. Raises where name, network, input or license are others."""
    if isinstance(checkpoint.contract, ImageContract) and isinstance(entry.contract, ImageContract) and not entry.files:
        entry = replace(entry, contract=replace(entry.contract, size=checkpoint.contract.size))
    where = str(checkpoint.folder)
    check_is_entry(entry, checkpoint, where, encoder_alone=False)
    chain, ours = checkpoint.license, entry.license
    if chain.weights != wheel.LICENSE:
        data = ", ".join(f"{name} ({terms})" for name, terms in chain.datasets)
        raise CheckpointError(
            f"{where}: its weights are under {chain.weights!r}, for they learned from {data} and started from "
            f"{chain.base_model}; accepted: {wheel.LICENSE}, the license of the wheel."
        )
    for what, have, wanted in (
        ("license", chain.weights, ours.weights),
        ("data", chain.datasets, ours.datasets),
        ("start", chain.base_model, ours.base_model),
    ):
        if have != wanted:
            raise CheckpointError(
                f"{where}: the catalog states {what} {wanted!r} for {entry.name!r}; this has {have!r}."
            )
    return entry


def _check_package(package: str) -> None:
    if not package.isidentifier() or not package.islower():
        raise CheckpointError(
            f"Package {package!r}; accepted: a name of Python in lower case, such as {OUR_PACKAGES[1]!r}."
        )


def _light(checkpoint: Checkpoint, folder: Path, without: Collection[str]) -> Checkpoint:
    """A copy for the wheel: float16, a short log, no paths of this machine, a card of its own."""
    half = write_halved(checkpoint.folder, folder / "half", without=without)
    log = half.file_of("log")
    _replace_text(half, log, _thinned((half.folder / log).read_text(encoding="utf-8")))
    half = read_checkpoint(half.folder)
    for name, text in outgoing(half).items():
        (half.folder / name).write_bytes(text)
    return read_checkpoint(half.folder)


def _thinned(log: str) -> str:
    """Every n-th step of a log, the first and the last one, and all lines that are no steps of training."""
    lines = log.splitlines(keepends=True)
    steps = [number for number, line in enumerate(lines) if '"lr"' in line]
    every = -(-len(steps) // LOG_LINES)
    if every < 2:
        return log
    dropped = set(steps) - {*steps[::every], steps[-1]}
    return "".join(line for number, line in enumerate(lines) if number not in dropped)


def write_own_card(checkpoint: Checkpoint, measured: tuple[Result, ...]) -> Checkpoint:
    """Render the card of a checkpoint in a wheel, with the numbers measured of it."""
    card = render_card(
        checkpoint.name,
        checkpoint.arch,
        checkpoint.contract,
        checkpoint.license,
        checkpoint.provenance,
        recipe="recipe.yaml",
        results=measured,
        source=checkpoint.name,
        files=checkpoint.files,
    )
    _replace_text(checkpoint, checkpoint.file_of("card"), card)
    return read_checkpoint(checkpoint.folder)


def _replace_text(checkpoint: Checkpoint, name: str, text: str) -> None:
    """Write a text of a checkpoint folder, and its line in config.json."""
    write_text(checkpoint.folder / name, text)
    config: dict[str, Any] = parse_json((checkpoint.folder / CONFIG).read_bytes())
    config["files"][name] = inventory_line(checkpoint.folder / name, config["files"][name]["role"])
    config.pop(SEAL, None)
    config[SEAL] = tree_digest(config)
    write_text(checkpoint.folder / CONFIG, json.dumps(config, indent=2) + "\n")


def row_of(checkpoint: Checkpoint, package: str, before: Shipped | None = None) -> Shipped:
    """The catalog's row of a checkpoint in a wheel; mirrors and numbers of the row before stay."""
    pinned = {name: (f.size, f.sha256) for name, f in checkpoint.files.items() if f.role != "card"}
    size = checkpoint.contract.size if isinstance(checkpoint.contract, ImageContract) else None
    row = Shipped(package, pinned, wheel.made(checkpoint), size)
    return row if before is None else replace(row, mirrors=before.mirrors, measured=before.measured)


def _list(catalog: Path, checkpoint: Checkpoint, package: str) -> None:
    rows: Mapping[str, Shipped] = read_shipped(catalog)
    row = row_of(checkpoint, package, rows.get(checkpoint.name))
    write_shipped(catalog, {**rows, checkpoint.name: row})


def _differences(checkpoint: Checkpoint) -> list[str]:
    """How the recipe in the folder differs from the one of its name."""
    if checkpoint.name not in list_recipes():
        return []
    theirs = (checkpoint.folder / checkpoint.file_of("recipe")).read_text(encoding="utf-8")
    return changes(load_recipe(checkpoint.name).to_yaml(), theirs)
