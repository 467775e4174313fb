"""From a name, folder, URL or Hugging Face repository to a local checkpoint folder whose needed files are verified.

Disk and network are touched here and nowhere else on the loading side. No torch: the hub moves bytes and compares
digests; whoever reads the weights compares them again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from geo_pretrain import __version__, checkpoint
from geo_pretrain.catalog import CATALOG, Entry
from geo_pretrain.checkpoint import CONFIG, Checkpoint
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError, unknown

HUB_VARIABLE, CACHE_VARIABLE = "GEO_PRETRAIN_HUB", "GEO_PRETRAIN_CACHE"
HF_PREFIX = "hf-hub:"
TIMEOUT = 30.0  # seconds without a byte
CONFIG_LIMIT = 10 << 20  # bytes; a config.json is a few kB

T = TypeVar("T")
Roles = Sequence[str] | Callable[[Checkpoint], Sequence[str]]  # fixed, or asked of the config.json that was found


class NotThere(HubError):
    """A source that works but does not have this checkpoint."""


@dataclass(frozen=True)
class Request:
    """What is wanted from a source."""

    name: str
    roles: Roles
    revision: str | None
    cache_dir: Path | None  # None: the default cache, for Hugging Face its own
    offline: bool
    pins: Mapping[str, str] = field(default_factory=dict)  # digests the catalog promises, by file name

    def roles_of(self, found: Checkpoint) -> Sequence[str]:
        """The roles wanted of this checkpoint."""
        return self.roles(found) if callable(self.roles) else self.roles


def without_decoder(found: Checkpoint) -> Sequence[str]:
    """The roles that `load_backbone` needs when no decoder is asked for."""
    return found.network_roles(decoder=False)


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    hub: str | Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    roles: Roles = without_decoder,
) -> Path:
    """The local folder of a checkpoint that holds config.json and the files with `roles`, fetching them if needed.

    `roles` are names or a function that gives them for the `Checkpoint` found, since networks come in other files.

    `name_or_path` is a checkpoint folder, "hf-hub:owner/repo[@revision]", the URL of a checkpoint folder, or a name.
    A name is looked up in `hub` or else in the environment variable GEO_PRETRAIN_HUB (comma-separated): folders,
    http(s) URLs holding `<name>/config.json`, or "hf:organisation", tried in order. `revision`: Hugging Face only.
    `local_files_only` (or HF_HUB_OFFLINE=1) forbids the network. Raises `HubError` listing every source with its
    reason, `UnknownName` for a name nobody has, `CheckpointError` for a folder that is not a checkpoint.
    """
    text = os.fspath(name_or_path)
    request = Request(
        name=text,
        roles=roles,
        revision=revision,
        cache_dir=Path(cache_dir).expanduser() if cache_dir is not None else None,
        offline=local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )
    if text.startswith(HF_PREFIX):
        return _first([text], request)
    if text.startswith(("http://", "https://")):
        base, _, name = text.rstrip("/").rpartition("/")
        return _first([base], _named(request, name))
    folder = Path(text).expanduser()
    if _means_folder(name_or_path, folder):
        if revision is not None:
            raise HubError(f"{folder} is a folder; revision={revision!r} is understood by Hugging Face only.")
        _check_files(checkpoint.read_checkpoint(folder), request)
        return folder
    return _by_name(request, hub)


def default_cache() -> Path:
    """GEO_PRETRAIN_CACHE, or ~/.cache/geo_pretrain."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/geo_pretrain").expanduser()


def _means_folder(given: str | os.PathLike[str], folder: Path) -> bool:
    """A checkpoint folder wins over a name; a bare name is a folder only if it is one or the catalog lacks it."""
    if (folder / CONFIG).is_file() or not isinstance(given, str):
        return True
    looks_like_path = os.sep in given or given.startswith((".", "~"))
    return looks_like_path or (folder.is_dir() and given not in CATALOG)


