"""Locks, atomic writes, digests of JSON: every file that others may read or write meanwhile goes through here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from geo_pretrain.errors import CheckpointError, HubError, first_line

SEAL = "sha256"  # key of the digest in JSON files that we read again
WINDOWS = os.name == "nt"
RETRIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # seconds; on Windows a reader, or a virus scanner, holds a file for a moment
WAIT_NOTE = 5.0  # seconds of waiting for another process before a warning says so


@contextmanager
def atomic_write(path: Path, *, suffix: str = ".part") -> Iterator[Path]:
    """Yield a temporary path to write to; at the end it is synced to disk and renamed to `path`.

    Readers see the old file or the whole new one. After an error the old file stays and nothing else. The temporary
    path lies in the same folder, which is made if needed; it ends in `suffix`, for libraries that choose a format by
    it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")
    part.touch(exist_ok=False)  # a disk that refuses does so now, before work is done for it
    mode = part.stat().st_mode  # the umask's; safetensors puts a private file of its own in this one's place
    try:
        yield part
        part.chmod(mode)
        sync_file(part)
        move(part, path)
    finally:
        with suppress(OSError):  # on a disk that refused, the reason is in the first error
            part.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder, over a file that is there; on Windows again while another program has it open.

    Readers elsewhere keep the old bytes. Raises OSError, on Windows after 1.4 seconds.
    """
    for pause in RETRIES if WINDOWS else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(pause)
    source.replace(target)


def is_file(path: Path) -> bool:
    """Whether a file is there; False, too, where this user may not ask."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False, too, where this user may not ask."""
    try:
        return path.is_dir()
    except OSError:
        return False


def expanded(path: str | os.PathLike[str], otherwise: str = "Give a whole path.") -> Path:
    """A path without ~. Raises `HubError`, which ends with `otherwise`, where nobody knows that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise HubError(f"{os.fspath(path)!r}: this system does not know that home folder. {otherwise}") from None


def regular(path: Path) -> Path:
    """The path, unless a pipe or a device lies there, whose end may never come. Raises OSError."""
    if any(kind(path.stat().st_mode) for kind in (stat.S_ISFIFO, stat.S_ISCHR, stat.S_ISBLK, stat.S_ISSOCK)):
        raise OSError(errno.EINVAL, "is a pipe or a device, no file", str(path))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file by an `atomic_write`."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")  # the same bytes, and digests, on every system


def parse_json(text: str | bytes) -> Any:
    """`json.loads`; ValueError also for JSON that is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_sealed(path: Path, tree: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON object by an `atomic_write`, with a sha256 over all of it as its last key."""
    write_text(path, json.dumps({**tree, SEAL: tree_digest(tree)}, indent=indent) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object and compare it with its sha256, which is left out of the result.

    Files of older versions have none; a warning says so. Raises `CheckpointError` with the reason where the file is no
    JSON object or was altered, FileNotFoundError where there is none.
    """
    try:
        tree = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({first_line(error)}).") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds {type(tree).__name__}; an object is accepted.")
    if SEAL not in tree:
        warnings.warn(f"{path.name} is of an older version, without a digest; it is used unchecked.", stacklevel=2)
        return tree
    promised = tree.pop(SEAL)
    if promised != tree_digest(tree):
        raise CheckpointError(f"{path}: was altered: its {SEAL} is not that of its content.")
    return tree


def tree_digest(tree: Mapping[str, Any]) -> str:
    """A sha256 (hex) over a JSON object, independent of the order of its keys."""
    plain = json.loads(json.dumps(tree))  # as it is read: keys are texts, tuples lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Flush a written file from the operating system's buffers to the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_files(folder: Path) -> None:
    """Flush all files of a folder to the disk."""
    for path in folder.iterdir():
        sync_file(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk: new, renamed and removed files. Windows has no such call."""
    if WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, *, busy: str = "", stacklevel: int = 1) -> Iterator[None]:
    """Hold the lock of `path`, a file or folder that need not exist: one process and thread at a time.

    Others wait, and after `WAIT_NOTE` seconds a warning says so; with a text `busy` they get a `CheckpointError` with
    it instead. A process that dies inside blocks nobody. The lock is the file `.<name>.lock` beside `path`. Where
    others may be waiting it stays as long as `path` does, else it is removed. OSError: the lock cannot be written.

    `stacklevel`: of the warning; 1 is the caller's `with` statement.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    for patience in (0,) if busy else (WAIT_NOTE, -1, -1, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience)
            break
        except Timeout:
            if busy:
                raise CheckpointError(busy) from None
            note = f"Another process is working on {path}; waiting for it to finish."
            warnings.warn(note, stacklevel=stacklevel + 2)  # this function and contextlib's lie in between
        except FileNotFoundError:
            continue  # somebody cleared the cache in between
    else:
        lock.acquire(timeout=0 if busy else -1)
    try:
        yield
    finally:
        if busy or not path.exists():
            with suppress(OSError):
                Path(lock.lock_file).unlink()  # whoever waits on the removed file notices and starts over
        lock.release()
