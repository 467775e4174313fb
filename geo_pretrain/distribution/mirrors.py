"""Another door for weights that a package holds: its bytes are compared before the catalog lists it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import Shipped
from geo_pretrain.checkpoint import StoredFile, check_digest
from geo_pretrain.distribution.shipped_file import catalog_file, read_shipped, row_named, write_shipped
from geo_pretrain.errors import CheckpointError, HubError
from geo_pretrain.hub.sources import HF_PREFIX, WEB_PREFIXES, Request, source_of


def add_mirror(name: str, place: str, weights: Path | str = "weights") -> tuple[str, ...]:
    """List a place beside the package that holds `name`; returns all of its mirrors in order of trial.

    `place`: "hf-hub:owner/repo@COMMIT", or an http(s) URL above `<name>/<file>`, such as a release's. Every file that
    the catalog pins is fetched from there and compared. Raises `UnknownName`, `HubError` or `DigestMismatch`.
    """
    catalog = catalog_file(Path(weights))
    if catalog is None:
        raise CheckpointError("This geo_pretrain runs from no clone, so it has no catalog to write to.")
    rows = read_shipped(catalog)
    row = row_named(rows, name)
    if not place.startswith((HF_PREFIX, *WEB_PREFIXES)):
        raise HubError(f"{place!r} is no mirror; accepted: hf-hub:OWNER/REPO@COMMIT, or an http(s) URL above {name}/.")
    place = place.rstrip("/")
    listed = replace(row, mirrors=tuple(dict.fromkeys((*row.mirrors, place))))
    try:
        entry = listed.applied(CATALOG[name])
    except ValueError as error:  # what the catalog would not take
        raise HubError(str(error)) from error
    compare(row, name, place)
    write_shipped(catalog, {**rows, entry.name: listed})
    return listed.mirrors


def compare(row: Shipped, name: str, place: str) -> None:
    """Fetch every file of a row from a place and compare it. Raises `HubError` or `DigestMismatch`."""
    entry = replace(row, mirrors=()).applied(CATALOG[name])
    with tempfile.TemporaryDirectory() as temporary:
        source = source_of(place, Request(name, None, Path(temporary), False, entry))
        source.look()
        checkpoint = source.fetch([file.role for file in entry.files])
        for file in entry.files:
            check_digest(checkpoint.folder / file.name, StoredFile(file.role, file.size, file.sha256))
