"""rooms: procedural indoor RGB-D with exact geometry, rendered by the package itself."""

from __future__ import annotations

from geo_pretrain.rooms.scene import CLASSES, OrientedBox
from geo_pretrain.rooms.surface import Mesh, SurfacePoints

__all__ = ["CLASSES", "Mesh", "OrientedBox", "SurfacePoints"]
