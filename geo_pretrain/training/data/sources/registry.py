"""The registry of data sources, and opening one from a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from geo_pretrain.errors import GeoPretrainError, RecipeError, UnknownName, path_without_source, unknown
from geo_pretrain.files import expanded
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.frame import Frame, Noted, Source, SourcePart, capability
from geo_pretrain.training.data.sources.arkitscenes import ArkitScenesOptions, open_arkitscenes
from geo_pretrain.training.data.sources.colmap import ColmapOptions, open_colmap
from geo_pretrain.training.data.sources.folder import PlainOptions, open_plain
from geo_pretrain.training.data.sources.kitti import KittiOptions, open_kitti
from geo_pretrain.training.data.sources.megadepth import MegaDepthOptions, open_megadepth
from geo_pretrain.training.data.sources.polycam import PolycamOptions, open_polycam
from geo_pretrain.training.data.sources.record3d import Record3DOptions, open_record3d
from geo_pretrain.training.data.sources.redwood import RedwoodOptions, open_redwood
from geo_pretrain.training.data.sources.rooms import Rooms, RoomsOptions
from geo_pretrain.training.data.sources.scannet import ScanNet, ScanNetConfig
from geo_pretrain.training.data.sources.scenezoo import SceneZooOptions, open_scenezoo
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes, SevenScenesConfig
from geo_pretrain.training.data.sources.shards import Shards, ShardsOptions
from geo_pretrain.training.data.sources.transforms import TransformsOptions, open_transforms
from geo_pretrain.training.data.sources.tum import TumOptions, open_tum
from geo_pretrain.training.recipe import DataSpec

Progress = Callable[[int, int], None]
Opener = Callable[[Any, DataSpec, str, Progress | None], Source]  # called with options, spec, device, progress


@dataclass(frozen=True)
class SourceRow:
    """A row of the registry: how a source is opened, its data set and license."""

    config: type  # dataclass of `data.options`
    open: Opener
    dataset: str
    license: str  # SPDX or LicenseRef
    weights: str | None = None  # terms of weights trained on it, where they are not the data's


def list_sources() -> list[str]:
    """List the names that `data.source` accepts."""
    return sorted(SOURCES)


def open_source(
    spec: DataSpec, *, split: str = "train", device: str = "cpu", progress: Progress | None = None
) -> Source:
    """Open the data of a recipe. `split` is "train" or "val"; only rooms has its own validation scenes.

    `progress(done, total)` is called while scenes are rendered.
    """
    options = source_options(spec, split)
    source = SOURCES[spec.source].open(options, spec, device, progress)
    return source if spec.frames == (0.0, 1.0) else FrameRange(source, *spec.frames)


def open_on_disk(spec: DataSpec, *, split: str = "train") -> Source | None:
    """Open a source of files; None for rooms, which are rendered in a size that follows from the backbone.

    For those who fetch weights: called first, a wrong path is told before.
    """
    return None if spec.source == "rooms" else open_source(spec, split=split)


def source_options(spec: DataSpec, split: str = "train") -> Any:
    """Parse the options of a source without opening it. Raises `UnknownName`, or `RecipeError` for wrong options."""
    if spec.source not in SOURCES:
        raise _unknown_source(spec.source)
    config = SOURCES[spec.source].config
    given = {"split": split} if any(field.name == "split" for field in fields(config)) else {}
    return parse(config, {**given, **spec.options}, where="data.options", prefix="data.options.")


def _unknown_source(name: str) -> GeoPretrainError:
    """The error for a name that is no source of frames: it may be one of labelled data."""
    from geo_pretrain.training.data.labelled.registry import DATA_SETS

    if meant := _meant(name) or path_without_source(name, "folder"):
        return UnknownName(meant)
    if name not in DATA_SETS:
        return unknown("data source", name, list_sources(), "Write SOURCE or SOURCE:PATH.")
    own = " (`visualize points` draws clouds, too)" if name == "clouds" else ""
    return UnknownName(
        f"{name!r} is labelled data, for finetune, predict and eval probe; here posed RGB-D is wanted{own}: "
        f"{', '.join(list_sources())}."
    )


def layouts_of(path: Path) -> list[str]:
    """The sources that find frames in a folder, by their default options; most folders have one layout."""
    found = []
    for name, row in SOURCES.items():
        with suppress(GeoPretrainError, OSError):
            source = row.open(row.config(), DataSpec(name, str(path)), "cpu", None) if name in LAYOUTS else None
            if source is not None and any(source.frame_ids(scene) for scene in source.scenes()):
                found.append(name)
    return found


def _meant(path: str) -> str:
    """What to say of a folder that is given without its source, by its layout; "" for all else."""
    folder = expanded(path)
    fitting = layouts_of(folder) if folder.is_dir() else []
    lines = " or ".join(f"{name}:{path}" for name in fitting)
    return f"{path!r} is a path, and data are SOURCE:PATH. Did you mean {lines}?" if fitting else ""


class FrameRange(SourcePart):
    """A range of each scene's frames in order of time, such as the first 75 % (the rest is held out)."""

    def __init__(self, source: Source, start: float, stop: float) -> None:
        self.source, self.start, self.stop = source, start, stop
        self.name = source.name

    def scenes(self) -> list[str]:
        return self.source.scenes()

    def frame_ids(self, scene: str) -> list[str]:
        """Frames whose position lies in [start, stop) of the scene."""
        ids = self.source.frame_ids(scene)
        return ids[math.ceil(self.start * len(ids)) : math.ceil(self.stop * len(ids))]

    def load(self, scene: str, frame_id: str) -> Frame:
        return self.source.load(scene, frame_id)

    def fingerprint(self) -> str:
        """A digest of the source and the range."""
        return f"{self.source.fingerprint()}[{self.start:g}:{self.stop:g}]"