def _by_name(request: Request, hub: str | Sequence[str] | None) -> Path:
    if hub is None:
        hub = os.environ.get(HUB_VARIABLE, "")
    sources = [part.strip() for part in hub.split(",")] if isinstance(hub, str) else [str(part) for part in hub]
    sources = [source for source in sources if source]
    entry = CATALOG.get(request.name)
    if entry is None and not sources:
        hint = f"All names: list_backbones(); other checkpoints: give their folder, or hub= or {HUB_VARIABLE}."
        raise unknown("backbone", request.name, CATALOG, hint)
    if entry is not None and entry.files:
        request = _named(request, request.name, {file.name: file.sha256 for file in entry.files})
        sources += [base for base in _catalog_bases(entry) if base not in sources]
    return _first(sources, request)


def _catalog_bases(entry: Entry) -> list[str]:
    """Hubs that hold `<base>/<name>/<file>` for the files of an entry, in order, each once."""
    return list(dict.fromkeys(source.rsplit("/", 2)[0] for file in entry.files for source in file.sources))


def _named(request: Request, name: str, pins: Mapping[str, str] | None = None) -> Request:
    return Request(name, request.roles, request.revision, request.cache_dir, request.offline, pins or {})


def _first(sources: Iterable[str], request: Request) -> Path:
    """The first source that delivers."""
    failures: dict[str, Exception] = {}
    for source in sources:
        try:
            return _from_source(source, request)
        except (HubError, CheckpointError, OSError) as error:
            failures[source] = error
    raise _failed(request.name, failures) from next(reversed(failures.values()), None)


def _failed(name: str, failures: Mapping[str, Exception]) -> Exception:
    entry = CATALOG.get(name)
    if entry is None and failures and all(isinstance(error, NotThere) for error in failures.values()):
        if name.startswith(HF_PREFIX):
            return HubError(f"{name!r}: {next(iter(failures.values()))}")
        return unknown("backbone", name, CATALOG, f"Not on these hubs either: {', '.join(failures)}.")
    lines = [f"- {source}: {error}" for source, error in failures.items()]
    lines = lines or [f"- no hub is given (hub=..., or the environment variable {HUB_VARIABLE})"]
    if entry is not None:
        lines.append(f"What you can do: {entry.how_to_get()}.")
    return HubError("\n".join([f"{name!r} could not be loaded:", *lines]))


def _from_source(source: str, request: Request) -> Path:
    if source.startswith(HF_PREFIX):
        return _from_hugging_face(source.removeprefix(HF_PREFIX), request)
    if not checkpoint.CHECKPOINT_NAME.fullmatch(request.name):
        raise NotThere(f"{request.name!r} is no checkpoint name: letters, digits, '.', '_' and '-' are accepted")
    if source.startswith("hf:"):
        return _from_hugging_face(f"{source.removeprefix('hf:')}/{request.name}", request)
    if request.revision is not None:
        raise HubError(f"revision={request.revision!r} is understood by Hugging Face only")
    if source.startswith(("http://", "https://")):
        return _from_url(source.rstrip("/"), request)
    folder = Path(source).expanduser() / request.name
    if not folder.is_dir():
        raise NotThere(f"no folder {folder}")
    _check_files(checkpoint.read_checkpoint(folder), request)
    return folder


def _check_files(found: Checkpoint, request: Request) -> None:
    for role in request.roles_of(found):
        name = found.file_of(role)
        if not (found.folder / name).is_file():
            raise CheckpointError(f"{found.folder / name}: is missing; {CONFIG} lists it as its {role} file.")


def _from_hugging_face(spec: str, request: Request) -> Path:
    """huggingface_hub does the transfer and keeps its own cache; only the needed files are fetched."""
    import huggingface_hub as client
    from huggingface_hub import errors

    repo, _, at_revision = spec.partition("@")
    revision = at_revision or request.revision

    def fetch(file: str, at: str | None) -> Path:
        try:
            return Path(
                client.hf_hub_download(
                    repo, file, revision=at, cache_dir=request.cache_dir, local_files_only=request.offline
                )
            )
        except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise NotThere(f"Hugging Face has no file {file!r} in {repo!r}") from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
            raise HubError(f"Hugging Face, {repo!r}: {_short(error)}") from error

    folder = fetch(CONFIG, revision).parent
    found = checkpoint.read_checkpoint(folder)
    # the snapshot's own commit, so that a push in between cannot mix two versions
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    for role in request.roles_of(found):
        fetch(found.file_of(role), commit)
    return folder


