"""Where results are written: one rule for the names of files and folders, checked before any work.

The folder of a result is made where it is missing, if the folder above it is there, and that is said. More is not made:
of `-o rnus/mine/a/x.png` the mistake would be found where nobody looks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
GRIDS = (".png",)  # features of frames
MATCHES = (".png", ".html")
CLOUDS = (".ply", ".html", ".png")
PAGES = (".html",)
TEXTS = (".md", ".txt")
BUNDLES = (".tar",)
ONNX = (".onnx",)
RERUN = (".rrd",)
OF_FILES = {*PICTURES, *CLOUDS, *PAGES, ".json", ".npy", ".npz"}  # endings that no new folder has


def file_fault(path: Path, accepted: Sequence[str]) -> str | None:
    """Why a file of one of these suffixes cannot be written to `path`, and the nearest name; None if it can."""
    if path.is_dir():
        return f"{str(path)!r} is a folder; accepted: the name of a file that ends in {', '.join(accepted)}."
    if path.suffix.lower() not in accepted:
        given = path.suffix.lower()
        close = max(accepted, key=lambda one: SequenceMatcher(None, given, one).ratio())  # the first of equals
        return (
            f"The file to write is {path.name!r}; accepted: names that end in {', '.join(accepted)}, such as "
            f"{path.with_suffix(close)}"
        )
    return _place_fault(path)


def folder_fault(path: Path) -> str | None:
    """Why a folder cannot be written to `path`; None if it can."""
    if path.exists() and not path.is_dir():
        return f"{str(path)!r} is a file; accepted: a new folder, or one of an earlier result."
    if path.is_dir():
        return None
    if path.suffix.lower() in OF_FILES:
        return f"{str(path)!r} would be a folder of several files; accepted: a folder's name, such as {path.stem}."
    return _place_fault(path)


def named(path: Path) -> Path:
    """The path with a name, beside which a run keeps its state: that of "." is absolute."""
    return path if path.name not in ("", "..") else path.resolve()


def missing_folder(path: Path) -> Path | None:
    """The folder that has to be made above a result; None if it is there."""
    above = path.expanduser().absolute().parent
    return None if above.is_dir() else path.parent


def _place_fault(path: Path) -> str | None:
    """Why nothing can be written beside `path`."""
    above = path.expanduser().absolute().parent
    there = next(folder for folder in (above, *above.parents) if folder.exists())
    if not there.is_dir():
        return f"{str(path)!r}: {str(there)!r} is a file; accepted: a name in a folder."
    if there not in (above, above.parent):
        return (
            f"{str(path)!r}: there is no folder {str(path.parent)!r}, nor the one above it. If that is meant: "
            f"mkdir -p {path.parent}"
        )
    if not os.access(there, os.W_OK):
        return f"{str(path)!r}: the folder {str(there)!r} may not be written to; accepted: one that may."
    return None
