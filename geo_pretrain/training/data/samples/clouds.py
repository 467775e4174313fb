"""Samples with voxels: two turned point clouds with their matches, or two images with the chunks around them.

Defaults are the released code's of PointContrast (Xie et al., ECCV 2020); "rgb" and "upright" are those of CSC (Hou
et al., CVPR 2021). Chunks are Pri3D's (Hou et al., ICCV 2021). All are drawn by (seed, epoch, index) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.geometry import centered, radius_matches, rotation, transform
from geo_pretrain.sparse.coordinates import Voxels, voxelize
from geo_pretrain.training.data.frame import Frame, Source, Surface
from geo_pretrain.training.data.mining import Pair
from geo_pretrain.training.data.samples.sampler import Key, PairSamples, collate, load_pair
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop
from geo_pretrain.training.data.surfaces.fusing import Surfaces, frame_cloud
from geo_pretrain.training.recipe import DataSpec

Rotation = Literal["full", "upright", "none"]
Features = Literal["ones", "rgb"]

TILT = math.pi / 64  # of an upright rotation, about x and y


@dataclass(frozen=True)
class CloudSpec:
    """How a frame becomes voxels; each default is PointContrast's."""

    voxel_size: float = 0.025  # m
    radius: float | None = None  # m, of a match; None: 1.5 voxels
    features: Features = "ones"  # "rgb": color / 255 - 0.5
    rotation: Rotation = "full"  # "upright": any turn about z, +-pi/64 about x and y
    jitter: float = 0.01  # standard deviation; of rgb on the scale of 0 to 255, as in CSC's code (no visible effect)
    jitter_prob: float = 0.95
    scale: tuple[float, float] = (
        1.0,
        1.0,
    )  # both clouds of a pair alike; the released code has (0.8, 1.2) switched off
    match_released_code: bool = False  # a pair without a match gets the match (0, 0)

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("voxel_size", "match_radius"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"'{key}' is {getattr(self, key)!r}, accepted are meters above 0.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise RecipeError(f"'scale' is {self.scale!r}, accepted is (low, high) with 0 < low <= high.")

    @property
    def match_radius(self) -> float:
        """In meters of the world."""
        return 1.5 * self.voxel_size if self.radius is None else self.radius


class CloudPairSamples(Dataset[dict[str, Any]]):
    """The point clouds of pairs, each turned on its own. Indexed by (epoch, pair) like `PairSamples`."""

    def __init__(self, source: Source, pairs: list[Pair], spec: DataSpec, cloud: CloudSpec, seed: int) -> None:
        self.source, self.pairs, self.spec, self.cloud, self.seed = source, pairs, spec, cloud, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample, by (epoch, pair).

        coords1, 2: int32 [n, 3], voxels of the turned cloud; feats1, 2: float [n, C]; points1, 2: float32 [n, 3], the
        point that stands for each voxel, turned frame, m; to_world1, 2: float64 [4, 4], from the turned frame.
        matches: int64 [m, 2], every two rows whose points are less than the radius apart in the world.
        seed: an integer for draws made later, on the device; skipped: (path, reason) of files that failed on the way.
        """
        frames, skipped, generator = load_pair(self.source, self.pairs, self.spec.size, self.seed, key)
        low, high = self.cloud.scale
        scale = low + (high - low) * float(torch.rand((), generator=generator))
        sample: dict[str, Any] = {"skipped": skipped}
        world = []
        for number, frame in enumerate(frames, start=1):
            view = turned_voxels(frame_cloud(frame), self.cloud, scale, generator)
            world.append(transform(view["points"].double(), view["to_world"]))
            sample |= {f"{name}{number}": value for name, value in view.items()}
        sample["matches"] = radius_matches(world[0], world[1], self.cloud.match_radius)
        if self.cloud.match_released_code and not len(sample["matches"]):
            sample["matches"] = torch.zeros(1, 2, dtype=torch.int64)
        sample["seed"] = int(torch.randint(2**62, (), generator=generator))
        return sample


class ChunkPairSamples(PairSamples):
    """`PairSamples` with the voxels of the surface around each frame."""

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        voxel_size: float = 0.02,
        features: Features = "rgb",
        frustum: bool = False,
        match_released_code: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        """Chunks and their voxels.

        Args:
            features: "rgb" is color / 255, which the released code feeds; "ones" the paper's occupancy.
            frustum: the tight box of the view frustum instead of the authors' box, see `chunks.chunk_box`.
            match_released_code: voxel indices are truncated towards zero instead of rounded down.
            cache_dir: of fused surfaces, see `surface.scene_surface`.
        """
        super().__init__(source, pairs, spec, contract, seed)
        self.voxel_size, self.features, self.frustum, self.match_released_code = (
            voxel_size,
            features,
            frustum,
            match_released_code,
        )
        self.surfaces = Surfaces(source, cache_dir)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """As `PairSamples`, and coords1, 2: int32 [n, 3], voxels of the world; feats1, 2: float32 [n, 3]."""
        return super().__getitem__(key)

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        box = chunk_box(frame, match_released_code=not self.frustum)
        chunk = crop(self.surfaces.load(frame.scene), *box)
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


def turned_voxels(cloud: Surface, spec: CloudSpec, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A cloud turned about its centroid, which moves to the origin, and cut into voxels, one point each."""
    points, colors = torch.from_numpy(cloud.points), torch.from_numpy(cloud.colors)
    to_turned = torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))
    if spec.rotation != "none":
        to_turned = random_rotation(generator, spec.rotation) @ to_turned @ centered(points)
    moved = transform(points.double(), to_turned).float()
    voxels = voxelize(moved, colors, spec.voxel_size)
    feats = voxels.feats.float() if spec.features == "rgb" else torch.ones(len(voxels), 3)
    if float(torch.rand((), generator=generator)) < spec.jitter_prob:
        feats = feats + spec.jitter * torch.randn(feats.shape, generator=generator)
    if spec.features == "rgb":
        feats = feats / 255 - 0.5
    return {
        "coords": voxels.coords[:, 1:],
        "feats": feats,
        "points": moved[voxels.index],
        "to_world": torch.linalg.inv(to_turned),
    }


