"""Installed Python packages that carry checkpoints: weights that need no network and no download of their own.

Such a package holds folders `<name>/config.json` and says so by an entry point of the group "geo_pretrain.weights":

    [project.entry-points."geo_pretrain.weights"]
    geo_pretrain_weights = "geo_pretrain_weights"     # a package of ours or of anybody

It is found by its metadata and never imported.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from geo_pretrain.catalog.entry import PACKAGE_PREFIX as PACKAGE_PREFIX
from geo_pretrain.catalog.entry import how_to_install
from geo_pretrain.checkpoint import CONFIG
from geo_pretrain.errors import NotThere

GROUP = "geo_pretrain.weights"


def package_folders() -> dict[str, Path]:
    """The folders of checkpoints that installed packages hold, by the package's name; two of a name: the first."""
    folders: dict[str, Path] = {}
    for point in entry_points(group=GROUP):
        if point.value not in folders and (folder := _folder(point.value)) is not None:
            folders[point.value] = folder
    return folders


def package_folder(package: str) -> Path:
    """The folder of checkpoints of one package. Raises `NotThere` where it is not installed."""
    folder = package_folders().get(package)
    if folder is None:
        raise NotThere(f"the package {package} is not installed. Install it: {how_to_install(package)}")
    return folder


def packages_with(name: str) -> list[str]:
    """The installed packages that hold a checkpoint of this name."""
    return [package for package, folder in package_folders().items() if (folder / name / CONFIG).is_file()]


def without(package: str, name: str) -> str:
    """What to say where an installed package lacks a checkpoint."""
    held = sorted(path.parent.name for path in package_folders()[package].glob(f"*/{CONFIG}"))
    newer = f"{how_to_install(package, '--upgrade')} brings a newer one"
    return f"the installed package {package} has no {name!r}; it holds: {', '.join(held) or 'none'}; {newer}"


def again(package: str) -> str:
    """What to do where an installed package was damaged."""
    return f"Install the package again: {how_to_install(package, '--force-reinstall --no-deps')}."


def _folder(package: str) -> Path | None:
    if not package.isidentifier():  # of a package inside another one the outer one would be imported
        return None
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # metadata without a package
        return None
    places = None if spec is None else spec.submodule_search_locations
    return Path(places[0]) if places else None
