"""Samples of single frames: an image, and the voxels of its back-projected points with the pixel of each.

PPKT (Liu et al., 2021) and Janda et al. (2022) train on these. An image is flipped and resized together with its depth
and camera: mirroring negates the focal length along x, so that the points stay where they are
and each keeps its pixel. The cloud is distorted, scaled and rotated independently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.geometry import backproject, transform
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.training.checks import Meters, NotNegative, PositiveRange, Probability, Ranged, Shares
from geo_pretrain.training.data.frame import Frame, resize_frame
from geo_pretrain.training.data.samples.augment import (
    Rotation,
    augment_colors,
    elastic_distortion,
    elastic_grid,
    scaled_rotation,
    uniform,
)
from geo_pretrain.training.data.samples.clouds import Features
from geo_pretrain.training.data.samples.pairs import read_pair
from geo_pretrain.training.data.samples.sampler import ImageSamples, Key, Skipped

ELASTIC = ((0.2, 0.4), (0.8, 1.6))  # m: granularity and magnitude of each distortion


@dataclass(frozen=True)
class FrameCloudSettings(Ranged):
    """What a task may choose of `FrameCloudConfig`. Defaults augment nothing but rotate; PPKT's are in brackets."""

    features: Features = "rgb"  # color / 255 - 0.5
    # Correspondences: one pixel per voxel (the one its features are of), or (SLidR) every pixel that falls in it.
    pixels: Literal["one", "all"] = "one"
    rotation: Rotation = "upright"  # about the centroid, which moves to the origin; "upright": +-pi/64 about x, y
    scale: PositiveRange = (1.0, 1.0)  # of the cloud (0.9, 1.1)
    elastic_prob: Probability = 0.0  # of distorting the cloud (0.95), see augment.py
    keep: Shares = (1.0, 1.0)  # share of the points that stay, drawn in this range
    color_jitter: NotNegative = 0.0  # standard deviation of noise on the voxels' colors, as a share of 255
    flip_prob: Probability = 0.0  # of mirroring the image (0.5)
    resize: PositiveRange = (1.0, 1.0)  # of the image and its intrinsics, then cut or padded to its size (0.8, 1.25)


@dataclass(frozen=True)
class FrameCloudConfig(FrameCloudSettings):
    """How a frame becomes an image and voxels."""

    voxel_size: Meters = 0.025
    color_jitter_prob: Probability = 0.95


