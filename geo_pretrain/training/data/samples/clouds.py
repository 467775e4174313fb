"""Samples with voxels: two rotated point clouds with their matches, or two images with the chunks around them.

Defaults are the released code's of PointContrast (Xie et al., ECCV 2020); "rgb" and "upright" are those of CSC (Hou
et al., CVPR 2021). Chunks are Pri3D's (Hou et al., ICCV 2021). All draws depend on (seed, epoch, index) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from geo_pretrain.geometry import radius_matches, transform
from geo_pretrain.sparse.coordinates import Voxels, voxelize
from geo_pretrain.training.checks import Meters, NotNegative, PositiveRange, Probability, Ranged
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.samples.augment import Rotation, scaled_rotation, uniform
from geo_pretrain.training.data.samples.pairs import PairSamples, read_pair
from geo_pretrain.training.data.samples.sampler import Key, Samples, Skipped
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces, frame_cloud

Features = Literal["ones", "rgb"]


@dataclass(frozen=True)
class PairCloudSettings(Ranged):
    """What a task may choose of `PairCloudConfig`; each default is PointContrast's released code's."""

    radius: Meters | None = None  # of a match; None: 1.5 voxels
    features: Features = "ones"  # "rgb": color / 255 - 0.5
    rotation: Rotation = "full"  # "upright": any angle about z, +-pi/64 about x and y
    jitter: NotNegative = 0.01  # standard deviation; of rgb on the scale 0 to 255, as in CSC's code (no visible effect)
    jitter_prob: Probability = 0.95
    match_released_code: bool = False  # give a pair without matches the match (0, 0)


@dataclass(frozen=True)
class PairCloudConfig(PairCloudSettings):
    """How a frame becomes voxels."""

    voxel_size: Meters = 0.025
    scale: PositiveRange = (1.0, 1.0)  # same for both clouds; the released code has (0.8, 1.2) switched off

    @property
    def match_radius(self) -> float:
        """Largest distance of matching points, m (world)."""
        return 1.5 * self.voxel_size if self.radius is None else self.radius


@dataclass(eq=False, repr=False)
class CloudPairSamples(Samples):
    """The point clouds of frame pairs, each rotated at random.

    coords1, 2: int32 [n, 3], voxels of the rotated cloud; feats1, 2: float [n, C]; points1, 2: float32 [n, 3], the
    point that stands for each voxel, rotated frame, m; to_world1, 2: float64 [4, 4], from the rotated frame.
    matches: int64 [m, 2], all pairs of rows whose points are closer than the radius in the world.
    """

    coords = ("coords1", "coords2")
    ragged = ("feats1", "feats2", "points1", "points2", "matches")

    cloud: PairCloudConfig

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        _, frames = read_pair(self, key, generator, skipped)
        scale = uniform(*self.cloud.scale, generator)
        sample: dict[str, Any] = {}
        world = []
        for number, frame in enumerate(frames, start=1):
            view = rotated_voxels(frame_cloud(frame), self.cloud, scale, generator)
            world.append(transform(view["points"].double(), view["to_world"]))
            sample |= {f"{name}{number}": value for name, value in view.items()}
        sample["matches"] = radius_matches(world[0], world[1], self.cloud.match_radius)
        if self.cloud.match_released_code and not len(sample["matches"]):
            sample["matches"] = torch.zeros(1, 2, dtype=torch.int64)
        return sample

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples; matches are rows of the batch, and matches_per_pair is how many each pair has."""
        batch = super().collate(samples)
        batch["matches_per_pair"] = [len(sample["matches"]) for sample in samples]
        rows = torch.tensor([[len(sample[name]) for name in cls.coords] for sample in samples])  # [B, 2]
        starts = rows.cumsum(dim=0) - rows
        batch["matches"] = batch["matches"] + starts.repeat_interleave(torch.tensor(batch["matches_per_pair"]), dim=0)
        return batch


@dataclass(eq=False, repr=False)
class ChunkPairSamples(PairSamples):
    """`PairSamples` with the surface around each frame: coords1, 2 int32 [n, 3], world voxels; feats1, 2 [n, 3].

    Args:
        features: "rgb" is color / 255, as in the released code; "ones" is the paper's occupancy.
        frustum: use the tight box of the view frustum instead of the authors' box, see `chunk_box`.
        match_released_code: truncate voxel indices towards zero instead of rounding down.
        cache_dir: folder of fused surfaces, see `Surfaces`.
    """

    coords = ("coords1", "coords2")
    ragged = ("feats1", "feats2")

    _: KW_ONLY
    voxel_size: float = 0.02
    features: Features = "rgb"
    frustum: bool = False
    match_released_code: bool = False
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.surfaces = Surfaces(self.source, self.cache_dir)

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        box = chunk_box(frame, match_released_code=not self.frustum)
        chunk = crop_surface(self.surfaces.load(frame.scene), *box)
        voxels = chunk_voxels(chunk, self.voxel_size, self.features, match_released_code=self.match_released_code)
        return super()._tensors(frame, generator) | {"coords": voxels.coords[:, 1:], "feats": voxels.feats}


def chunk_voxels(
    surface: Surface, voxel_size: float, features: Features, *, match_released_code: bool = False
) -> Voxels:
    """Voxelize a surface in the world's axes as Pri3D feeds it; see `ChunkPairSamples` for the arguments."""
    points, feats = torch.from_numpy(surface.points), torch.from_numpy(surface.colors).float() / 255
    if features == "ones":
        feats = torch.ones_like(feats)
    if match_released_code:
        points = (points / voxel_size).trunc() * voxel_size + voxel_size / 2
    return voxelize(points, feats, voxel_size)


def rotated_voxels(
    cloud: Surface, config: PairCloudConfig, scale: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Rotate a cloud about its centroid, which moves to the origin, and voxelize it, one point per voxel."""
    points, colors = torch.from_numpy(cloud.points), torch.from_numpy(cloud.colors)
    to_rotated = scaled_rotation(points, scale, config.rotation, generator)
    moved = transform(points.double(), to_rotated).float()
    voxels = voxelize(moved, colors, config.voxel_size)
    feats = voxels.feats.float() if config.features == "rgb" else torch.ones(len(voxels), 3)
    if uniform(0, 1, generator) < config.jitter_prob:
        feats = feats + config.jitter * torch.randn(feats.shape, generator=generator)
    if config.features == "rgb":
        feats = feats / 255 - 0.5
    return {
        "coords": voxels.coords[:, 1:],
        "feats": feats,
        "points": moved[voxels.index],
        "to_world": torch.linalg.inv(to_rotated),
    }