def data_license(spec: DataSpec) -> tuple[str, str]:
    """Look up the data set of a recipe and its license (SPDX or LicenseRef)."""
    row = SOURCES[spec.source]
    return row.dataset, spec.license or row.license


def weights_terms(spec: DataSpec) -> str:
    """The terms that the data of a recipe put on weights: those of the data, unless nobody can state them."""
    return SOURCES[spec.source].weights or data_license(spec)[1] if spec.license is None else spec.license


def source_note(source: Source) -> str:
    """The source's remark on its frames, for the provenance."""
    noted = capability(source, Noted)
    return "" if noted is None else noted.note


def _open_rooms(options: RoomsOptions, spec: DataSpec, device: str, progress: Progress | None) -> Source:
    if spec.path is not None:
        raise RecipeError("Source 'rooms' renders its own scenes and takes no path; see data.options.")
    source = Rooms(options.config, device=device, cache=options.cache)
    source.prepare(progress)
    return source


def _folder(source: Callable[[Path, Any], Source]) -> Opener:
    """Make the opener of a layout on disk; `source` is called with the folder and its options."""

    def call(options: Any, spec: DataSpec, device: str, progress: Progress | None) -> Source:
        if spec.path is None:
            raise RecipeError(f"Source {spec.source!r} needs a folder: {spec.source}:PATH (or data.path=PATH).")
        return source(expanded(spec.path), options)

    return call


# A layout says nothing about whose frames they are, so a folder's license is its owner's unless `data.license` tells.
_OWNER = "LicenseRef-data-owner"
# MegaDepth's photographs belong to many owners under differing terms.
SOURCES = {
    "arkitscenes": SourceRow(
        ArkitScenesOptions, _folder(open_arkitscenes), "ARKitScenes", "LicenseRef-ARKitScenes-terms"
    ),
    "colmap": SourceRow(ColmapOptions, _folder(open_colmap), "RGB-D folder reconstructed by COLMAP", _OWNER),
    "folder": SourceRow(PlainOptions, _folder(open_plain), "RGB-D folder in the plain layout", _OWNER),
    "kitti": SourceRow(KittiOptions, _folder(open_kitti), "KITTI", "CC-BY-NC-SA-3.0"),
    "megadepth": SourceRow(
        MegaDepthOptions, _folder(open_megadepth), "MegaDepth", "LicenseRef-MegaDepth-terms", "LicenseRef-unstated"
    ),
    "polycam": SourceRow(PolycamOptions, _folder(open_polycam), "RGB-D recordings by Polycam", _OWNER),
    "record3d": SourceRow(Record3DOptions, _folder(open_record3d), "RGB-D recordings by Record3D", _OWNER),
    "redwood": SourceRow(RedwoodOptions, _folder(open_redwood), "RGB-D folder in Redwood's layout", _OWNER),
    "rooms": SourceRow(RoomsOptions, _open_rooms, "rooms", "MIT"),
    "scannet": SourceRow(ScanNetConfig, _folder(ScanNet), "ScanNet", "LicenseRef-ScanNet-ToU"),
    "scenezoo": SourceRow(SceneZooOptions, _folder(open_scenezoo), "RGB-D data set read by scenezoo", _OWNER),
    "seven_scenes": SourceRow(SevenScenesConfig, _folder(SevenScenes), "RGB-D folder in 7-Scenes layout", _OWNER),
    "shards": SourceRow(ShardsOptions, _folder(Shards), "RGB-D frames in tar files", _OWNER),
    "transforms": SourceRow(TransformsOptions, _folder(open_transforms), "RGB-D folder with transforms.json", _OWNER),
    "tum": SourceRow(TumOptions, _folder(open_tum), "RGB-D folder in TUM's layout", _OWNER),
}
LAYOUTS = SOURCES.keys() - {"rooms", "scenezoo"}  # that are recognized by their files
