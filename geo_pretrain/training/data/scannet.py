"""ScanNet's exported layout: scene*/{color/*.jpg, depth/*.png, pose/*.txt, intrinsic/intrinsic_depth.txt}.

The mesh scene*/<scene>_vh_clean_2.ply of the release, where it is there, is the surface of the scene.
Colour (1296x968) and depth (640x480) are aligned by the sensor's own calibration, so colour is resized onto the
depth grid and the depth intrinsics of the scan hold for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.geometry import nearest_indices
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.ply import read_ply
from geo_pretrain.training.data.surface import NoSurface, Surface

# Pri3D uses one matrix for every scan, at 320x240; here for 640x480 with the same pixel centres.
CONSTANT_640 = np.array([[577.870605, 0, 319.5], [0, 577.870605, 239.5], [0, 0, 1]])


@dataclass(frozen=True)
class ScanNetConfig:
    """Options of the source."""

    constant_intrinsics: bool = False  # Pri3D's one matrix for all scans instead of each scan's own


class ScanNet:
    """Exported ScanNet scans as a source of frames."""

    name = "scannet"
    note = "depth intrinsics of each scan; colour resized onto the depth grid (nearest)"

    def __init__(self, root: Path, config: ScanNetConfig | None = None) -> None:
        self.root = root
        self.config = config or ScanNetConfig()
        self._scenes = sorted(p.parent.name for p in root.glob("scene*/pose") if p.is_dir())
        if not self._scenes:
            raise DataError(f"No scans in {str(root)!r}: expected scene*/color, depth, pose and intrinsic folders.")

    def scenes(self) -> list[str]:
        """Scan names such as scene0000_00."""
        return self._scenes

    def frame_ids(self, scene: str) -> list[str]:
        """Frame numbers, in order of time."""
        return sorted((p.stem for p in (self.root / scene / "pose").glob("*.txt")), key=lambda s: (len(s), s))

    def load(self, scene: str, frame_id: str) -> Frame:
        """Read one frame. Raises `BadFrame`."""
        folder = self.root / scene
        pose = files.read_pose(folder / "pose" / f"{frame_id}.txt")
        color_path = folder / "color" / f"{frame_id}.jpg"
        color = files.read_color(color_path if color_path.exists() else color_path.with_suffix(".png"))
        depth = files.read_depth(folder / "depth" / f"{frame_id}.png")
        rows, columns = (nearest_indices(old, new) for old, new in zip(color.shape, depth.shape, strict=False))
        color = color[rows][:, columns]
        intrinsics = CONSTANT_640
        if not self.config.constant_intrinsics:
            intrinsics = files.read_matrix(folder / "intrinsic" / "intrinsic_depth.txt", 4, 4)[:3, :3]
        return Frame(scene, frame_id, color, depth, intrinsics, pose)

    def surface(self, scene: str) -> Surface:
        """The vertices of the scan's mesh. Raises `NoSurface` without one, `DataError` when it is broken."""
        path = self._mesh_path(scene)
        if not path.is_file():
            raise NoSurface(f"No mesh {str(path)!r}; it comes with the scans ('{path.name}').")
        vertex = read_ply(path, ["vertex"])["vertex"]
        missing = [name for name in ("x", "y", "z", "red", "green", "blue") if name not in vertex]
        if missing:
            raise DataError(f"{path}: vertices have no {', '.join(missing)}; they have {', '.join(vertex)}.")
        points, colors = (np.stack([vertex[k] for k in keys], 1) for keys in ("xyz", ("red", "green", "blue")))
        if colors.dtype != np.uint8:
            raise DataError(f"{path}: colours are {colors.dtype}, expected uchar.")
        if not (len(points) and np.isfinite(points).all()):
            raise DataError(f"{path}: {'some vertices are not finite' if len(points) else 'the mesh has no vertices'}.")
        return Surface(points.astype(np.float32), colors)

    def fingerprint(self) -> str:
        """Names, sizes and times of pose files and meshes (each frame has a pose; hashing images would take hours)."""
        meshes = (path for path in map(self._mesh_path, self._scenes) if path.is_file())
        return files.files_fingerprint(self.root, chain(self.root.glob("scene*/pose/*.txt"), meshes))

    def _mesh_path(self, scene: str) -> Path:
        return self.root / scene / f"{scene}_vh_clean_2.ply"
