"""Resolve a name, folder, URL or Hugging Face repository to a local checkpoint folder, in two steps.

    opened = hub.open("pri3d_view_geo_r50")              # its description: config.json, verified
    checkpoint = opened.fetch("encoder", "golden")       # fetches and verifies these files only

Disk and network are touched in this room and nowhere else on the loading side. No torch, but where an authors' file is
converted: the hub moves bytes and compares digests; whoever reads the weights compares them again.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlunsplit

from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.catalog import CATALOG, Entry, find
from geo_pretrain.checkpoint import Checkpoint, means_folder, read_checkpoint
from geo_pretrain.errors import CheckpointError, HubError, InputError, NotThere, WeightsMismatch, unknown
from geo_pretrain.files import expanded, is_folder
from geo_pretrain.hub.cache import HUB_VARIABLE
from geo_pretrain.hub.links import split_address
from geo_pretrain.hub.names import check_is_entry, check_pins
from geo_pretrain.hub.packages import PACKAGE_PREFIX, packages_with
from geo_pretrain.hub.sources import (
    AUTHORS,
    HF_PREFIX,
    OFFLINE_VARIABLE,
    WEB_PREFIXES,
    Description,
    Folder,
    Request,
    Source,
    source_of,
)
from geo_pretrain.inputs import check_path

WITHOUT = "Without a network: "  # begins the line of an error that says what can be done there
FAILURES = (HubError, CheckpointError, WeightsMismatch, OSError)  # after which the next source is tried
HUBS = "folders, http(s) addresses, 'hf:organization' or 'package:name', as a list or with commas between them"
NAME_OR_FOLDER = 'a name such as "pri3d_view_geo_r50", or a folder'  # what is accepted, for messages


class Where(TypedDict, total=False):
    """The keyword arguments of `open`: where to look for a checkpoint."""

    hub: str | Sequence[str] | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


def open(
    name_or_path: str | os.PathLike[str],
    *,
    hub: str | Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Opened:
    """Find a checkpoint and read its description; `Opened.fetch` then brings the files.

    `name_or_path` is a checkpoint folder, "hf-hub:owner/repo[@revision]", the URL of a checkpoint folder, or a name.
    A name is looked up, in this order, in `hub` or else in the environment variable GEO_PRETRAIN_HUB (comma-separated:
    folders, http(s) URLs holding `<name>/config.json`, "hf:organization" or "package:name"), among installed bundles,
    in installed packages with weights (`hub.packages`), where the catalog says that this project keeps it, and with its
    authors, whose file is converted. The next source is tried when one fails. `revision`: Hugging Face only.
    `local_files_only` (or HF_HUB_OFFLINE=1) forbids the network.

    Raises `HubError` listing every source with its reason, `UnknownName` for a name nobody has, `CheckpointError` for
    a folder that is not a checkpoint.
    """
    check_path("Loading a checkpoint", name_or_path, NAME_OR_FOLDER)
    text = os.fspath(name_or_path)
    if not text:
        raise unknown("backbone", text, CATALOG, "All names: list_backbones().")
    request = _request(text, cache_dir, local_files_only, revision)
    if (search := _search_at_address(request)) is not None:
        return search.open()
    folder = expanded(text)
    if means_folder(name_or_path):
        if revision is not None:
            raise HubError(f"{folder} is a folder; revision={revision!r} is understood by Hugging Face only.")
        if is_timm(text) and not folder.exists():
            raise CheckpointError(
                f"{text!r} is an encoder of timm and no checkpoint. load_backbone, `geo-pretrain export` and "
                "`geo-pretrain eval awareness` take it, and fetch timm's weights. As a start of training: `finetune "
                f"-b imagenet --set network.encoder={text}`, `train --set model.encoder={text} --set "
                "model.init=imagenet`."
            )
        source = Folder(folder)
        _check_bare_name(name_or_path, folder)
        return Opened(**vars(source.look()), _source=source)
    return _search_for_name(request, hub).open()


def _request(
    name: str, cache_dir: str | os.PathLike[str] | None, local_files_only: bool, revision: str | None = None
) -> Request:
    return Request(
        name=name,
        revision=revision,
        cache_dir=expanded(cache_dir) if cache_dir is not None else None,
        offline=local_files_only or os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE"),
    )


def _search_at_address(request: Request) -> _Search | None:
    """The search at the one place that an address names, of the Hub or a web server; None for a name or folder."""
    if request.name.startswith(HF_PREFIX):
        return _Search(request, (request.name,))
    if request.name.startswith(WEB_PREFIXES):
        address = split_address(request.name)
        above, _, name = address.path.rstrip("/").rpartition("/")
        return _Search(replace(request, name=name), (urlunsplit(address._replace(path=above, fragment="")),))
    return None


def _check_bare_name(given: str | os.PathLike[str], folder: Path) -> None:
    """Refuse a folder found under a bare name of the catalog, "NAME" and not "./NAME", that is another checkpoint."""
    entry = find(given) if isinstance(given, str) else None
    if entry is None:
        return
    checkpoint = read_checkpoint(folder)
    path = f"'{os.curdir}{os.sep}{folder}'"
    check_is_entry(entry, checkpoint, str(folder.resolve()), f"load this folder as {path}")
    check_pins(entry, checkpoint.files, f"{folder.resolve()} (it loads as {path})")


@dataclass(frozen=True)
class Opened(Description):
    """The description of a checkpoint; `fetch` brings its files."""

    _source: Source = field(kw_only=True, repr=False)
    _search: _Search | None = field(kw_only=True, default=None, repr=False)  # the sources after this one

    def network_roles(self, *, decoder: bool = True) -> tuple[str, ...]:
        """The roles of the files with the network's weights; decoder=False: only the first, which is enough for it."""
        return self.arch.network_roles(decoder=decoder)

    def fetch(self, *roles: str, optional: Sequence[str] = (), compare: bool = False) -> Checkpoint:
        """Bring the files with these roles, and no others, into a local folder; return its `Checkpoint`.

        `optional` roles are left out where the source has no such file. `compare`: compare the sha256 of these files,
        and of the others that are there. When the source fails, the ones after it are
        tried. Raises as `open` does.
        """
        opened = self
        while True:
            wanted = [*roles, *(role for role in optional if role in opened.roles and role not in roles)]
            try:
                checkpoint = opened._source.fetch(wanted)
                if compare:
                    opened._source.compare(checkpoint)
                return checkpoint
            except FAILURES as error:
                if opened._search is None:
                    raise
                opened = opened._search.failed(error).open()


