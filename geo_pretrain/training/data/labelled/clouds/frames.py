"""The clouds of labelled RGB-D frames: a point for each pixel with a valid depth.

The papers' protocols (PointContrast, tables 4 and 7) segment whole scans; a frame's cloud is what a labelled RGB-D
source offers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.training.data.frame import Frame, resize_frame
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import Subset
from geo_pretrain.training.data.labelled.rooms import LabelledRooms
from geo_pretrain.training.data.surfaces.fusing import frame_cloud


def labelled_clouds(source: LabelledSource, size: tuple[int, int] | None = None) -> list[LabelledCloud]:
    """Back-project every labelled frame of `source`, its images first resized to `size` (None: their own).

    Raises `RecipeError` for a source whose labelled images have no depth; so far only rooms has it.
    """
    clouds = [cloud_of(labelled_frame(source, id, size), id) for id in source.ids()]
    return [cloud for cloud in clouds if len(cloud.points)]


def labelled_frame(source: LabelledSource, id: str, size: tuple[int, int] | None = None) -> Frame:
    """The RGB-D frame of a labelled image, with the classes of `source`; sampled at `size` (None: its own).

    Raises `RecipeError` for a source whose labelled images have no depth.
    """
    rooms = _rooms_of(source)
    scene, _, frame_id = id.partition("/")
    frame, semantic = rooms.rooms.load(scene, frame_id), source.load(id).semantic
    if semantic is None:
        raise DataError(f"{source.name}: image {id} has no labels of pixels; open the source for segmentation.")
    frame = dataclasses.replace(frame, semantic=semantic.astype(np.int16))
    return frame if size is None else resize_frame(frame, size)


def cloud_of(frame: Frame, id: str) -> LabelledCloud:
    """The cloud of a labelled frame: a point for each pixel with a valid depth, row by row."""
    cloud, labels = frame_cloud(frame), np.asarray(frame.semantic)[frame.depth > 0]
    return LabelledCloud(id, cloud.points, cloud.colors, labels.astype(np.int64))


def _rooms_of(source: LabelledSource) -> LabelledRooms:
    """Return the rooms that a source is, or is a subset of; their frames have depth."""
    inner: Any = source
    while isinstance(inner, Subset):
        inner = inner.source
    if not isinstance(inner, LabelledRooms):
        raise RecipeError(f"Source {source.name!r} has no depth beside its labels; 3D networks accept: rooms.")
    return inner
