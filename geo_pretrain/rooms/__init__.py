"""Procedural indoor RGB-D with exact geometry and labels, rendered by the package itself: no download.

`RoomGenerator(RoomsConfig(...))` yields everything as arrays; it knows nothing of training.
"""

from __future__ import annotations

from geo_pretrain.rooms.generator import FIELDS, GENERATOR, RoomGenerator, RoomsConfig
from geo_pretrain.rooms.scene import CLASSES, OrientedBox
from geo_pretrain.rooms.surface import Mesh, SurfacePoints

__all__ = [
    "CLASSES",
    "FIELDS",
    "GENERATOR",
    "Mesh",
    "OrientedBox",
    "RoomGenerator",
    "RoomsConfig",
    "SurfacePoints",
]
