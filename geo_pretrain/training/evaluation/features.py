"""The feature extractor: a frozen network's features of the pixels of a frame and of the points of a surface.

`ImageExtractor` wraps a 2D network, `CloudExtractor` a 3D one, `PairedExtractor` two networks with one feature space.
Matching, probes and pictures all read features through them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, WeightsMismatch
from geo_pretrain.geometry import seen_at, transform
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.seeding import seeded
from geo_pretrain.sparse.functional import point_rows
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.samples.clouds import chunk_voxels
from geo_pretrain.training.data.samples.frame_clouds import FrameCloudConfig, frame_voxels
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces, cubic_voxel_size, frame_cloud
from geo_pretrain.training.networks3d import encode
from geo_pretrain.training.recipe import AugmentSpec, recipe_of
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.matching import one_match_each
from geo_pretrain.training.tasks.pri3d import Pri3D

RANDOM = "random"  # name of the random-init baseline in results
SEEN_WITHIN = 0.05  # m along the optical axis between a point and the depth of a frame that sees it
PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)
GEOMETRIC = ("pri3d_geo", "pri3d_view_geo")  # tasks whose folders hold Pri3D's 3D network
ACCEPTED = f"accepted: folders that a recipe of task {' or '.join(GEOMETRIC)} wrote"


@dataclass(frozen=True)
class Features:
    """Features of map cells or voxels, and the index of the feature of each pixel or point."""

    rows: Tensor  # float32 [M, C], as the network gives them and where it is
    index: np.ndarray  # int64 [H, W] or [N], the row of each pixel or point, -1 for none
    positions: Tensor  # float64 [M, D] of each row: (u, v) px; a voxel's first point, m; of chunks the voxel itself

    def unit(self) -> Tensor:
        """Normalize the rows to unit length, as cosine compares them; on the CPU."""
        return F.normalize(self.rows, dim=1).cpu()

    def rows_at(self, pixels: Tensor) -> Tensor:
        """Gather features of flat pixels or points: [Q, C], laid out as a map's, on which sums of float32 depend."""
        chosen = torch.from_numpy(self.index).flatten()[pixels].to(self.rows.device)
        return self.rows.T.index_select(1, chosen).T


