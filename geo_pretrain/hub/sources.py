"""The places where a checkpoint may lie: a folder, a web server, Hugging Face, and its authors' own file.

A `Source` is asked twice: `look` reads and verifies the config.json alone, `fetch` brings the files of some roles.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from geo_pretrain.catalog import Arch, Entry, License
from geo_pretrain.checkpoint import (
    CHECKPOINT_NAME,
    CONFIG,
    Checkpoint,
    Pairing,
    check_digest,
    intact_checkpoint,
    parse_config,
    read_checkpoint,
    sha256,
    verify_file,
)
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError, NotThere, first_line, renamed, shown
from geo_pretrain.files import atomic_write, expanded, is_folder, move
from geo_pretrain.hub import authors
from geo_pretrain.hub.cache import default_cache, exclusive
from geo_pretrain.hub.links import split_address
from geo_pretrain.hub.packages import PACKAGE_PREFIX, again, package_folder, without
from geo_pretrain.hub.transfer import LARGEST, download, probe
from geo_pretrain.online import hub_fault
from geo_pretrain.progress import Stage, of_bytes

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
HF_PREFIX, WEB_PREFIXES = "hf-hub:", ("http://", "https://")
CONFIG_LIMIT = 10 << 20  # bytes; a config.json is a few kB
AUTHORS = "the authors' own file"
DOWNLOADS_OFF = f"downloads are off (local_files_only or {OFFLINE_VARIABLE})"

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Which checkpoint is wanted, and where it may come from."""

    name: str
    revision: str | None
    cache_dir: Path | None  # None: the default cache, for Hugging Face its own
    offline: bool
    entry: Entry | None = None  # the catalog entry, with digests and authors' files

    @property
    def cache(self) -> Path:
        """The folder of this package's own cache."""
        return self.cache_dir or default_cache()

    @property
    def pinned(self) -> set[str]:
        """The names of the files whose sha256 the catalog states."""
        return set() if self.entry is None else {file.name for file in self.entry.files}


@dataclass(frozen=True)
class Description:
    """A checkpoint as its config.json describes it or, before an authors' file is converted, its catalog entry."""

    name: str
    arch: Arch
    contract: ImageContract | VoxelContract
    license: License
    roles: tuple[str, ...]  # of the files that can be fetched
    pairing: Pairing | None = None
    licence = renamed("licence", "license")

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Description:
        """The description in a config.json."""
        fields = (checkpoint.name, checkpoint.arch, checkpoint.contract, checkpoint.license)
        return cls(*fields, checkpoint.roles, checkpoint.pairing)


class Source(ABC):
    """One place that may hold the checkpoint of a request."""

    @abstractmethod
    def look(self) -> Description:
        """Describe the checkpoint, without fetching any file but config.json. Raises `NotThere` if it is not here."""

    @abstractmethod
    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """The local checkpoint folder with the files of these roles; `look` was called before."""

    def compare(self, checkpoint: Checkpoint) -> None:
        """Compare what was fetched, and files beside it that no network needs and that are there, by sha256."""
        for name in checkpoint.files:
            if (checkpoint.folder / name).is_file():
                verify_file(checkpoint, name)

    @abstractmethod
    def reach(self) -> int | None:
        """Ask for the network's files without fetching them: their bytes, None where nobody says. Raises as `look`."""


def source_of(spec: str, request: Request) -> Source:
    """The source that a text names.

    AUTHORS, "hf-hub:owner/repo", "hf:owner", "package:name", a URL or a folder of checkpoints.
    """
    if spec.startswith(HF_PREFIX):
        return HuggingFace(spec.removeprefix(HF_PREFIX), request)
    if spec != AUTHORS and not CHECKPOINT_NAME.fullmatch(request.name):
        raise NotThere(f"{request.name!r} is no checkpoint name: letters, digits, '.', '_' and '-' are accepted")
    if spec.startswith("hf:"):
        return HuggingFace(f"{spec.removeprefix('hf:')}/{request.name}", request)
    if request.revision is not None:
        raise HubError(f"revision={request.revision!r} is understood by Hugging Face only")
    if spec == AUTHORS and request.entry is not None:
        return Authors(request.entry, request)
    if spec.startswith(WEB_PREFIXES):
        return WebServer(spec.rstrip("/"), request)
    if spec.startswith(PACKAGE_PREFIX):
        return Package(spec.removeprefix(PACKAGE_PREFIX), request)
    folder = expanded(spec) / request.name
    if not is_folder(folder):
        raise NotThere(f"no folder {folder}")
    return Folder(folder, request)


