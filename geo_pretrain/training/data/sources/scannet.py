"""ScanNet's exported layout: scene*/{color/*.jpg, depth/*.png, pose/*.txt, intrinsic/intrinsic_depth.txt}.

The mesh scene*/<scene>_vh_clean_2.ply of the release, where it is there, is the surface of the scene, and
<scene>_vh_clean_2.0.010000.segs.json beside it has the segment of each of its vertices.
Color (1296x968) and depth (640x480) are aligned by the sensor's own calibration, so color is resized onto the
depth grid and the depth intrinsics of the scan hold for both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame, Surface, resize_image
from geo_pretrain.training.data.sources import scannet_files as scan_files
from geo_pretrain.training.data.surfaces.ply import triangle_rows

# Pri3D uses one matrix for every scan, at 320x240: focal length 288.9353025, principal point 159.5, 119.5. This one at
# 640x480 becomes that when `resize_frame` takes the second of every two pixels.
CONSTANT_640 = np.array([[577.870605, 0, 320.0], [0, 577.870605, 240.0], [0, 0, 1]])


@dataclass(frozen=True)
class ScanNetConfig:
    """Options of the source."""

    constant_intrinsics: bool = False  # Pri3D's one matrix for all scans instead of each scan's own
    labels: str | None = None  # folder of label images beside color, such as "label-filt": `Frame.semantic`
    instances: str | None = None  # such as "instance-filt": `Frame.instance`


class ScanNet:
    """Exported ScanNet scans as a source of frames."""

    name = "scannet"
    note = "depth intrinsics of each scan; color resized onto the depth grid (nearest)"

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
        return sorted((p.stem for p in (self.root / scene / "pose").glob("*.txt")), key=lambda s: (len(s), s))

    def load(self, scene: str, frame_id: str) -> Frame:
        folder = self.root / scene
        pose = files.read_pose(folder / "pose" / f"{frame_id}.txt")
        color_path = folder / "color" / f"{frame_id}.jpg"
        color = files.read_color(color_path if color_path.exists() else color_path.with_suffix(".png"))
        depth = files.read_depth(folder / "depth" / f"{frame_id}.png")
        semantic, instance = (
            None if name is None else _read_labels(folder / name / f"{frame_id}.png", depth.shape, kind)
            for name, kind in ((self.config.labels, np.int16), (self.config.instances, np.int32))
        )
        intrinsics = CONSTANT_640
        if not self.config.constant_intrinsics:
            intrinsics = files.read_intrinsics(folder / "intrinsic" / "intrinsic_depth.txt", 4)
        return Frame(scene, frame_id, resize_image(color, depth.shape), depth, intrinsics, pose, semantic, instance)

    def surface(self, scene: str) -> Surface:
        return Surface(*scan_files.colored_vertices(self._mesh_path(scene)))

    def triangles(self, scene: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._mesh_path(scene)
        vertex, face = scan_files.read_mesh(path, "vertex", "face")
        points = scan_files.positions(path, vertex)
        return points, triangle_rows(path, face, len(points))

    def vertices(self, scene: str) -> np.ndarray:
        path = self._mesh_path(scene)
        (vertex,) = scan_files.read_mesh(path, "vertex")
        return scan_files.positions(path, vertex)

    def segments(self, scene: str, vertices: int) -> np.ndarray | None:
        path = self._segments_path(scene)
        return scan_files.read_segments(path, vertices) if path.exists() else None

    def content(self) -> str:
        """A digest of the bytes of some frames' files, see `files.sampled_digest`; poses alone are listed."""
        poses = sorted(self.root.glob("scene*/pose/*.txt"))
        chosen = poses[:: max(1, -(-len(poses) // (files.SAMPLED // 3)))]
        folders = (("pose", ".txt"), ("color", ".jpg"), ("color", ".png"), ("depth", ".png"))
        of_frames = (pose.parents[1] / kind / f"{pose.stem}{ending}" for pose in chosen for kind, ending in folders)
        return files.sampled_digest(self.root, of_frames)

    def fingerprint(self) -> str:
        """A digest of the options and of names, sizes and times of poses, intrinsics, meshes and segments.

        Each frame has a pose; looking at all images too would take long on a disk of the network.
        """
        patterns = "scene*/pose/*.txt", "scene*/intrinsic/intrinsic_depth.txt"
        of_scenes = (kind(scene) for scene in self._scenes for kind in (self._mesh_path, self._segments_path))
        found = chain(*map(self.root.glob, patterns), (path for path in of_scenes if path.is_file()))
        options = json.dumps(asdict(self.config), sort_keys=True)
        return hashlib.sha256(f"{files.files_fingerprint(self.root, found)}\0{options}".encode()).hexdigest()

    def _mesh_path(self, scene: str) -> Path:
        return scan_files.mesh_path(self.root / scene)

    def _segments_path(self, scene: str) -> Path:
        return scan_files.segments_path(self.root / scene)


def _read_labels(path: Path, shape: tuple[int, ...], kind: type[np.signedinteger[Any]]) -> np.ndarray:
    """Read label ids and resize them to the depth grid [H, W]; label images may have either camera's size."""
    ids = files.read_ids(path, bits=(8, 16))
    if ids.max() > np.iinfo(kind).max:
        raise BadFrame(path, f"label {ids.max()} is above {np.iinfo(kind).max}; is this an image of instances?")
    return resize_image(ids, shape).astype(kind)
