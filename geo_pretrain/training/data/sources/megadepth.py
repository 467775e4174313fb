"""MegaDepth: photographs of landmarks with depth, in the layout of D2-Net's preparation that Pri3D shares.

    MegaDepth_v1/0000/dense0/depths/NAME.h5             "/depth": float [H, W], 0 = invalid
    Undistorted_SfM/0000/images/NAME.jpg                what COLMAP's image_undistorter makes of MegaDepth_v1_SfM/0000,
    Undistorted_SfM/0000/sparse/ (.bin), sparse-txt/    and its model, see `colmap_model`

    colmap image_undistorter --image_path MegaDepth_v1_SfM/0000/images --max_image_size N
        --input_path MegaDepth_v1_SfM/0000/sparse/manhattan/0 --output_path Undistorted_SfM/0000

N is the longest side of an image in MegaDepth_v1/0000/dense0/imgs. Images without a depth file, or with one under
100 KiB (it holds a mask of what is near and far), are left out. A scene is one number of the release. Depth and poses
are in units of the scene's reconstruction, not in meters. Pairs of `data.measure: source` are Pri3D's: two images, in
order, of which the second observes a share of the points of the first (30 %). The points that both observe are the
centers of crops (`data.crop: match`). Needs h5py (extra `datasets`).
Source: D2-Net's megadepth_utils (mihaidusmanu/d2-net), data_preprocess/megadepth of Sekunde/Pri3D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.checks import NaturalNumber
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.sources.colmap_model import (
    ModelFiles,
    ModelImage,
    camera_of,
    find_model,
    read_cameras,
    read_images,
    read_observations,
)
from geo_pretrain.training.data.sources.conventions import Conventions, FolderOptions
from geo_pretrain.training.data.sources.recording import Recording, Recordings, View, existing_folder, readable

DEPTHS, IMAGES = "MegaDepth_v1", "Undistorted_SfM"
MODELS = ("sparse-txt", "sparse", "sparse/0")
LAYOUT = f"{DEPTHS}/0000/dense0/depths/ and {IMAGES}/0000/, which `colmap image_undistorter` makes"


@dataclass(frozen=True)
class MegaDepthOptions(FolderOptions):
    """Options of the source."""

    smallest_depth: NaturalNumber = 100 * 1024  # bytes; smaller files hold masks of what is near and far


class MegaDepth(Recordings):
    """MegaDepth as a source, with the pairs and common points that Pri3D uses."""

    models: dict[str, tuple[ModelFiles, dict[str, ModelImage]]]

    def tests(self, scene: str, ids: Sequence[str]) -> int:
        """How many pairs among images of a scene are compared."""
        return len(ids) * (len(ids) - 1)

    def overlaps(self, scene: str, ids: Sequence[str], skips: SkippedFrames) -> Iterator[tuple[str, str, float]]:
        """Yield of every two images (i, j) the share of i's points that j observes, too."""
        usable, seen = [], []
        for id in ids:
            try:
                seen.append(self._observed(scene, id)[0])
                usable.append(id)
            except BadFrame as bad:
                skips.add(bad)
        numbers = np.array([len(points) for points in seen])
        points = np.concatenate([np.zeros(0, np.int64), *seen])
        _, points = np.unique(points, return_inverse=True)
        owner = np.repeat(np.arange(len(usable)), numbers)
        starts = np.concatenate([[0], numbers.cumsum()])
        mine = np.zeros(points.max(initial=-1) + 1, dtype=bool)
        for i, id in enumerate(usable):
            own = points[starts[i] : starts[i + 1]]
            mine[own] = True
            common = np.bincount(owner[mine[points]], minlength=len(usable))
            mine[own] = False
            for j, other in enumerate(usable):
                if i != j:
                    yield id, other, float(common[j] / max(len(own), 1))

    def common_points(self, scene: str, frame1: str, frame2: str) -> np.ndarray:
        """Where two images observe the same points: float64 [N, 4], row and column in either."""
        (ids1, xy1), (ids2, xy2) = (self._observed(scene, id) for id in (frame1, frame2))
        _, one, two = np.intersect1d(ids1, ids2, assume_unique=True, return_indices=True)
        return np.hstack([xy1[one, ::-1], xy2[two, ::-1]])

    def _observed(self, scene: str, id: str) -> tuple[np.ndarray, np.ndarray]:
        model, images = self.models[scene]
        return read_observations(model.images, images[id])


def open_megadepth(root: Path, options: MegaDepthOptions) -> MegaDepth:
    """Open a folder with MegaDepth's depth and undistorted reconstructions."""
    existing_folder(root, LAYOUT)
    models: dict[str, tuple[ModelFiles, dict[str, ModelImage]]] = {}

    def read(scene: tuple[Path, Path, ModelFiles]) -> Recording:
        folder, depths, model = scene
        images = {Path(image.name).stem: image for image in read_images(model.images)}
        recording = _recording(folder, depths, model, images, options.smallest_depth)
        models[folder.name] = model, images
        return recording

    recordings = readable(_scenes(root), read)
    if not recordings:
        raise DataError(f"No scene in {str(root)!r}: expected {LAYOUT}.")
    conventions = Conventions(depth_scale=1.0, pose_convention="world_to_camera", float_depth=True)
    note = "depth and poses are in units of each scene's reconstruction, not in meters"
    source = MegaDepth("megadepth", root, recordings, conventions, options, note=note)
    source.models = models
    return source


def _scenes(root: Path) -> Iterator[tuple[Path, Path, ModelFiles]]:
    """The scenes with depth and a reconstruction: their folder, that of their depth, the model."""
    for folder in sorted((root / IMAGES).glob("*")):
        depths, model = root / DEPTHS / folder.name / "dense0" / "depths", find_model(folder, MODELS)
        if model is not None and depths.is_dir():
            yield folder, depths, model


def _recording(
    folder: Path, depths: Path, model: ModelFiles, images: dict[str, ModelImage], smallest: int
) -> Recording:
    """The images of a scene that have depth."""
    cameras, views = read_cameras(model.cameras), {}
    for id in sorted(images, key=files.natural_order):
        image, depth = images[id], depths / f"{id}.h5"
        if depth.is_file() and depth.stat().st_size >= smallest:
            camera = camera_of(image, cameras, model)
            views[id] = View(folder / "images" / image.name, depth, image.pose, camera)
    return Recording(folder.name, views, [model.images, model.cameras])
