"""Colors of features (three principal components in one color space), depths, classes and sets.

As in the figures of Pri3D (Hou et al., ICCV 2021) and of Janda et al. (2022): equal colors mean equal features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import DataError

COMPONENTS = 3  # red, green, blue
PERCENTILES = (1.0, 99.0)  # of each component; beyond them colors saturate, so a few odd points fade nothing
_CHUNK = 1 << 16  # rows held in float64 at once
_ROUNDING = 1e-6  # of the features' size: what varies less is the rounding of float32


@dataclass(frozen=True)
class ColorSpace:
    """Principal components of a feature space as red, green and blue; K of them, 3 unless there are fewer channels."""

    mean: Tensor  # float64 [C]
    axes: Tensor  # float64 [C, K], orthonormal columns, the largest variance first
    low: np.ndarray  # float64 [K], of a component: color 0
    high: np.ndarray  # [K]: color 255

    def components(self, features: Tensor) -> np.ndarray:
        """Project features [N, C] onto the axes: float64 [N, K]."""
        return np.concatenate([((part - self.mean) @ self.axes).numpy() for part in _chunks(features)])

    def colors(self, features: Tensor) -> np.ndarray:
        """Color features [N, C]: uint8 [N, 3]; constant or missing components map to 0.5."""
        span = self.high - self.low
        scaled = (self.components(features) - self.low) / np.where(span > 0, span, 1)
        shades = np.full((len(scaled), COMPONENTS), 0.5)
        shades[:, : len(span)] = np.where(span > 0, np.clip(scaled, 0, 1), 0.5)
        return np.rint(shades * 255).astype(np.uint8)


def fit_colors(features: Sequence[Tensor]) -> ColorSpace:
    """Fit one color space to all rows of `features`, each [N_i, C] with the same C.

    Axes are the eigenvectors of the C x C covariance, computed in float64, each with the sign that makes its largest
    entry (by magnitude, the first of equal ones) positive: the same features give the same colors at every call.

    Raises:
        DataError: there is no row, rows differ in length, or a value is not finite.
    """
    widths = sorted({part.shape[1] for part in features})
    rows = sum(len(part) for part in features)
    if len(widths) != 1 or not rows:
        raise DataError(f"{rows} features with {widths} channels; accepted: at least one, all of one length.")
    bad = sum(int((~torch.isfinite(part)).any(dim=1).sum()) for part in features)
    if bad:
        raise DataError(f"{bad} of {rows} features are not finite, so they have no colors; are the weights broken?")
    total = torch.zeros(widths[0], dtype=torch.float64)
    for chunk in _all_chunks(features):
        total += chunk.sum(dim=0)
    mean = total / rows
    covariance = torch.zeros(widths[0], widths[0], dtype=torch.float64)
    for chunk in _all_chunks(features):
        covariance += (chunk - mean).T @ (chunk - mean)
    axes = torch.linalg.eigh(covariance / rows).eigenvectors.flip(1)[:, :COMPONENTS]  # eigenvalues ascend
    largest = axes.abs().argmax(dim=0)
    axes = axes * axes[largest, torch.arange(axes.shape[1])].sign()
    space = ColorSpace(mean, axes, np.zeros(axes.shape[1]), np.ones(axes.shape[1]))
    low, high = np.percentile(np.concatenate([space.components(part) for part in features]), PERCENTILES, axis=0)
    still = high - low <= _ROUNDING * (float(mean.abs().max()) + (high - low).max())
    return ColorSpace(mean, axes, low, np.where(still, low, high))


def shared_pca(features: Sequence[Tensor | np.ndarray]) -> list[np.ndarray]:
    """Color arrays [N_i, C] in one color space fitted to all of them (`fit_colors`): uint8 [N_i, 3] each.

    For the frames of a scene, or for two modalities whose features live in one space, such as pixels and voxels.
    """
    tensors = [torch.as_tensor(part) for part in features]
    space = fit_colors(tensors)
    return [space.colors(part) for part in tensors]


def depth_colors(depth: np.ndarray) -> np.ndarray:
    """Color depth [H, W] in meters: uint8 [H, W, 3]; invalid (0) is black."""
    valid = depth > 0
    if not valid.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    low, high = np.percentile(depth[valid], [1, 99])
    x = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
    stops = np.array([[253, 231, 110], [110, 205, 90], [35, 140, 140], [55, 90, 140], [50, 15, 75]], np.float64)
    position, places = x * (len(stops) - 1), np.arange(len(stops))
    mixed = np.stack([np.interp(position, places, channel) for channel in stops.T], axis=-1)
    return np.where(valid[..., None], mixed, 0).astype(np.uint8)


def class_colors(semantic: np.ndarray) -> np.ndarray:
    """Color class ids [H, W]: uint8 [H, W, 3], a fixed color per id, black for 0 and below."""
    strong, light = np.take([0.45, 0.75], semantic % 2), np.take([0.95, 0.75, 0.55], semantic % 3)
    return np.where(semantic[..., None] <= 0, 0, _by_hue(semantic, strong, light)).astype(np.uint8)


def set_colors(ids: np.ndarray) -> np.ndarray:
    """Color set ids [...]: uint8 [..., 3], a fixed bright color per id, unlike those of nearby ids; -1 is black."""
    strong, light = np.take([0.5, 0.8, 0.65], ids % 3), np.take([0.95, 0.75], ids % 2)
    return np.where(ids[..., None] < 0, 0, _by_hue(ids, strong, light)).astype(np.uint8)


def _by_hue(ids: np.ndarray, strong: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Colors [..., 3], 0 to 255, of saturation and value in [0, 1]; the golden ratio sets hues of neighbors apart."""
    sector = (np.array([5, 3, 1]) + 6 * (ids * 0.61803398875 % 1)[..., None]) % 6
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.round(255 * light[..., None] * (1 - strong[..., None] * fall))


def _chunks(features: Tensor) -> Iterator[Tensor]:
    for part in features.split(_CHUNK) if len(features) else [features]:
        yield part.double()


def _all_chunks(features: Sequence[Tensor]) -> Iterator[Tensor]:
    for part in features:
        yield from _chunks(part)