@dataclass(frozen=True)
class Door:
    """One place of a checkpoint, and whether it can be had there now."""

    name: str
    place: str  # a source as `open` takes it, or "the authors' own file"
    is_open: bool
    size: int | None = None  # bytes of the network's files, where the place says so
    reason: str = ""  # why it is closed


def doors(
    name: str,
    *,
    hub: str | Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Door]:
    """Ask every place of a name whether its files can be had, and fetch none of them; see `open` for the arguments.

    An address has one door, a folder is one. A name that nobody offers has none. Raises `UnknownName`, and
    `CheckpointError` for a folder that is no checkpoint.
    """
    request = _request(name, cache_dir, local_files_only)
    search = _search_at_address(request)
    if search is None and means_folder(name):
        open(name)
        return [Door(name, name, is_open=True)]
    search = search or _search_for_name(request, hub)
    found = []
    for spec in search.sources:
        try:
            found.append(Door(name, spec, True, source_of(spec, search.request).reach()))
        except FAILURES as error:
            found.append(Door(name, spec, False, reason=str(error)))
    return found


@dataclass(frozen=True)
class _Search:
    """The remaining sources of a request, and the failures of the others."""

    request: Request
    sources: tuple[str, ...]
    failures: Mapping[str, Exception] = field(default_factory=dict)
    current: str = ""  # the source that was opened last

    def open(self) -> Opened:
        """Open the first source that has the checkpoint."""
        failures = dict(self.failures)
        for number, spec in enumerate(self.sources):
            try:
                source = source_of(spec, self.request)
                description = source.look()
                self._check(description, spec)
            except FAILURES as error:
                failures[spec] = error
            else:
                rest = replace(self, sources=self.sources[number + 1 :], failures=failures, current=spec)
                return Opened(**vars(description), _source=source, _search=rest)
        raise _failed(self.request.name, failures) from next(reversed(failures.values()), None)

    def _check(self, description: Description, where: str) -> None:
        """Refuse another checkpoint under a name of the catalog and say so: the next source may have the right one."""
        entry = self.request.entry
        if entry is None:
            return
        try:
            check_is_entry(entry, description, where, "load its folder by its path")
        except CheckpointError as error:
            warnings.warn(f"{error} It is not used.", stacklevel=5)
            raise

    def failed(self, error: Exception) -> _Search:
        """Record that the source opened last has failed, and return the search among those after it."""
        return replace(self, failures={**self.failures, self.current: error})


