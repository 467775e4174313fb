"""Clouds of one's own to draw: a file, or a folder of files, which need neither labels nor splits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError, RecipeError, unknown
from geo_pretrain.files import expanded
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.spacing import spacing_doubt
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.frame import Surface
from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, read_cloud
from geo_pretrain.training.data.labelled.clouds.folder import FolderOptions
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.clouds import cloud_colors
from geo_pretrain.training.visualize.columns import Opened

OWN_CLOUDS = "clouds"  # the labelled data set of one's own files


@dataclass(frozen=True)
class OwnClouds:
    """Files of clouds by name: their path below the folder, without suffix."""

    files: dict[str, Path]
    options: FolderOptions

    def pick(self, scene: str | None) -> str:
        """The cloud asked for, or the first. Raises `UnknownName`."""
        if scene is not None and scene not in self.files:
            raise unknown("cloud", scene, self.files)
        return next(iter(self.files)) if scene is None else scene

    def surface(self, scene: str, contract: VoxelContract) -> Surface:
        """Read a cloud for a network with this contract; without colors it is drawn by intensity or height.

        Warns of points that seem not to be in meters. Raises `BadFrame`, `DataError` where the network takes colors and
        the file has none.
        """
        path = self.files[scene]
        cloud = read_cloud(path, self.options, need=())
        if contract.given_channels and cloud.colors is None:
            raise DataError(
                f"{path} has no colors; the network takes {', '.join(contract.given_channels)}. Accepted: a file with "
                "colors (--set data.options.color=NAME where they have another name), or a network for points alone."
            )
        points, size = torch.from_numpy(cloud.points), contract.voxel_size
        if isinstance(size, int | float):
            coords = voxelize(points, torch.ones(len(points), 1), size).coords
            doubt = spacing_doubt(coords, len(points), size, "--set data.options.scale={}")
            if doubt is not None:
                warnings.warn(f"Cloud {scene!r}: {doubt}", stacklevel=2)
        return Surface(cloud.points, cloud_colors(cloud))


def open_own_clouds(spec: DataSpec) -> OwnClouds:
    """Find the files of `--data clouds:PATH`. Raises `DataError` where there are none, `RecipeError` without PATH."""
    options = parse(FolderOptions, spec.options, where="data.options", prefix="data.options.")
    if spec.path is None:
        raise RecipeError("Source 'clouds' needs a file or a folder: --data clouds:PATH.")
    root = expanded(spec.path)
    if root.is_file():
        return OwnClouds({root.stem: root}, options)
    inside = sorted(root.rglob("*")) if root.is_dir() else []
    files = [path for path in inside if path.suffix.lower() in CLOUD_SUFFIXES and not path.name.startswith(".")]
    if not files:
        what = f"has no {', '.join(CLOUD_SUFFIXES)} file" if root.is_dir() else "is neither a file nor a folder"
        raise DataError(f"{str(root)!r} {what}.")
    named: dict[str, Path] = {}
    for path in files:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in named:
            raise DataError(
                f"{str(path.parent)!r}: {named[name].name} and {path.name} are one cloud; keep one of them."
            )
        named[name] = path
    return OwnClouds(named, options)


def point_contract(opened: Opened) -> VoxelContract:
    """The contract of a backbone for points. Raises `RecipeError` for one for images, which a cloud does not have."""
    contract = opened.checkpoint.contract
    if not isinstance(contract, VoxelContract):
        raise RecipeError(
            f"{opened.title} is a network for images, and clouds of your own have none; accepted: a backbone for "
            "points (geo-pretrain list --modality 3d), or RGB-D data."
        )
    return contract
