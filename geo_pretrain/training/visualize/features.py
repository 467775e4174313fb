"""What a backbone says about the pixels of a frame and about the points of a surface, whatever kind it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain import hub
from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.checkpoint import Checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import BadFrame
from geo_pretrain.geometry import seen_at
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.sparse.functional import point_rows
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop
from geo_pretrain.training.data.surfaces.fusing import Surfaces, cubic_voxel_size, frame_cloud
from geo_pretrain.training.evaluation.pixel_voxel import load_pri3d, random_pair
from geo_pretrain.training.recipe import recipe_of
from geo_pretrain.training.tasks.clouds import encode
from geo_pretrain.training.tasks.pri3d import Pri3D
from geo_pretrain.training.visualize.splat import frame_camera, splat

RANDOM = "random weights"  # what the twin is called in pictures
ENCODER_MAP = 2  # of an encoder that comes alone: stride 8, the finest with a view of whole things
SEEN_WITHIN = 0.05  # m along the optical axis between a point and the depth of a frame that sees it


@dataclass(frozen=True)
class Features:
    """Features of pixels or points, many of which share one: a cell of a map, a voxel."""

    rows: Tensor  # float32 [M, C], unit length: matching compares by cosine
    index: np.ndarray  # int64 [H, W] or [N], the row of each pixel or point, -1 for none


class Describer(ABC):
    """One network, and what it says. Describers of one `space` share a feature space, so one color space."""

    def __init__(self, title: str, space: str) -> None:
        self.title, self.space = title, space

    @abstractmethod
    def of_frame(self, frame: Frame) -> Features:
        """Features of a frame's pixels. Raises `BadFrame` when it has none."""

    @abstractmethod
    def of_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Features of the points of a surface that `frames` look at."""


class ImageDescriber(Describer):
    """A 2D network: a dense map, or one map of an encoder."""

    def __init__(self, title: str, space: str, network: Any, contract: ImageContract, level: int | None) -> None:
        """`level`: which of the maps, where `network` gives several."""
        super().__init__(title, space)
        self.network, self.contract, self.level = network, contract, level

    @torch.no_grad()
    def of_frame(self, frame: Frame) -> Features:
        """Each pixel has the cell of the map that covers it."""
        device = next(self.network.parameters()).device
        features = self._map(self.contract.transforms(resize=False)(frame.color)[None].to(device))
        rows = self._project(features[0].float().flatten(1).T)
        (height, width), (h, w) = frame.depth.shape, features.shape[-2:]
        index = (np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width
        return Features(F.normalize(rows, dim=1).cpu(), index.astype(np.int64))

    def of_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """The mean over the frames that see a point, within 5 cm of their depth; the direction of it."""
        points = torch.from_numpy(surface.points).double()
        total: Tensor | None = None
        count = torch.zeros(len(points), dtype=torch.int64)
        for frame in frames:
            found = self.of_frame(frame)
            depth, intrinsics, pose = (
                torch.from_numpy(a).double() for a in (frame.depth, frame.intrinsics, frame.cam_to_world)
            )
            pixel = seen_at(points, depth, intrinsics, pose, tolerance=SEEN_WITHIN, rounding="nearest")
            seen = (pixel >= 0).nonzero()[:, 0]
            if total is None:
                total = torch.zeros(len(points), found.rows.shape[1])
            total.index_add_(0, seen, found.rows[torch.from_numpy(found.index).flatten()[pixel[seen]]])
            count[seen] += 1
        known = (count > 0).nonzero()[:, 0]
        if total is None or not len(known):
            raise BadFrame(frames[0].scene if frames else "scene", "no frame sees a point of the surface")
        index = torch.full((len(points),), -1).index_copy_(0, known, torch.arange(len(known)))
        return Features(F.normalize(total[known], dim=1), index.numpy())

    def _map(self, images: Tensor) -> Tensor:
        """Images [1, 3, H, W], normalized -> [1, C, h, w]."""
        found: Any = self.network(images)
        features: Tensor = found if self.level is None else found[self.level]
        return features

    def _project(self, rows: Tensor) -> Tensor:
        return rows


class CloudDescriber(Describer):
    """A 3D network. Clouds are given to it as they lie in the world, whose z is up in most data sets."""

    def __init__(self, title: str, space: str, network: Any, contract: VoxelContract, level: int | None) -> None:
        """`level`: the map of the network's pyramid; None: its output. Raises `CheckpointError` for other voxels."""
        super().__init__(title, space)
        cubic_voxel_size(contract)
        self.network, self.contract, self.level = network, contract, level

    def of_frame(self, frame: Frame) -> Features:
        """Each pixel with a depth has the voxel of the frame's own cloud that it falls into."""
        cloud = frame_cloud(frame)
        if not len(cloud):
            raise BadFrame(f"{frame.scene}/{frame.id}", "no pixel has a valid depth")
        found = self.of_surface(cloud, [])
        index = np.full(frame.depth.shape, -1, np.int64)
        index[frame.depth > 0] = found.index
        return Features(found.rows, index)

    @torch.no_grad()
    def of_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Each point has the voxel it lies in; `frames` are not needed."""
        colors = surface.colors if self.contract.given_channels else None
        voxels = self.contract.transforms()(surface.points, colors)
        device = next(self.network.parameters()).device
        x = SparseTensor(voxels.coords.to(device), voxels.feats.to(device))
        return Features(F.normalize(self._rows(x).float().cpu(), dim=1), voxels.inverse.numpy())

    def _rows(self, x: SparseTensor) -> Tensor:
        """Features [N, C] of the voxels, in the order of `x.coords`."""
        found = self.network(x) if self.level is None else self.network.pyramid(x)[self.level]
        rows: Tensor = found.feats[point_rows(found, x.coords)]
        return rows


class Pri3DPixels(ImageDescriber):
    """The U-Net of Pri3D, projected into the space in which its pixels and voxels are compared."""

    def __init__(self, title: str, space: str, task: Pri3D) -> None:
        super().__init__(title, space, task.backbone, task.contract, None)
        self.task = task

    def _project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.task.w2d(rows)
        return projected


class Pri3DVoxels(Describer):
    """The 3D network of Pri3D, projected into the space in which its pixels and voxels are compared."""

    def __init__(self, title: str, space: str, task: Pri3D, surfaces: Surfaces) -> None:
        super().__init__(title, space)
        self.task, self.surfaces = task, surfaces

    def of_frame(self, frame: Frame) -> Features:
        """The chunk of surface around the frame, as in pre-training, drawn into its camera."""
        chunk = crop(
            self.surfaces.load(frame.scene), *chunk_box(frame, match_released_code=not self.task.config.frustum)
        )
        if not len(chunk):
            raise BadFrame(f"{frame.scene}/{frame.id}", "no surface lies around the frame")
        found = self.of_surface(chunk, [])
        row = splat(torch.from_numpy(chunk.points), frame_camera(frame), self.task.voxel_size / 2)
        return Features(found.rows, np.where(row >= 0, found.index[row], -1))

    @torch.no_grad()
    def of_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Each point has the voxel it lies in; `frames` are not needed."""
        feats = torch.from_numpy(surface.colors).float() / 255
        if self.task.config.features == "ones":
            feats = torch.ones_like(feats)
        voxels = voxelize(torch.from_numpy(surface.points), feats, self.task.voxel_size)
        device = self.task.w3d.weight.device
        coords, feats = voxels.coords.to(device), voxels.feats.to(device)
        rows = self.task.w3d(encode(self.task.backbone3d, coords, feats, low_precision=False))
        return Features(F.normalize(rows, dim=1).cpu(), voxels.inverse.numpy())