@dataclass(eq=False, repr=False)
class FrameCloudSamples(ImageSamples):
    """Single frames with their point clouds.

    image: float [3, H, W], normalized; depth: float [H, W] m and intrinsics: float64 [3, 3], of that image.
    coords: int32 [n, 3], voxels of the rotated cloud; feats: float [n, 3]; points: float32 [n, 3], the point that
    stands for each voxel, rotated frame, m; to_world: float64 [4, 4], from the rotated frame (an elastic distortion
    cannot be undone and is not in it).
    pixel: int64 [m], flat pixels of the image (row * W + column), and voxel: int64 [m], the row of `coords` that
    each falls in; with pixels "one" voxel is 0 .. n - 1, and pixel [n] holds one pixel per voxel.
    index: the number of the frame that was read, which replaces the one asked for where that is broken.

    `pairs` are frames paired with themselves, as `data.units: frames` gives them; of other pairs the first frame is
    used. Photometric augmentation is the recipe's (`data.augment`) and changes the image, not the cloud's colors.
    """

    coords = ("coords",)
    ragged = ("feats", "points", "pixel", "voxel")

    cloud: FrameCloudConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pairs = [replace(pair, frame2=pair.frame1) for pair in self.pairs]

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        index, (frame, _) = read_pair(self, key, generator, skipped)
        frame = self._flip_resize(frame, generator)
        return {
            "image": self.normalize(augment_colors(frame.color, self.spec.augment, generator)),
            "depth": torch.from_numpy(np.ascontiguousarray(frame.depth)),
            "intrinsics": torch.from_numpy(frame.intrinsics),
            "index": torch.tensor(index),
            **frame_voxels(frame, self.cloud, generator),
        }

    def _flip_resize(self, frame: Frame, generator: torch.Generator) -> Frame:
        """Mirror and resize a frame at random; unchanged where that would leave no pixel with a depth."""
        cloud = self.cloud
        factor = uniform(*cloud.resize, generator)
        offsets = torch.rand(2, generator=generator).tolist()
        flip = uniform(0, 1, generator) < cloud.flip_prob
        changed = flip_frame(frame) if flip else frame
        if factor != 1:
            changed = fit_frame(changed, factor, (offsets[0], offsets[1]), self.normalize.fill_color())
        return changed if changed.depth.any() else frame

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples; voxel is a row of the batch, and element int64 [M] the sample that each pixel is of."""
        batch = super().collate(samples)
        rows, counts = (torch.tensor([len(sample[name]) for sample in samples]) for name in ("coords", "pixel"))
        batch["element"] = torch.arange(len(samples)).repeat_interleave(counts)
        batch["voxel"] = batch["voxel"] + (rows.cumsum(dim=0) - rows).repeat_interleave(counts)
        return batch


def frame_voxels(frame: Frame, config: FrameCloudConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Augment and voxelize the cloud of a frame: "coords", "feats", "points", "to_world", "pixel", "voxel".

    See `FrameCloudSamples`. The frame has at least one pixel with a depth.
    """
    depth = torch.from_numpy(np.ascontiguousarray(frame.depth)).double()
    pixel = depth.flatten().nonzero()[:, 0]
    share = uniform(*config.keep, generator)
    if share < 1:
        chosen = torch.randperm(len(pixel), generator=generator)[: max(1, round(share * len(pixel)))]
        pixel = pixel[chosen.sort().values]
    camera = backproject(depth, torch.from_numpy(frame.intrinsics))[pixel]
    world = transform(camera, torch.from_numpy(frame.cam_to_world).double())
    if uniform(0, 1, generator) < config.elastic_prob:
        for granularity, magnitude in ELASTIC:
            noise = torch.randn(*elastic_grid(world, granularity), 3, generator=generator)
            world = elastic_distortion(world, noise, granularity, magnitude)
    to_rotated = scaled_rotation(world, uniform(*config.scale, generator), config.rotation, generator)
    points = transform(world, to_rotated).float()
    colors = torch.from_numpy(np.ascontiguousarray(frame.color)).flatten(0, 1)[pixel]
    voxels = voxelize(points, colors, config.voxel_size)
    feats = voxels.feats.float() if config.features == "rgb" else torch.ones(len(voxels), 3)
    if config.features == "rgb":
        if config.color_jitter and uniform(0, 1, generator) < config.color_jitter_prob:
            feats = feats + 255 * config.color_jitter * torch.randn(feats.shape, generator=generator)
            feats = feats.clamp(0, 255)
        feats = feats / 255 - 0.5
    every = config.pixels == "all"
    return {
        "coords": voxels.coords[:, 1:],
        "feats": feats,
        "points": points[voxels.index],
        "to_world": torch.linalg.inv(to_rotated),
        "pixel": pixel if every else pixel[voxels.index],
        "voxel": voxels.inverse if every else torch.arange(len(voxels)),
    }


def flip_frame(frame: Frame) -> Frame:
    """Mirror a frame left to right: the camera stays where it is and gets a negative focal length along x."""
    intrinsics = frame.intrinsics.copy()
    intrinsics[0, 0] *= -1
    intrinsics[0, 2] = frame.depth.shape[1] - 1 - intrinsics[0, 2]
    return _with_images(frame, frame.color[:, ::-1], frame.depth[:, ::-1], intrinsics)


def fit_frame(frame: Frame, factor: float, offsets: tuple[float, float], fill: np.ndarray) -> Frame:
    """Resize a frame by `factor` (nearest pixel) and crop or pad it back to its size.

    Args:
        offsets: where the crop or the padded frame lies along rows and columns, 0 (start) to 1 (end).
        fill: uint8 [3], the color of the padding, which has no depth.
    """
    height, width = frame.depth.shape
    size = max(1, round(height * factor)), max(1, round(width * factor))
    resized = resize_frame(frame, size)
    color = np.empty((height, width, 3), dtype=np.uint8)
    color[:] = fill
    depth = np.zeros((height, width), dtype=frame.depth.dtype)
    (to_rows, from_rows, down), (to_columns, from_columns, right) = (
        _align_axis(old, new, offset) for old, new, offset in zip((height, width), size, offsets, strict=True)
    )
    color[to_rows, to_columns] = resized.color[from_rows, from_columns]
    depth[to_rows, to_columns] = resized.depth[from_rows, from_columns]
    intrinsics = resized.intrinsics.copy()
    intrinsics[0, 2] += right
    intrinsics[1, 2] += down
    return _with_images(frame, color, depth, intrinsics)


def _align_axis(old: int, new: int, offset: float) -> tuple[slice, slice, int]:
    """Where a resized axis lands on the original: (destination slice, source slice, shift)."""
    shift = min(int(offset * (abs(old - new) + 1)), abs(old - new))
    if new >= old:
        return slice(0, old), slice(shift, shift + old), -shift
    return slice(shift, shift + new), slice(0, new), shift


def _with_images(frame: Frame, color: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray) -> Frame:
    """Replace the images of a frame; labels are dropped, since nothing here reads them."""
    color, depth = np.ascontiguousarray(color), np.ascontiguousarray(depth)
    return Frame(frame.scene, frame.id, color, depth, intrinsics, frame.cam_to_world)
