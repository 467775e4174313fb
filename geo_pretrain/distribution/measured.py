"""Numbers on the cards of shipped weights: each is read from a stored result, and says from which place in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from geo_pretrain.catalog.entry import Result, Shipped
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.distribution import project as wheel
from geo_pretrain.distribution.add import write_own_card
from geo_pretrain.distribution.shipped_file import catalog_file, read_shipped, row_named, write_shipped
from geo_pretrain.errors import CheckpointError, DataError
from geo_pretrain.files import parse_json

FACTORS = (1, 100)  # a share as it is, or as a percentage
DIGITS = 4  # significant ones of a number on a card


def number_at(file: Path, place: str) -> float:
    """The number at a place of a JSON file; `place` is a JSON pointer (RFC 6901): "/networks/NAME/depth/0".

    Raises `DataError` that tells what is there instead.
    """
    try:
        value: Any = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; accepted: a stored result, JSON.") from None
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error}); accepted: a stored result.") from error
    if not place.startswith("/"):
        raise DataError(f"Place {place!r}; accepted: a JSON pointer such as '/networks/NAME/recall'.")
    done = ""
    for raw in place[1:].split("/"):
        key = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            there = list(value)[:12] if isinstance(value, dict) else f"{type(value).__name__} {str(value)[:40]}"
            raise DataError(f"{file}: has no {key!r} at {done or 'its top'}; there is: {there}. In a key, / is ~1.")
        done = f"{done}/{raw}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{file}: {place} is {str(value)[:60]!r}; accepted: the place of a number.")
    return float(value)


def read_result(
    clone: Path, file: Path, place: str, *, task: str, dataset: str, metric: str, scale: float = 1.0, note: str = ""
) -> Result:
    """A line of a card from a stored result: the number times `scale`, to `DIGITS` digits."""
    if scale not in FACTORS:
        raise DataError(f"scale is {scale:g}; accepted: 1, and 100 for a share as a percentage.")
    value = float(f"{scale * number_at(file, place):.{DIGITS}g}")
    try:
        stored = file.resolve().relative_to(clone.resolve()).as_posix()
    except ValueError:
        raise DataError(f"{file}: lies outside of {clone}; store it in benchmarks/results first.") from None
    try:
        return Result(task, dataset, metric, value, f"{stored}#{place}", note)
    except ValueError as error:
        raise DataError(str(error)) from error


def add_result(
    name: str,
    file: Path | str,
    place: str,
    *,
    task: str,
    dataset: str,
    metric: str,
    scale: float = 1.0,
    note: str = "",
    weights: Path | str = "weights",
) -> tuple[Result, ...]:
    """Put a stored number on the card of a shipped checkpoint, here and in its package; returns all of its numbers.

    A number of the same task, data and metric is replaced. Raises `UnknownName` for a name that no package holds, and
    `DataError` for a place without a number.
    """
    weights = Path(weights)
    catalog = catalog_file(weights)
    if catalog is None:
        raise CheckpointError("This geo_pretrain runs from no clone, so it has no catalog to write to.")
    rows = read_shipped(catalog)
    row = row_named(rows, name)
    clone = catalog.parents[2]
    result = read_result(clone, Path(file), place, task=task, dataset=dataset, metric=metric, scale=scale, note=note)
    what = (result.task, result.dataset, result.metric)
    others = [one for one in row.measured if (one.task, one.dataset, one.metric) != what]
    row = replace(row, measured=(*others, result))
    folder = weights / row.package / row.package / name
    if folder.is_dir():
        write_own_card(read_checkpoint(folder), row.measured)
        wheel.write_project(weights / row.package)
    write_shipped(catalog, {**rows, name: row})
    return row.measured


def check_results(row: Shipped, clone: Path) -> None:
    """Compare the numbers of a row with the stored results. Raises `DataError` for one that is another there."""
    for result in row.measured:
        file, _, place = result.table.partition("#")
        stored = number_at(clone / file, place)
        if not any(abs(factor * stored - result.value) <= 1e-3 * abs(result.value) for factor in FACTORS):
            raise DataError(
                f"{result.task}, {result.dataset}: the card says {result.value:g} {result.metric}, {result.table} says "
                f"{stored:g}; `geo-pretrain weights measured` reads it anew."
            )