class PairPixels(ImageDescriber):
    """The image network of a pair with one feature space: a teacher's, of PPKT or Janda et al."""

    def __init__(self, title: str, space: str, pair: FeaturePair) -> None:
        super().__init__(title, space, pair, pair.image_contract, None)
        self.pair = pair

    def _map(self, images: Tensor) -> Tensor:
        return self.pair.image_map(images)


class PairPoints(CloudDescriber):
    """The point network of a pair with one feature space: the student."""

    def __init__(self, title: str, space: str, pair: FeaturePair) -> None:
        super().__init__(title, space, pair, pair.point_contract, None)
        self.pair = pair

    def _rows(self, x: SparseTensor) -> Tensor:
        return self.pair.encode_voxels(x)


@dataclass(frozen=True)
class Opened:
    """A backbone found, not loaded yet."""

    name: str  # as given
    checkpoint: Checkpoint

    @property
    def title(self) -> str:
        """The name, of a folder the last part of its path."""
        return Path(self.name).name or self.name

    @property
    def in_both(self) -> bool:
        """Whether it holds a 2D and a 3D network with one feature space: Pri3D's geometric prior."""
        recipe = recipe_of(self.checkpoint) if "heads" in self.checkpoint.roles else None
        return recipe is not None and recipe.task["name"] in ("pri3d_geo", "pri3d_view_geo")


def find_backbone(name: str) -> Opened:
    """The checkpoint of a catalog name or folder, with all it takes to draw. Raises what `hub.open` does."""
    opened = hub.open(name)
    return Opened(name, opened.fetch(*opened.network_roles(), optional=("heads", "recipe")))


def load_describers(
    found: Opened,
    surfaces: Surfaces,
    *,
    level: int | None = None,
    random: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Describer]:
    """The describers of a backbone: one, or for pixels and voxels of one feature space two.

    Args:
        surfaces: of the source that frames come from.
        level: a map of the encoder (0 to 4: strides 2 to 32) or of the sparse U-Net (strides 1 to 16); None: the
            output, of an encoder that comes alone the map of stride 8.
        random: the same architecture with random weights drawn from `seed`.
    """
    checkpoint, title = found.checkpoint, RANDOM if random else found.title
    space = f"{found.name} {random}"
    if found.in_both and level is None:
        task = load_pri3d(found.name, pretrained=not random, seed=seed).to(device)
        return [
            Pri3DPixels(f"{title}: pixels", space, task),
            Pri3DVoxels(f"{title}: voxels", space, task, surfaces),
        ]
    contract = checkpoint.contract
    if checkpoint.pairing is not None and isinstance(contract, VoxelContract) and level is None:
        pair = random_pair(found.name, seed) if random else load_pair(found.name)
        pair, title = pair.to(device), "random student" if random else title  # the teacher keeps its weights
        return [PairPixels(f"{title}: pixels", space, pair), PairPoints(f"{title}: voxels", space, pair)]
    decoder = isinstance(contract, ImageContract) and checkpoint.arch.has_decoder and level is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load_backbone(checkpoint.folder, decoder=decoder, pretrained=not random, device=device)
    if isinstance(contract, VoxelContract):
        return [CloudDescriber(title, space, network, contract, level)]
    if not decoder and level is None:
        level = ENCODER_MAP
    return [ImageDescriber(title, space, network, contract, level)]
