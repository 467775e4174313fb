"""Columns of a picture: the extractors of a backbone, each with its title and color space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.checkpoint import Checkpoint
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.evaluation.features import (
    ChunkExtractor,
    FeatureExtractor,
    Features,
    is_paired,
    load_extractor,
    load_paired,
    open_checkpoint,
    paired_extractor,
)
from geo_pretrain.training.visualize.colors import shared_pca
from geo_pretrain.training.visualize.splat import frame_camera, splat

RANDOM_TITLE = "random weights"  # of the random-init baseline
ENCODER_MAP = 2  # of an encoder that comes alone: stride 8, the finest with a view of whole things


@dataclass(frozen=True)
class Opened:
    """A backbone whose files are there and that is not loaded yet."""

    name: str  # as given
    checkpoint: Checkpoint

    @property
    def title(self) -> str:
        """The name, or the last part of a folder's path."""
        return Path(self.name).name or self.name


@dataclass(frozen=True)
class Column:
    """An extractor in a picture. Columns of one `space` share a feature space, so one color space."""

    title: str
    space: str
    extractor: FeatureExtractor

    def pixel_features(self, frame: Frame) -> Features:
        """Extract features of a frame's pixels; those of a chunk are rendered into its camera. Raises `BadFrame`."""
        if not isinstance(self.extractor, ChunkExtractor):
            return self.extractor.extract_frame(frame)
        chunk = self.extractor.chunk(frame)
        features = self.extractor.extract_surface(chunk, [])
        row = splat(torch.from_numpy(chunk.points), frame_camera(frame), self.extractor.voxel_size / 2)
        return replace(features, index=np.where(row >= 0, features.index[row], -1))


def find_backbone(name: str) -> Opened:
    """Open the checkpoint of a catalog name or folder for drawing. Raises the errors of `hub.open`."""
    return Opened(name, open_checkpoint(name, heads=True))


def load_columns(
    opened: Opened,
    surfaces: Surfaces | None,
    *,
    level: int | None = None,
    random_init: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Column]:
    """Load the column of a backbone, or two of a paired one: pixels and voxels in one feature space.

    Args:
        surfaces: of the source that frames come from; None without one: points alone are described.
        level: a map of the encoder (0 to 4: strides 2 to 32) or of the sparse U-Net (strides 1 to 16); None: the
            output, of an encoder that comes alone the map of stride 8.
        random_init: the same architecture with random weights drawn from `seed`.
    """
    checkpoint, title = opened.checkpoint, RANDOM_TITLE if random_init else opened.title
    space = f"{opened.name} {random_init}"
    if level is None and is_paired(checkpoint):
        networks = load_paired(opened.name, random_init=random_init, seed=seed)
        if random_init and isinstance(networks, FeaturePair):
            title = "random student"  # the teacher keeps its weights
        both = paired_extractor(networks.to(device), surfaces)
        return [Column(f"{title}: pixels", space, both.pixels), Column(f"{title}: voxels", space, both.voxels)]
    if level is None and checkpoint.arch.modality == "2d" and not checkpoint.arch.has_decoder:
        level = ENCODER_MAP
    extractor = load_extractor(checkpoint.folder, level=level, random_init=random_init, seed=seed, device=device)
    return [Column(title, space, extractor)]


def load_beside_random(
    backbones: Sequence[Opened], surfaces: Surfaces | None, *, baseline: bool, seed: int, **options: Any
) -> list[Column]:
    """Load the columns of several backbones; with `baseline` those of the first with random weights come last.

    `options`: `level` and `device` of `load_columns`.
    """
    columns = [column for opened in backbones for column in load_columns(opened, surfaces, seed=seed, **options)]
    if baseline:
        columns += load_columns(backbones[0], surfaces, random_init=True, seed=seed, **options)
    return columns


def shared_colors(columns: Sequence[Column], rows: Sequence[Sequence[Tensor]]) -> list[list[np.ndarray]]:
    """Color features rows[i][j] [N, C] of column j: uint8 [N, 3], with one color space for each feature space."""
    colors: dict[tuple[int, int], np.ndarray] = {}
    for space in dict.fromkeys(column.space for column in columns):
        cells = [(r, c) for c, column in enumerate(columns) if column.space == space for r in range(len(rows))]
        colors |= zip(cells, shared_pca([rows[r][c] for r, c in cells]), strict=True)
    return [[colors[r, c] for c in range(len(columns))] for r in range(len(rows))]
