"""From a name, folder, URL or Hugging Face repository to a local checkpoint folder whose needed files are verified.

Disk and network are touched in this room and nowhere else on the loading side. No torch, but where an authors' file is
converted: the hub moves bytes and compares digests; whoever reads the weights compares them again.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from geo_pretrain import checkpoint
from geo_pretrain.catalog import CATALOG, Entry, find
from geo_pretrain.checkpoint import CONFIG, Checkpoint
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError, WeightsMismatch, unknown
from geo_pretrain.hub import authors
from geo_pretrain.hub.cache import default_cache, exclusive
from geo_pretrain.hub.transfer import NotThere, download

HUB_VARIABLE, OFFLINE_VARIABLE = "GEO_PRETRAIN_HUB", "HF_HUB_OFFLINE"
HF_PREFIX = "hf-hub:"
CONFIG_LIMIT = 10 << 20  # bytes; a config.json is a few kB
AUTHORS = "the authors' own file"
DOWNLOADS_OFF = f"downloads are off (local_files_only or {OFFLINE_VARIABLE})"

T = TypeVar("T")
Roles = Sequence[str] | Callable[[Checkpoint], Sequence[str]]  # fixed, or asked of the config.json that was found


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
    A name is looked up, in this order, in `hub` or else in the environment variable GEO_PRETRAIN_HUB (comma-separated:
    folders, http(s) URLs holding `<name>/config.json`, or "hf:organization"), among installed bundles, where the
    catalog says that this project keeps it, and with its authors, whose file is converted. The next source is tried
    when one fails. `revision`: Hugging Face only. `local_files_only` (or HF_HUB_OFFLINE=1) forbids the network.

    Raises `HubError` listing every source with its reason, `UnknownName` for a name nobody has, `CheckpointError` for
    a folder that is not a checkpoint.
    """
    text = os.fspath(name_or_path)
    if not text:
        raise unknown("backbone", text, CATALOG, "All names: list_backbones().")
    request = Request(
        name=text,
        roles=roles,
        revision=revision,
        cache_dir=Path(cache_dir).expanduser() if cache_dir is not None else None,
        offline=local_files_only or os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE"),
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


def _means_folder(given: str | os.PathLike[str], folder: Path) -> bool:
    """A checkpoint folder wins over a name; a bare name means what lies here under it if the catalog lacks it."""
    if (folder / CONFIG).is_file() or not isinstance(given, str):
        return True
    looks_like_path = os.sep in given or given.startswith((".", "~"))
    return looks_like_path or (folder.exists() and given not in CATALOG)


def _by_name(request: Request, hub: str | Sequence[str] | None) -> Path:
    if hub is None:
        hub = os.environ.get(HUB_VARIABLE, "")
    hub = os.fspath(hub) if isinstance(hub, os.PathLike) else hub
    sources = [part.strip() for part in hub.split(",")] if isinstance(hub, str) else [str(part) for part in hub]
    sources = [source for source in sources if source]
    entry = find(request.name)
    bundles = (request.cache_dir or default_cache()) / "bundles"
    if entry is not None:
        request = _named(request, entry.name, {file.name: file.sha256 for file in entry.files})
    if (bundles / request.name).is_dir():
        sources.append(str(bundles))
    if entry is None and not sources:
        hint = f"All names: list_backbones(); other checkpoints: give their folder, or hub= or {HUB_VARIABLE}."
        raise unknown("backbone", request.name, CATALOG, hint)
    if entry is not None:
        sources += [base for base in _catalog_bases(entry) if base not in sources]
        sources += [AUTHORS] if entry.authors_files else []
    return _first(sources, request)


def _catalog_bases(entry: Entry) -> list[str]:
    """Where the files of an entry lie, in order, each once: repositories at a commit, and hubs that hold
    `<base>/<name>/<file>`.
    """
    sources = [source for file in entry.files for source in file.sources]
    bases = [source if source.startswith(HF_PREFIX) else source.rsplit("/", 2)[0] for source in sources]
    return list(dict.fromkeys(bases))


def _named(request: Request, name: str, pins: Mapping[str, str] | None = None) -> Request:
    return replace(request, name=name, pins=pins or {})


def _first(sources: Iterable[str], request: Request) -> Path:
    """The first source that delivers."""
    failures: dict[str, Exception] = {}
    for source in sources:
        try:
            return _from_source(source, request)
        except (HubError, CheckpointError, WeightsMismatch, OSError) as error:
            failures[source] = error
    raise _failed(request.name, failures) from next(reversed(failures.values()), None)


def _failed(name: str, failures: Mapping[str, Exception]) -> Exception:
    entry = find(name)
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
    if source == AUTHORS:
        return _from_authors(request)
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


def _from_authors(request: Request) -> Path:
    entry = find(request.name)
    if entry is None:
        raise NotThere(f"the catalog has no {request.name!r}")
    if request.revision is not None:
        raise HubError(f"revision={request.revision!r} is understood by Hugging Face only")
    promised = Checkpoint(
        folder=Path(request.name),
        name=entry.name,
        arch=entry.arch,
        contract=entry.contract,
        files={},
        license=entry.license,
        provenance={},
        finished=True,
    )
    cache = request.cache_dir or default_cache()
    with _bar(request.name) as progress:
        return authors.fetch(entry, request.roles_of(promised), cache, offline=request.offline, progress=progress)


def _from_hugging_face(spec: str, request: Request) -> Path:
    """huggingface_hub does the transfer and keeps its own cache; only the needed files are fetched."""
    import huggingface_hub as client
    from huggingface_hub import errors

    repo, _, at_revision = spec.partition("@")
    if not re.fullmatch(r"[^/]+/[^/]+", repo):
        raise HubError(f"{repo!r} is no repository; OWNER/REPO or OWNER/REPO@REVISION is accepted")
    if at_revision and request.revision not in (None, at_revision):
        raise HubError(f"{spec} states its revision; revision={request.revision!r} is another: drop one")
    revision = at_revision or request.revision

    def fetch(file: str, at: str | None, *, again: bool = False) -> Path:
        try:
            return Path(
                client.hf_hub_download(
                    repo,
                    file,
                    revision=at,
                    cache_dir=request.cache_dir,
                    local_files_only=request.offline,
                    force_download=again,
                )
            )
        except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise NotThere(f"Hugging Face has no file {file!r} in {repo!r}") from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
            if request.offline:
                raise HubError(f"Hugging Face, {repo!r}: {file} is not in its cache, and {DOWNLOADS_OFF}") from error
            raise HubError(f"Hugging Face, {repo!r}: {_short(error)}") from error

    folder = fetch(CONFIG, revision).parent
    found = checkpoint.read_checkpoint(folder)
    _check_pins(found, request, f"{HF_PREFIX}{repo}")
    # the snapshot's own commit, so that a push in between cannot mix two versions
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    for role in request.roles_of(found):
        name = found.file_of(role)
        fetch(name, commit)
        try:
            checkpoint.verify_file(found, name)  # the client compares sizes, not digests
        except DigestMismatch:
            if request.offline:
                raise
            fetch(name, commit, again=True)
            checkpoint.verify_file(found, name)
    return folder


def _from_url(base: str, request: Request) -> Path:
    """Into the cache: weights first, config.json last, each by an atomic replace after its digest was compared."""
    cache = (request.cache_dir or default_cache()) / "hub"
    folder = cache / f"{urlsplit(base).hostname}-{hashlib.sha256(base.encode()).hexdigest()[:12]}" / request.name
    if _is_complete(folder, request):
        return folder
    if request.offline:
        raise HubError(f"not in the cache {folder}, and {DOWNLOADS_OFF}")
    with exclusive(folder):
        if not _is_complete(folder, request):  # another process may have been quicker
            _fill(folder, f"{base}/{request.name}", request)
    return folder


def _fill(folder: Path, url: str, request: Request) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".download.part"
    try:
        found = _fetch_config(f"{url}/{CONFIG}", folder, part)
        _check_pins(found, request, url)
        text = part.read_bytes()
        for role in request.roles_of(found):
            _fetch_file(url, found, found.file_of(role), part)
        part.write_bytes(text)
        part.replace(folder / CONFIG)
    finally:
        part.unlink(missing_ok=True)


def _check_pins(found: Checkpoint, request: Request, where: str) -> None:
    for file, pin in request.pins.items():
        if file in found.files and found.files[file].sha256 != pin:
            raise DigestMismatch(f"{where}: promises sha256 {found.files[file].sha256} for {file}, expected {pin}.")


def _is_complete(folder: Path, request: Request) -> bool:
    """Whether the cached copy can be used as it is; a broken one is fetched again."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        found = checkpoint.read_checkpoint(folder)
        _check_pins(found, request, str(folder))
        for role in request.roles_of(found):
            checkpoint.verify_file(found, found.file_of(role))
    except CheckpointError:
        return False
    return True


def _fetch_config(url: str, folder: Path, part: Path) -> Checkpoint:
    def once() -> Checkpoint:
        download(url, part, limit=CONFIG_LIMIT)
        return checkpoint.parse_config(part.read_bytes(), folder)

    return _with_one_retry(once, url)


def _fetch_file(url: str, found: Checkpoint, file: str, part: Path) -> None:
    target, stored = found.folder / file, found.files[file]
    if target.is_file() and checkpoint.sha256(target) == stored.sha256:
        return

    def once() -> None:
        try:
            with _bar(f"{found.name}/{file}") as progress:
                download(f"{url}/{file}", part, limit=stored.size, progress=progress)
        except NotThere as error:  # not the same as a hub without this checkpoint
            raise HubError(f"{error}, although its {CONFIG} lists it: whoever runs that hub has to add it") from error
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


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A progress bar in a terminal, nothing elsewhere: for files that take minutes."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _short(error: Exception) -> str:
    """The first line of an error, and of the one under it: transfer libraries hide the reason there."""
    chain = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    return "; because: ".join((str(one).strip().splitlines() or [type(one).__name__])[0] for one in chain)
