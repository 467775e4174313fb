"""Samples of single frames: an image, and the voxels of its own points with the pixel that each came from.

What PPKT (Liu et al., 2021) and Janda et al. (2022) train on. An image is flipped and resized together with its depth
and camera: a mirrored image is that of a camera with a negative focal length, so that the points stay where they are
and each keeps its pixel. The cloud is distorted, scaled and turned on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.geometry import backproject, centered, transform
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.training.data.frame import Frame, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.data.samples.clouds import Features, Rotation, joined, random_rotation
from geo_pretrain.training.data.samples.elastic import elastic_distortion, elastic_grid
from geo_pretrain.training.data.samples.sampler import Key, augment, load_numbered
from geo_pretrain.training.recipe import DataSpec

ELASTIC = ((0.2, 0.4), (0.8, 1.6))  # m: granularity and magnitude of each distortion


@dataclass(frozen=True)
class FrameCloudSpec:
    """How a frame becomes an image and voxels; each default is none, the values in brackets are PPKT's."""

    voxel_size: float = 0.025  # m
    features: Features = "rgb"  # color / 255 - 0.5
    pixels: Literal["one", "all"] = "one"  # correspondences: a pixel a voxel (that of its features), or every pixel
    rotation: Rotation = "upright"  # about the centroid, which moves to the origin
    scale: tuple[float, float] = (1.0, 1.0)  # of the cloud (0.9, 1.1)
    elastic_prob: float = 0.0  # (0.95)
    keep: tuple[float, float] = (1.0, 1.0)  # share of the points that stay, drawn in this range
    color_jitter: float = 0.0  # standard deviation of noise on the voxels' colors, of 255
    color_jitter_prob: float = 0.95
    flip_prob: float = 0.0  # mirrored images (0.5)
    resize: tuple[float, float] = (1.0, 1.0)  # of the image, cut or padded back to its size (0.8, 1.25)

    def __post_init__(self) -> None:
        """Ranges."""
        if not self.voxel_size > 0:
            raise RecipeError(f"'voxel_size' is {self.voxel_size!r}, accepted are meters above 0.")
        for key in ("elastic_prob", "flip_prob", "color_jitter_prob"):
            if not 0 <= getattr(self, key) <= 1:
                raise RecipeError(f"'task.{key}' is {getattr(self, key)!r}, accepted is a probability, 0 to 1.")
        for key in ("scale", "keep", "resize"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise RecipeError(f"'task.{key}' is {[low, high]!r}, accepted is [low, high] with 0 < low <= high.")
        if self.keep[1] > 1:
            raise RecipeError(f"'task.keep' is {list(self.keep)!r}, accepted are shares up to 1.")
        if self.color_jitter < 0:
            raise RecipeError(f"'task.color_jitter' is {self.color_jitter!r}, accepted is a number from 0 up.")


class FrameCloudSamples(Dataset[dict[str, Any]]):
    """Single frames with their clouds. Indexed by (epoch, frame), so that workers and resuming change nothing.

    `pairs` are frames paired with themselves, as `data.units: frames` gives them; of another pair the first frame is
    taken. Photometric augmentation is the recipe's (`data.augment`) and changes the image, not the cloud's colors.
    """

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        cloud: FrameCloudSpec,
        contract: ImageContract,
        seed: int,
    ) -> None:
        self.source, self.spec, self.cloud, self.seed = source, spec, cloud, seed
        self.pairs = [replace(pair, frame2=pair.frame1) for pair in pairs]
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample, by (epoch, frame).

        image: float [3, H, W], normalized; depth: float [H, W] m and intrinsics: float64 [3, 3], of that image.
        coords: int32 [n, 3], voxels of the turned cloud; feats: float [n, 3]; points: float32 [n, 3], the point that
        stands for each voxel, turned frame, m; to_world: float64 [4, 4], from the turned frame (an elastic distortion
        cannot be undone and is not in it).
        pixel: int64 [m], flat pixels of the image (row * W + column), and voxel: int64 [m], the row of `coords` that
        each falls in; with pixels "one" voxel is 0 .. n - 1, so that pixel [n] is that of each voxel.
        index: the number of the frame that this is, not of the one asked for where that could not be read; seed: an
        integer for draws made later, on the device; skipped: (path, reason).
        """
        index, (frame, _), skipped, generator = load_numbered(self.source, self.pairs, self.spec.size, self.seed, key)
        frame = self._moved(frame, generator)
        image = (augment(frame.color, self.spec.augment, generator) - self.mean) / self.std
        sample: dict[str, Any] = {
            "skipped": skipped,
            "image": image,
            "depth": torch.from_numpy(np.ascontiguousarray(frame.depth)),
            "intrinsics": torch.from_numpy(frame.intrinsics),
            "index": torch.tensor(index),
            **frame_voxels(frame, self.cloud, generator),
        }
        sample["seed"] = int(torch.randint(2**62, (), generator=generator))
        return sample

    def _moved(self, frame: Frame, generator: torch.Generator) -> Frame:
        """The frame mirrored and resized as drawn; as it was where that leaves no pixel with a depth."""
        cloud = self.cloud
        factor = _uniform(cloud.resize, generator)
        offsets = torch.rand(2, generator=generator).tolist()
        flip = float(torch.rand((), generator=generator)) < cloud.flip_prob
        changed = flipped(frame) if flip else frame
        if factor != 1:
            changed = fitted(changed, factor, (offsets[0], offsets[1]), _grey(self.mean))
        return changed if changed.depth.any() else frame


def collate_frame_clouds(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of `FrameCloudSamples`.

    image [B, 3, H, W]; depth [B, H, W]; coords: int32 [N, 4], rows (batch, x, y, z); feats [N, 3]; points [N, 3];
    pixel, voxel, element: int64 [M], the flat pixel in its own image, the row of the joined `coords`, and the batch
    element of every correspondence; to_world, intrinsics, index [B, ...]; seed, skipped: lists.
    """
    batch, lengths = joined(samples, ("coords",), ("feats", "points", "pixel", "voxel"))
    rows = torch.tensor(lengths[0])
    counts = torch.tensor([len(sample["pixel"]) for sample in samples])
    batch["element"] = torch.arange(len(samples)).repeat_interleave(counts)
    batch["voxel"] = batch["voxel"] + (rows.cumsum(dim=0) - rows).repeat_interleave(counts)
    return batch