class FeatureExtractor(nn.Module, ABC):
    """A frozen network that gives features of pixels and points."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    @abstractmethod
    def extract_frame(self, frame: Frame) -> Features:
        """Extract features of a frame's pixels. Raises `BadFrame` when it has none."""

    @abstractmethod
    def extract_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Extract features of the points of a surface that `frames` look at."""


class ImageExtractor(FeatureExtractor):
    """Feature extractor around a 2D network: its dense map, or one map of an encoder."""

    def __init__(
        self,
        network: nn.Module,
        contract: ImageContract,
        *,
        level: int | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        """Wrap a network from images [B, 3, H, W] to a map [B, C, h, w] or several.

        Args:
            level: which of the maps, where `network` gives several.
            projection: into a space shared with another modality, from rows [M, C] to rows [M, D].
        """
        super().__init__()
        self.network, self.contract, self.level, self.projection = network, contract, level, projection
        self.eval()

    def maps(self, image: np.ndarray, *, resize: bool = False) -> list[Tensor]:
        """Compute all maps [1, C, h, w] of an image uint8 [H, W, 3]; `resize`: first to the contract's size."""
        inputs = self.contract.transforms(resize=resize)(image)[None].to(self.device)
        outputs: Any = self.network(inputs)
        return [m.float() for m in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    @torch.no_grad()
    def extract_frame(self, frame: Frame) -> Features:
        """Assign each pixel the cell of the map that covers it; a cell's position is its center."""
        features = self.maps(frame.color)[self.level or 0]
        (height, width), (h, w) = frame.depth.shape, features.shape[-2:]
        index = _cells(height, h)[:, None] * w + _cells(width, w)
        stride = round(height / h)
        cell = torch.arange(h * w)
        centers = torch.stack([cell % w, cell // w], dim=-1) * stride + (stride - 1) / 2
        rows = features[0].flatten(1).T
        return Features(rows if self.projection is None else self.projection(rows), index, centers.double())

    @torch.no_grad()
    def extract_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Average the features of each point over the frames that see it, within 5 cm of their depth."""
        points = torch.from_numpy(surface.points).double()
        total: Tensor | None = None
        count = torch.zeros(len(points), dtype=torch.int64)
        for frame in frames:
            features = self.extract_frame(frame)
            rows = features.unit()
            depth, intrinsics, pose = (
                torch.from_numpy(a).double() for a in (frame.depth, frame.intrinsics, frame.cam_to_world)
            )
            pixel = seen_at(points, depth, intrinsics, pose, tolerance=SEEN_WITHIN, rounding="nearest")
            seen = (pixel >= 0).nonzero()[:, 0]
            if total is None:
                total = torch.zeros(len(points), rows.shape[1])
            total.index_add_(0, seen, rows[torch.from_numpy(features.index).flatten()[pixel[seen]]])
            count[seen] += 1
        known = (count > 0).nonzero()[:, 0]
        if total is None or not len(known):
            raise BadFrame(frames[0].scene if frames else "scene", "no frame sees a point of the surface")
        index = torch.full((len(points),), -1).index_copy_(0, known, torch.arange(len(known)))
        return Features(total[known], index.numpy(), points[known])


class CloudExtractor(FeatureExtractor):
    """Feature extractor around a 3D network. Clouds keep the world's axes, whose z is mostly up."""

    def __init__(
        self, network: nn.Module, contract: VoxelContract, *, level: int | None = None, frames: bool = True
    ) -> None:
        """Wrap a network from voxels to voxels.

        `level`: a map of its pyramid; None: its output. With `frames`, of which it then extracts features, raises
        `CheckpointError` for voxels that RGB-D cannot give.
        """
        super().__init__()
        if frames:
            self.voxel_size = cubic_voxel_size(contract)
        self.network, self.contract, self.level = network, contract, level
        self.eval()

    def extract_frame(self, frame: Frame) -> Features:
        """Assign each pixel with a depth the voxel of the frame's own cloud that it falls into."""
        features = self.extract_surface(cloud_of(frame), [])
        index = np.full(frame.depth.shape, -1, np.int64)
        index[frame.depth > 0] = features.index
        return replace(features, index=index)

    @torch.no_grad()
    def extract_surface(
        self, surface: Surface, frames: Sequence[Frame], *, to_network: Tensor | None = None
    ) -> Features:
        """Extract one feature per voxel and the voxel of each point; `frames` are unused.

        `to_network`: float64 [4, 4], moves the points before they are voxelized; positions stay those in the world.
        """
        world = torch.from_numpy(surface.points).double()
        points = surface.points if to_network is None else transform(world, to_network).float()
        voxels = self.contract.transforms()(points, surface.colors if self.contract.given_channels else None)
        rows = self.voxel_rows(SparseTensor(voxels.coords.to(self.device), voxels.feats.to(self.device)))
        return Features(rows.float(), voxels.inverse.numpy(), world[voxels.index])

    def voxel_rows(self, x: SparseTensor) -> Tensor:
        """Compute features [N, C] of voxels, in the order of `x.coords`."""
        network: Any = self.network
        outputs = network(x) if self.level is None else network.pyramid(x)[self.level]
        rows: Tensor = outputs.feats[point_rows(outputs, x.coords)]
        return rows


@dataclass(frozen=True)
class Correspondences:
    """Pixels of one frame and the voxels that they show."""

    pixels: Tensor  # float32 [Q, C], features of the pixels
    voxels: Tensor  # int64 [Q], the row of the voxel of each
    candidates: Features  # all voxels; their positions are their coordinates


class PairedExtractor(nn.Module, ABC):
    """A 2D and a 3D network that share one feature space."""

    pixels: FeatureExtractor
    voxels: FeatureExtractor

    @abstractmethod
    def correspond(self, frame: Frame, queries: int, generator: torch.Generator) -> Correspondences:
        """Draw at most `queries` pixels of a frame, each with the voxel that it shows. Raises `BadFrame`."""


class Pri3DExtractor(PairedExtractor):
    """Both networks of Pri3D's geometric prior, on the chunk of surface around a frame."""

    def __init__(self, task: Pri3D, surfaces: Surfaces) -> None:
        super().__init__()
        self.task = task
        self.pixels = ImageExtractor(task.backbone, task.contract, projection=task.w2d)
        self.voxels = ChunkExtractor(task, surfaces)

    @torch.no_grad()
    def correspond(self, frame: Frame, queries: int, generator: torch.Generator) -> Correspondences:
        """Draw cells of the half-resolution map that show a voxel of the frame's chunk.

        A voxel is shown where its center is seen (in front of the camera, depth within 5 cm). All voxels of the chunk
        are candidates, seen or not.
        """
        candidates = self.voxels.extract_frame(frame)
        centers = (candidates.positions + 0.5) * self.task.voxel_size
        depth, intrinsics, pose = (torch.from_numpy(a) for a in (frame.depth, frame.intrinsics, frame.cam_to_world))
        target = seen_at(centers, depth, intrinsics.float(), pose, rounding=self.task.config.rounding)
        seen = (target >= 0).nonzero()[:, 0]
        if not len(seen):
            raise BadFrame(f"{frame.scene}/{frame.id}", "frame sees no voxel")
        image = self.pixels.extract_frame(frame)
        cell = torch.from_numpy(image.index).flatten()[target[seen]]
        cell, voxel = one_match_each(torch.stack([cell, seen], dim=1), queries, generator).unbind(-1)
        return Correspondences(image.rows[cell.to(image.rows.device)], voxel, candidates)


class ChunkExtractor(FeatureExtractor):
    """The 3D network of Pri3D, projected into the space in which its pixels and voxels are compared."""

    def __init__(self, task: Pri3D, surfaces: Surfaces) -> None:
        super().__init__()
        self.task, self.surfaces, self.voxel_size = task, surfaces, task.voxel_size
        self.eval()

    def chunk(self, frame: Frame) -> Surface:
        """Crop the chunk of surface around a frame, as in pre-training. Raises `BadFrame` when it is empty."""
        box = chunk_box(frame, match_released_code=not self.task.config.frustum)
        chunk = crop_surface(self.surfaces.load(frame.scene), *box)
        if not len(chunk):
            raise BadFrame(f"{frame.scene}/{frame.id}", "no surface lies around the frame")
        return chunk

    def extract_frame(self, frame: Frame) -> Features:
        """Extract one feature per voxel of the frame's chunk; `index` runs over the chunk's points."""
        return self.extract_surface(self.chunk(frame), [])

    @torch.no_grad()
    def extract_surface(self, surface: Surface, frames: Sequence[Frame]) -> Features:
        """Extract one feature per voxel and the voxel of each point; `frames` are unused."""
        config = self.task.config
        voxels = chunk_voxels(surface, self.voxel_size, config.features, match_released_code=config.match_released_code)
        coords, feats = voxels.coords.to(self.device), voxels.feats.to(self.device)
        rows = self.task.w3d(encode(self.task.backbone3d, coords, feats, low_precision=False))
        return Features(rows, voxels.inverse.numpy(), voxels.coords[:, 1:].double())


class TaughtExtractor(PairedExtractor):
    """A point network and the image network that taught it (PPKT, img2pc), on the frame's own cloud."""

    voxels: CloudExtractor

    def __init__(self, pair: FeaturePair) -> None:
        super().__init__()
        self.pair = pair
        self.pixels = ImageExtractor(_ImageMap(pair), pair.image_contract)
        self.voxels = _PairVoxels(pair, pair.point_contract)

    @torch.no_grad()
    def correspond(self, frame: Frame, queries: int, generator: torch.Generator) -> Correspondences:
        """Draw voxels of the frame's cloud, in the world's axes; each shows its first pixel.

        Features of pixels are those of the map made as large as the image.
        """
        if not frame.depth.any():
            raise BadFrame(f"{frame.scene}/{frame.id}", "no pixel has a valid depth")
        pair, contract, device = self.pair, self.pair.point_contract, self.pixels.device
        kind: Literal["rgb", "ones"] = "rgb" if contract.given_channels else "ones"
        spec = FrameCloudConfig(voxel_size=cubic_voxel_size(contract), features=kind, rotation="none")
        voxels = frame_voxels(frame, spec, generator)
        feats = voxels["feats"] + 0.5 + contract.offset if contract.given_channels else voxels["feats"]
        coords = F.pad(voxels["coords"], (1, 0))
        chosen = torch.randperm(len(coords), generator=generator)[:queries]
        image = pair.image_contract.transforms(resize=False)(frame.color)[None].to(device)
        pixels = pair.encode_image(image)[0].flatten(1).T[voxels["pixel"][chosen].to(device)]
        rows = self.voxels.voxel_rows(SparseTensor(coords.to(device), feats.to(device)))
        index = voxels["voxel"].numpy()
        return Correspondences(pixels, chosen, Features(rows, index, voxels["coords"].double()))


class _ImageMap(nn.Module):
    """The image network of a pair and its projection, at the network's own resolution."""

    def __init__(self, pair: FeaturePair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, images: Tensor) -> Tensor:
        return self.pair.image_map(images)


class _PairVoxels(CloudExtractor):
    """The point network of a pair and its projection."""

    def voxel_rows(self, x: SparseTensor) -> Tensor:
        pair: Any = self.network
        rows: Tensor = pair.encode_voxels(x)
        return rows


class EncoderMaps(nn.Module):
    """An encoder's maps side by side at half resolution: each of unit length, enlarged (bilinear).

    What is matched where there is no decoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """`encoder` gives a list of maps [B, C_i, H_i, W_i], those that are to be matched."""
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, sum of channels, H / 2, W / 2]."""
        size = (x.shape[2] // 2, x.shape[3] // 2)
        maps = [F.normalize(m) for m in self.encoder(x)]
        return torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)


def open_checkpoint(name: str | Path, *, heads: bool = False) -> Checkpoint:
    """Fetch a backbone (catalog name or folder) with its recipe; `heads`: also what a paired network needs."""
    opened = hub.open(name)
    return opened.fetch(*opened.network_roles(), optional=("heads", "recipe") if heads else ("recipe",))


def pretraining_size(checkpoint: Checkpoint, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Size of frames (height, width) in pre-training; `otherwise` where neither contract nor recipe says it."""
    if isinstance(checkpoint.contract, ImageContract):
        return checkpoint.contract.size
    recipe = recipe_of(checkpoint)
    return otherwise if recipe is None else recipe.data.size


def load_network(
    folder: str | Path,
    *,
    random_init: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Any:
    """Load a backbone, or its architecture with random weights drawn from `seed`; `options` of `load_backbone`."""
    with seeded(seed):
        return load_backbone(folder, pretrained=not random_init, device=device, **options)


def deep_maps(arch: Arch) -> tuple[int, ...]:
    """Indices of an encoder's maps above stride 2, which are measured: of a ResNet those at strides 4, 8, 16, 32."""
    return tuple(index for index, (_, stride) in enumerate(arch.maps) if stride > 2)


def output_options(checkpoint: Checkpoint, *, decoder: bool = True) -> dict[str, Any]:
    """Options of `load_backbone` for the output: of a 2D network the U-Net's, without decoder the encoder's maps."""
    if checkpoint.arch.modality == "3d":
        return {}
    return {"decoder": True} if decoder and checkpoint.arch.has_decoder else {"out_indices": deep_maps(checkpoint.arch)}


def load_extractor(folder: str | Path, *, level: int | None = None, **options: Any) -> ImageExtractor | CloudExtractor:
    """Load one network of a checkpoint folder; `options`: `random_init`, `seed` and `device` of `load_network`.

    `level`: a map of the encoder (0 to 4: strides 2 to 32) or of the sparse U-Net (strides 1 to 16); None: the output,
    of an encoder that comes alone its maps side by side (`EncoderMaps`).
    """
    checkpoint = read_checkpoint(folder)
    contract = checkpoint.contract
    if level is None:
        options |= output_options(checkpoint)
    network = load_network(folder, **options)
    if isinstance(contract, VoxelContract):
        return CloudExtractor(network, contract, level=level)
    return ImageExtractor(EncoderMaps(network) if "out_indices" in options else network, contract, level=level)


def is_paired(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds a 2D and a 3D network with one feature space, which `load_paired` accepts."""
    if _is_taught(checkpoint):
        return True
    recipe = recipe_of(checkpoint) if "heads" in checkpoint.roles else None
    return recipe is not None and recipe.task["name"] in GEOMETRIC


def _is_taught(checkpoint: Checkpoint) -> bool:
    return checkpoint.pairing is not None and checkpoint.arch.modality == "3d"


def load_paired(name: str | Path, *, random_init: bool = False, seed: int = 0) -> Pri3D | FeaturePair:
    """Load both networks of a checkpoint of Pri3D's geometric prior, PPKT or img2pc.

    `random_init`: all weights of Pri3D are drawn from `seed`; of a taught network its own and the projections. Raises
    `CheckpointError` for one network alone, and for a folder that does not say how its 3D part is built.
    """
    if _is_taught(open_checkpoint(name)):
        return random_pair(name, seed) if random_init else load_pair(name)
    return load_pri3d(str(name), pretrained=not random_init, seed=seed)


def paired_extractor(networks: Pri3D | FeaturePair, surfaces: Surfaces | None) -> PairedExtractor:
    """Wrap both networks of a checkpoint; `surfaces` are those of the source that frames come from.

    Pri3D's chunks are cut from them; a pair of networks needs none.
    """
    if isinstance(networks, FeaturePair):
        return TaughtExtractor(networks)
    assert surfaces is not None
    return Pri3DExtractor(networks, surfaces)


def random_pair(name: str | Path, seed: int = 0) -> FeaturePair:
    """Load a pair whose point network and projections are drawn from `seed`; the teacher keeps its weights."""
    pair = load_pair(name)
    with seeded(seed):
        fresh = load_backbone(str(name), pretrained=False)
        pair.get_submodule("point_network").load_state_dict(fresh.state_dict())
        for layer in (pair.image_projection, pair.point_projection):
            if layer is not None:
                layer.reset_parameters()
    return pair


def load_pri3d(name: str, *, pretrained: bool = True, seed: int = 0) -> Pri3D:
    """Load both networks and projections of Pri3D, in eval mode, with samples that are not augmented.

    A folder converted from an authors' file takes its catalog entry's recipe. `pretrained=False`: the same with random
    weights, drawn from `seed`. Raises `CheckpointError` for a folder without the 3D part.
    """
    checkpoint = open_checkpoint(name, heads=True)
    if "heads" not in checkpoint.roles:
        raise CheckpointError(f"{name!r} has no voxel part (a file with role 'heads'); {ACCEPTED}.")
    recipe = recipe_of(checkpoint)
    if recipe is None:
        raise CheckpointError(f"{checkpoint.folder}: no recipe tells how its voxel part is built; {ACCEPTED}.")
    if recipe.task["name"] not in GEOMETRIC:
        raise CheckpointError(f"{name!r} was trained by task {recipe.task['name']!r}, without voxels; {ACCEPTED}.")
    start = str(checkpoint.folder) if pretrained else "scratch"
    recipe = replace(
        recipe,
        seed=seed,
        data=replace(recipe.data, augment=PLAIN),
        model=recipe.model and replace(recipe.model, init=start),
        task=recipe.task | {"keep_heads": pretrained},
    )
    try:
        return cast(Pri3D, build_task(recipe)).eval()
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{start}: the weights do not fit the folder's own recipe: {error}") from error


def cloud_of(frame: Frame) -> Surface:
    """Back-project a frame. Raises `BadFrame` when no pixel has a depth."""
    cloud = frame_cloud(frame)
    if not len(cloud):
        raise BadFrame(f"{frame.scene}/{frame.id}", "no pixel has a valid depth")
    return cloud


def _cells(pixels: int, cells: int) -> np.ndarray:
    """Map pixels along an axis to cells: int64 [pixels]; at half resolution pixel // 2, as in pre-training."""
    pixel = np.arange(pixels)
    index = np.minimum(pixel // 2, cells - 1) if round(pixels / cells) == 2 else pixel * cells // pixels
    return index.astype(np.int64)
