"""The catalog: every checkpoint that exists, as frozen data. One module a method; no I/O and no torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from geo_pretrain.catalog import csc, gsc, img2pc, moco, pointcontrast, ppkt, pri3d, slidr
from geo_pretrain.catalog.entry import (
    MODALITIES,
    STATUSES,
    Arch,
    AuthorsFile,
    Entry,
    File,
    Paper,
    Result,
)
from geo_pretrain.catalog.license import LICENSE_GROUPS, License
from geo_pretrain.catalog.shipped import SHIPPED
from geo_pretrain.errors import unknown
from geo_pretrain.inputs import check_path

__all__ = [
    "CATALOG",
    "LICENSE_GROUPS",
    "RENAMED",
    "STATUSES",
    "Arch",
    "AuthorsFile",
    "Entry",
    "File",
    "License",
    "Paper",
    "Result",
    "backbone_info",
    "find",
    "list_backbones",
]

METHODS = (pri3d, moco, gsc, pointcontrast, csc, ppkt, img2pc, slidr)
ENTRIES = tuple(entry for module in METHODS for entry in module.ENTRIES)
CATALOG: Mapping[str, Entry] = MappingProxyType(
    {entry.name: SHIPPED[entry.name].applied(entry) if entry.name in SHIPPED else entry for entry in ENTRIES}
)

# old name -> the name it has now; old names keep working with a FutureWarning
RENAMED: Mapping[str, str] = MappingProxyType({})


def check_renamed(renamed: Mapping[str, str], names: Collection[str]) -> None:
    """Raise unless every old name is free and every new one exists: a name never means two checkpoints."""
    for old, new in renamed.items():
        if old in names:
            raise ValueError(f"{old!r} is renamed to {new!r}, but it is the name of an entry; accepted: a free name.")
        if new not in names:
            raise unknown("backbone", new, names, f"{old!r} is renamed to it.")


check_renamed(RENAMED, CATALOG)


def list_backbones(
    pattern: str = "*",
    *,
    method: str | None = None,
    modality: str | None = None,
    license: str | None = None,
    data: str | None = None,
    status: str | None = None,
) -> list[str]:
    """List the names that match all given filters, in natural order (r18 before r50, `kitti` before `kitti_180`).

    `pattern` is fnmatch's (`"pri3d_*_r50*"`). `modality` is "2d" or "3d", `data` the pre-training data ("ScanNet",
    any case), `status` a key of `STATUSES`. `license` is an exact identifier of the weights' license ("MIT") or a
    group, "permissive" or "non-commercial". An unknown modality, status, method, data or license raises `UnknownName`.

    >>> list_backbones("pri3d_view*", license="permissive")
    ['pri3d_view_geo_r18.rooms', 'pri3d_view_r18.rooms', 'pri3d_view_r18.rooms_toy']
    """
    check_path("list_backbones", pattern, 'a pattern such as "pri3d_*"')
    entries = list(CATALOG.values())
    _check("method", method, {entry.method for entry in entries})
    _check("modality", modality, MODALITIES)
    _check("status", status, STATUSES)
    _check("license", license, {*LICENSE_GROUPS, *(entry.license.weights for entry in entries)})
    _check("data", data and data.lower(), {entry.data.lower() for entry in entries})
    chosen = [
        entry.name
        for entry in entries
        if fnmatchcase(entry.name, pattern)
        and method in (None, entry.method)
        and modality in (None, entry.modality)
        and status in (None, entry.status)
        and (data is None or data.lower() == entry.data.lower())
        and (license is None or entry.license.matches(license))
    ]
    return sorted(chosen, key=_natural)


def backbone_info(name: str) -> Entry:
    """The catalog entry of a backbone, without torch or any file. An unknown name raises `UnknownName`."""
    entry = find(name, stacklevel=3)
    if entry is None:
        raise unknown("backbone", name, CATALOG, "All names: list_backbones().")
    return entry


def find(name: str, *, stacklevel: int = 2) -> Entry | None:
    """Look up an entry by its current or former name (FutureWarning at the caller); None if unknown."""
    if name in RENAMED:
        message = f"{name!r} is called {RENAMED[name]!r} now; the old name will stop working."
        warnings.warn(message, FutureWarning, stacklevel=stacklevel)
    return CATALOG.get(RENAMED.get(name, name))


def _check(what: str, value: str | None, options: Iterable[str]) -> None:
    accepted = set(options)
    if value is not None and value not in accepted:
        raise unknown(what, value, accepted)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key: digits compare as numbers and sort before text."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