def random_rotation(generator: torch.Generator, mode: Rotation) -> Tensor:
    """A turn as the released loaders draw it, float64 [4, 4].

    "full" (PointContrast): about the direction of rand(3) - 0.5 by an angle in [-pi, pi), which is not uniform over
    rotations. "upright" (CSC): +-pi/64 about x and y and +-pi about z, one after another in random order.
    """
    if mode == "none":
        return torch.eye(4, dtype=torch.float64)
    draw = torch.rand(4, generator=generator, dtype=torch.float64)
    if mode == "full":
        return rotation(draw[:3] - 0.5, (2 * float(draw[3]) - 1) * math.pi)
    limits = torch.tensor([TILT, TILT, math.pi], dtype=torch.float64)
    turns = [
        rotation(axis, float(angle)) for axis, angle in zip(torch.eye(3), (2 * draw[:3] - 1) * limits, strict=True)
    ]
    first, second, third = torch.randperm(3, generator=generator).tolist()
    return turns[first] @ turns[second] @ turns[third]


def collate_clouds(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of `CloudPairSamples`.

    coords1, 2: int32 [N, 4], rows (batch, x, y, z); feats1, 2: [N, C]; points1, 2: [N, 3]; to_world1, 2: [B, 4, 4];
    matches: int64 [M, 2] into the joined rows, and matches_per_pair, how many each pair has; seed, skipped: lists.
    """
    batch, lengths = joined(samples, ("coords1", "coords2"), ("feats1", "feats2", "points1", "points2", "matches"))
    batch["matches_per_pair"] = [len(sample["matches"]) for sample in samples]
    rows = torch.tensor(lengths).T  # [B, 2]
    starts = rows.cumsum(dim=0) - rows
    batch["matches"] = batch["matches"] + starts.repeat_interleave(torch.tensor(batch["matches_per_pair"]), dim=0)
    return batch


def collate_chunks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of `ChunkPairSamples`: as `collate`, with coords1, 2 int32 [N, 4] (batch, x, y, z) and feats1, 2."""
    return joined(samples, ("coords1", "coords2"), ("feats1", "feats2"))[0]


def joined(
    samples: list[dict[str, Any]], coords: tuple[str, ...], others: tuple[str, ...]
) -> tuple[dict[str, Any], list[list[int]]]:
    """Join what differs in length, coordinates with their batch number in front, and `collate` the rest."""
    ragged = {*coords, *others}
    batch = collate([{k: v for k, v in sample.items() if k not in ragged} for sample in samples])
    lengths = [[len(sample[name]) for sample in samples] for name in coords]
    for name, rows in zip(coords, lengths, strict=True):
        numbers = torch.arange(len(samples), dtype=torch.int32).repeat_interleave(torch.tensor(rows))
        batch[name] = torch.cat([numbers[:, None], torch.cat([sample[name] for sample in samples])], dim=1)
    for name in others:
        batch[name] = torch.cat([sample[name] for sample in samples])
    return batch, lengths