class Folder(Source):
    """A checkpoint folder of this machine, used where it lies."""

    def __init__(self, folder: Path, request: Request | None = None) -> None:
        self.folder, self.request = folder, request  # None: the folder was named by its path

    def look(self) -> Description:
        """Read config.json."""
        checkpoint = read_checkpoint(self.folder)
        if self.request is not None:
            _check_pins(checkpoint, self.request, str(self.folder))
        return Description.of(checkpoint)

    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """Check that the files are there; whoever reads them compares their digests."""
        checkpoint = read_checkpoint(self.folder)
        for role in roles:
            path = self.folder / checkpoint.file_of(role)
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing; {CONFIG} lists it as its {role} file.")
        return checkpoint

    def reach(self) -> int | None:
        """Look whether the files are there."""
        roles = self.look().arch.network_roles()
        checkpoint = self.fetch(roles)
        return sum(checkpoint.files[checkpoint.file_of(role)].size for role in roles)


class Package(Folder):
    """A checkpoint folder in an installed Python package; damaged files are told before anybody reads them.

    So that the next source is tried, and the error says how to install the package again.
    """

    def __init__(self, package: str, request: Request) -> None:
        self.package = package
        super().__init__(package_folder(package) / request.name, request)
        if not self.folder.is_dir():
            raise NotThere(without(package, request.name))

    def look(self) -> Description:
        """Read config.json."""
        with self._installed():
            return super().look()

    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """Compare the files with their digests of loads, which is as quick as reading them."""
        with self._installed():
            checkpoint = super().fetch(roles)
            for role in roles:
                verify_file(checkpoint, checkpoint.file_of(role), load_digest=True)
            return checkpoint

    def compare(self, checkpoint: Checkpoint) -> None:
        """Compare all files: a package has them all."""
        with self._installed():
            for name in checkpoint.files:
                verify_file(checkpoint, name)

    def reach(self) -> int | None:
        """Compare the sizes of the files."""
        size = super().reach()
        with self._installed():
            checkpoint = read_checkpoint(self.folder)
            for name in map(checkpoint.file_of, checkpoint.network_roles()):
                have, promised = (self.folder / name).stat().st_size, checkpoint.files[name].size
                if have != promised:
                    raise CheckpointError(f"{self.folder / name}: has {have} bytes, expected {promised}.")
        return size

    @contextmanager
    def _installed(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise type(error)(f"{error} {again(self.package)}") from shown(error)


class Authors(Source):
    """A file in its authors' own format, converted into a checkpoint folder of the cache; see `authors`."""

    def __init__(self, entry: Entry, request: Request) -> None:
        self.entry, self.request = entry, request

    def look(self) -> Description:
        """What the catalog says: the files are not opened."""
        entry = self.entry
        roles = {role: None for file in entry.authors_files for role in file.roles}  # each once, in order
        made = ("golden", "card")  # by the conversion
        return Description(entry.name, entry.arch, entry.contract, entry.license, (*roles, *made))

    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """Download and convert the file that holds the roles."""
        request = self.request
        with of_bytes(request.name) as progress:
            folder = authors.fetch(self.entry, roles, request.cache, offline=request.offline, progress=progress)
        return read_checkpoint(folder)

    def reach(self) -> int | None:
        """Ask each server of the authors."""
        if self.request.offline:
            raise HubError(DOWNLOADS_OFF)
        return _total(probe(file.url, file.size) for file in self.entry.authors_files)


class HuggingFace(Source):
    """A repository of the Hugging Face Hub. huggingface_hub does the transfer and keeps its own cache."""

    def __init__(self, spec: str, request: Request) -> None:
        self.repo, _, at_revision = spec.partition("@")
        self.request = request
        if not re.fullmatch(r"[^/]+/[^/]+", self.repo):
            raise HubError(f"{self.repo!r} is no repository; OWNER/REPO or OWNER/REPO@REVISION is accepted")
        if at_revision and request.revision not in (None, at_revision):
            raise HubError(f"{spec} states its revision; revision={request.revision!r} is another: drop one")
        self.revision = at_revision or request.revision
        self.checkpoint: Checkpoint | None = None  # once `look` was called
        self.answers = False  # somebody was asked, and did

    def look(self) -> Description:
        """Fetch config.json."""
        folder = self._download(CONFIG, self.revision).parent
        self.checkpoint = read_checkpoint(folder)
        _check_pins(self.checkpoint, self.request, f"{HF_PREFIX}{self.repo}")
        return Description.of(self.checkpoint)

    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """Fetch the files at the commit of that config.json, so that a push in between cannot mix two versions."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        snapshot = checkpoint.folder.name
        commit = snapshot if re.fullmatch(r"[0-9a-f]{40}", snapshot) else self.revision
        for role in roles:
            name = checkpoint.file_of(role)
            # pins are sha256s, and another client may have downloaded the file without a look at them
            quick = name not in self.request.pinned and (checkpoint.folder / name).is_file()
            self._download(name, commit)
            try:
                verify_file(checkpoint, name, load_digest=quick)  # the client compares sizes, not digests
            except DigestMismatch:
                if self.request.offline:
                    raise
                self._download(name, commit, again=True)
                verify_file(checkpoint, name)
        return checkpoint

    def reach(self) -> int | None:
        """Ask for config.json, and for the files that the catalog pins."""
        import huggingface_hub as client

        if self.request.offline:
            raise HubError(DOWNLOADS_OFF)

        def size(file: str) -> int | None:
            with self._asking(file):
                return client.get_hf_file_metadata(client.hf_hub_url(self.repo, file, revision=self.revision)).size

        size(CONFIG)
        return _total(map(size, sorted(self.request.pinned)))

    def _download(self, file: str, revision: str | None, *, again: bool = False) -> Path:
        import huggingface_hub as client

        where: dict[str, Any] = {"cache_dir": self.request.cache_dir, "local_files_only": self.request.offline}
        self._knock(file, revision)
        with self._asking(file), of_bytes(f"{self.repo}/{file}") as stage:
            where |= {} if stage is None else {"tqdm_class": _bars_of(stage)}
            return Path(client.hf_hub_download(self.repo, file, revision=revision, force_download=again, **where))

    def _knock(self, file: str, revision: str | None) -> None:
        """Give up at once where there is no network: the client would try for half a minute."""
        if self.request.offline or self.answers:
            return
        cache = None if self.request.cache_dir is None else str(self.request.cache_dir)
        if (fault := hub_fault(self.repo, file, revision, cache=cache)) is not None:
            raise HubError(
                f"Hugging Face, {self.repo!r}: {fault} Where there is none, `geo-pretrain bundle` and a folder of "
                "checkpoints (hub=PATH, GEO_PRETRAIN_HUB) can stand in."
            )
        self.answers = True

    @contextmanager
    def _asking(self, file: str) -> Iterator[None]:
        """Turn the client's errors into ours."""
        from huggingface_hub import errors

        try:
            yield
        except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise NotThere(f"Hugging Face has no file {file!r} in {self.repo!r}") from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
            said = f"{file} is not in its cache, and {DOWNLOADS_OFF}" if self.request.offline else _first_lines(error)
            raise HubError(f"Hugging Face, {self.repo!r}: {said}") from shown(error)


class WebServer(Source):
    """An http(s) address under which `<name>/config.json` lies; its files are kept in the cache.

    Weights are written first and config.json last, each by an atomic replace after its digest was compared.
    """

    def __init__(self, base: str, request: Request) -> None:
        self.request, self.base = request, base
        parts = split_address(base)
        self.url = self._address()
        same = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))  # whoever asks
        host = f"{parts.hostname}-{hashlib.sha256(same.encode()).hexdigest()[:12]}"
        self.folder = request.cache / "hub" / host / request.name
        self.part = self.folder / ".download.part"
        self.config: bytes | None = None  # what `look` fetched; None: it found the cached one

    def look(self) -> Description:
        """Read the cached config.json, else fetch it."""
        checkpoint = self._cached(())
        if checkpoint is None:
            self._refuse_offline()
            with exclusive(self.folder):
                checkpoint = self._cached(())  # another process may have been quicker
                if checkpoint is None:
                    checkpoint, self.config = self._fetch_config()
        return Description.of(checkpoint)

    def fetch(self, roles: Sequence[str]) -> Checkpoint:
        """Fetch the files that the cache lacks, or that are damaged there."""
        if self._cached(roles) is None:
            self._refuse_offline()
            with exclusive(self.folder):
                if self._cached(roles) is None:
                    self._fill(roles)
        return read_checkpoint(self.folder)

    def reach(self) -> int | None:
        """Ask for config.json, and for the files that the catalog pins."""
        self._refuse_offline()
        probe(self._address(CONFIG), CONFIG_LIMIT)
        return _total(probe(self._address(file)) for file in sorted(self.request.pinned))

    def _address(self, *names: str) -> str:
        """The address of the checkpoint, or of a file of it, with the query of the hub's address: signatures."""
        parts = urlsplit(self.base)
        path = "/".join((parts.path.rstrip("/"), self.request.name, *names))
        return urlunsplit(parts._replace(path=path, fragment=""))

    def _refuse_offline(self) -> None:
        if self.request.offline:
            raise HubError(f"not in the cache {self.folder}, and {DOWNLOADS_OFF}")

    def _cached(self, roles: Sequence[str]) -> Checkpoint | None:
        """The cached copy if it can be used as it is; a broken one is fetched again."""
        checkpoint = intact_checkpoint(self.folder, roles)
        with suppress(CheckpointError):
            if checkpoint is not None:
                _check_pins(checkpoint, self.request, str(self.folder))
                for name in self.request.pinned.intersection(map(checkpoint.file_of, roles)):
                    verify_file(checkpoint, name)  # pins are sha256s
                return checkpoint
        return None

    def _fill(self, roles: Sequence[str]) -> None:
        """Bring the files and then config.json into the cache; the caller has the lock."""
        if self.config is None:  # the cached one, which may be older than what the server has now
            checkpoint, self.config = self._fetch_config()
        else:
            checkpoint = parse_config(self.config, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for role in roles:
                self._fetch_file(checkpoint, checkpoint.file_of(role))
            with atomic_write(self.folder / CONFIG) as part:
                part.write_bytes(self.config)
        finally:
            self.part.unlink(missing_ok=True)

    def _fetch_config(self) -> tuple[Checkpoint, bytes]:
        url = self._address(CONFIG)

        def once() -> tuple[Checkpoint, bytes]:
            download(url, self.part, limit=CONFIG_LIMIT)
            text = self.part.read_bytes()
            return parse_config(text, self.folder), text

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            checkpoint, text = _with_one_retry(once, url)
        finally:
            self.part.unlink(missing_ok=True)
        _check_pins(checkpoint, self.request, self.url)
        return checkpoint, text

    def _fetch_file(self, checkpoint: Checkpoint, file: str) -> None:
        target, stored, url = self.folder / file, checkpoint.files[file], self._address(file)
        if stored.size > LARGEST:
            raise CheckpointError(f"{url}: {CONFIG} promises {stored.size} bytes; at most {LARGEST} are accepted.")
        if target.is_file() and sha256(target) == stored.sha256:
            return

        def once() -> None:
            try:
                with of_bytes(f"{checkpoint.name}/{file}") as progress:
                    download(url, self.part, limit=stored.size, progress=progress)
            except NotThere as error:  # not the same as a server without this checkpoint
                raise HubError(
                    f"{error}, although its {CONFIG} lists it: whoever runs that hub has to add it"
                ) from error
            check_digest(self.part, stored)

        _with_one_retry(once, url)
        move(self.part, target)


def _total(sizes: Iterable[int | None]) -> int | None:
    """The sum, unless there is nothing to sum or a size is not known."""
    known = list(sizes)
    return sum(size for size in known if size is not None) if known and None not in known else None


def _check_pins(checkpoint: Checkpoint, request: Request, where: str) -> None:
    """Raise `DigestMismatch` when a config.json promises other files than the catalog."""
    for file in request.entry.files if request.entry is not None else ():
        stored = checkpoint.files.get(file.name)
        if stored is not None and stored.sha256 != file.sha256:
            raise DigestMismatch(f"{where}: promises sha256 {stored.sha256} for {file.name}, expected {file.sha256}.")


def _with_one_retry(fetch: Callable[[], T], url: str) -> T:
    """Fetch once more after a `CheckpointError`: a transfer may break, what is wrong twice is wrong at its source."""
    try:
        return fetch()
    except CheckpointError:
        try:
            return fetch()
        except CheckpointError as error:
            raise type(error)(f"{url}, fetched twice: {error}") from error


def _bars_of(stage: Stage) -> type:
    """What huggingface_hub takes for the class of its progress bars: it shows their bytes in a stage of ours."""
    from huggingface_hub.utils import tqdm

    class Bytes(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})  # which keeps `n` and `total`, and draws nothing

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            stage(self.n, self.total)

    return Bytes


def _first_lines(error: Exception) -> str:
    """The first line of an error, and of its cause: transfer libraries hide the reason there."""
    chain = [error] + ([error.__cause__] if error.__cause__ is not None else [])
    return "; because: ".join(map(first_line, chain))
