"""COLMAP's reconstructions with depth: cameras and images as text or binary, images/ and depth maps.

cameras.txt and images.txt, or cameras.bin and images.bin, stand in the recording's folder or in sparse/, sparse/0/ or
sparse-txt/ below it; where there are both, the text is read. Poses are world-to-camera, as a quaternion (w, x, y, z)
and a translation. Only images without distortion are accepted, PINHOLE and SIMPLE_PINHOLE (`colmap image_undistorter`).
Principal points count from the corner of the image; here they count from the center of the first pixel.

Depth is COLMAP's own, stereo/depth_maps/NAME.geometric.bin (or .photometric.bin): "width&height&1&" and float32 row by
row, in units of the reconstruction; or depth/ with images of equal stems, 16-bit in millimeters. A reconstruction from
images alone has no meters: with `m` meters a unit, give depth_scale and pose_scale as 1 / m.
Source: https://colmap.github.io/format.html, scripts/python/read_dense.py of colmap/colmap.
The files of the model are read by `colmap_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geo_pretrain.errors import DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.sources.colmap_model import ModelFiles, camera_of, find_model, read_cameras, read_images
from geo_pretrain.training.data.sources.conventions import Conventions, FolderOptions
from geo_pretrain.training.data.sources.recording import (
    DEPTHS,
    Recording,
    Recordings,
    View,
    existing_folder,
    folders_with,
    images_in,
    readable,
    scene_name,
)

MODELS = ("", "sparse", "sparse/0", "sparse-txt")  # where the files of the model stand
MAPS = ("geometric", "photometric")


@dataclass(frozen=True)
class ColmapOptions(FolderOptions):
    """Options of the source."""


def open_colmap(root: Path, options: ColmapOptions) -> Recordings:
    """Open a reconstruction with depth maps, or a folder of them."""
    existing_folder(root, "sparse/cameras.txt and images.txt (or .bin), images/ and stereo/depth_maps/ or depth/")
    folders = folders_with(root, lambda path, folders, names: "images" in folders and _model(path) is not None)
    models = [(folder, model) for folder in folders if (model := _model(folder)) is not None]
    kinds = {_maps(folder) for folder, _ in models}
    recordings = readable(models, lambda found: _recording(root, *found))
    if len(kinds) > 1:
        raise DataError(
            f"Some reconstructions below {str(root)!r} have stereo/depth_maps/, others depth/: open each kind."
        )
    conventions = Conventions(pose_convention="world_to_camera")
    note = ""
    if True in kinds:
        conventions = Conventions(depth_scale=1.0, pose_convention="world_to_camera", float_depth=True)
        given = options.depth_scale is not None
        note = "" if given else "depth and poses are in units of the reconstruction, which may not be meters"
    return Recordings("colmap", root, recordings, conventions, options, note=note)


def _model(folder: Path) -> ModelFiles | None:
    return find_model(folder, MODELS)


def _maps(folder: Path) -> bool:
    """Whether depth is COLMAP's own."""
    return (folder / "stereo" / "depth_maps").is_dir()


def _recording(root: Path, folder: Path, model: ModelFiles) -> Recording:
    cameras = read_cameras(model.cameras)
    views: dict[str, View] = {}
    depths = {} if _maps(folder) else images_in(folder / "depth", DEPTHS)
    for image in sorted(read_images(model.images), key=lambda image: files.natural_order(image.name)):
        stem = Path(image.name).with_suffix("").as_posix()
        if _maps(folder):
            own = [folder / "stereo" / "depth_maps" / f"{image.name}.{kind}.bin" for kind in MAPS]
            depth = next((path for path in own if path.is_file()), own[0])
        else:
            depth = depths.get(stem, folder / "depth" / f"{stem}.png")
        views[stem] = View(folder / "images" / image.name, depth, image.pose, camera_of(image, cameras, model))
    return Recording(scene_name(root, folder), views, [model.images, model.cameras])
