"""Write `catalog/shipped.py`: what the packages hold, as rows that Python reads quickly and people can compare."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from geo_pretrain.catalog import shipped
from geo_pretrain.catalog.entry import Result, Shipped
from geo_pretrain.errors import CheckpointError, unknown
from geo_pretrain.files import write_text

RENDERERS = ("geo_pretrain.cards", "geo_pretrain.advice")  # what `make cards` runs
PLACE = Path("geo_pretrain/catalog/shipped.py")  # in a clone
WIDEST = 120  # characters of a line


def catalog_file(weights: Path) -> Path | None:
    """The file of the clone from which this package runs; None where it is installed elsewhere.

    Raises `CheckpointError` where `weights` belongs to another clone.
    """
    ours = Path(shipped.__file__).resolve()
    beside = weights.resolve().parent / PLACE
    if beside.is_file() and beside.resolve() != ours:
        raise CheckpointError(
            f"{weights} belongs to the clone {beside.parents[2]}, and this geo_pretrain runs from {ours.parents[2]}; "
            "accepted: the clone's own (`make install`, then .venv/bin/geo-pretrain)."
        )
    return ours if (ours.parents[2] / "pyproject.toml").is_file() else None


def read_shipped(path: Path) -> dict[str, Shipped]:
    """The rows that stand in the file now. Raises `CheckpointError` where it is no Python."""
    try:
        return dict(runpy.run_path(str(path))["SHIPPED"])
    except (SyntaxError, NameError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be read ({reason}); `git checkout {path}` brings it back.") from error


def row_named(rows: Mapping[str, Shipped], name: str) -> Shipped:
    """The row of a name. Raises `UnknownName` for one that no package holds."""
    if name not in rows:
        raise unknown("checkpoint in a package", name, rows, "`geo-pretrain weights add RUN` puts one in.")
    return rows[name]


def write_shipped(path: Path, rows: Mapping[str, Shipped]) -> None:
    """Write the file with these rows, by name."""
    before = path.read_text(encoding="utf-8")
    head = before[: before.index("SHIPPED: Mapping")]
    write_text(path, head + rows_text(rows))


def refresh_pages(catalog: Path) -> None:
    """Render the cards, tables and pages of the clone anew, by processes that read the catalog as it is now."""
    clone = catalog.parents[2]
    for module in RENDERERS:
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=clone, capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"{catalog} was written, but python -m {module} failed ({said}): run `make cards`.")


def rows_text(rows: Mapping[str, Shipped]) -> str:
    """The rows as ruff formats them."""
    if not rows:
        return "SHIPPED: Mapping[str, Shipped] = {}\n"
    body = "".join(_row(name, rows[name]) for name in sorted(rows))
    return f"SHIPPED: Mapping[str, Shipped] = {{\n{body}}}\n"


def _row(name: str, row: Shipped) -> str:
    lines = [f"package={_text(row.package)},", "files={"]
    lines += [f"    {_text(file)}: ({size}, {_text(digest)})," for file, (size, digest) in row.files.items()]
    lines += ["},", f"made={_text(row.made)},"]
    if row.size is not None:
        lines.append(f"size={row.size},")
    if row.mirrors:
        lines += ["mirrors=(", *(f"    {_text(place)}," for place in row.mirrors), "),"]
    if row.measured:
        lines += ["measured=(", *(f"    {line}" for result in row.measured for line in _result(result)), "),"]
    return "".join([f"    {_text(name)}: Shipped(\n", *(_line(f"        {line}") for line in lines), "    ),\n"])


def _line(text: str) -> str:
    """A line; one that is too long for the linter (a place in a file can be) says so."""
    return f"{text}  # noqa: E501\n" if len(text) > WIDEST else f"{text}\n"


def _result(result: Result) -> list[str]:
    fields = [f"    {key}={_text(v) if isinstance(v, str) else repr(v)}," for key, v in vars(result).items() if v != ""]
    return ["Result(", *fields, "),"]


def _text(value: str) -> str:
    """A string as ruff writes it: in double quotes."""
    return json.dumps(value, ensure_ascii=False)