def _search_for_name(request: Request, hub: str | Sequence[str] | None) -> _Search:
    """The sources of a name, in the order in which they are tried."""
    if hub is None:
        hub = os.environ.get(HUB_VARIABLE, "")
    hub = os.fspath(hub) if isinstance(hub, os.PathLike) else hub
    if not isinstance(hub, str | Sequence) or isinstance(hub, bytes):
        raise InputError(f"hub takes {HUBS}; got {hub!r}.")
    sources = [part.strip() for part in hub.split(",")] if isinstance(hub, str) else [str(part) for part in hub]
    sources = [source for source in sources if source]
    entry = find(request.name)
    if entry is not None:
        request = replace(request, name=entry.name, entry=entry)
    with suppress(HubError):  # no home, so no cache; a source that needs one says so
        bundles = request.cache / "bundles"
        sources += [str(bundles)] if is_folder(bundles / request.name) else []
    sources += [f"{PACKAGE_PREFIX}{package}" for package in packages_with(request.name)]
    if entry is None and not sources:
        hint = f"All names: list_backbones(); other checkpoints: give their folder, or hub= or {HUB_VARIABLE}."
        raise unknown("backbone", request.name, CATALOG, hint)
    if entry is not None:
        sources += [base for base in _catalog_bases(entry) if base not in sources]
        sources += [AUTHORS] if entry.authors_files else []
    return _Search(request, tuple(sources))


def without_network(error: HubError, line: str) -> HubError:
    """The error with another way out where there is no network: `line`, which fits what was called."""
    return type(error)(re.sub(rf"(?m)^{WITHOUT}.*$", lambda _: WITHOUT + line, str(error)))


def _catalog_bases(entry: Entry) -> list[str]:
    """The places of an entry's files, in order, each once: repositories at a commit, and addresses above `<name>/`."""
    sources = [source for file in entry.files for source in file.sources]
    bases = [
        source if source.startswith((HF_PREFIX, PACKAGE_PREFIX)) else source.rsplit("/", 2)[0] for source in sources
    ]
    return list(dict.fromkeys(bases))


def _failed(name: str, failures: Mapping[str, Exception]) -> Exception:
    """The error when every source failed, with the reason of each."""
    entry = find(name)
    if entry is None and failures and all(isinstance(error, NotThere) for error in failures.values()):
        if name.startswith(HF_PREFIX):
            return HubError(f"{name!r}: {next(iter(failures.values()))}")
        return unknown("backbone", name, CATALOG, f"Not on these hubs either: {', '.join(failures)}.")
    lines = [f"- {source}: {error}" for source, error in failures.items()]
    lines = lines or [f"- no hub is given (hub=..., or the environment variable {HUB_VARIABLE})"]
    if entry is not None:
        lines.append(f'{WITHOUT}load_backbone("{name}", pretrained=False) builds the same network with random weights.')
        lines.append(f"To get its weights: {entry.how_to_get()}.")
    return HubError("\n".join([f"{name!r} could not be loaded:", *lines]))