def frame_voxels(frame: Frame, spec: FrameCloudSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """The cloud of a frame, augmented and cut into voxels: "coords", "feats", "points", "to_world", "pixel", "voxel".

    See `FrameCloudSamples`. The frame has at least one pixel with a depth.
    """
    depth = torch.from_numpy(np.ascontiguousarray(frame.depth)).double()
    pixel = depth.flatten().nonzero()[:, 0]
    share = _uniform(spec.keep, generator)
    if share < 1:
        chosen = torch.randperm(len(pixel), generator=generator)[: max(1, round(share * len(pixel)))]
        pixel = pixel[chosen.sort().values]
    camera = backproject(depth, torch.from_numpy(frame.intrinsics))[pixel]
    world = transform(camera, torch.from_numpy(frame.cam_to_world).double())
    if float(torch.rand((), generator=generator)) < spec.elastic_prob:
        for granularity, magnitude in ELASTIC:
            noise = torch.randn(*elastic_grid(world, granularity), 3, generator=generator)
            world = elastic_distortion(world, noise, granularity, magnitude)
    factor = _uniform(spec.scale, generator)
    to_turned = torch.diag(torch.tensor([factor, factor, factor, 1.0], dtype=torch.float64))
    if spec.rotation != "none":
        to_turned = random_rotation(generator, spec.rotation) @ to_turned @ centered(world)
    points = transform(world, to_turned).float()
    colors = torch.from_numpy(np.ascontiguousarray(frame.color)).flatten(0, 1)[pixel]
    voxels = voxelize(points, colors, spec.voxel_size)
    feats = voxels.feats.float() if spec.features == "rgb" else torch.ones(len(voxels), 3)
    if spec.features == "rgb":
        if spec.color_jitter and float(torch.rand((), generator=generator)) < spec.color_jitter_prob:
            feats = feats + 255 * spec.color_jitter * torch.randn(feats.shape, generator=generator)
            feats = feats.clamp(0, 255)
        feats = feats / 255 - 0.5
    every = spec.pixels == "all"
    return {
        "coords": voxels.coords[:, 1:],
        "feats": feats,
        "points": points[voxels.index],
        "to_world": torch.linalg.inv(to_turned),
        "pixel": pixel if every else pixel[voxels.index],
        "voxel": voxels.inverse if every else torch.arange(len(voxels)),
    }


def flipped(frame: Frame) -> Frame:
    """The frame mirrored left to right: that of a camera with a negative focal length along x, in the same place."""
    intrinsics = frame.intrinsics.copy()
    intrinsics[0, 0] *= -1
    intrinsics[0, 2] = frame.depth.shape[1] - 1 - intrinsics[0, 2]
    return _with(frame, frame.color[:, ::-1], frame.depth[:, ::-1], intrinsics)


def fitted(frame: Frame, factor: float, offsets: tuple[float, float], fill: np.ndarray) -> Frame:
    """The frame resized by `factor` (every image at the nearest pixel), cut or padded back to the size it had.

    Args:
        offsets: where along the rows and columns that are too many, or missing, the frame is placed: 0 to 1.
        fill: uint8 [3], the color of the padding, which has no depth.
    """
    height, width = frame.depth.shape
    size = max(1, round(height * factor)), max(1, round(width * factor))
    resized = resize_frame(frame, size)
    color = np.empty((height, width, 3), dtype=np.uint8)
    color[:] = fill
    depth = np.zeros((height, width), dtype=frame.depth.dtype)
    (to_rows, from_rows, down), (to_columns, from_columns, right) = (
        _overlap(old, new, offset) for old, new, offset in zip((height, width), size, offsets, strict=True)
    )
    color[to_rows, to_columns] = resized.color[from_rows, from_columns]
    depth[to_rows, to_columns] = resized.depth[from_rows, from_columns]
    intrinsics = resized.intrinsics.copy()
    intrinsics[0, 2] += right
    intrinsics[1, 2] += down
    return _with(frame, color, depth, intrinsics)


def _overlap(old: int, new: int, offset: float) -> tuple[slice, slice, int]:
    """An axis of length `new` laid on one of `old`: what it covers there, what of it that is, and its shift."""
    shift = min(int(offset * (abs(old - new) + 1)), abs(old - new))
    if new >= old:
        return slice(0, old), slice(shift, shift + old), -shift
    return slice(shift, shift + new), slice(0, new), shift


def _with(frame: Frame, color: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray) -> Frame:
    """The frame with other images, without labels: nothing here reads them."""
    color, depth = np.ascontiguousarray(color), np.ascontiguousarray(depth)
    return Frame(frame.scene, frame.id, color, depth, intrinsics, frame.cam_to_world)


def _grey(mean: Tensor) -> np.ndarray:
    """The color that becomes 0 when normalized, nearly."""
    filled: np.ndarray = (255 * mean.flatten()).round().to(torch.uint8).numpy()
    return filled


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * float(torch.rand((), generator=generator))
