"""The cache of checkpoints: list it, remove from it, lock a folder of it.

    <cache>/hub/<host-digest>/<name>/   checkpoint folders from http(s) hubs
    <cache>/authors/<name>/             authors' files, converted; authors/digests.json stays when they go
    <cache>/bundles/<name>/             checkpoint folders that came in a bundle

Files from Hugging Face lie in Hugging Face's own cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.errors import CheckpointError, HubError, UnknownName, unknown
from geo_pretrain.files import expanded, is_folder, locked
from geo_pretrain.hub.packages import package_folders
from geo_pretrain.hub.transfer import CACHE_VARIABLE, disk_error

HUB_VARIABLE = "GEO_PRETRAIN_HUB"
KINDS = {"hub": "hub/*/*", "authors": "authors/*", "bundle": "bundles/*"}  # where the folders of each lie
LEFT_BEHIND = (".part", ".writing", ".old", ".work")  # suffixes of hidden files that killed processes leave


@dataclass(frozen=True)
class Cached:
    """One checkpoint folder of the cache."""

    name: str
    kind: str  # a key of `KINDS`
    folder: Path
    size: int  # bytes
    modified: float  # seconds since 1970, of its newest file
    broken: str = ""  # why it cannot be used as it is; it is fetched again when asked for


def default_cache() -> Path:
    """GEO_PRETRAIN_CACHE, or ~/.cache/geo_pretrain."""
    return expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/geo_pretrain", f"Set {CACHE_VARIABLE} to a folder.")


def cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder that a caller names, or the default one."""
    return expanded(cache_dir) if cache_dir is not None else default_cache()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process and thread at a time work on a folder of the cache, which need not exist; others wait.

    On entry the .part files of a process that died are removed, at the end the folder if it is empty. Raises
    `HubError` where no lock can be written: a read-only cache.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, stacklevel=4))
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            _drop_parts(folder)
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()


def _drop_parts(folder: Path) -> None:
    for part in folder.glob("*.part"):  # hidden ones too
        try:
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, part) from error


def cached(cache_dir: str | os.PathLike[str] | None = None) -> list[Cached]:
    """List the checkpoint folders in the cache, by kind and name; several hubs may have given one name."""
    root = cache_root(cache_dir)
    entries = [_look(kind, folder) for kind in KINDS for folder in _folders(root, kind)]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.folder))


def names_here(cache_dir: str | os.PathLike[str] | None = None) -> set[str]:
    """The names that load without a network, with all files: see `folders_here`."""
    return set(folders_here(cache_dir))


def folders_here(cache_dir: str | os.PathLike[str] | None = None, *, hubs: bool = True) -> dict[str, Path]:
    """The names that load without a network, and where they lie: of several folders the one that `hub.open` takes.

    They lie in folders that GEO_PRETRAIN_HUB names (not with `hubs` False), in installed packages with weights and in
    our cache. Files are looked for and their sizes compared; they are not read. Hugging Face's own cache is not looked
    at.
    """
    root = cache_root(cache_dir)
    own = (folder for place in (_hub_folders() if hubs else ()) for folder in sorted(place.glob("*")))
    packages = (path.parent for above in package_folders().values() for path in above.glob(f"*/{CONFIG}"))
    downloads = (folder for kind in ("hub", "authors") for folder in _folders(root, kind))
    found: dict[str, Path] = {}
    for folder in (*own, *_folders(root, "bundle"), *packages, *downloads):
        with suppress(CheckpointError, OSError):
            checkpoint = read_checkpoint(folder)
            files = map(checkpoint.file_of, checkpoint.network_roles())
            if all((folder / file).stat().st_size == checkpoint.files[file].size for file in files):
                found.setdefault(checkpoint.name, folder)
    return found


def _hub_folders() -> list[Path]:
    """The folders among the places that GEO_PRETRAIN_HUB names."""
    found = []
    for place in os.environ.get(HUB_VARIABLE, "").split(","):
        with suppress(HubError):
            if place.strip() and is_folder(expanded(place.strip())):
                found.append(expanded(place.strip()))
    return found


def remove(names: str | Iterable[str] | None, cache_dir: str | os.PathLike[str] | None = None) -> list[Cached]:
    """Remove the checkpoints with these names, of every kind; None: all, and what killed processes left behind.

    The digests recorded for authors' files stay: they are what a later download is compared with. Returns what was
    removed. Raises `UnknownName` for a name that is not there, before anything is removed.
    """
    root = cache_root(cache_dir)
    present = cached(root)
    wanted = {entry.name for entry in present} if names is None else {names} if isinstance(names, str) else set(names)
    known = {entry.name for entry in present}
    for name in sorted(wanted - known):
        if not known:
            raise UnknownName(f"Unknown cached checkpoint {name!r}. The cache {root} holds none.")
        raise unknown("cached checkpoint", name, known, f"The cache is {root}; all names: `geo-pretrain cache ls`.")
    chosen = [entry for entry in present if entry.name in wanted]
    for entry in chosen:
        if not entry.folder.parent.resolve().is_relative_to(root.resolve()):
            raise HubError(f"{entry.folder} lies outside the cache {root} (a link); remove it yourself.")
    try:
        for entry in chosen:
            with exclusive(entry.folder):
                _remove_folder(entry.folder)
        if names is None:
            _sweep(root)
    except OSError as error:
        raise HubError(f"{error.filename or root}: cannot be removed ({error.strerror or error}).") from error
    for entry in chosen:
        _prune(entry.folder.parent, root)
    return chosen


def _folders(root: Path, kind: str) -> Iterator[Path]:
    for path in root.glob(KINDS[kind]):
        if path.is_dir() and not path.name.startswith(".") and not path.parent.name.startswith("."):
            yield path


def _look(kind: str, folder: Path) -> Cached:
    size, modified = 0, 0.0
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):  # another process may remove it meanwhile
            facts = path.stat()
            modified = max(modified, facts.st_mtime)
            size += facts.st_size if path.is_file() else 0
    broken = ""
    try:
        read_checkpoint(folder)
    except (CheckpointError, OSError) as error:
        broken = str(error)
    return Cached(folder.name, kind, folder, size, modified, broken)


def _remove_folder(folder: Path) -> None:
    """Remove a folder and what killed processes left beside it. The caller has the lock."""
    if folder.is_symlink():
        folder.unlink()  # what it points to is not ours
    elif folder.is_dir():
        (folder / CONFIG).unlink(missing_ok=True)  # first: whoever is killed here leaves no promise behind
        shutil.rmtree(folder)
    for end in LEFT_BEHIND:
        beside = folder.with_name(f".{folder.name}{end}")
        if beside.is_dir() and not beside.is_symlink():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Remove what killed processes left of folders that were never completed."""
    for pattern in KINDS.values():
        for path in root.glob(pattern):
            if path.name.startswith(".") and path.name.endswith((".lock", *LEFT_BEHIND)):
                folder = path.with_name(path.name.removeprefix(".").rpartition(".")[0])
                if not folder.exists() and path.parent.resolve().is_relative_to(root.resolve()):
                    with exclusive(folder):
                        _remove_folder(folder)
        for path in root.glob(pattern.rpartition("/")[0]):
            _prune(path, root)


def _prune(folder: Path, root: Path) -> None:
    """Remove `folder` and those above it, up to the cache, as far as they are empty."""
    with suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent
