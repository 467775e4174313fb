"""Checkpoints in one file, for machines without a network: an uncompressed tar of checkpoint folders.

    <name>/encoder.safetensors, <name>/..., <name>/config.json last; names in order, no times, no owners

Equal folders make equal bundles. Reading trusts nothing: the only thing understood is a plain file called
<name>/<file> that the checkpoint's own inventory lists. Each header is parsed by itself, by the standard library, so
links, devices, sparse files and long names are refused before they mean anything.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from geo_pretrain.checkpoint import (
    CHECKPOINT_NAME,
    CONFIG,
    FILE_NAME,
    Checkpoint,
    StoredFile,
    parse_config,
    read_checkpoint,
    staged,
    verify_file,
)
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError
from geo_pretrain.files import atomic_write
from geo_pretrain.hub.cache import cache_root, exclusive
from geo_pretrain.hub.names import check_published_name
from geo_pretrain.hub.outgoing import outgoing
from geo_pretrain.hub.sources import CONFIG_LIMIT

MEMBER_LIMIT = 10_000  # files in one bundle: about a thousand checkpoints
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
PIECE = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Span:
    """The range of a file's bytes in the bundle."""

    start: int
    size: int


@dataclass(frozen=True)
class Bundled:
    """One checkpoint of a bundle. Its inventory may list texts (log, card) that the bundle lacks."""

    checkpoint: Checkpoint  # `folder`: the bundle's path plus the name; not a real folder
    config: bytes
    spans: Mapping[str, Span]  # by file name, without config.json

    @property
    def size(self) -> int:
        """Bytes on disk once installed."""
        return len(self.config) + sum(span.size for span in self.spans.values())


def write_bundle(
    folders: Sequence[Path | str], out: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write checkpoint folders into the bundle `out`, by an atomic write after it was read back.

    Every file is compared with its digest. The network's weights and golden values must be there; texts that a folder
    lists but does not hold (it came from a cache) are left out, and so are paths of this machine (`outgoing`). An
    unfinished checkpoint stays one. `progress` is called with the checkpoints done, written and read back, and twice
    their number. Raises
    `CheckpointError` or `DigestMismatch` for a folder that is none, `HubError` when `out` cannot be written, or is a
    file of another kind.
    """
    out = Path(out).expanduser()
    if out.is_dir():
        raise HubError(f"{out} is a folder; the name of a file, such as {out / 'backbones.tar'}, is accepted.")
    if out.exists():  # a bundle is written anew, another file is somebody's
        try:
            list_bundle(out)
        except CheckpointError:
            raise HubError(f"{out} is there and no bundle. Choose another name, or remove it.") from None
    chosen = _read_folders(folders)
    try:
        with atomic_write(out) as part:
            with tarfile.open(part, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for done, checkpoint in enumerate(chosen):
                    progress(done, 2 * len(chosen))
                    texts = outgoing(checkpoint)
                    for name in (*_files_to_bundle(checkpoint), CONFIG):
                        _add(tar, checkpoint, name, texts.get(name))
            with _opened(part) as stream:
                for done, bundled in enumerate(_contents(stream, part), len(chosen) + 1):
                    _verify(stream, bundled)
                    progress(done, 2 * len(chosen))
    except OSError as error:
        raise HubError(f"{out}: cannot be written ({error.strerror or error}). Choose another place for it.") from error
    return out


def list_bundle(bundle: Path | str) -> list[Bundled]:
    """List the checkpoints of a bundle from its headers and configs. Raises `CheckpointError` for another file."""
    bundle = Path(bundle).expanduser()
    with _opened(bundle) as stream:
        return _contents(stream, bundle)


def install_bundle(
    bundle: Path | str,
    cache_dir: Path | str | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Unpack a bundle into <cache>/bundles/<name>, where `hub.open` looks names up; return these folders.

    Everything is compared with the inventories' digests before the cache is touched; then all checkpoints are written
    beside their places and put there one after the other, each at once. One that is installed already is left alone;
    another one of the same name is replaced. Raises `CheckpointError` for a file that is no bundle or holds anything
    else, `DigestMismatch` for altered bytes or another checkpoint than the catalog's, `HubError` for the disk.
    `progress` is called with the checkpoints done, compared and unpacked, and twice their number.
    """
    bundle = Path(bundle).expanduser()
    root = cache_root(cache_dir) / "bundles"
    with _opened(bundle) as stream, ExitStack() as locks:
        contents = _contents(stream, bundle)
        for done, bundled in enumerate(contents):
            progress(done, 2 * len(contents))
            check_published_name(bundled.checkpoint, "unpack the bundle, a tar file, and load its folder by its path")
            _verify(stream, bundled)
        targets = {root / bundled.checkpoint.name: bundled for bundled in contents}
        missing = _not_installed(targets)
        for folder in sorted(missing):
            locks.enter_context(exclusive(folder))
        missing = _not_installed(missing)  # another process may have been quicker
        try:
            with ExitStack() as stagings:  # which puts all in place once all are complete, the last one first
                for done, (folder, bundled) in enumerate(reversed(missing.items()), 2 * len(contents) - len(missing)):
                    progress(done, 2 * len(contents))
                    _unpack(stream, bundled, stagings.enter_context(staged(folder)))
            progress(2 * len(contents), 2 * len(contents))
        except OSError as error:
            reason = error.strerror or error
            needed = sum(bundled.size for bundled in missing.values()) // 10**6
            raise HubError(
                f"{root}: cannot be written ({reason}); {needed} MB are needed there. Free some room or make it "
                "writable, or set GEO_PRETRAIN_CACHE to another folder."
            ) from error
    return list(targets)


def _read_folders(folders: Sequence[Path | str]) -> list[Checkpoint]:
    """Read and verify checkpoint folders; sorted by name."""
    chosen: dict[str, Checkpoint] = {}
    for folder in folders:
        checkpoint = read_checkpoint(folder)
        if checkpoint.name in chosen:
            raise CheckpointError(
                f"{folder} and {chosen[checkpoint.name].folder} are both called {checkpoint.name!r}; "
                "each name is accepted once."
            )
        for name in _files_to_bundle(checkpoint):
            verify_file(checkpoint, name)
        chosen[checkpoint.name] = checkpoint
    if not chosen:
        raise CheckpointError("No checkpoint folder is given; one or more are accepted.")
    return [chosen[name] for name in sorted(chosen)]


def _needed(checkpoint: Checkpoint) -> set[str]:
    """Names of the files that loading and verifying need."""
    return {checkpoint.file_of(role) for role in (*checkpoint.network_roles(), "golden")}


def _files_to_bundle(checkpoint: Checkpoint) -> list[str]:
    needed = _needed(checkpoint)
    return sorted(name for name in checkpoint.files if name in needed or (checkpoint.folder / name).is_file())


def _add(tar: tarfile.TarFile, checkpoint: Checkpoint, name: str, text: bytes | None = None) -> None:
    """Add a file of the folder, or `text` in its place."""
    header = tarfile.TarInfo(f"{checkpoint.name}/{name}")
    header.mode = 0o644
    with (checkpoint.folder / name).open("rb") if text is None else io.BytesIO(text) as stream:
        header.size = os.fstat(stream.fileno()).st_size if text is None else len(text)
        try:
            tar.addfile(header, stream)
        except ValueError as error:  # a name or number that a plain header has no room for
            raise CheckpointError(f"{checkpoint.folder / name}: does not fit into a tar file ({error}).") from error


@contextmanager
def _opened(bundle: Path) -> Iterator[BinaryIO]:
    try:
        stream = bundle.open("rb")
    except OSError as error:
        raise CheckpointError(f"{bundle}: cannot be read ({error.strerror}); a bundle is accepted.") from error
    with stream:
        yield stream


def _contents(stream: BinaryIO, bundle: Path) -> list[Bundled]:
    folders: dict[str, dict[str, Span]] = {}
    for name, file, span in _members(stream, bundle):
        if file in folders.setdefault(name, {}):
            raise CheckpointError(f"{bundle}: holds {name}/{file} twice.")
        folders[name][file] = span
    if not folders:
        raise CheckpointError(f"{bundle}: holds no checkpoint; a file made by `geo-pretrain bundle` is accepted.")
    return [_bundled(stream, bundle, name, files) for name, files in sorted(folders.items())]


def _members(stream: BinaryIO, bundle: Path) -> Iterator[tuple[str, str, Span]]:
    """Yield checkpoint name, file name and byte range of every file. Anything else raises `CheckpointError`."""
    length = os.fstat(stream.fileno()).st_size
    cut = f"{bundle}: is cut off after {length} bytes, or no bundle. Copy it again."
    position = 0
    for _ in range(MEMBER_LIMIT + 1):
        stream.seek(position)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise CheckpointError(cut)
        if not any(block):  # the end
            break
        try:
            header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise CheckpointError(f"{bundle}: is not a bundle, or damaged (at byte {position}: {error}).") from error
        if header.type != tarfile.REGTYPE:
            raise CheckpointError(
                f"{bundle}: holds {header.name!r}, which is no plain file (tar type {header.type!r}); only files of "
                "checkpoints, as `geo-pretrain bundle` writes them, are accepted."
            )
        name, slash, file = header.name.partition("/")
        if not (slash and CHECKPOINT_NAME.fullmatch(name) and FILE_NAME.fullmatch(file)):
            raise CheckpointError(f"{bundle}: holds {header.name!r}; only <checkpoint's name>/<file> is accepted.")
        start = position + BLOCK
        if header.size < 0 or start + header.size > length:
            raise CheckpointError(cut)
        yield name, file, Span(start, header.size)
        position = start + -(-header.size // BLOCK) * BLOCK
    else:
        raise CheckpointError(f"{bundle}: holds more than {MEMBER_LIMIT} files.")
    rest = stream.read(RECORD + 1)
    if len(rest) < BLOCK:
        raise CheckpointError(cut)
    if len(rest) > RECORD or any(rest):
        raise CheckpointError(f"{bundle}: goes on after its end (byte {position}); it was altered or joined.")


def _bundled(stream: BinaryIO, bundle: Path, name: str, files: dict[str, Span]) -> Bundled:
    """Check that config, file names and sizes of a bundled checkpoint agree; digests are compared by `_verify`."""
    folder = bundle / name
    if CONFIG not in files:
        raise CheckpointError(f"{folder}: has no {CONFIG}.")
    span = files.pop(CONFIG)
    if span.size > CONFIG_LIMIT:
        raise CheckpointError(f"{folder / CONFIG}: has {span.size} bytes; at most {CONFIG_LIMIT} are accepted.")
    stream.seek(span.start)
    config = stream.read(span.size)
    checkpoint = parse_config(config, folder)
    if checkpoint.name != name:
        raise CheckpointError(f"{folder}: its {CONFIG} calls it {checkpoint.name!r}; both must be the same.")
    for file, bytes_of_file in files.items():
        if file not in checkpoint.files:
            raise CheckpointError(f"{folder / file}: is not listed in {CONFIG}.")
        if bytes_of_file.size != checkpoint.files[file].size:
            raise DigestMismatch(
                f"{folder / file}: has {bytes_of_file.size} bytes, its {CONFIG} promises {checkpoint.files[file].size}."
            )
    for file in sorted(_needed(checkpoint) - set(files)):
        raise CheckpointError(
            f"{folder / file}: is missing; {CONFIG} lists it as its {checkpoint.files[file].role} file."
        )
    return Bundled(checkpoint, config, files)


def _verify(stream: BinaryIO, bundled: Bundled) -> None:
    for file, span in bundled.spans.items():
        _copy(stream, span, bundled.checkpoint.folder / file, bundled.checkpoint.files[file])


def _copy(stream: BinaryIO, span: Span, path: Path, stored: StoredFile, target: BinaryIO | None = None) -> None:
    """Read a file of the bundle, into `target` if given, and compare its digest."""
    digest, left = hashlib.sha256(), span.size
    stream.seek(span.start)
    while left > 0 and (piece := stream.read(min(PIECE, left))):
        digest.update(piece)
        left -= len(piece)
        if target is not None:
            target.write(piece)
    if left or digest.hexdigest() != stored.sha256:
        raise DigestMismatch(
            f"{path}: sha256 is {digest.hexdigest()}, expected {stored.sha256}. The bundle was altered or damaged; "
            "nothing of it was installed. Copy it again."
        )


def _not_installed(targets: Mapping[Path, Bundled]) -> dict[Path, Bundled]:
    return {folder: bundled for folder, bundled in targets.items() if not _is_installed(folder, bundled)}


def _is_installed(folder: Path, bundled: Bundled) -> bool:
    """Whether the same checkpoint is installed and undamaged."""
    try:
        checkpoint = read_checkpoint(folder)
        for name in bundled.spans:
            verify_file(checkpoint, name)
        return (folder / CONFIG).read_bytes() == bundled.config
    except CheckpointError:
        return False


def _unpack(stream: BinaryIO, bundled: Bundled, staging: Path) -> None:
    for file, span in bundled.spans.items():
        with (staging / file).open("wb") as target:
            _copy(stream, span, bundled.checkpoint.folder / file, bundled.checkpoint.files[file], target)
    (staging / CONFIG).write_bytes(bundled.config)
