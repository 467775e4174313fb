"""The catalog: every checkpoint that exists, as frozen data. One module a method; no I/O and no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from geo_pretrain.catalog import csc, pointcontrast, pri3d, slidr
from geo_pretrain.catalog.entry import (
    LICENCE_GROUPS,
    MODALITIES,
    STATUSES,
    Arch,
    AuthorsFile,
    Entry,
    File,
    Licence,
    Paper,
    Result,
)
from geo_pretrain.errors import unknown

__all__ = [
    "CATALOG",
    "LICENCE_GROUPS",
    "STATUSES",
    "Arch",
    "AuthorsFile",
    "Entry",
    "File",
    "Licence",
    "Paper",
    "Result",
    "backbone_info",
    "list_backbones",
]

METHODS = (pri3d, pointcontrast, csc, slidr)
CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for module in METHODS for entry in module.ENTRIES})


def list_backbones(
    pattern: str = "*",
    *,
    method: str | None = None,
    modality: str | None = None,
    license: str | None = None,
    data: str | None = None,
    status: str | None = None,
) -> list[str]:
    """Names of the catalog that match everything given, in natural order (r18 before r50, `kitti` before `kitti_180`).

    `pattern` is fnmatch's (`"pri3d_*_r50*"`). `modality` is "2d" or "3d", `data` the pre-training data ("ScanNet",
    any case), `status` a key of `STATUSES`. `license` is an exact identifier of the weights' licence ("MIT") or a
    group, "permissive" or "non-commercial". An unknown modality, status, method, data or licence raises `UnknownName`.

    >>> list_backbones("pri3d_view*", license="permissive")
    ['pri3d_view_geo_r18.rooms', 'pri3d_view_r18.rooms', 'pri3d_view_r18.rooms_toy']
    """
    entries = list(CATALOG.values())
    _check("method", method, {entry.method for entry in entries})
    _check("modality", modality, MODALITIES)
    _check("status", status, STATUSES)
    _check("license", license, {*LICENCE_GROUPS, *(entry.licence.weights for entry in entries)})
    _check("data", data and data.lower(), {entry.data.lower() for entry in entries})
    chosen = [
        entry.name
        for entry in entries
        if fnmatchcase(entry.name, pattern)
        and method in (None, entry.method)
        and modality in (None, entry.modality)
        and status in (None, entry.status)
        and (data is None or data.lower() == entry.data.lower())
        and (license is None or entry.licence.matches(license))
    ]
    return sorted(chosen, key=_natural)


def backbone_info(name: str) -> Entry:
    """The catalog entry of a backbone, without torch or any file. An unknown name raises `UnknownName`."""
    if name not in CATALOG:
        raise unknown("backbone", name, CATALOG, "All names: list_backbones().")
    return CATALOG[name]


def _check(what: str, value: str | None, options: Iterable[str]) -> None:
    accepted = set(options)
    if value is not None and value not in accepted:
        raise unknown(what, value, accepted)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Digits compare as numbers and sort before text."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
