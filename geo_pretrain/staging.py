"""A folder replaced as a whole: whoever reads sees the old one or the new one, also after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from geo_pretrain.files import locked, move, sync_files, sync_folder

Own = Callable[[Path], set[str]]  # the names in a folder that go with it when it is replaced; others are kept


@contextmanager
def replaced(folder: Path, own: Own, writer: str = "") -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place at the end, or is removed after an error.

    Two renames; `recover` puts things right when the process dies between or after them. `writer` tells writers apart
    where there may be several at a time.
    """
    recover(folder, own)
    staging = folder.with_name(f".{folder.name}{writer and '.' + writer}.writing")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    retired = _retired(folder)
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_files(staging)
        with locked(retired):  # who reads in between must not take the old one for what a dead process left
            if folder.exists():
                move(folder, retired)
            move(staging, folder)
            sync_folder(folder.parent)
            if retired.is_dir():
                _retire(retired, folder, own)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        recover(folder, own)
        raise


def recover(folder: Path, own: Own) -> None:
    """Finish or undo the write of a process that was killed: afterwards the old or the new folder is in place.

    One that is not complete is dropped by the next write and ignored here. A writer that is alive is waited for.
    """
    retired = _retired(folder)
    with locked(retired) if retired.is_dir() else nullcontext():
        if retired.is_dir() and folder.exists():
            _retire(retired, folder, own)
        elif retired.is_dir():
            move(retired, folder)


def _retired(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _retire(retired: Path, folder: Path, own: Own) -> None:
    """Remove a replaced folder, after moving files that are not its own to the new one."""
    known = own(retired)
    for path in retired.iterdir():
        if path.name not in known and not (folder / path.name).exists():
            move(path, folder / path.name)
    shutil.rmtree(retired)