def _from_url(base: str, request: Request) -> Path:
    """Into the cache: weights first, config.json last, each by an atomic replace after its digest was compared."""
    cache = (request.cache_dir or default_cache()) / "hub"
    folder = cache / f"{urlsplit(base).hostname}-{hashlib.sha256(base.encode()).hexdigest()[:12]}" / request.name
    if _is_complete(folder, request):
        return folder
    if request.offline:
        raise HubError(f"not in the cache {folder}, and downloads are off (local_files_only or HF_HUB_OFFLINE)")
    folder.mkdir(parents=True, exist_ok=True)
    url = f"{base}/{request.name}"
    part = folder / f".{os.getpid()}.part"
    try:
        found = _fetch_config(f"{url}/{CONFIG}", folder, part)
        for file, pin in request.pins.items():
            if file in found.files and found.files[file].sha256 != pin:
                raise DigestMismatch(f"{url}: promises sha256 {found.files[file].sha256} for {file}, expected {pin}.")
        text = part.read_bytes()
        for role in request.roles_of(found):
            _fetch_file(url, found, found.file_of(role), part)
        part.write_bytes(text)
        part.replace(folder / CONFIG)
    finally:
        part.unlink(missing_ok=True)
    return folder


def _is_complete(folder: Path, request: Request) -> bool:
    """Whether the cached copy can be used as it is; a broken one is fetched again."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        found = checkpoint.read_checkpoint(folder)
        for role in request.roles_of(found):
            checkpoint.verify_file(found, found.file_of(role))
    except CheckpointError:
        return False
    return True


def _fetch_config(url: str, folder: Path, part: Path) -> Checkpoint:
    def once() -> Checkpoint:
        _download(url, part, limit=CONFIG_LIMIT)
        return checkpoint.parse_config(part.read_bytes(), folder)

    return _with_one_retry(once, url)


def _fetch_file(url: str, found: Checkpoint, file: str, part: Path) -> None:
    target, stored = found.folder / file, found.files[file]
    if target.is_file() and checkpoint.sha256(target) == stored.sha256:
        return

    def once() -> None:
        _download(f"{url}/{file}", part, limit=stored.size)
        checkpoint.check_digest(part, stored)

    _with_one_retry(once, f"{url}/{file}")
    part.replace(target)


def _with_one_retry(fetch: Callable[[], T], url: str) -> T:
    """A transfer may break once; what is wrong twice is wrong at its source."""
    try:
        return fetch()
    except CheckpointError:
        try:
            return fetch()
        except CheckpointError as error:
            raise type(error)(f"{url}, fetched twice: {error}") from error


def _download(url: str, target: Path, *, limit: int) -> None:
    """Write at most `limit` + 1 bytes of `url` to `target`: one byte too many is enough to fail the size check."""
    query = urllib.request.Request(url, headers={"User-Agent": f"geo_pretrain/{__version__}"})
    try:
        with urllib.request.urlopen(query, timeout=TIMEOUT) as answer, target.open("wb") as stream:
            left = limit + 1
            while left > 0 and (block := answer.read(min(1 << 20, left))):
                stream.write(block)
                left -= len(block)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise NotThere(f"{url}: HTTP {error.code}, no such file") from error
        raise HubError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise HubError(f"{url}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The first line of an error, and of the one under it: transfer libraries hide the reason there."""
    chain = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    return "; because: ".join((str(one).strip().splitlines() or [type(one).__name__])[0] for one in chain)


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Remove everything downloaded from http hubs; returns the folder that was removed."""
    cache = (Path(cache_dir).expanduser() if cache_dir is not None else default_cache()) / "hub"
    shutil.rmtree(cache, ignore_errors=True)
    return cache
